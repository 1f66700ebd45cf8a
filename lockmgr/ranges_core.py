"""Byte-range locks of a whole node: its own, and the files it masters, in one pure core.

As `lockmgr.core` does for the six modes: what one half says to the other is delivered within the
step, in order; what is for other nodes leaves as `RangeSend`. ``members`` and ``coordinator`` are
for the detection of deadlocks that go through several masters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lockmgr.messages import Resource
from lockmgr.ranges_client import RangeClient
from lockmgr.ranges_deadlock import RangeDetector
from lockmgr.ranges_events import RangeEffect, RangeEpochRefused, RangeEvent, RangeSend
from lockmgr.ranges_master import RANGES_PER_OWNER, RangeMaster
from lockmgr.ranges_messages import (
    AskRangeWaits,
    RangeDeadlocks,
    RangeMessage,
    RangeNodeBound,
    RangeSuspicion,
    RangeVerdict,
)


class RangeCore:
    """The byte-range locks of node ``node`` in the view of epoch ``epoch``."""

    def __init__(
        self,
        node: int,
        epoch: int,
        master_of: Callable[[Resource], int],
        *,
        members: Sequence[int] | None = None,
        coordinator: int | None = None,
        may_grant: Callable[[Resource], bool] = lambda _resource: True,
        ranges_per_owner: int = RANGES_PER_OWNER,
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.coordinator = node if coordinator is None else coordinator
        self.detector = RangeDetector(epoch, (node,) if members is None else members)
        self.client = RangeClient(node, epoch, master_of)
        self.master = RangeMaster(epoch, may_grant=may_grant, ranges_per_owner=ranges_per_owner)

    def step(self, event: RangeEvent, now: float) -> list[RangeEffect]:
        """Carry out what a process of this node wants, and all that this causes here."""
        return self._settle(self.client.step(event, now), now)

    def deliver(self, message: RangeMessage, now: float) -> list[RangeEffect]:
        """Carry out a message from another node. Raises `ProtocolViolation`."""
        return self._settle(self._receive(message, now), now)

    def new_epoch(
        self,
        epoch: int,
        master_of: Callable[[Resource], int],
        now: float,
        *,
        members: Sequence[int],
        coordinator: int,
    ) -> list[RangeEffect]:
        """A new view: freeze, and re-assert. Followed by `thaw` when every node has done so."""
        self.epoch = epoch
        self.coordinator = coordinator
        self.detector = RangeDetector(epoch, members)
        self.master.freeze(epoch)
        return self._settle(self.client.new_epoch(epoch, master_of, now), now)

    def thaw(self, now: float) -> list[RangeEffect]:
        """All re-assertions of this epoch have arrived everywhere: grant again."""
        return self._settle(_to_nodes(self.master.thaw(now)), now)

    def reopened(self, now: float) -> list[RangeEffect]:
        """``may_grant`` has changed its mind for some files."""
        return self._settle(_to_nodes(self.master.reopened(now)), now)

    # -- deadlocks through several masters -------------------------------------------------
    def new_coordinator(self, coordinator: int, members: Sequence[int], now: float) -> None:
        """Another coordinator in the same epoch; a search for deadlocks begins anew, and whoever
        has told the one before of a doubt doubts anew."""
        self.master.doubt_anew(now)
        self.coordinator = coordinator
        self.detector = RangeDetector(self.epoch, members)

    def next_timer(self) -> float | None:
        """When `timer_due` is to be called; None: no time matters."""
        return self.master.next_timer()

    def timer_due(self, now: float) -> list[RangeEffect]:
        """The time that `next_timer` named has come."""
        if not self.master.take_doubts(now):
            return []
        suspicion = RangeSuspicion(self.epoch, self.node)
        return self._settle([RangeSend(self.coordinator, suspicion)], now)

    def _deadlocks(self, message: RangeDeadlocks, now: float) -> list[RangeEffect]:
        if isinstance(message, RangeVerdict):
            return _to_nodes(self.master.judge(message, now))
        if isinstance(message, AskRangeWaits):
            answers = self.master.waits(message, self.node, now)
            return [RangeSend(self.coordinator, answer) for answer in answers]
        if self.coordinator != self.node:
            return []  # it was, a moment ago; whoever suspects will do so again
        if isinstance(message, RangeSuspicion):
            return _to_nodes(self.detector.suspect(now))
        return _to_nodes(self.detector.receive(message, now))

    def _settle(self, effects: list[RangeEffect], now: float) -> list[RangeEffect]:
        out: list[RangeEffect] = []
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if isinstance(effect, RangeSend) and effect.to == self.node:
                pending.extend(self._receive(effect.message, now))
            else:
                out.append(effect)
        return out

    def _receive(self, message: RangeMessage, now: float) -> list[RangeEffect]:
        if message.epoch != self.epoch:
            return [RangeEpochRefused(message)]
        if isinstance(message, RangeNodeBound):
            return self.client.receive(message, now)
        if isinstance(message, RangeDeadlocks):
            return self._deadlocks(message, now)
        return _to_nodes(self.master.step(message, now))

    def check(self) -> None:
        """Assert the invariants of both halves."""
        self.client.check()
        self.detector.check()
        self.master.check()


def _to_nodes(
    answers: Sequence[RangeNodeBound | AskRangeWaits | RangeVerdict],
) -> list[RangeEffect]:
    return [RangeSend(answer.node, answer) for answer in answers]
