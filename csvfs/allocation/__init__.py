"""Allocation groups: where free units and blocks are, and which to take."""
