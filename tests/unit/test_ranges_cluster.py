"""Several nodes' byte-range locks, messages that take their time, recoveries at any moment.

Every owner is a program of one thread, so what it has is certain whenever it waits for nothing:
what it was told, no more and no less, whatever views come and go.
"""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lockmgr.messages import Resource
from lockmgr.ranges import Holdings, Span
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeEffect,
    RangeEpochRefused,
    RangeEvent,
    RangeFound,
    RangeSend,
    SetRange,
)
from lockmgr.ranges_messages import (
    END,
    Access,
    Kind,
    Outcome,
    Owner,
    RangeForget,
    RangeLock,
    RangeLower,
    RangeMessage,
    RangeReassert,
)

FILES = [Resource(b"a", b"\0"), Resource(b"b", b"\1")]
NODES = 3
KINDS = [Kind.POSIX, Kind.POSIX, Kind.OFD, Kind.FLOCK]
OWNERS = [
    Owner(kind, node, 10 * node + number, pid=100 + number)
    for node in range(NODES)
    for number, kind in enumerate(KINDS)
]
Key = tuple[Resource, Owner]
PICK = st.integers(0, 99)
"""Which of those there are."""


class RangeCluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 1
        self.now = 0.0
        self.closed: set[Resource] = set()
        self.members = list(range(NODES))
        self.cores = {node: self._core(node) for node in self.members}
        self.channels: dict[tuple[int, int], deque[RangeMessage]] = {}
        self.thawed = True
        self.truth: dict[Key, Holdings] = {}
        self.busy: dict[Owner, tuple[int, RangeEvent]] = {}
        self.tickets = 0

    def _core(self, node: int) -> RangeCore:
        return RangeCore(
            node, self.epoch, self._master_of, may_grant=lambda file: file not in self.closed
        )

    def _master_of(self, resource: Resource) -> int:
        return self.members[resource.placement[0] % len(self.members)]

    # -- what happens
    def _carry_out(self, node: int, effects: list[RangeEffect]) -> None:
        for effect in effects:
            if isinstance(effect, RangeSend):
                if effect.to in self.cores:
                    self.channels.setdefault((node, effect.to), deque()).append(effect.message)
            elif isinstance(effect, RangeDone):
                self._done(effect)
            elif isinstance(effect, RangeFound):
                for owner in [o for o, (t, _event) in self.busy.items() if t == effect.ticket]:
                    del self.busy[owner]
            else:
                assert isinstance(effect, RangeEpochRefused)

    def _done(self, effect: RangeDone) -> None:
        found = [owner for owner, (ticket, _event) in self.busy.items() if ticket == effect.ticket]
        if not found:
            return  # of an owner that has died
        _ticket, event = self.busy.pop(found[0])
        if effect.outcome is not Outcome.DONE:
            assert isinstance(event, SetRange | FindConflict)
            if event.owner.kind is Kind.FLOCK:
                self._flock_failed((event.resource, event.owner))
            return
        if isinstance(event, SetRange):
            holdings = self.truth.setdefault((event.resource, event.owner), Holdings())
            holdings.assign(event.start_bytes, event.end_bytes, event.access)
        elif isinstance(event, ForgetFile):
            self.truth.pop((event.resource, event.owner), None)

    def _flock_failed(self, key: Key) -> None:
        """A conversion that failed has lost the old lock, unless nobody had looked at it yet."""
        if self._dying(key):
            return  # what is left is that of a namesake, and is being given up
        left = self._believed().get(key, [])
        assert left in ([], self.truth.get(key, Holdings()).spans)
        self.truth[key] = Holdings(list(left))

    def _start(self, event: SetRange | FindConflict | ForgetFile) -> None:
        self.busy[event.owner] = (event.ticket, event)
        node = event.owner.node
        self._carry_out(node, self.cores[node].step(event, self.now))

    def _free(self, pick: int) -> Owner | None:
        free = [o for o in OWNERS if o.node in self.cores and o not in self.busy]
        return free[pick % len(free)] if free else None

    # -- rules
    @rule(
        pick=PICK,
        file=st.sampled_from(FILES),
        start=st.integers(0, 5),
        length=st.integers(1, 4),
        access=st.sampled_from([*Access, Access.WRITE]),
        wait=st.booleans(),
    )
    def set(
        self,
        pick: int,
        file: Resource,
        start: int,
        length: int,
        access: Access,
        wait: bool,
    ) -> None:
        owner = self._free(pick)
        if owner is None:
            return
        self.tickets += 1
        end = END if start + length > 7 else start + length
        if owner.kind is Kind.FLOCK:
            start, end = 0, END
        self._start(SetRange(self.tickets, file, owner, start, end, access, wait))

    @rule(pick=PICK, file=st.sampled_from(FILES))
    def find(self, pick: int, file: Resource) -> None:
        owner = self._free(pick)
        if owner is not None:
            self.tickets += 1
            self._start(FindConflict(self.tickets, file, owner, 0, END, Access.WRITE))

    @rule(pick=PICK, file=st.sampled_from(FILES))
    def close(self, pick: int, file: Resource) -> None:
        owner = self._free(pick)
        if owner is not None:
            self.tickets += 1
            self._start(ForgetFile(self.tickets, file, owner))

    @precondition(lambda self: self.busy)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        owners = sorted(self.busy)
        owner = owners[pick % len(owners)]
        core = self.cores[owner.node]
        self._carry_out(owner.node, core.step(CancelRange(self.busy[owner][0]), self.now))

    @rule(pick=PICK)
    def died(self, pick: int) -> None:
        owners = [owner for owner in OWNERS if owner.node in self.cores]
        self._owner_died(owners[pick % len(owners)])

    def _owner_died(self, owner: Owner) -> None:
        self.busy.pop(owner, None)
        for file in FILES:
            self.truth.pop((file, owner), None)
        self._carry_out(owner.node, self.cores[owner.node].step(OwnerDied(owner), self.now))

    @rule(pick=PICK, count=st.integers(1, 6))
    def deliver(self, pick: int, count: int) -> None:
        rng = random.Random(pick)
        for _ in range(count):
            full = [channel for channel, messages in self.channels.items() if messages]
            if full:
                self._deliver_one(rng.choice(sorted(full)))

    def _deliver_one(self, channel: tuple[int, int]) -> None:
        message = self.channels[channel].popleft()
        target = channel[1]
        if target in self.cores:
            self._carry_out(target, self.cores[target].deliver(message, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @rule(pick=PICK, back=st.booleans(), keep=st.booleans(), close=st.sampled_from(FILES))
    def recover(self, pick: int, back: bool, keep: bool, close: Resource) -> None:
        """A node departs, or all that have departed come back as newcomers; a view of its own."""
        gone = [node for node in range(NODES) if node not in self.cores]
        if not back and len(self.members) > 1:
            node = self.members[pick % len(self.members)]
            del self.cores[node]
            self.closed = {close}
            for owner in [owner for owner in OWNERS if owner.node == node]:
                self.busy.pop(owner, None)
                for file in FILES:
                    self.truth.pop((file, owner), None)
        elif back and gone:
            for node in gone:
                self.cores[node] = self._core(node)
        else:
            return
        self.members = sorted(self.cores)
        self.epoch += 1
        self.thawed = False
        for channel in list(self.channels):
            if not keep or not {*channel} <= {*self.cores}:
                del self.channels[channel]
        for node, core in self.cores.items():
            self._carry_out(
                node,
                core.new_epoch(
                    self.epoch,
                    self._master_of,
                    self.now,
                    members=self.members,
                    coordinator=self.members[0],
                ),
            )

    def _asserting(self) -> bool:
        return any(
            isinstance(message, RangeReassert) and message.epoch == self.epoch
            for messages in self.channels.values()
            for message in messages
        )

    @precondition(lambda self: not self.thawed)
    @rule()
    def thaw(self) -> None:
        if self._asserting():
            return
        self.thawed = True
        for node, core in self.cores.items():
            self._carry_out(node, core.thaw(self.now))

    @precondition(lambda self: self.closed and self.thawed)
    @rule()
    def reopen(self) -> None:
        self.closed = set()
        for node, core in self.cores.items():
            self._carry_out(node, core.reopened(self.now))

    # -- what must be true
    def _believed(self) -> dict[Key, list[Span]]:
        return {
            (resource, owner): holdings.spans
            for core in self.cores.values()
            for resource, owners in core.client.held.items()
            for owner, holdings in owners.items()
        }

    @invariant()
    def nobody_is_deceived(self) -> None:
        believed = self._believed()
        for file in FILES:
            for owner in OWNERS:
                if owner not in self.busy and not self._dying((file, owner)):
                    truth = self.truth.get((file, owner), Holdings()).spans
                    assert believed.get((file, owner), []) == truth, (file, owner)
        for core in self.cores.values():
            core.check()

    def _dying(self, key: Key) -> bool:
        resource, owner = key
        core = self.cores.get(owner.node)
        return core is not None and any(
            pending.ticket is None
            and pending.message.owner == owner
            and pending.message.resource == resource
            for pending in core.client.pending.values()
        )

    @invariant()
    def nobody_excludes_another(self) -> None:
        claims: dict[Resource, dict[Owner, Holdings]] = {}
        for (file, owner), spans in self._believed().items():
            claims.setdefault(file, {})[owner] = Holdings(list(spans))
        for core in self.cores.values():
            for pending in core.client.pending.values():
                message = pending.message
                held = claims.get(message.resource, {}).get(message.owner)
                if held is None:
                    continue
                if isinstance(message, RangeLower):
                    held.lower_to(message.start_bytes, message.end_bytes, message.keep)
                elif isinstance(message, RangeForget) or (
                    isinstance(message, RangeLock) and message.owner.kind is Kind.FLOCK
                ):
                    held.spans.clear()
        for owners in claims.values():
            for owner, holdings in owners.items():
                for other, others in owners.items():
                    if owner < other and (owner.kind is Kind.FLOCK) == (other.kind is Kind.FLOCK):
                        for span in holdings.spans:
                            assert others.obstacle(*span) is None, (owner, other, span)

    def teardown(self) -> None:
        self._settle()
        if not self.thawed:
            self.thaw()
        self.reopen()
        self._settle()
        mastered = {
            (file.resource, owner): holdings.spans
            for core in self.cores.values()
            for file in core.master.files.values()
            for owner, holdings in file.held.items()
        }
        assert mastered == self._believed()
        for owner in OWNERS:
            if owner.node in self.cores:
                self._owner_died(owner)
        self._settle()
        for core in self.cores.values():
            assert not core.client.held and not core.client.pending
            assert not core.master.files and not core.master.later

    def _settle(self) -> None:
        while full := [channel for channel, messages in self.channels.items() if messages]:
            self._deliver_one(full[0])


TestRangeCluster = RangeCluster.TestCase
TestRangeCluster.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(60))
def test_crowded(seed: int) -> None:
    """As above, with so many locks that most are in somebody's way."""
    rng = random.Random(seed)
    cluster = RangeCluster()
    speed = rng.choice([1, 4, 12])
    for _ in range(200):
        cluster.now += 0.01
        what = rng.random()
        pick = rng.randrange(100)
        file = FILES[int(rng.random() < 0.3)]
        if what < 0.5:
            access = rng.choice([Access.NONE, Access.READ, Access.WRITE])
            length = rng.randint(1, 4)
            cluster.set(pick, file, rng.randrange(6), length, access, rng.random() < 0.6)
        elif what < 0.9:
            cluster.deliver(pick, rng.randint(1, speed))
        elif what < 0.93:
            if cluster.busy:
                cluster.cancel(pick)
        elif what < 0.94:
            cluster.died(pick)
        elif what < 0.945:
            cluster.close(pick, file)
        elif what < 0.95:
            cluster.find(pick, file)
        elif what < 0.98:
            cluster.recover(pick, rng.random() < 0.5, rng.random() < 0.5, file)
        elif not cluster.thawed:
            cluster.thaw()
        elif cluster.closed:
            cluster.reopen()
        else:
            cluster.sleep(0.1)
        cluster.nobody_is_deceived()
        cluster.nobody_excludes_another()
    cluster.teardown()
