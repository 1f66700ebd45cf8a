"""Random histories: one node against the naive one, several nodes against the invariants."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lockmgr.claim import Claim, ClaimState
from lockmgr.events import Patience
from lockmgr.messages import Resource
from lockmgr.modes import WRITES_VALUE, Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_cluster import Cluster
from tests.unit.lockmgr_naive import NaiveClaim, NaiveNode, at_least

MODES = st.sampled_from(Mode)
TIMEOUTS = st.sampled_from([None, None, 0.5, 2.0])


class OneNodeAgainstNaive(RuleBasedStateMachine):
    """A node that is its own only member, and whose owner is instant: who is granted, and when?"""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(1, Settings(cache_limit=0))
        self.resource = Resource(b"r", b"\0")
        self.naive = NaiveNode()
        self.claims: list[Claim] = []
        self.naives: list[NaiveClaim] = []
        self.absent = Mode.PR

    @initialize(absent=st.sampled_from([Mode.PR, Mode.CW]))
    def choose(self, absent: Mode) -> None:
        """With PR and CW both, a node lowers itself first, and lets others in meanwhile."""
        self.absent = absent

    def _finish(self) -> None:
        """Let the owner finish, then compare who holds and who waits for what."""
        self.cluster.settle()
        self.naive.granted.clear()
        for claim, naive in zip(self.claims, self.naives, strict=True):
            held = naive in self.naive.held
            waits = naive in self.naive.waiting or naive in self.naive.converting
            assert (claim in self.cluster.held) == held, (claim, naive)
            assert (claim in self.cluster.waiting) == waits, (claim, naive)
            if held:
                assert claim.mode == naive.mode

    def _pick(self, data: st.DataObject, held: bool) -> tuple[Claim, NaiveClaim] | None:
        among = [
            (claim, naive)
            for claim, naive in zip(self.claims, self.naives, strict=True)
            if (claim.state is ClaimState.HELD if held else claim in self.cluster.waiting)
        ]
        return data.draw(st.sampled_from(among)) if among else None

    @rule(mode=MODES, shared=st.booleans(), timeout_s=TIMEOUTS)
    def acquire(self, mode: Mode, shared: bool, timeout_s: float | None) -> None:
        if mode is self.absent:
            return
        naive = NaiveClaim(len(self.claims), int(mode), shared)
        if timeout_s is not None:
            naive.deadline = self.cluster.now + timeout_s
        self.naives.append(naive)
        self.naive.waiting.append(naive)
        self.naive.settle()
        claim = self.cluster.acquire(0, self.resource, mode, shared=shared, timeout_s=timeout_s)
        self.claims.append(claim)
        self._finish()

    @rule(
        mode=MODES,
        shared=st.booleans(),
        patience=st.sampled_from([Patience.NONE, Patience.NO_QUEUE]),
    )
    def try_acquire(self, mode: Mode, shared: bool, patience: Patience) -> None:
        if mode is self.absent:
            return
        naive = NaiveClaim(len(self.claims), int(mode), shared)
        possible = (
            not self.naive.waiting
            and not self.naive.converting
            and self.naive.fits(naive, naive.mode)
        )
        claim = self.cluster.acquire(0, self.resource, mode, shared=shared, patience=patience)
        assert claim not in self.cluster.waiting
        assert (claim in self.cluster.held) == possible
        if claim in self.cluster.held:
            self.naives.append(naive)
            self.naive.held.append(naive)
            self.claims.append(claim)
        self._finish()

    @rule(data=st.data(), mode=MODES, timeout_s=st.sampled_from([0.5, 2.0]))
    def convert(self, data: st.DataObject, mode: Mode, timeout_s: float) -> None:
        picked = self._pick(data, held=True)
        if picked is None or mode is self.absent:
            return
        claim, naive = picked
        if at_least(naive.mode, int(mode)):
            naive.mode = int(mode)
        else:
            naive.wants = int(mode)
            naive.deadline = self.cluster.now + timeout_s
            self.naive.converting.append(naive)
        self.naive.settle()
        self.cluster.convert(claim, mode, timeout_s=timeout_s)
        self._finish()

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        picked = self._pick(data, held=True)
        if picked is None:
            return
        claim, naive = picked
        self.naive.held.remove(naive)
        self.naive.settle()
        self.cluster.release(claim)
        self._finish()

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        picked = self._pick(data, held=False)
        if picked is None:
            return
        claim, naive = picked
        self.naive.withdraw(naive)
        self.naive.settle()
        self.cluster.withdraw(claim)
        self._finish()

    @rule(duration_s=st.sampled_from([0.1, 0.5, 3.0]))
    def sleep(self, duration_s: float) -> None:
        self.naive.expire(self.cluster.now + duration_s)
        self.cluster.sleep(duration_s)
        self._finish()

    def teardown(self) -> None:
        self.cluster.drain_everything()


class ClusterHistories(RuleBasedStateMachine):
    """Three nodes, slow channels, slow owners: the invariants hold, and everybody gets a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(3, Settings(cache_limit=1, shed_at_once=1, min_hold_s=0.2))
        self.resources = [Resource(b"a", b"\0"), Resource(b"b", b"\1")]
        self.versions = 0

    @rule(
        node=st.integers(0, 2),
        which=st.integers(0, 1),
        mode=st.sampled_from([*Mode, Mode.PR, Mode.EX, Mode.EX]),
        shared=st.booleans(),
        patience=st.sampled_from([*Patience, Patience.QUEUE]),
        timeout_s=TIMEOUTS,
    )
    def acquire(
        self,
        node: int,
        which: int,
        mode: Mode,
        shared: bool,
        patience: Patience,
        timeout_s: float | None,
    ) -> None:
        claim = self.cluster.acquire(
            node,
            self.resources[which],
            mode,
            shared=shared,
            patience=patience,
            timeout_s=timeout_s,
        )
        assert patience is not Patience.NONE or claim not in self.cluster.waiting

    @precondition(lambda self: self.cluster.held)
    @rule(data=st.data(), mode=MODES, patience=st.sampled_from(Patience))
    def convert(self, data: st.DataObject, mode: Mode, patience: Patience) -> None:
        idle = [claim for claim in self.cluster.held if claim.state is ClaimState.HELD]
        if idle:
            claim = data.draw(st.sampled_from(idle))
            self.cluster.convert(claim, mode, patience=patience, timeout_s=1.0)

    @precondition(lambda self: self.cluster.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        idle = [claim for claim in self.cluster.held if claim.state is ClaimState.HELD]
        if idle:
            self.cluster.release(data.draw(st.sampled_from(idle)))

    @precondition(lambda self: self.cluster.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.cluster.withdraw(data.draw(st.sampled_from(list(self.cluster.waiting))))

    @precondition(lambda self: self.cluster.held)
    @rule(data=st.data(), valid=st.booleans())
    def write_value(self, data: st.DataObject, valid: bool) -> None:
        writers = [claim for claim in self.cluster.held if WRITES_VALUE[claim.mode]]
        if writers:
            self.versions += 1
            value = self.versions.to_bytes(64, "big") if valid else None
            self.cluster.set_value(data.draw(st.sampled_from(writers)), value)

    @precondition(lambda self: self.cluster.busy_channels)
    @rule(data=st.data(), count=st.integers(1, 4))
    def deliver(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if self.cluster.busy_channels:
                self.cluster.deliver(*data.draw(st.sampled_from(self.cluster.busy_channels)))

    @precondition(lambda self: self.cluster.demoting)
    @rule(data=st.data(), drain=st.booleans())
    def owner(self, data: st.DataObject, drain: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.cluster.demoting, key=repr)))
        if key in self.cluster.draining:
            return
        if drain:
            self.cluster.drain(*key)
        else:
            self.cluster.demoted(*key)

    @rule(node=st.integers(0, 2), which=st.integers(0, 1))
    def glimpse(self, node: int, which: int) -> None:
        self.cluster.glimpse(node, self.resources[which])

    @precondition(lambda self: self.cluster.answering)
    @rule()
    def answer(self) -> None:
        self.cluster.answer(0, b"size")

    @rule(duration_s=st.sampled_from([0.05, 0.2, 1.0]))
    def sleep(self, duration_s: float) -> None:
        self.cluster.sleep(duration_s)

    def teardown(self) -> None:
        self.cluster.drain_everything()


TestOneNodeAgainstNaive = OneNodeAgainstNaive.TestCase
TestOneNodeAgainstNaive.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

TestClusterHistories = ClusterHistories.TestCase
TestClusterHistories.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
