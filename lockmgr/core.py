"""A node's whole lock manager: its own locks, and the resources it masters, in one pure core.

Messages between the two halves of one node are delivered within the step that sends them, in
order; messages for other nodes leave as `Send`. With one member every resource is mastered here,
and no step ever leaves anything on its way.

Epochs: a message of an earlier one changes nothing (`EpochRefused`); one of a later one is kept
until the view of that epoch is there. While a recovery is under way, what nodes ask this master is
kept too (`lockmgr.recovery`).

Byte ranges (`lockmgr.ranges_core`) go by the same views. What this node re-asserts of them it sends
before its last `Reassert`, so whoever has heard that of all members knows all ranges too, and one
barrier thaws both. Files that a departed node may have had ranges of stay closed until it may be
granted over (`lockmgr.ranges_debts`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from lockmgr.carried import Carried
from lockmgr.claim import ClaimState
from lockmgr.deadlock import Search
from lockmgr.events import (
    Acquire,
    Cleared,
    Convert,
    Deliver,
    Effect,
    EpochRefused,
    Event,
    Gathered,
    GatherLocks,
    JournalsReplayed,
    Send,
    Stalled,
    StopGathering,
    Thawed,
    TimerDue,
    ViewChanged,
)
from lockmgr.gather import Gathering, Teller
from lockmgr.glimpses import bundle, unbundle
from lockmgr.mastering import Choose, Mastering, rendezvous
from lockmgr.messages import (
    Blocking,
    Deadlocks,
    Glimpses,
    MasterBound,
    NodeBound,
    Recovering,
    Waits,
    Working,
)
from lockmgr.node import NodeLocks
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_debts import RangeDebts
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeEffect,
    RangeEpochRefused,
    RangeSend,
    SetRange,
)
from lockmgr.recovery import Recovery, Stage
from lockmgr.resource import Master
from lockmgr.settings import Settings
from lockmgr.snapshot import Statistics
from lockmgr.snapshot_messages import AskLocks, LocksPart
from lockmgr.unanswered import Unanswered

_NOBODY: frozenset[int] = frozenset()


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
        listed = (node,) if members is None else tuple(members)
        nowhere = Mastering(listed, choose).master_of
        settings = settings or Settings()
        self.locks = NodeLocks(node, epoch, nowhere, settings)
        self.recovery = Recovery(node, epoch, listed, choose, self.locks)
        self.search = Search(node, self.locks, self.recovery)
        self.unanswered = Unanswered(node, settings.evict_after_s, nowhere)
        self.range_debts = RangeDebts(node, self.recovery.debts, choose)
        self.ranges = RangeCore(
            node,
            epoch,
            nowhere,
            members=listed,
            coordinator=self.recovery.coordinator,
            may_grant=self.range_debts.may_grant,
        )
        self.gathered: dict[int, Gathering] = {}
        """What members have told of their locks, for people, by the ticket of `GatherLocks`."""
        self._teller = Teller(node, self.locks, self.recovery, self.ranges, self._waits)
        self._early: list[Carried] = []

    @property
    def epoch(self) -> int:
        """The lock epoch that this node goes by."""
        return self.recovery.epoch

    @property
    def members(self) -> tuple[int, ...]:
        """Who is in the view of that epoch."""
        return self.recovery.members

    @property
    def owing(self) -> frozenset[int]:
        """Departed nodes whose journal is not replayed, or that may not be granted over yet."""
        return self.recovery.debts.owing

    @property
    def master(self) -> Master:
        """The resources that this node masters."""
        return self.recovery.master

    def step(self, event: Event, now: float) -> list[Effect]:
        """Carry out one event at ``now`` (seconds, any monotonic clock) and all it causes here.

        Raises `lockmgr.errors.ProtocolViolation` for what no correct caller or peer does.
        """
        match event:
            case Deliver(message):
                effects = self._deliver(message, now)
            case ViewChanged():
                effects = self._view_changed(event, now)
            case Cleared(nodes):
                effects = self.recovery.told(nodes, _NOBODY)
                effects += self._ranges_reopened(now)
            case JournalsReplayed(nodes):
                effects = self.recovery.told(_NOBODY, nodes)
            case TimerDue():
                effects = self.locks.step(event, now) + self.search.time_passed(now)
                effects += _as_ours(self.ranges.timer_due(now))
                effects += self.unanswered.time_passed(
                    now, self.epoch, self.locks.locks, self.master.resources
                )
            case Stalled(stalled):
                self.unanswered.stalled(stalled, now)
                effects = []
            case Acquire(claim) | Convert(claim):
                effects = self.locks.step(event, now)
                if claim.state is ClaimState.WAITING or claim.state is ClaimState.CONVERTING:
                    self.search.watch(claim, now)
            case GatherLocks(ticket, cached):
                gathering = self.gathered[ticket] = Gathering(self.node, ticket, cached)
                effects = self._ask(gathering)
            case StopGathering(ticket):
                self.gathered.pop(ticket, None)
                effects = []
            case SetRange() | FindConflict() | ForgetFile() | OwnerDied() | CancelRange():
                effects = _as_ours(self.ranges.step(event, now))
            case _:
                effects = self.locks.step(event, now)
        if not any(type(effect) is Send for effect in effects):
            return effects
        return self._delivered_here(effects, now)

    def _delivered_here(self, effects: list[Effect], now: float) -> list[Effect]:
        """Carry out what this node says to itself; drop what is for nobody."""
        out: list[Effect] = []
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if type(effect) is not Send:
                out.append(effect)
                continue
            if self.recovery.stage is Stage.NO_VIEW or effect.to not in self.members:
                continue  # the next view re-asserts it, or its addressee has departed
            if type(effect.message) is Blocking:
                self.unanswered.told(effect.to, effect.message.resource, now)
            if effect.to == self.node:
                pending.extend(self._deliver(effect.message, now))
            else:
                out.append(effect)
        return bundle(out, self.node) if len(out) > 1 else out

    def _view_changed(self, view: ViewChanged, now: float) -> list[Effect]:
        before, coordinator_before = self.epoch, self.recovery.coordinator
        if view.epoch > before:
            self.range_debts.freeze(self.ranges.master.files.values())
        effects = self.recovery.view_changed(view, now)
        coordinator = self.recovery.coordinator
        if self.epoch == before:
            if coordinator != self.ranges.coordinator:
                self.ranges.new_coordinator(coordinator, self.members, now)
            if coordinator != coordinator_before:
                self.search.view_changed(now)
            return effects + self._ranges_reopened(now)
        ranges = self.ranges.new_epoch(
            self.epoch,
            self.recovery.mastering.master_of,
            now,
            members=self.members,
            coordinator=coordinator,
        )
        effects = _as_ours(ranges) + effects
        self.search.view_changed(now)
        self.unanswered.view_changed(self.recovery.mastering.master_of)
        for gathering in self.gathered.values():
            effects += self._ask(gathering)
        early, self._early = self._early, []
        for message in early:
            effects += self._deliver(message, now)
        return effects

    def _recovering(self, message: Recovering, now: float) -> list[Effect]:
        effects = self.recovery.receive(message)
        if any(type(effect) is Thawed for effect in effects):
            self.range_debts.thaw(self.recovery.granted_in)
            return effects + _as_ours(self.ranges.thaw(now))
        return effects + self._ranges_reopened(now)

    def _ranges_reopened(self, now: float) -> list[Effect]:
        self.range_debts.settle()
        return [] if self.recovery.frozen else _as_ours(self.ranges.reopened(now))

    def _deliver(self, message: Carried, now: float) -> list[Effect]:
        if message.epoch != self.epoch:
            if message.epoch < self.epoch:
                return [EpochRefused(message)]
            self._early.append(message)
            return []
        if isinstance(message, MasterBound):
            if self.recovery.frozen:
                self.recovery.keep(message)
                return []
            return [Send(answer.node, answer) for answer in self.master.step(message)]
        if isinstance(message, NodeBound):
            if type(message) is Blocking:
                self.unanswered.wanted(message.resource, now)
            return self.locks.receive(message, now)
        if isinstance(message, Recovering):
            return self._recovering(message, now)
        if isinstance(message, Deadlocks):
            return self.search.receive(message, now)
        if isinstance(message, AskLocks):
            return [Send(message.node, self._teller.answer(message, now))]
        if isinstance(message, LocksPart):
            return self._told(message)
        if isinstance(message, Glimpses):
            return [e for each in unbundle(message, self.node) for e in self._deliver(each, now)]
        if isinstance(message, Working):
            self.unanswered.heard(message.node, message.resource, now)
            return []
        return _as_ours(self.ranges.deliver(message, now))

    # -- for people ------------------------------------------------------------------------
    def _waits(self, now: float) -> Waits:
        return self.search.waits(0, now)

    def _ask(self, gathering: Gathering) -> list[Effect]:
        return [Send(to, asked) for to, asked in gathering.begin(self.epoch, self.members)]

    def _told(self, part: LocksPart) -> list[Effect]:
        gathering = self.gathered.get(part.round)
        if gathering is None:
            return []
        more = gathering.receive(part)
        if more is not None:
            return [Send(part.node, more)]
        return [] if gathering.missing else [Gathered(gathering.number)]

    def next_timer(self) -> float | None:
        """When the next `TimerDue` is due; None: not before another event."""
        timers = [
            self.locks.next_timer(),
            self.search.next_timer(),
            self.ranges.next_timer(),
            self.unanswered.next_timer(),
        ]
        return min((when for when in timers if when is not None), default=None)

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
            deadlocks=counters.deadlocks,
            locks=len(self.locks.locks),
            idle=len(self.locks.idle),
            mastered=len(self.master.resources),
        )

    def check(self) -> None:
        """Assert the invariants of both halves, and of the recovery between views."""
        self.locks.check()
        if not self.recovery.frozen:
            self.master.check()
        self.recovery.check()
        self.ranges.check()
        self.unanswered.check()
        self.range_debts.check(self.recovery.frozen)
        for gathering in self.gathered.values():
            gathering.check()


def _as_ours(effects: Iterable[RangeEffect]) -> list[Effect]:
    ours: list[Effect] = []
    for effect in effects:
        match effect:
            case RangeSend(to, message):
                ours.append(Send(to, message))
            case RangeEpochRefused(message):
                ours.append(EpochRefused(message))
            case _:
                ours.append(effect)
    return ours
