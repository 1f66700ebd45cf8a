"""A node's whole lock manager: its own locks, and the resources it masters, in one pure core.

Messages between the two halves of one node are delivered within the step that sends them, in
order; messages for other nodes leave as `Send`. With one member every resource is mastered here,
and no step ever leaves anything on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lockmgr.events import Deliver, Effect, EpochRefused, Event, Send
from lockmgr.mastering import Choose, Mastering, rendezvous
from lockmgr.messages import (
    AnyMessage,
    AskGlimpse,
    Cancel,
    Lower,
    NodeBound,
    Request,
)
from lockmgr.node import NodeLocks
from lockmgr.resource import Master
from lockmgr.settings import Settings
from lockmgr.snapshot import Statistics


class LockCore:
    """The lock manager of node ``node`` in the view of lock epoch ``epoch``.

    ``members`` of that view; None: this node alone; empty: none yet, so that everything waits for
    the first `ViewChanged`. ``choose`` picks the member that masters a placement.
    """

    def __init__(
        self,
        node: int = 0,
        epoch: int = 1,
        settings: Settings | None = None,
        members: Sequence[int] | None = None,
        choose: Choose = rendezvous,
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.mastering = Mastering((node,) if members is None else members, choose)
        self.locks = NodeLocks(node, epoch, self.mastering.master_of, settings or Settings())
        self.master = Master(epoch)

    def step(self, event: Event, now: float) -> list[Effect]:
        """Carry out one event at ``now`` (seconds, any monotonic clock) and all it causes here.

        Raises `lockmgr.errors.ProtocolViolation` for what no correct caller or peer does.
        """
        if isinstance(event, Deliver):
            effects = self._deliver(event.message, now)
        else:
            effects = self.locks.step(event, now)
        if not any(type(effect) is Send and effect.to == self.node for effect in effects):
            return effects
        out: list[Effect] = []
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if type(effect) is Send and effect.to == self.node:
                pending.extend(self._deliver(effect.message, now))
            else:
                out.append(effect)
        return out

    def _deliver(self, message: AnyMessage, now: float) -> list[Effect]:
        if message.epoch != self.epoch:
            return [EpochRefused(message)]
        if isinstance(message, Request | Cancel | Lower | AskGlimpse):
            answers: list[NodeBound] = self.master.step(message)
            return [Send(answer.node, answer) for answer in answers]
        if not isinstance(message, NodeBound):
            raise NotImplementedError(message)
        return self.locks.receive(message, now)

    def next_timer(self) -> float | None:
        """When the next `TimerDue` is due; None: not before another event."""
        return self.locks.next_timer()

    def statistics(self) -> Statistics:
        """Counters and gauges."""
        counters = self.locks.counters
        return Statistics(
            cached_grants=counters.cached_grants,
            master_grants=counters.master_grants,
            blocking_notifications=counters.blocking_notifications,
            demotions=counters.demotions,
            demote_passes=counters.demote_passes,
            shed=counters.shed,
            glimpses=counters.glimpses,
            timeouts=counters.timeouts,
            locks=len(self.locks.locks),
            idle=len(self.locks.idle),
            mastered=len(self.master.resources),
        )

    def check(self) -> None:
        """Assert the invariants of both halves."""
        self.locks.check()
        self.master.check()
