"""The node's side: what one node holds on every resource, as a pure state machine.

`lockmgr.claim` has the theory of a single lock: claims, the phases of giving up, the gate;
`lockmgr.progress` what follows from a change. This module brings the changes: tasks that want
and release, owners that have finished, masters that say something, times that have come. And it
keeps the cache: a lock that no claim uses stays, but beyond ``cache_limit`` the least recently
used ones are given up, at most ``shed_at_once`` at a time.

Two ways in. `step` takes any event. `try_claim` and `drop` are the same as a step with `Acquire`
(Patience.NONE) or `Release` where nothing needs to be done beyond counting the claim in or out;
they say so if that is not the case, and then change nothing.

invariants (`check`), beside those of each lock:
- ``idle`` has exactly the locks that are held, calm and unused, least recently used first
- a lock that holds nothing, waits for nothing and has nothing in progress is forgotten
"""

from __future__ import annotations

from collections.abc import Callable

from lockmgr.claim import Claim, ClaimState, NodeLock, Phase
from lockmgr.errors import ProtocolViolation
from lockmgr.events import (
    Acquire,
    Answer,
    Answered,
    AnsweredAll,
    AwaitDrain,
    Close,
    Convert,
    Demoted,
    Deny,
    Effect,
    Emptied,
    Event,
    Glimpse,
    GlimpseAll,
    Glimpsed,
    Grant,
    Patience,
    Release,
    Send,
    TimerDue,
    Withdraw,
)
from lockmgr.messages import (
    AskGlimpse,
    Blocking,
    GlimpseAnswer,
    Granted,
    HeldState,
    NodeBound,
    Probe,
    Refused,
    Resource,
    Unblocking,
    ValueBlock,
)
from lockmgr.modes import COMPATIBLE, COVERS, JOIN, WRITES_VALUE, Mode
from lockmgr.progress import Progress


class NodeLocks(Progress):
    """All locks of node ``node``; ``master_of`` names the node to send requests to."""

    # -- the hot path ----------------------------------------------------------------------
    def try_claim(self, claim: Claim, now: float) -> bool:
        """Grant at once what the node has and no other claim excludes; False: step is needed."""
        lock = self.locks.get(claim.resource.name)
        if lock is None or not lock.calm:
            return False
        mode = claim.mode
        held = lock.held
        if held is None or not COVERS[held][mode]:
            return False
        beside = lock.exclusive_modes if claim.shared_here else lock.all_modes
        if not COMPATIBLE[mode][beside]:
            return False
        if not lock.claims:
            self.idle.pop(lock, None)
        lock.add(claim)
        claim.since = now
        self.counters.cached_grants += 1
        return True

    def drop(self, claim: Claim) -> bool:
        """Release if that wakes nobody and makes no room necessary; False: step is needed."""
        lock = claim.lock
        if lock is None or not lock.calm or lock.asked is not None:
            return False
        if len(lock.claims) == 1:
            if len(self.idle) >= self._idle_limit or lock.held is Mode.NL:
                return False
            self.idle[lock] = None
        lock.remove(claim)
        return True

    # -- events ----------------------------------------------------------------------------
    def step(self, event: Event, now: float) -> list[Effect]:
        """Carry out an event that concerns this node's claims and owners."""
        self._now = now
        _EVENTS[type(event)](self, event)
        return self._finish()

    def receive(self, message: NodeBound, now: float) -> list[Effect]:
        """Carry out a message of this epoch. Raises `ProtocolViolation` for impossible ones."""
        self._now = now
        _MESSAGES[type(message)](self, message)
        return self._finish()

    def next_timer(self) -> float | None:
        """When `TimerDue` is due; None: no time matters."""
        return self._timers.next()

    def _finish(self) -> list[Effect]:
        while self._shedding < self.settings.shed_at_once and len(self.idle) > self._idle_limit:
            lock = next(iter(self.idle))
            lock.shed = True
            self._shedding += 1
            self.counters.shed += 1
            self._advance(lock)
        if self._closing and not self.locks:
            self._out.append(Emptied())
        out, self._out = self._out, []
        return out

    def _acquire(self, event: Acquire) -> None:
        claim = event.claim
        if claim.state is not ClaimState.NEW:
            raise ProtocolViolation(f"{claim} is in use")
        lock = self.locks.get(claim.resource.name)
        if lock is None:
            lock = NodeLock(claim.resource)
            self.locks[claim.resource.name] = lock
        claim.state = ClaimState.WAITING
        self._enqueue(lock, lock.waiting, claim, event.patience, event.timeout_s)

    def _convert(self, event: Convert) -> None:
        claim = event.claim
        lock = claim.lock
        if lock is None or claim.state is not ClaimState.HELD:
            raise ProtocolViolation(f"{claim} cannot be converted")
        if COVERS[claim.mode][event.mode]:
            lock.change(claim, event.mode)
            self._out.append(Grant(claim))
            self._advance(lock)
            return
        claim.state = ClaimState.CONVERTING
        claim.wanted_mode = event.mode
        self._enqueue(lock, lock.converting, claim, event.patience, event.timeout_s)

    def _enqueue(
        self,
        lock: NodeLock,
        queue: list[Claim],
        claim: Claim,
        patience: Patience,
        timeout_s: float | None,
    ) -> None:
        claim.queue = patience is Patience.QUEUE
        queue.append(claim)
        if claim.queue:
            claim.since = self._now
            if timeout_s is not None:
                claim.deadline = self._now + timeout_s
                self._timers.set(claim.deadline, claim)
        elif not self._at_once(lock, claim, patience):
            if patience is Patience.NONE:
                self._out.append(Deny(claim, None))
                self._unqueue(lock, claim)
            else:
                self._deny(lock, claim)
            self._settle(lock)
            return
        self._advance(lock)

    def _at_once(self, lock: NodeLock, claim: Claim, patience: Patience) -> bool:
        """Will `_advance` grant this claim, or ask the master for it first thing?"""
        if lock.next_claim() is claim:
            return True
        if lock.asked is not None or lock.phase is not Phase.HELD or self._goal(lock) is not None:
            return False
        if claim is not self._head(lock):
            return False
        if patience is Patience.NO_QUEUE:
            return True
        return not self.frozen and self._master_of(lock.resource) == self.node

    def _release(self, event: Release) -> None:
        claim = event.claim
        lock = claim.lock
        if lock is None or claim.state is not ClaimState.HELD:
            raise ProtocolViolation(f"{claim} is not held, or converts")
        lock.remove(claim)
        self._advance(lock)

    def _withdraw(self, event: Withdraw) -> None:
        claim = event.claim
        if claim.state not in (ClaimState.WAITING, ClaimState.CONVERTING):
            raise ProtocolViolation(f"{claim} does not wait")
        lock = self.locks[claim.resource.name]
        self._unqueue(lock, claim)
        self._advance(lock)

    def _demoted(self, event: Demoted) -> None:
        lock = self.locks[event.resource.name]
        assert lock.phase in (Phase.FIRST, Phase.LAST), lock.phase
        if lock.regranted:
            # What this pass was for, the node has been granted anew, and may hold for a while.
            self._end_passes(lock)
        elif not lock.served and not lock.above_target():
            self._give_up(lock)
        else:
            lock.phase = Phase.DRAINING
            lock.drain = False
            self._no_longer_shed(lock)
        self._advance(lock)

    def _await_drain(self, event: AwaitDrain) -> None:
        lock = self.locks[event.resource.name]
        if lock.phase not in (Phase.FIRST, Phase.LAST):
            raise ProtocolViolation(f"{event.resource.name!r} is not being demoted")
        lock.drain = True
        lock.drained = False
        self._advance(lock)

    def _glimpse(self, event: Glimpse) -> None:
        self._glimpses[event.ticket] = event.resource
        self._send(AskGlimpse(event.resource, self.epoch, self.node, event.ticket))

    def _glimpse_all(self, event: GlimpseAll) -> None:
        for each in event.asked:
            self._glimpse(each)

    def _answered_all(self, event: AnsweredAll) -> None:
        for each in event.answers:
            self._answered(each)

    def _answered(self, event: Answered) -> None:
        # A lock that was lost meanwhile makes the answer one about the past.
        lock = self.locks.get(event.resource.name)
        current = lock is not None and lock.held is not None and WRITES_VALUE[lock.held]
        self._answer(event.resource, event.asker, event.serial, event.answer if current else None)

    def _timer_due(self, _event: TimerDue) -> None:
        while (due := self._timers.pop_due(self._now)) is not None:
            if isinstance(due, NodeLock):
                due.timer_at = None
                self._advance(due)
            else:
                lock = self.locks[due.resource.name]
                self.counters.timeouts += 1
                self._deny(lock, due)
                self._advance(lock)

    def _close(self, _event: Close) -> None:
        self._closing = True
        self._idle_limit = 0

    # -- another view ----------------------------------------------------------------------
    def enter(
        self, epoch: int, master_of: Callable[[Resource], int], now: float
    ) -> list[HeldState]:
        """Go by the masters of another view; what is to be re-asserted to them. `resume` follows.

        The new masters know nothing of what the old ones wanted of this node, nor of requests
        that it has cancelled.
        """
        self._now = now
        self.epoch = epoch
        self._master_of = master_of
        self.frozen = True
        states: list[HeldState] = []
        for lock in self.locks.values():
            lock.wanted = Mode.NL
            if lock.cancelled:
                self._not_granted(lock)
            if lock.held is not None or lock.asked is not None:
                states.append(lock.state(now))
        return states

    def resume(self, now: float) -> list[Effect]:
        """After the re-assertions: go on with every lock, claim and glimpse."""
        self._now = now
        for ticket, resource in self._glimpses.items():
            self._send(AskGlimpse(resource, self.epoch, self.node, ticket))
        for lock in list(self.locks.values()):
            if lock not in self.idle:
                self._advance(lock)
        return self._finish()

    def sacrifice(self, claim: Claim, words: str, now: float) -> list[Effect]:
        """Deny a claim that waits, to break the cycle that ``words`` tells."""
        self._now = now
        lock = self.locks[claim.resource.name]
        self.counters.deadlocks += 1
        self._deny(lock, claim, words)
        self._advance(lock)
        return self._finish()

    # -- messages --------------------------------------------------------------------------
    def _granted(self, message: Granted) -> None:
        lock = self._answered_lock(message)
        lock.held = message.mode
        lock.grant = message.serial
        lock.granted_at = self._now
        lock.wanted = Mode.NL  # the master says again what others want, after each grant
        if message.value.sequence >= lock.value.sequence:
            lock.value = message.value
        self.counters.master_grants += 1
        lock.regranted = lock.phase is Phase.FIRST or lock.phase is Phase.LAST
        self._advance(lock)

    def _refused(self, message: Refused) -> None:
        lock = self._answered_lock(message)
        self._not_granted(lock)
        self._advance(lock)

    def _not_granted(self, lock: NodeLock) -> None:
        claim = lock.asked_for
        lock.asked = lock.asked_for = None
        lock.cancelled = False
        if claim is not None and not claim.queue:
            self._deny(lock, claim)

    def _answered_lock(self, message: Granted | Refused) -> NodeLock:
        lock = self.locks.get(message.resource.name)
        if lock is None or lock.asked is None or lock.serial != message.serial:
            raise ProtocolViolation(f"nobody asked for {message}")
        lock.asked = None
        lock.cancelled = False
        return lock

    def _blocking(self, message: Blocking) -> None:
        self.counters.blocking_notifications += 1
        lock = self.locks.get(message.resource.name)
        if lock is not None and lock.held is not None:
            lock.wanted = JOIN[lock.wanted][message.mode]
            self._advance(lock)

    def _unblocking(self, message: Unblocking) -> None:
        lock = self.locks.get(message.resource.name)
        if lock is not None and lock.held is not None:
            lock.wanted = message.mode
            self._advance(lock)

    def _probe(self, message: Probe) -> None:
        lock = self.locks.get(message.resource.name)
        if lock is not None and lock.held is not None and WRITES_VALUE[lock.held]:
            self.counters.glimpses += 1
            self._out.append(Answer(message.resource, message.asker, message.serial))
        else:
            self._answer(message.resource, message.asker, message.serial, None)

    def _answer(self, resource: Resource, asker: int, serial: int, answer: bytes | None) -> None:
        self._out.append(Send(asker, GlimpseAnswer(resource, self.epoch, asker, serial, answer)))

    def _glimpse_answer(self, message: GlimpseAnswer) -> None:
        # After a change of the view the same question may be answered twice.
        if self._glimpses.pop(message.serial, None) is not None:
            self._out.append(Glimpsed(message.serial, message.answer))

    def set_value(self, claim: Claim, data: bytes | None) -> None:
        """Change the value block under a claim in PW or EX. Raises `ValueError` otherwise."""
        lock = claim.lock
        if lock is None or not WRITES_VALUE[claim.mode]:
            raise ValueError(f"{claim} does not let its holder write the value block")
        lock.value = ValueBlock(data, lock.value.sequence + 1)
        lock.value_changed = True

    def check(self) -> None:
        """Assert the invariants of this module and of each lock."""
        for name, lock in self.locks.items():
            lock.check()
            assert lock.resource.name == name
            unused = (
                lock.phase is Phase.HELD
                and not lock.claims
                and not lock.converting
                and not lock.waiting
                and lock.asked is None
            )
            assert (lock in self.idle) == unused, lock.snapshot(self._now)
            assert not (unused and lock.held in (None, Mode.NL)), lock.snapshot(self._now)
        assert all(self.locks[lock.resource.name] is lock for lock in self.idle)
        assert self._shedding == sum(lock.shed for lock in self.locks.values())


_EVENTS: dict[type, Callable[..., None]] = {
    Acquire: NodeLocks._acquire,
    Convert: NodeLocks._convert,
    Release: NodeLocks._release,
    Withdraw: NodeLocks._withdraw,
    Demoted: NodeLocks._demoted,
    AwaitDrain: NodeLocks._await_drain,
    Glimpse: NodeLocks._glimpse,
    GlimpseAll: NodeLocks._glimpse_all,
    Answered: NodeLocks._answered,
    AnsweredAll: NodeLocks._answered_all,
    TimerDue: NodeLocks._timer_due,
    Close: NodeLocks._close,
}

_MESSAGES: dict[type, Callable[..., None]] = {
    Granted: NodeLocks._granted,
    Refused: NodeLocks._refused,
    Blocking: NodeLocks._blocking,
    Unblocking: NodeLocks._unblocking,
    Probe: NodeLocks._probe,
    GlimpseAnswer: NodeLocks._glimpse_answer,
}
