"""Leases: how long this node may use what it cached, and when those of the departed are over.

Theory. A lease runs ``lease_s`` from the *sending* of a renewal that was confirmed later: of an own
write of the heartbeat block, or of a question that the coordinator answered. A coordinator answers
only within ``answer_within_s`` of the *sending* of a write of its own that was confirmed on the
reserving session: measured from sending, because the confirmation may be read long after the
coordinator was deposed and fenced, and the write was sent before.

So the last renewal of a departed node was sent no later than

- the last change of its heartbeat block, read again after its fence; or
- the last answer that this coordinator gave it; or
- the last answer of any coordinator before: ``answer_within_s`` after the last change of that
  one's own heartbeat block, or after its fence, whichever is earlier.

``lease_over_bound_s`` after the latest of these the lease is over on every clock.

invariants:
- what is told upwards never goes back;
- nothing is cleared that is not known to be fenced.
"""

from __future__ import annotations

from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId


class Lease:
    """This node's own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.until = float("-inf")

    def renewed(self, sent_at: float) -> float | None:
        """A renewal sent then is confirmed: the new end, or None if it is not later."""
        until = sent_at + self._settings.lease_s
        if until <= self.until:
            return None
        self.until = until
        return until


class LeasesGiven:
    """What a coordinator answers, and what it must assume that others have answered."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._confirmed_sent = float("-inf")
        self._given: dict[NodeId, float] = {}
        self._by_others = float("-inf")

    def wrote(self, sent_at: float) -> None:
        """An own heartbeat sent then is on the LUN, written on the reserving session."""
        self._confirmed_sent = max(self._confirmed_sent, sent_at)

    def lost_office(self) -> None:
        """The reserving session is gone: what was confirmed on it counts no more."""
        self._confirmed_sent = float("-inf")

    def may_answer(self, now: float) -> bool:
        return now - self._confirmed_sent <= self._settings.answer_within_s

    def answered(self, node: NodeId, now: float) -> None:
        self._given[node] = now

    def other_held(self, last_change: float, fenced_at: float) -> None:
        """Somebody else held until it was fenced; its block changed no later than that."""
        last_answer = min(last_change, fenced_at) + self._settings.answer_within_s
        self._by_others = max(self._by_others, last_answer)

    def over_at(self, node: NodeId, block_changed_at: float) -> float:
        """When the lease of a fenced node is over, on this clock."""
        last = max(block_changed_at, self._given.get(node, float("-inf")), self._by_others)
        return last + self._settings.lease_over_bound_s
