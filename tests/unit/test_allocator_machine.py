"""The allocator against two sets, by a hypothesis rule machine, on a cache that forgets."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from csvfs.allocation.allocator import GOOD_RUN_UNITS
from csvfs.allocation.group import RESERVE_UNITS
from csvfs.errors import Damaged, NoSpace
from csvfs.ondisk.geometry import GROUP_UNITS, UNITS_PER_MAP
from tests.unit.test_allocator import TWO_GROUPS, Volume


class AllocatorMachine(RuleBasedStateMachine):
    """A volume and two sets: data units, and metadata blocks in use."""

    @initialize(
        units=st.sampled_from([32, 100, TWO_GROUPS, 2 * GROUP_UNITS + 40]),
        seed=st.integers(0, 1000),
        forget=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def start(self, units: int, seed: int, forget: float) -> None:
        self.volume = Volume(units, seed, forget)
        self.geometry = self.volume.geometry
        self.data: set[int] = set()
        self.blocks: set[int] = set()

    def run_behind(self, unit: int, taken: set[int] | None = None) -> int:
        """Free units from ``unit`` to the end of its map."""
        if not self.geometry.holds_unit(unit):
            return 0
        taken = self.taken() if taken is None else taken
        group, _, position = self.geometry.map_place(unit)
        end = unit - position + UNITS_PER_MAP
        end = min(end, self.geometry.group_first_unit(group) + self.geometry.group_units(group))
        count = 0
        while unit + count < end and unit + count not in taken:
            count += 1
        return count

    def taken(self) -> set[int]:
        own = {self.geometry.group_first_unit(group) for group in self.volume.numbers}
        return self.data | own | {address // 16 for address in self.blocks}

    def available(self, group: int, privileged: bool) -> int:
        first = self.geometry.group_first_unit(group)
        inside = range(first, first + self.geometry.group_units(group))
        units = len(inside) - sum(unit in inside for unit in self.taken())
        return units if privileged else max(units - RESERVE_UNITS, 0)

    def longest(self, group: int) -> int:
        """Longest run of free units of a group, by counting."""
        best, unit, taken = 0, self.geometry.group_first_unit(group), self.taken()
        end = unit + self.geometry.group_units(group)
        while unit < end:
            count = self.run_behind(unit, taken)
            best = max(best, count)
            unit += max(count, 1)
        return best

    @rule(
        goal=st.none() | st.integers(0, 2 * GROUP_UNITS + 200),
        count=st.integers(1, 200) | st.sampled_from([1000, 5000]),
        short=st.booleans(),
        privileged=st.booleans(),
        groups=st.lists(st.integers(0, 2), max_size=2),
        busy=st.sets(st.integers(0, 2)),
    )
    def allocate(
        self,
        goal: int | None,
        count: int,
        short: bool,
        privileged: bool,
        groups: list[int],
        busy: set[int],
    ) -> None:
        groups = [group for group in groups if group < self.geometry.group_count]
        self.volume.blocks.locks.busy = {self.volume.resources.group(group) for group in busy}
        minimum = 1 if short else min(count, UNITS_PER_MAP)
        try:
            run = self.volume.allocate(count, goal, minimum, groups, privileged)
        except NoSpace:
            for group in self.volume.numbers:
                if self.available(group, privileged) >= minimum:
                    assert self.longest(group) < minimum
            return
        assert minimum <= run.units <= count
        assert self.run_behind(run.first_unit) >= run.units
        group = self.geometry.group_of_unit(run.first_unit)
        assert self.available(group, privileged) >= run.units
        wanted = max(minimum, min(count, GOOD_RUN_UNITS))
        if goal is not None and self.run_behind(goal) >= wanted:
            at_goal = self.geometry.group_of_unit(goal)
            if at_goal not in busy and self.available(at_goal, privileged) >= wanted:
                assert run.first_unit == goal
        self.data |= set(range(run.first_unit, run.first_unit + run.units))

    @rule(group=st.integers(0, 2), count=st.integers(1, 40), privileged=st.booleans())
    def allocate_blocks(self, group: int, count: int, privileged: bool) -> None:
        group = min(group, self.geometry.group_count - 1)
        self.volume.blocks.locks.busy.clear()
        for _ in range(count):
            units = {address // 16 for address in self.blocks}
            try:
                address = self.volume.allocate_block(group, privileged=privileged)
            except NoSpace:
                assert len(self.blocks) == 16 * len(units)
                assert not any(self.available(g, privileged) for g in self.volume.numbers)
                return
            assert address not in self.blocks and address // 16 not in self.data
            if address // 16 not in units:
                here = {u for u in units if self.geometry.group_of_unit(u) == group}
                inside = sum(address // 16 in here for address in self.blocks)
                assert inside == 16 * len(here), "a unit of the group had a free block"
            self.blocks.add(address)

    @rule(data=st.data(), count=st.integers(1, 300))
    def free(self, data: st.DataObject, count: int) -> None:
        if not self.data:
            return
        first = data.draw(st.sampled_from(sorted(self.data)))
        group = self.geometry.group_of_unit(first)
        end = first
        while (
            end < first + count and end in self.data and self.geometry.group_of_unit(end) == group
        ):
            end += 1
        self.volume.free(first, end - first)
        self.data -= set(range(first, end))

    @rule(data=st.data(), count=st.integers(1, 30))
    def free_blocks(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.blocks))):
            address = data.draw(st.sampled_from(sorted(self.blocks)))
            self.volume.free_block(address)
            self.blocks.remove(address)

    @rule(unit=st.integers(0, 2 * GROUP_UNITS + 200), count=st.integers(1, 2000))
    def wrong_frees(self, unit: int, count: int) -> None:
        before = dict(self.volume.blocks.home)
        if not set(range(unit, unit + count)) <= self.data:
            with pytest.raises(Damaged):
                self.volume.free(unit, count)
        if unit * 16 + count % 16 not in self.blocks:
            with pytest.raises(Damaged):
                self.volume.free_block(unit * 16 + count % 16)
        assert self.volume.blocks.home == before

    @rule()
    def fill(self) -> None:
        if self.geometry.group_count == 1:
            self.volume.fill()
            self.data = self.volume.states()[0]
            assert not any(self.available(group, False) for group in self.volume.numbers)

    @invariant()
    def equals_the_model(self) -> None:
        assert self.volume.states() == (self.data, self.blocks)
        free = self.volume.totals().free_units
        assert free == sum(self.available(group, True) for group in self.volume.numbers)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.full
def test_long_histories() -> None:
    run_state_machine_as_test(
        AllocatorMachine,
        settings=settings(max_examples=300, stateful_step_count=50, deadline=None),
    )
