"""The node's side: what one node holds on every resource, as a pure state machine.

`lockmgr.claim` has the theory of a single lock: claims, the phases of giving up, the gate. This
module drives it: it answers tasks, asks masters, answers what masters say, keeps the cache within
its cap and wakes up for deadlines and minimum hold times.

- A claim goes in first come, first served; conversions first. The head of the queue makes the
  node ask the master for what all claims and it need together, once it fits beside them.
- A lock that no claim uses stays cached. Beyond ``cache_limit`` the least recently used ones are
  given up, at most ``shed_at_once`` at a time.
- After a grant the node keeps a lock for ``min_hold_s`` whatever others want.

Two ways in. `step` takes any event. `try_claim` and `drop` are the same as a step with `Acquire`
(Patience.NONE) or `Release` where nothing needs to be done beyond counting the claim in or out;
they say so if that is not the case, and then change nothing.

invariants (`check`), beside those of each lock:
- ``idle`` has exactly the locks that are held, calm and unused, least recently used first
- a lock that holds nothing, waits for nothing and has nothing in progress is forgotten
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lockmgr.claim import Claim, ClaimState, NodeLock, Obstacle, Phase
from lockmgr.errors import ProtocolViolation
from lockmgr.events import (
    Acquire,
    Answer,
    Answered,
    AwaitDrain,
    Close,
    Convert,
    Demote,
    Demoted,
    Deny,
    Drained,
    Effect,
    Emptied,
    Event,
    Glimpse,
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
    Cancel,
    GlimpseAnswer,
    Granted,
    Lower,
    NodeBound,
    Probe,
    Refused,
    Request,
    Resource,
    Unblocking,
    ValueBlock,
)
from lockmgr.modes import COMPATIBLE, COVERS, JOIN, WRITES_VALUE, Mode, meet, yielded
from lockmgr.timers import Timers


@dataclass(frozen=True, slots=True)
class Settings:
    """What an administrator may want to change."""

    cache_limit: int = 20_000
    """Locks that are cached though no task uses them."""
    shed_at_once: int = 32
    """Demotions for want of room that run at the same time."""
    min_hold_s: float = 0.01
    """How long a granted lock stays with the node though others wait."""


@dataclass(slots=True)
class Counters:
    """See `lockmgr.snapshot.Statistics`."""

    cached_grants: int = 0
    master_grants: int = 0
    blocking_notifications: int = 0
    demotions: int = 0
    demote_passes: int = 0
    shed: int = 0
    glimpses: int = 0
    timeouts: int = 0


class NodeLocks:
    """All locks of node ``node``; ``master_of`` names the node to send requests to."""

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
        self._serial = 0
        self._shedding = 0
        self._closing = False
        self._timers: Timers[Claim | NodeLock] = Timers(self._still_due)
        self._out: list[Effect] = []
        self._now = 0.0

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
        return patience is Patience.NO_QUEUE or self._master_of(lock.resource) == self.node

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

    def _unqueue(self, lock: NodeLock, claim: Claim) -> None:
        claim.deadline = None
        claim.wanted_mode = claim.mode
        if claim.state is ClaimState.CONVERTING:
            lock.converting.remove(claim)
            claim.state = ClaimState.HELD
        else:
            lock.waiting.remove(claim)
            claim.state = ClaimState.NEW

    def _deny(self, lock: NodeLock, claim: Claim) -> None:
        self._out.append(Deny(claim, lock.snapshot(self._now)))
        self._unqueue(lock, claim)

    def _demoted(self, event: Demoted) -> None:
        lock = self.locks[event.resource.name]
        assert lock.phase in (Phase.FIRST, Phase.LAST), lock.phase
        if not lock.served and not lock.above_target():
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
        self._send(AskGlimpse(event.resource, self.epoch, self.node, event.ticket))

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

    def _still_due(self, when: float, key: Claim | NodeLock) -> bool:
        return when == (key.timer_at if isinstance(key, NodeLock) else key.deadline)

    def _close(self, _event: Close) -> None:
        self._closing = True
        self._idle_limit = 0

    # -- messages --------------------------------------------------------------------------
    def _granted(self, message: Granted) -> None:
        lock = self._answered_lock(message)
        lock.held = message.mode
        lock.granted_at = self._now
        lock.wanted = Mode.NL  # the master says again what others want, after each grant
        if not lock.value_changed:
            lock.value = message.value
        self.counters.master_grants += 1
        if lock.phase is not Phase.HELD:
            # Whoever asked gets a turn: the pass that runs is no longer the last one.
            lock.served = True
            if lock.drain and not lock.drained:
                self._out.append(Drained(lock.resource))
            lock.drain = False
            if lock.phase is Phase.LAST:
                lock.phase = Phase.FIRST
        self._advance(lock)

    def _refused(self, message: Refused) -> None:
        lock = self._answered_lock(message)
        claim = lock.asked_for
        lock.asked_for = None
        if claim is not None and not claim.queue:
            self._deny(lock, claim)
        self._advance(lock)

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
        self._out.append(Glimpsed(message.serial, message.answer))

    # -- progress --------------------------------------------------------------------------
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
        if lock.shed:
            return Mode.NL
        if not COMPATIBLE[held][lock.wanted]:
            hold_ends = lock.granted_at + self.settings.min_hold_s
            if self._now >= hold_ends or self._closing:
                return yielded(held, lock.wanted)
            if lock.timer_at != hold_ends:
                lock.timer_at = hold_ends
                self._timers.set(hold_ends, lock)
            return None
        first = next(lock.queued, None)
        if first is not None and lock.asked is None and lock.fits_here(first):
            need = lock.need(first)
            if not COVERS[need][held] and not COVERS[held][need]:
                return meet(held, need)
        return None

    def _phase_changed(self, lock: NodeLock) -> bool:
        """Begin or continue to give up. True: the gate has changed, look at the queues again."""
        if lock.phase is Phase.HELD:
            goal = self._goal(lock)
            if goal is None or lock.held is Mode.NL:
                return False
            self._begin_pass(lock, Phase.FIRST, goal)
            return True
        if lock.phase is Phase.DRAINING:
            goal = self._goal(lock)
            if goal is None:
                lock.phase = Phase.HELD
                return True
            lock.target = goal
            if lock.above_target():
                return False
            self._begin_pass(lock, Phase.LAST, goal)
            return True
        if lock.drain and not lock.drained and not lock.above_target():
            lock.drained = True
            lock.served = False
            self._out.append(Drained(lock.resource))
        return False

    def _begin_pass(self, lock: NodeLock, phase: Phase, target: Mode) -> None:
        lock.phase = phase
        lock.target = target
        lock.drain = lock.drained = False
        lock.served = lock.above_target()
        self.counters.demote_passes += 1
        self._out.append(Demote(lock.resource, target))

    def _give_up(self, lock: NodeLock) -> None:
        """Lower to ``target``: from here on other nodes may have what it does not cover."""
        assert lock.held is not None
        lock.phase = Phase.HELD
        lock.drain = lock.served = False
        self._no_longer_shed(lock)
        self.counters.demotions += 1
        keeps = lock.target is not Mode.NL or bool(lock.claims) or lock.asked is not None
        self._lower(lock, lock.target if keeps else None)

    def _lower(self, lock: NodeLock, mode: Mode | None) -> None:
        assert lock.held is not None
        value: ValueBlock | None = None
        if lock.value_changed and (mode is None or not WRITES_VALUE[mode]):
            value = lock.value
            lock.value_changed = False
        self._send(Lower(lock.resource, self.epoch, self.node, mode, value))
        lock.held = mode
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
        if claim is None:
            lock.asked_for = None
            return
        self._serial += 1
        lock.serial = self._serial
        lock.asked = lock.need(claim)
        lock.asked_for = claim
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
    Answered: NodeLocks._answered,
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
