"""Several lock cores with FIFO channels between them, driven one step at a time.

`Cluster.check` asserts after each step what must be true of the whole: DESIGN's "no two live
nodes hold incompatible locks", and what an owner relies on when it writes back in ``demote``.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

from lockmgr.carried import Carried
from lockmgr.claim import Claim, ClaimState, Phase
from lockmgr.core import LockCore
from lockmgr.events import (
    Acquire,
    Answer,
    Answered,
    AwaitDrain,
    Convert,
    Deliver,
    Demote,
    Demoted,
    Deny,
    Drained,
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
    Unresponsive,
    Withdraw,
)
from lockmgr.mastering import Choose
from lockmgr.messages import Resource
from lockmgr.modes import COMPATIBLE, COVERS, WRITES_VALUE, Mode
from lockmgr.resource import MasteredResource
from lockmgr.settings import Settings


class Forgetting(dict[bytes, MasteredResource]):
    """A master's resources; what is forgotten has no value block any more."""

    def __init__(self, values: dict[bytes, bytes | None]) -> None:
        super().__init__()
        self._values = values

    def __delitem__(self, name: bytes) -> None:
        super().__delitem__(name)
        self._values.pop(name, None)


def by_first_byte(placement: bytes, members: Sequence[int]) -> int:
    """The member that a placement's first byte names, or the one after it."""
    return min(members, key=lambda node: ((node - (*placement, 0)[0]) % 256, node))


class Cluster:
    """``nodes`` cores, resources mastered by the first byte of their placement."""

    finds_deadlocks = False

    def __init__(
        self,
        nodes: int,
        settings: Settings | None = None,
        choose: Choose = by_first_byte,
    ) -> None:
        self.now = 0.0
        self.settings = settings or Settings()
        if not self.finds_deadlocks:
            self.settings = replace(self.settings, deadlock_after_s=None)
        self.choose = choose
        self.cores = [
            LockCore(node, 3, self.settings, range(nodes), choose) for node in range(nodes)
        ]
        self.alive = set(range(nodes))
        self.channels: dict[tuple[int, int], deque[Carried]] = defaultdict(deque)
        self.demoting: dict[tuple[int, Resource], Mode] = {}
        self.draining: set[tuple[int, Resource]] = set()
        self.answering: list[tuple[int, Answer]] = []
        self.asked_glimpses: dict[int, int] = {}
        self.glimpsed: dict[int, bytes | None] = {}
        self.waiting: dict[Claim, int] = {}
        self.held: dict[Claim, int] = {}
        self.emptied: set[int] = set()
        self.unresponsive: list[tuple[int, Unresponsive]] = []
        """Who names whom, and why."""
        self.demotions: list[tuple[int, bytes, Mode]] = []
        self.values: dict[bytes, bytes | None] = {}
        """What a holder of PR or more must see."""
        for core in self.cores:
            core.master.resources = Forgetting(self.values)
        self._step = 0
        self._last_use: dict[tuple[int, Resource, Mode], int] = {}
        """The step at which a claim of that mode was last held."""
        self._clean_since: dict[tuple[int, Resource], int] = {}
        """The step from which on the owner's last flush misses nothing."""
        self._closed: set[tuple[int, Resource]] = set()
        """Owners that rely on there being no claim above their mode until they are done."""

    # -- what tasks do ---------------------------------------------------------------------
    def acquire(
        self,
        node: int,
        resource: Resource,
        mode: Mode,
        *,
        shared: bool = False,
        patience: Patience = Patience.QUEUE,
        timeout_s: float | None = None,
        owner: str | None = None,
    ) -> Claim:
        name = owner or f"task {self._step} of node {node}"
        claim = Claim(resource, mode, shared, name, owner)
        self.waiting[claim] = node
        if patience is Patience.NONE and self.cores[node].locks.try_claim(claim, self.now):
            self._granted(claim)
            self._after(node)
        else:
            self.step(node, Acquire(claim, patience, timeout_s))
        return claim

    def convert(
        self,
        claim: Claim,
        mode: Mode,
        *,
        patience: Patience = Patience.QUEUE,
        timeout_s: float | None = None,
    ) -> None:
        node = self.held[claim]
        self.waiting[claim] = node
        self.step(node, Convert(claim, mode, patience, timeout_s))

    def release(self, claim: Claim) -> None:
        node = self.held.pop(claim)
        if self.cores[node].locks.drop(claim):
            self._after(node)
        else:
            self.step(node, Release(claim))

    def cache(self, node: int, resource: Resource, mode: Mode) -> None:
        """Have ``mode`` cached."""
        claim = self.acquire(node, resource, mode)
        self.settle()
        self.release(claim)

    def withdraw(self, claim: Claim) -> None:
        self.step(self.waiting.pop(claim), Withdraw(claim))

    def set_value(self, claim: Claim, data: bytes | None) -> None:
        self.cores[self.held[claim]].locks.set_value(claim, data)
        self.values[claim.resource.name] = data
        self.check()

    def glimpse(self, node: int, resource: Resource) -> int:
        ticket = len(self.asked_glimpses)
        self.asked_glimpses[ticket] = node
        self.step(node, Glimpse(resource, ticket))
        return ticket

    def glimpse_all(self, node: int, resources: Sequence[Resource]) -> list[int]:
        """All in one step."""
        first = len(self.asked_glimpses)
        asked = [Glimpse(resource, first + i) for i, resource in enumerate(resources)]
        self.asked_glimpses |= {each.ticket: node for each in asked}
        self.step(node, GlimpseAll(tuple(asked)))
        return [each.ticket for each in asked]

    # -- what owners and the network do ----------------------------------------------------
    def demoted(self, node: int, resource: Resource) -> None:
        del self.demoting[node, resource]
        self._closed.discard((node, resource))
        self.step(node, Demoted(resource))

    def drain(self, node: int, resource: Resource) -> None:
        self.draining.add((node, resource))
        self.step(node, AwaitDrain(resource))

    def answer(self, position: int, answer: bytes) -> None:
        node, question = self.answering.pop(position)
        self.step(node, Answered(question.resource, question.asker, question.serial, answer))

    def deliver(self, source: int, to: int) -> None:
        message = self.channels[source, to].popleft()
        self.step(to, Deliver(message))

    def sleep(self, duration_s: float) -> None:
        self.now += duration_s
        for node, core in self.living:
            due = core.next_timer()
            if due is not None and due <= self.now:
                self.step(node, TimerDue())

    @property
    def living(self) -> list[tuple[int, LockCore]]:
        """Nodes that are not dead, with their cores."""
        return [(node, self.cores[node]) for node in sorted(self.alive)]

    @property
    def busy_channels(self) -> list[tuple[int, int]]:
        return sorted(key for key, channel in self.channels.items() if channel)

    def settle(self) -> None:
        """Deliver everything, let every owner finish and every minimum hold end."""
        for _ in range(10_000):
            timers = [
                due for _, core in self.living if (due := core.locks.next_timer()) is not None
            ]
            deadlines = {claim.deadline for claim in self.waiting}
            if self.busy_channels:
                self.deliver(*self.busy_channels[0])
            elif self.answering:
                self.answer(0, b"answer")
            elif self.demoting.keys() - self.draining:
                self.demoted(*min(self.demoting.keys() - self.draining, key=repr))
            elif timers and min(timers) not in deadlines:
                self.sleep(max(0.0, min(timers) - self.now))
            else:
                return
        raise AssertionError("the cluster does not come to rest")

    # -- bookkeeping -----------------------------------------------------------------------
    def step(self, node: int, event: Event) -> list[Effect]:
        effects = self.cores[node].step(event, self.now)
        for effect in effects:
            self._carry_out(node, effect)
        self._after(node)
        return effects

    def _carry_out(self, node: int, effect: Effect) -> None:
        match effect:
            case Grant(claim):
                assert self.waiting[claim] == node
                self._granted(claim)
            case Deny(claim, _, deadlock):
                assert self.waiting.pop(claim) == node
                if deadlock is not None:
                    self._sacrificed(claim, deadlock)
                state = ClaimState.HELD if claim in self.held else ClaimState.NEW
                assert claim.state is state
            case Demote(resource, to_mode):
                if self.cores[node].locks.locks[resource.name].phase is Phase.LAST:
                    self._closed.add((node, resource))
                assert (node, resource) not in self.demoting
                self.demoting[node, resource] = to_mode
                self.draining.discard((node, resource))
                self._clean_since[node, resource] = self._step
                self.demotions.append((node, resource.name, to_mode))
            case Drained(resource, empty):
                self.draining.remove((node, resource))
                if empty:
                    self._clean_since[node, resource] = self._step
                    self._closed.add((node, resource))
            case Answer():
                self.answering.append((node, effect))
            case Glimpsed(ticket, answer):
                assert self.asked_glimpses[ticket] == node and ticket not in self.glimpsed
                self.glimpsed[ticket] = answer
            case Send(to, message):
                assert to != node
                if to in self.alive:
                    self.channels[node, to].append(message)
            case Emptied():
                self.emptied.add(node)
            case Unresponsive():
                self.unresponsive.append((node, effect))
            case _:
                self._carry_out_change(node, effect)

    def _sacrificed(self, claim: Claim, words: str) -> None:
        raise AssertionError(f"{claim}, though nobody looks for deadlocks: {words}")

    def _carry_out_change(self, node: int, effect: Effect) -> None:
        raise AssertionError(f"{effect} on node {node}, though no view has changed")

    def _granted(self, claim: Claim) -> None:
        node = self.waiting.pop(claim)
        assert claim.state is ClaimState.HELD and claim.lock is not None
        self.held[claim] = node
        self._last_use[node, claim.resource, claim.mode] = self._step

    def _after(self, node: int) -> None:
        for lock in self.cores[node].locks.locks.values():
            for claim in lock.claims:
                self._last_use[node, lock.resource, claim.mode] = self._step
        self.check()
        self._step += 1

    def check(self) -> None:
        """Assert what must be true of the whole cluster at any moment."""
        modes: dict[Resource, dict[int, Mode]] = defaultdict(dict)
        for node, core in self.living:
            core.check()
            for lock in core.locks.locks.values():
                if lock.held is not None:
                    modes[lock.resource][node] = lock.held
        for resource, holders in modes.items():
            self._check_holders(resource, holders)
        self._check_flushed(modes)
        for node, resource in self._closed:
            lock = self.cores[node].locks.locks[resource.name]
            assert COVERS[self.demoting[node, resource]][lock.all_modes], "the owner forgets now"
        for claim in self.held:
            assert claim.state in (ClaimState.HELD, ClaimState.CONVERTING), claim
            if COVERS[claim.mode][Mode.PR] and claim.lock is not None:
                self._check_value(claim, claim.lock.value.data)
        for claim in self.waiting:
            assert claim.state in (ClaimState.WAITING, ClaimState.CONVERTING), claim

    def _check_holders(self, resource: Resource, holders: dict[int, Mode]) -> None:
        for node, mode in holders.items():
            for other, other_mode in holders.items():
                assert node == other or COMPATIBLE[mode][other_mode], (resource, holders)
        for node, mode in holders.items():
            recovery = self.cores[node].recovery
            master = self.cores[recovery.mastering.master_of(resource)]
            if master.node in self.alive and self._in_step(self.cores[node], master):
                granted = master.master.resources[resource.name].granted
                assert COVERS[granted[node]][mode], "a node holds more than its master knows of"

    def _in_step(self, core: LockCore, master: LockCore) -> bool:
        return core.epoch == master.epoch and not master.recovery.frozen

    def _check_value(self, claim: Claim, seen: bytes | None) -> None:
        assert seen == self.values.get(claim.resource.name), claim

    def _check_flushed(self, modes: dict[Resource, dict[int, Mode]]) -> None:
        """What a lowered mode had allowed was not used after the owner's last flush began."""
        for (node, resource, mode), used in list(self._last_use.items()):
            held = modes.get(resource, {}).get(node)
            if held is None or not COVERS[held][mode]:
                if mode is not Mode.NL:
                    assert used < self._clean_since[node, resource], (node, resource, mode)
                del self._last_use[node, resource, mode]

    def drain_everything(self) -> None:
        """Release and settle until nothing is left to do; every claim must have had its turn."""
        for _ in range(1000):
            self.settle()
            idle = [claim for claim in self.held if claim.state is ClaimState.HELD]
            if idle:
                self.release(idle[0])
            elif self.held or any(claim.deadline is not None for claim in self.waiting):
                deadlines = [c.deadline for c in self.waiting if c.deadline is not None]
                self.sleep(max(0.0, min(deadlines) - self.now))
            else:
                break
        assert not self.held and not self.waiting and not self.demoting, (self.held, self.waiting)
        assert not self.busy_channels and len(self.glimpsed) == len(self.asked_glimpses)
        for _, core in self.living:
            assert all(lock in core.locks.idle for lock in core.locks.locks.values())
            assert not any(
                WRITES_VALUE[lock.held] and COMPATIBLE[lock.held][lock.wanted] is False
                for lock in core.locks.locks.values()
                if lock.held is not None
            )
