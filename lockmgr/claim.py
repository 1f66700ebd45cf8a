"""One node's lock on one resource, and the claims of its tasks on it: who may go in now.

Theory. The *node* holds one lock per resource, in the mode its master granted (`NodeLock.held`).
Tasks have *claims*. Claims stand beside each other if their modes are compatible, or if both said
``shared_here``; what all of them need together, the join of their modes, the node must hold. A
lock without claims stays cached.

Giving up. Another node's need (`wanted`), want of room (`shed`) or a need of this node's own that
is not comparable with what it holds makes the node lower its lock to ``target``, in phases:

    phase      runs       claims above target    left when
    HELD       -          come and go            there is a reason, and the minimum hold is over
    FIRST      demote()   come and go            demote returns: none above target was there since
                                                 it began or drained: lower, HELD; otherwise
                                                 DRAINING
    DRAINING   -          finish, wait           the last is gone: LAST; the reason is gone: HELD
    LAST       demote()   wait                   demote returns: lower, HELD

If the master grants a request during a pass, the lock is not lowered after it but kept (HELD), for
its minimum hold: whoever asked has its turn, and the master says again what others want.

So requests are served while ``demote`` runs for the first time (it may cause requests that it
waits for: a kernel that writes back pages, say), and yet a busy lock is given up after the second
time at the latest. An owner that drains by itself, before its last flush, needs no second pass.

While the gate is closed (DRAINING, LAST, or an owner's drain), a claim above target still
converts: everything waits for it, it must not wait for the gate.

invariants (`check`):
- claims are pairwise compatible or both shared_here
- ``held`` covers every claim
- ``calm`` is true only in HELD with nobody in a queue
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import Enum

from lockmgr.messages import NEVER_WRITTEN, HeldState, Resource
from lockmgr.modes import COMPATIBLE, COVERS, JOIN, Mode
from lockmgr.snapshot import ClaimSnapshot, LockSnapshot


class ClaimState(Enum):
    """Where a claim stands."""

    NEW = "not asked for, denied, withdrawn or released"
    WAITING = "in the queue of new claims"
    HELD = "granted"
    CONVERTING = "granted, and in the queue for another mode"


class Claim:
    """A task's claim. The shell subclasses it; only the node core changes it after creation."""

    __slots__ = (
        "deadline",
        "holder",
        "lock",
        "mode",
        "owner",
        "queue",
        "resource",
        "shared_here",
        "since",
        "state",
        "wait",
        "wanted_mode",
    )

    def __init__(
        self,
        resource: Resource,
        mode: Mode,
        shared_here: bool = False,
        holder: str = "",
        owner: Hashable | None = None,
    ) -> None:
        self.resource = resource
        self.mode = mode
        self.wanted_mode = mode
        """Differs from ``mode`` while the claim converts."""
        self.shared_here = shared_here
        self.holder = holder
        """Who this is, for people."""
        self.owner = owner
        """Whoever holds this claim while it awaits others with the same owner (a transaction, a
        task); it awaits one at a time. None: it awaits nothing else, as far as deadlocks go."""
        self.state = ClaimState.NEW
        self.lock: NodeLock | None = None
        """Set while the claim is granted."""
        self.since = 0.0
        self.deadline: float | None = None
        self.wait = 0
        """Which wait of this node it is, while it waits; never used again."""
        self.queue = True
        """False: to be denied rather than to wait for a holder."""

    def __repr__(self) -> str:
        shared = " shared" if self.shared_here else ""
        arrow = f"->{self.wanted_mode}" if self.wanted_mode is not self.mode else ""
        return (
            f"<{self.holder} {self.resource.name!r} {self.mode}{arrow}{shared} {self.state.name}>"
        )

    def snapshot(self, now: float) -> ClaimSnapshot:
        """For people."""
        converting_to = self.wanted_mode if self.state is ClaimState.CONVERTING else None
        return ClaimSnapshot(
            self.holder, self.mode, converting_to, self.shared_here, max(0.0, now - self.since)
        )


class Phase(Enum):
    """How far the node is in giving the lock up; see the module's table."""

    HELD = "held"
    FIRST = "demote runs, requests are served"
    DRAINING = "gate closed, claims above target finish"
    LAST = "demote runs, gate closed"


class Obstacle(Enum):
    """Why a queued claim cannot go in now."""

    GATE = "it is above the target of a demotion, and the gate is closed"
    MASTER = "the node does not hold enough"
    LOCAL = "claims of this node stand in its way"


class NodeLock:
    """The state; `lockmgr.node` drives it."""

    __slots__ = (
        "_counts",
        "all_modes",
        "asked",
        "asked_at",
        "asked_for",
        "calm",
        "cancelled",
        "claims",
        "converting",
        "drain",
        "drained",
        "exclusive_modes",
        "grant",
        "granted_at",
        "held",
        "lowers_for",
        "phase",
        "regranted",
        "resource",
        "serial",
        "served",
        "shed",
        "target",
        "timer_at",
        "value",
        "value_changed",
        "waiting",
        "wanted",
    )

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.held: Mode | None = None
        self.granted_at = 0.0
        self.value = NEVER_WRITTEN
        self.value_changed = False
        # -- towards the master
        self.asked: Mode | None = None
        self.asked_at = 0.0
        self.asked_for: Claim | None = None
        self.serial = 0
        self.grant = 0
        """The serial of the request that was granted last."""
        self.cancelled = False
        self.wanted = Mode.NL
        self.timer_at: float | None = None
        """When the minimum hold ends that a demotion waits for."""
        # -- this node's tasks
        self.claims: dict[Claim, None] = {}
        self.converting: list[Claim] = []
        self.waiting: list[Claim] = []
        self.all_modes = Mode.NL
        """The join of all claims."""
        self.exclusive_modes = Mode.NL
        """The join of the claims without shared_here."""
        self._counts = [0] * (2 * len(Mode))
        self.calm = False
        # -- giving up
        self.phase = Phase.HELD
        self.target = Mode.NL
        self.lowers_for: Claim | None = None
        """The claim that was next when the demotion began; it may be the reason for it."""
        self.shed = False
        self.served = False
        """A claim above target was there or came since the pass began or drained."""
        self.regranted = False
        """The master granted something during this pass."""
        self.drain = False
        """The owner asked, in this pass, to close the gate."""
        self.drained = False

    # -- claims ----------------------------------------------------------------------------
    def add(self, claim: Claim) -> None:
        """Count in a claim at ``claim.mode``."""
        mode = claim.mode
        self.claims[claim] = None
        self.all_modes = JOIN[self.all_modes][mode]
        if claim.shared_here:
            self._counts[mode] += 1
        else:
            self._counts[mode + 6] += 1
            self.exclusive_modes = JOIN[self.exclusive_modes][mode]
        claim.lock = self
        claim.state = ClaimState.HELD

    def remove(self, claim: Claim) -> None:
        """Count out a claim at ``claim.mode``."""
        claims = self.claims
        del claims[claim]
        claim.lock = None
        claim.state = ClaimState.NEW
        counts = self._counts
        position = claim.mode if claim.shared_here else claim.mode + 6
        counts[position] -= 1
        if not claims:
            self.all_modes = self.exclusive_modes = Mode.NL
        elif not counts[position]:
            self._sum_up()

    def _sum_up(self) -> None:
        shared = exclusive = Mode.NL
        for mode in Mode:
            if self._counts[mode]:
                shared = JOIN[shared][mode]
            if self._counts[mode + 6]:
                exclusive = JOIN[exclusive][mode]
        self.exclusive_modes = exclusive
        self.all_modes = JOIN[shared][exclusive]

    def change(self, claim: Claim, mode: Mode) -> None:
        """A granted claim has another mode from now on."""
        self.remove(claim)
        claim.mode = claim.wanted_mode = mode
        self.add(claim)

    @property
    def queued(self) -> Iterator[Claim]:
        """Claims that wait, conversions first."""
        yield from self.converting
        yield from self.waiting

    # -- who may go in ---------------------------------------------------------------------
    def fits_here(self, claim: Claim) -> bool:
        """Do the other claims of this node leave room for ``claim.wanted_mode``?"""
        compatible = COMPATIBLE[claim.wanted_mode]
        if claim.state is not ClaimState.CONVERTING:
            return compatible[self.exclusive_modes if claim.shared_here else self.all_modes]
        return all(
            compatible[other.mode] or (other.shared_here and claim.shared_here)
            for other in self.claims
            if other is not claim
        )

    def above_target(self) -> bool:
        """Is a claim in the way of lowering to ``target``?"""
        return not COVERS[self.target][self.all_modes]

    @property
    def gate_closed(self) -> bool:
        """Do new claims above ``target`` wait for the demotion to end?"""
        return self.phase is Phase.DRAINING or self.phase is Phase.LAST or self.drain

    def gated(self, claim: Claim) -> bool:
        """Does the demotion make this claim wait?"""
        if not self.gate_closed or COVERS[self.target][claim.wanted_mode]:
            return False
        return claim.state is not ClaimState.CONVERTING or COVERS[self.target][claim.mode]

    def obstacle(self, claim: Claim) -> Obstacle | None:
        """The first reason why a queued or new claim cannot go in now; None: it can."""
        if self.gated(claim):
            return Obstacle.GATE
        if self.held is None or not COVERS[self.held][claim.wanted_mode]:
            return Obstacle.MASTER
        return None if self.fits_here(claim) else Obstacle.LOCAL

    def need(self, claim: Claim) -> Mode:
        """What the node must hold for its claims and this one."""
        return JOIN[self.all_modes][claim.wanted_mode]

    def passable(self, obstacle: Obstacle | None) -> bool:
        """May later claims overtake one that has this obstacle?

        Nobody may be held up by one that cannot go in before the demotion has ended, if the
        demotion may be waiting for the one behind it.
        """
        if obstacle is Obstacle.GATE:
            return True
        return obstacle is Obstacle.MASTER and self.phase is Phase.FIRST and not self.drain

    def has_turn(self, claim: Claim) -> bool:
        """Does no earlier conversion hold up this one? As at the master, one overtakes those in
        whose way it stands.
        """
        ahead = self.converting[: self.converting.index(claim)]
        ahead = [other for other in ahead if not self.passable(self.obstacle(other))]
        return not ahead or any(
            not COMPATIBLE[claim.mode][other.wanted_mode]
            and not (claim.shared_here and other.shared_here)
            for other in ahead
        )

    def next_claim(self) -> Claim | None:
        """The queued claim to be granted now; None: all have to wait."""
        held_up = False
        for claim in self.converting:
            obstacle = self.obstacle(claim)
            if obstacle is None and self.has_turn(claim):
                return claim
            held_up = held_up or not self.passable(obstacle)
        if held_up:
            return None
        for claim in self.waiting:
            obstacle = self.obstacle(claim)
            if obstacle is None:
                return claim
            if obstacle is Obstacle.GATE or not self.passable(obstacle):
                return None
        return None

    # -- for a new master ------------------------------------------------------------------
    def state(self, now: float) -> HeldState:
        """What the node has and awaits of the resource."""
        return HeldState(
            self.resource,
            self.held,
            self.grant,
            self.value,
            self.asked,
            self.serial,
            self.asked_for is None or self.asked_for.queue,
            0.0 if self.asked is None else max(0.0, now - self.asked_at),
        )

    # -- for people ------------------------------------------------------------------------
    def snapshot(self, now: float) -> LockSnapshot:
        """Who holds and awaits this lock."""
        return LockSnapshot(
            name=self.resource.name,
            placement=self.resource.placement,
            held=self.held,
            asked=self.asked,
            wanted=self.wanted,
            demoting_to=None if self.phase is Phase.HELD else self.target,
            age_s=0.0 if self.held is None else max(0.0, now - self.granted_at),
            holders=tuple(claim.snapshot(now) for claim in self.claims),
            waiters=tuple(claim.snapshot(now) for claim in self.queued),
        )

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        claims = list(self.claims)
        for position, claim in enumerate(claims):
            assert claim.lock is self and claim.state in (ClaimState.HELD, ClaimState.CONVERTING)
            assert self.held is not None and COVERS[self.held][claim.mode], (self.held, claim)
            for other in claims[:position]:
                both_shared = claim.shared_here and other.shared_here
                assert both_shared or COMPATIBLE[claim.mode][other.mode], (claim, other)
        everything, exclusive = self.all_modes, self.exclusive_modes
        self._sum_up()
        assert (everything, exclusive) == (self.all_modes, self.exclusive_modes)
        assert self.held is None or COVERS[self.held][everything]
        assert all(claim.state is ClaimState.CONVERTING for claim in self.converting)
        assert all(claim.state is ClaimState.WAITING for claim in self.waiting)
        if self.calm:
            assert self.phase is Phase.HELD and not self.converting and not self.waiting
        assert self.next_claim() is None
        assert self.phase is not Phase.LAST or not self.above_target()
