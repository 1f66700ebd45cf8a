"""What nodes and newcomers say of themselves on the LUN, and in datagrams."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from lockmgr.cluster.view import NodeId


class HeartbeatFlag(IntFlag):
    NONE = 0
    LEAVING = 1
    HAS_DIRECT_PATH = 2


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life: on the LUN and, the same, as a datagram."""

    slot: int
    incarnation: int
    sequence: int
    epoch: int
    """Of the view that its node has installed."""
    hears: int
    """Bit map of the slots whose datagrams it hears."""
    flags: HeartbeatFlag = HeartbeatFlag.NONE

    @property
    def node(self) -> NodeId:
        return NodeId(self.slot, self.incarnation)


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The join block of slot ``slot``: a newcomer asks to be taken into that slot."""

    slot: int
    key: int
    """The newcomer's temporary key."""
    sequence: int
    """Grows as long as the newcomer lives."""
    node_name: str
    machine_id: bytes
    boot_id: bytes
    fingerprint: bytes
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is. The shell holds the daemon's lock file of this volume: whatever the view
    lists under the same node name and machine id is an earlier, dead incarnation of this host.
    """

    node_name: str
    machine_id: bytes
    boot_id: bytes
    fingerprint: bytes
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""
    wall_offset_ns: int = 0
    """CLOCK_REALTIME - CLOCK_BOOTTIME at start; for people only."""
