"""What becomes possible for one lock after anything has changed: grant, give up, ask, forget.

`Progress._advance` is the whole of it: it is called after each event that touched a lock, does
everything that can be done now, and leaves the lock in a state where nothing more can be.
`lockmgr.claim` has the theory; `lockmgr.node` brings the events.

- A claim goes in first come, first served; conversions first. The head of the queue makes the
  node ask the master for what all claims and it need together, once it fits beside them.
- After a grant the node keeps a lock for ``min_hold_s`` whatever others want.
- What the node holds and what it needs may not be comparable (PR is cached, CW is wanted). It
  then lowers itself to what both cover before it asks, so that it never holds more than it needs.
"""

from __future__ import annotations

from collections.abc import Callable

from lockmgr.claim import Claim, ClaimState, NodeLock, Obstacle, Phase
from lockmgr.events import Demote, Deny, Drained, Effect, Grant, Send
from lockmgr.messages import (
    NEVER_WRITTEN,
    AskGlimpse,
    Cancel,
    Lower,
    Request,
    Resource,
    ValueBlock,
)
from lockmgr.modes import COMPATIBLE, COVERS, WRITES_VALUE, Mode, meet, yielded
from lockmgr.settings import Counters, Settings
from lockmgr.timers import Timers


class Progress:
    """The state of all locks of a node, and how one of them goes on."""

    def __init__(
        self, node: int, epoch: int, master_of: Callable[[Resource], int], settings: Settings
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.settings = settings
        self.counters = Counters()
        self.locks: dict[bytes, NodeLock] = {}
        self.idle: dict[NodeLock, None] = {}
        self._idle_limit = settings.cache_limit
        self._master_of = master_of
        self.frozen = False
        """No master answers: a recovery is under way."""
        self._glimpses: dict[int, Resource] = {}
        """Glimpses without an answer, by ticket."""
        self._serial = 0
        self._shedding = 0
        self._closing = False
        self._timers: Timers[Claim | NodeLock] = Timers(self._still_due)
        self._out: list[Effect] = []
        self._now = 0.0

    def _advance(self, lock: NodeLock) -> None:
        """Do all that has become possible: grant, give up, ask; then note what the lock is now."""
        while True:
            while (claim := lock.next_claim()) is not None:
                self._grant(lock, claim)
            if not self._phase_changed(lock):
                break
        self._ask(lock)
        self._settle(lock)

    def _grant(self, lock: NodeLock, claim: Claim) -> None:
        if claim.state is ClaimState.CONVERTING:
            lock.converting.remove(claim)
            lock.change(claim, claim.wanted_mode)
        else:
            lock.waiting.remove(claim)
            lock.add(claim)
        if lock.asked_for is not claim:
            self.counters.cached_grants += 1
        claim.deadline = None
        claim.since = self._now
        if lock.phase is not Phase.HELD and not COVERS[lock.target][claim.mode]:
            lock.served = True
        self._out.append(Grant(claim))

    def _goal(self, lock: NodeLock) -> Mode | None:
        """The mode that the lock is to be lowered to now; None: no reason to."""
        held = lock.held
        if held is None:
            return None
        head = self._head(lock)
        if lock.phase is not Phase.HELD and head is not None and self._aside(lock, head):
            return meet(held, lock.need(head))
        if lock.shed:
            return Mode.NL
        if not COMPATIBLE[held][lock.wanted]:
            hold_ends = lock.granted_at + self.settings.min_hold_s
            if self._now >= hold_ends or self._closing:
                return yielded(held, lock.wanted)
            if lock.timer_at != hold_ends:
                lock.timer_at = hold_ends
                self._timers.set(hold_ends, lock)
        if lock.phase is Phase.HELD:
            aside = head is not None and lock.asked is None and self._aside(lock, head)
            return meet(held, lock.need(head)) if head is not None and aside else None
        # Whoever overtook that claim while the gate was open is about to leave.
        first = lock.lowers_for
        if first is None or first.state not in (ClaimState.WAITING, ClaimState.CONVERTING):
            return None
        common = meet(held, first.wanted_mode)
        return None if common in (held, first.wanted_mode) else common

    def _aside(self, lock: NodeLock, claim: Claim) -> bool:
        """Would asking for this claim give up something that the node holds?"""
        return lock.held is not None and not COVERS[lock.need(claim)][lock.held]

    def _phase_changed(self, lock: NodeLock) -> bool:
        """Begin or continue to give up. True: the gate has changed, look at the queues again."""
        if lock.phase is Phase.HELD:
            goal = self._goal(lock)
            if goal is None or lock.held is Mode.NL:
                return False
            lock.lowers_for = self._head(lock)
            self._begin_pass(lock, Phase.FIRST, goal)
            return True
        if lock.phase is Phase.DRAINING:
            goal = self._goal(lock)
            if goal is None:
                lock.phase = Phase.HELD
                return True
            moved = goal is not lock.target
            lock.target = goal
            if lock.above_target():
                return moved  # the gate may let others through than it did
            self._begin_pass(lock, Phase.LAST, goal)
            return True
        if lock.drain and not lock.drained:
            head = self._head(lock)
            empty = not lock.above_target()
            if empty:
                lock.served = False
            elif head is None or not self._aside(lock, head):
                return False
            # Otherwise the claim that the drain waits for needs another demotion before it can go
            # on. This pass ends as one in which the lock was used.
            lock.drained = True
            self._out.append(Drained(lock.resource, empty))
        return False

    def _begin_pass(self, lock: NodeLock, phase: Phase, target: Mode) -> None:
        lock.phase = phase
        lock.target = target
        lock.drain = lock.drained = lock.regranted = False
        lock.served = lock.above_target()
        self.counters.demote_passes += 1
        self._out.append(Demote(lock.resource, target))

    def _give_up(self, lock: NodeLock) -> None:
        """Lower to ``target``: from here on other nodes may have what it does not cover."""
        self._end_passes(lock)
        self.counters.demotions += 1
        keeps = lock.target is not Mode.NL or bool(lock.claims) or lock.asked is not None
        self._lower(lock, lock.target if keeps else None)

    def _end_passes(self, lock: NodeLock) -> None:
        lock.phase = Phase.HELD
        lock.drain = lock.served = lock.regranted = False
        self._no_longer_shed(lock)

    def _lower(self, lock: NodeLock, mode: Mode | None) -> None:
        assert lock.held is not None
        value: ValueBlock | None = None
        if lock.value_changed and (mode is None or not WRITES_VALUE[mode]):
            value = lock.value
            lock.value_changed = False
        self._send(Lower(lock.resource, self.epoch, self.node, lock.grant, mode, value))
        lock.held = mode
        if mode is None:
            lock.value = NEVER_WRITTEN
        if mode is None or COMPATIBLE[mode][lock.wanted]:
            lock.wanted = Mode.NL

    def _no_longer_shed(self, lock: NodeLock) -> None:
        if lock.shed:
            lock.shed = False
            self._shedding -= 1

    # -- towards the master ----------------------------------------------------------------
    def _head(self, lock: NodeLock) -> Claim | None:
        """The queued claim whose turn it is and that lacks nothing but the master's grant.

        During a demotion only claims that it waits for may ask; the others' turn comes after it.
        """
        for claim in lock.converting:
            if lock.phase is not Phase.HELD and COVERS[lock.target][claim.mode]:
                continue
            waits_for_master = lock.obstacle(claim) is Obstacle.MASTER
            if waits_for_master and lock.fits_here(claim) and lock.has_turn(claim):
                return claim
        if lock.converting or lock.phase is not Phase.HELD or not lock.waiting:
            return None
        claim = lock.waiting[0]
        waits_for_master = lock.obstacle(claim) is Obstacle.MASTER
        return claim if waits_for_master and lock.fits_here(claim) else None

    def _ask(self, lock: NodeLock) -> None:
        if lock.asked is not None:
            self._reconsider(lock)
            return
        claim = self._head(lock)
        if claim is None or self._aside(lock, claim):
            lock.asked_for = None
            return
        self._serial += 1
        lock.serial = self._serial
        lock.asked = lock.need(claim)
        lock.asked_for = claim
        lock.asked_at = self._now
        self._send(
            Request(lock.resource, self.epoch, self.node, lock.serial, lock.asked, claim.queue)
        )

    def _reconsider(self, lock: NodeLock) -> None:
        """Cancel a request that is no longer what somebody waits for."""
        claim = lock.asked_for
        if claim is None or claim.state not in (ClaimState.WAITING, ClaimState.CONVERTING):
            claim = lock.asked_for = next(lock.queued, None)
        if lock.cancelled or (claim is not None and lock.need(claim) == lock.asked):
            return
        lock.cancelled = True
        self._send(Cancel(lock.resource, self.epoch, self.node, lock.serial))

    def _send(self, message: Request | Cancel | Lower | AskGlimpse) -> None:
        self._out.append(Send(self._master_of(message.resource), message))

    # -- the cache -------------------------------------------------------------------------
    def _settle(self, lock: NodeLock) -> None:
        lock.calm = lock.phase is Phase.HELD and not lock.converting and not lock.waiting
        unused = lock.calm and not lock.claims and lock.asked is None
        if unused and lock.held in (None, Mode.NL):
            if lock.held is not None:
                self._no_longer_shed(lock)
                self._lower(lock, None)
            lock.timer_at = None
            del self.locks[lock.resource.name]
            self.idle.pop(lock, None)
        elif unused:
            self.idle[lock] = None
        else:
            self.idle.pop(lock, None)

    def _still_due(self, when: float, key: Claim | NodeLock) -> bool:
        return when == (key.timer_at if isinstance(key, NodeLock) else key.deadline)

    def _unqueue(self, lock: NodeLock, claim: Claim) -> None:
        claim.deadline = None
        claim.wanted_mode = claim.mode
        if claim.state is ClaimState.CONVERTING:
            lock.converting.remove(claim)
            claim.state = ClaimState.HELD
        else:
            lock.waiting.remove(claim)
            claim.state = ClaimState.NEW

    def _deny(self, lock: NodeLock, claim: Claim, deadlock: str | None = None) -> None:
        self._out.append(Deny(claim, lock.snapshot(self._now), deadlock))
        self._unqueue(lock, claim)
