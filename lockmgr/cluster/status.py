"""What a node knows of its cluster, for people and for programs.

Observations only: nothing here decides anything. Times are seconds ago, or seconds left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.effects import Stop
from lockmgr.cluster.pulse import PulseStatistics
from lockmgr.cluster.rpc import PeerStatistics
from lockmgr.cluster.view import NOBODY, NodeId, SlotState, View

_WORDS = {
    SlotState.FREE: "free",
    SlotState.JOINING: "joining",
    SlotState.ACTIVE: "active",
    SlotState.NEEDS_REPLAY: "needs replay",
}


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One slot that is not free."""

    node: NodeId
    name: str
    state: str
    """joining, active, needs replay."""
    is_this_node: bool
    is_coordinator: bool
    addresses: tuple[str, ...]
    replayed_by: int | None
    """The slot of who replays its journal."""
    has_path: bool | None
    """Whether it says that it has a path to the storage of its own; None: not heard yet."""
    leaving: bool
    heard_s: float | None
    """Since its last heartbeat over the network."""
    block_changed_s: float | None
    """Since its heartbeat block was seen to change."""
    hears: tuple[int, ...]
    """The slots that it says it hears, itself included or not."""
    connection: PeerStatistics | None


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """As this node sees it."""

    me: NodeId | None
    """None: it is not listed yet."""
    stopped: Stop | None
    epoch: int
    lock_epoch: int
    coordinator: NodeId | None
    is_coordinator: bool
    lease_left_s: float | None
    """None: there was none yet."""
    has_path: bool
    """This node's own path is open, and a view was read on it under a reservation."""
    unproven_keys: tuple[int, ...]
    """Of lost paths of this node that are not known to be fenced yet."""
    nodes: tuple[NodeStatus, ...]
    pulse: PulseStatistics
    beats_heard: int
    beats_bad: int

    def node_named(self, name: str) -> NodeId | None:
        """The listed node with that name."""
        for one in self.nodes:
            if one.name == name and one.state in ("joining", "active"):
                return one.node
        return None


class Hearing:
    """The last heartbeat of each node, and when it came."""

    def __init__(self) -> None:
        self._beats: dict[NodeId, tuple[Heartbeat, float]] = {}
        self._blocks: dict[NodeId, tuple[Heartbeat, float | None]] = {}

    def heard(self, beat: Heartbeat, now: float) -> None:
        """A datagram, or this node's own."""
        self._beats[beat.node] = (beat, now)

    def read(self, blocks: Iterable[Heartbeat], now: float) -> None:
        """All heartbeat blocks, as just read."""
        for beat in blocks:
            before = self._blocks.get(beat.node)
            if before is None:
                self._blocks[beat.node] = (beat, None)
            elif before[0].sequence != beat.sequence:
                self._blocks[beat.node] = (beat, now)

    def forget_others(self, view: View) -> None:
        """Whoever is not in the view."""
        listed = frozenset(view.listed)
        self._beats = {node: seen for node, seen in self._beats.items() if node in listed}
        self._blocks = {node: seen for node, seen in self._blocks.items() if node in listed}

    def last(self, node: NodeId) -> Heartbeat | None:
        """The latest heartbeat, whichever way it came."""
        found = [seen[node][0] for seen in (self._beats, self._blocks) if node in seen]
        return max(found, key=lambda beat: beat.sequence, default=None)

    def ages(self, node: NodeId, now: float) -> tuple[float | None, float | None]:
        """How long ago it was heard, and its block seen to change."""
        heard = self._beats.get(node)
        changed = self._blocks.get(node, (None, None))[1]
        return (
            None if heard is None else now - heard[1],
            None if changed is None else now - changed,
        )


def nodes_in(
    view: View | None,
    me: NodeId | None,
    coordinator: NodeId | None,
    hearing: Hearing,
    connections: Iterable[PeerStatistics],
    now: float,
) -> tuple[NodeStatus, ...]:
    """Every slot of the view that is not free."""
    by_peer = {one.peer: one for one in connections}
    found = []
    for number in view.members if view is not None else ():
        assert view is not None
        slot = view.slots[number]
        node = NodeId(number, slot.incarnation)
        beat = hearing.last(node)
        flags = HeartbeatFlag.NONE if beat is None else beat.flags
        heard_s, changed_s = hearing.ages(node, now)
        bits = 0 if beat is None else beat.hears
        found.append(
            NodeStatus(
                node,
                slot.node_name,
                _WORDS[slot.state],
                is_this_node=node == me,
                is_coordinator=node == coordinator,
                addresses=slot.addresses,
                replayed_by=None if slot.replay_by == NOBODY else slot.replay_by,
                has_path=None if beat is None else HeartbeatFlag.HAS_DIRECT_PATH in flags,
                leaving=HeartbeatFlag.LEAVING in flags,
                heard_s=heard_s,
                block_changed_s=changed_s,
                hears=tuple(n for n in range(len(view.slots)) if bits >> n & 1),
                connection=by_peer.get(node),
            )
        )
    return tuple(found)
