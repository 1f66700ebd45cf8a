"""Membership, wire format and RPC: what every layer above talks over."""
