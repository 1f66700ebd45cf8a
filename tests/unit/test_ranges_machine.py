"""Random histories of byte-range locks against the naive ones, byte by byte."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from lockmgr.messages import Resource
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeEffect,
    RangeFound,
    SetRange,
)
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner
from tests.unit.ranges_naive import SIZE, NaiveRanges, byte_range

FILES = [Resource(b"a", b"\0"), Resource(b"b", b"\1")]
OWNERS = [
    Owner(Kind.POSIX, 0, 1, pid=11),
    Owner(Kind.POSIX, 0, 2, pid=12),
    Owner(Kind.POSIX, 0, 3),
    Owner(Kind.OFD, 0, 4, pid=11),
    Owner(Kind.OFD, 0, 5),
    Owner(Kind.FLOCK, 0, 6, pid=11),
    Owner(Kind.FLOCK, 0, 7, pid=11),
    Owner(Kind.FLOCK, 0, 8, pid=12),
]
ACCESS = st.sampled_from([Access.READ, Access.WRITE])


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.integers(0, SIZE - 1))
    end = draw(st.integers(start + 1, SIZE))
    return start, END if end == SIZE else end


class RangesAgainstNaive(RuleBasedStateMachine):
    """One node that masters its own files: the same outcomes, the same bytes, the same waits."""

    def __init__(self) -> None:
        super().__init__()
        self.core = RangeCore(0, 1, lambda _resource: 0)
        self.naive = NaiveRanges()
        self.outcomes: dict[int, Outcome] = {}
        self.tickets = 0
        self.waiting: set[int] = set()

    def _carry_out(self, effects: list[RangeEffect]) -> None:
        for effect in effects:
            if isinstance(effect, RangeDone):
                assert effect.ticket not in self.outcomes
                self.outcomes[effect.ticket] = effect.outcome
        self._compare()

    def _compare(self) -> None:
        assert self.outcomes == self.naive.outcomes
        held = {
            (FILES.index(resource), owner): spans.spans
            for resource, owners in self.core.client.held.items()
            for owner, spans in owners.items()
        }
        mastered = {
            (FILES.index(file.resource), owner): spans.spans
            for file in self.core.master.files.values()
            for owner, spans in file.held.items()
        }
        assert held == mastered
        for key in {*held, *self.naive.bytes}:
            array = [Access.NONE] * SIZE
            for span in held.get(key, ()):
                for byte in byte_range(span.start, span.end):
                    array[byte] = span.access
            assert array == self.naive.bytes.get(key, [Access.NONE] * SIZE), key
        self.waiting = {wait.ticket for wait in self.naive.waits}
        assert sum(len(file.waiting) for file in self.core.master.files.values()) == len(
            self.waiting
        )
        self.core.check()

    def _ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    @rule(
        file=st.integers(0, 1),
        owner=st.sampled_from(OWNERS),
        bounds=ranges(),
        access=st.sampled_from([Access.NONE, Access.READ, Access.WRITE, Access.WRITE]),
        wait=st.booleans(),
    )
    def set(
        self, file: int, owner: Owner, bounds: tuple[int, int], access: Access, wait: bool
    ) -> None:
        start, end = (0, END) if owner.kind is Kind.FLOCK else bounds
        ticket = self._ticket()
        self.naive.set(ticket, file, owner, start, end, access, wait)
        event = SetRange(ticket, FILES[file], owner, start, end, access, wait)
        self._carry_out(self.core.step(event, 0.0))

    @rule(file=st.integers(0, 1), owner=st.sampled_from(OWNERS), bounds=ranges(), access=ACCESS)
    def test(self, file: int, owner: Owner, bounds: tuple[int, int], access: Access) -> None:
        start, end = (0, END) if owner.kind is Kind.FLOCK else bounds
        event = FindConflict(self._ticket(), FILES[file], owner, start, end, access)
        (found,) = self.core.step(event, 0.0)
        assert isinstance(found, RangeFound)
        holders = self.naive.holders(file, owner, byte_range(start, end), access)
        if found.conflict is None:
            assert not holders
        else:
            hold = found.conflict
            assert hold.owner in holders
            array = self.naive.bytes[file, hold.owner]
            covered = byte_range(hold.start_bytes, hold.end_bytes)
            assert all(array[byte] is hold.access for byte in covered)
            first, last = covered[0], covered[-1]
            assert first == 0 or array[first - 1] is not hold.access
            assert last == SIZE - 1 or array[last + 1] is not hold.access

    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        if self.waiting:
            ticket = sorted(self.waiting)[pick % len(self.waiting)]
            self.naive.cancel(ticket)
            self._carry_out(self.core.step(CancelRange(ticket), 0.0))

    @rule(file=st.integers(0, 1), owner=st.sampled_from(OWNERS))
    def close(self, file: int, owner: Owner) -> None:
        ticket = self._ticket()
        self.naive.close(file, owner)
        self.naive.outcomes[ticket] = Outcome.DONE
        self._carry_out(self.core.step(ForgetFile(ticket, FILES[file], owner), 0.0))

    @rule(owner=st.sampled_from(OWNERS))
    def died(self, owner: Owner) -> None:
        client = self.core.client
        files = [file for file, owners in client.held.items() if owner in owners]
        files += [pending.message.resource for pending in client.pending.values()]
        self.naive.died(owner, [FILES.index(file) for file in dict.fromkeys(files)])
        self._carry_out(self.core.step(OwnerDied(owner), 0.0))

    def teardown(self) -> None:
        for owner in OWNERS:
            self.died(owner)
        assert not self.core.master.files and not self.core.client.held
        assert not self.core.client.pending


TestRangesAgainstNaive = RangesAgainstNaive.TestCase
TestRangesAgainstNaive.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_crowded(seed: int) -> None:
    """As above, with so many locks that most are in somebody's way."""
    rng = random.Random(seed)
    machine = RangesAgainstNaive()
    owners = rng.sample(OWNERS, rng.randint(3, len(OWNERS)))
    for _ in range(120):
        what = rng.random()
        file = int(rng.random() < 0.3)
        owner = rng.choice(owners)
        start = rng.randrange(SIZE)
        end = min(SIZE, start + rng.randint(1, 5))
        bounds = (start, END if end == SIZE else end)
        access = rng.choice([Access.READ, Access.WRITE])
        if what < 0.55:
            machine.set(file, owner, bounds, access, wait=rng.random() < 0.6)
        elif what < 0.8:
            machine.set(file, owner, bounds, Access.NONE, wait=False)
        elif what < 0.9:
            machine.test(file, owner, bounds, access)
        elif what < 0.96:
            machine.cancel(rng.randrange(99))
        elif what < 0.98:
            machine.close(file, owner)
        else:
            machine.died(owner)
    machine.teardown()
