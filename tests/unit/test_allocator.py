"""The allocator: where runs and blocks are found, what is refused, what full groups cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from csvfs.allocation.allocator import Groups, Run
from csvfs.allocation.group import RESERVE_UNITS, Group
from csvfs.allocation.space import Totals
from csvfs.engine.locks import Resources
from csvfs.errors import Damaged, NoSpace
from csvfs.journal.transaction import BlockReader, Transaction
from csvfs.ondisk.geometry import GROUP_UNITS, UNITS_PER_MAP, Geometry
from csvfs.ondisk.groups import MAP_STATES_OFFSET, GroupHeader, UnitState, unit_state, used_blocks
from tests.unit.forgetful import VOLUME_ID, ForgetfulBlocks


class Volume:
    """Nothing but groups; ``units`` of them, the last group short."""

    def __init__(self, units: int, seed: int = 0, forget: float = 0.0) -> None:
        self.geometry = Geometry.of_units(23 + 16 + units + 1, 1, 16)
        self.resources = Resources(self.geometry)
        self.groups = Groups(self.geometry, self.resources)
        self.blocks = ForgetfulBlocks(seed, forget)
        self.numbers = range(self.geometry.group_count)
        for number in self.numbers:
            first = self.geometry.group_first_unit(number)
            header = GroupHeader.fresh(number, first, self.geometry.group_units(number))
            self.blocks.home[header.address] = bytes(header.encode(VOLUME_ID, 1))
            with self.groups.space.reading():
                self.groups.space.was_read(number, header.free_units, 0)

    def allocate(
        self,
        count: int,
        goal: int | None = None,
        minimum: int = 1,
        groups: Sequence[int] = (),
        privileged: bool = False,
    ) -> Run:
        return self.blocks.transact(
            lambda tx: self.groups.allocate_units(tx, count, goal, minimum=minimum, groups=groups),
            privileged=privileged,
        )

    def allocate_block(
        self, group: int, groups: Sequence[int] = (), privileged: bool = False
    ) -> int:
        return self.blocks.transact(
            lambda tx: self.groups.allocate_block(tx, group, groups=groups), privileged=privileged
        )

    def free(self, first: int, count: int) -> None:
        self.blocks.transact(lambda tx: self.groups.free_units(tx, first, count))

    def free_block(self, address: int) -> None:
        self.blocks.transact(lambda tx: self.groups.free_block(tx, address))

    def is_metadata(self, address: int) -> bool:
        return self.blocks.run(lambda reader: self.groups.is_metadata_block(reader, address))

    def totals(self) -> Totals:
        """As the headers say; what is kept for statfs(2) says the same."""

        def body(reader: BlockReader) -> Totals:
            groups = [Group(reader, self.geometry, number) for number in self.numbers]
            return Totals(
                sum(group.unit_count for group in groups),
                sum(group.free_units for group in groups),
                sum(group.available(False) for group in groups),
                sum(group.free_metadata_blocks for group in groups),
            )

        found = self.blocks.run(body)
        assert self.groups.space.totals() == found
        self.groups.space.check()
        return found

    def fill(self, privileged: bool = False) -> int:
        """Allocate until nothing is left: how many units that were."""
        total = 0
        try:
            while True:
                total += self.allocate(UNITS_PER_MAP, privileged=privileged).units
        except NoSpace:
            return total

    def _sound_group(self, number: int, reader: BlockReader) -> Group:
        group = Group(reader, self.geometry, number)
        assert list(group.faults()) == []
        return group

    def states(self) -> tuple[set[int], set[int]]:
        """Data units, and metadata blocks in use, as the maps say."""
        data, blocks = set(), set()
        for number in self.numbers:
            group = self.blocks.run(partial(self._sound_group, number))
            for index in range(group.map_count):
                if not group.is_ready(index):
                    continue
                block = group.read_map(index)
                first = group.first_unit + index * UNITS_PER_MAP
                for position in range(group.map_units(index)):
                    if not block[MAP_STATES_OFFSET + position // 4]:
                        continue
                    state = unit_state(block, position)
                    if state is UnitState.DATA:
                        data.add(first + position)
                    elif state is UnitState.METADATA:
                        bits = used_blocks(block, position)
                        at = (first + position) * 16
                        blocks |= {at + n for n in range(16) if bits >> n & 1}
        return data, blocks


TWO_GROUPS = GROUP_UNITS + 1900


def test_a_run_begins_at_its_goal() -> None:
    volume = Volume(TWO_GROUPS)
    goal = volume.geometry.group_first_unit(0) + 5000
    assert volume.allocate(10, goal) == Run(goal, 10)
    assert volume.allocate(10, goal + 10) == Run(goal + 10, 10)
    assert volume.allocate(10, goal) == Run(goal + 20, 10), "the next free place behind it"
    second = volume.geometry.group_first_unit(1) + 7
    assert volume.allocate(1, second) == Run(second, 1)


def test_a_map_is_written_when_it_is_first_used() -> None:
    volume = Volume(TWO_GROUPS)
    header = volume.geometry.group_header(0)
    volume.allocate(1, volume.geometry.group_first_unit(0) + 3 * UNITS_PER_MAP)
    assert header + 1 + 3 in volume.blocks.home
    assert len(volume.blocks.home) == 3
    fields = GroupHeader.unpack(volume.blocks.home[header])
    assert (fields.map_ready, fields.flags, fields.free_units) == (1 << 3, 0, GROUP_UNITS - 2)


def test_a_run_ends_with_its_map_and_the_next_one_continues_it() -> None:
    volume = Volume(TWO_GROUPS)
    goal = volume.geometry.group_first_unit(0) + UNITS_PER_MAP
    first = volume.allocate(5000, goal)
    assert first == Run(goal, UNITS_PER_MAP)
    assert volume.allocate(5000, goal + first.units) == Run(goal + UNITS_PER_MAP, UNITS_PER_MAP)


def test_what_has_no_goal_leaves_the_start_of_the_group_to_metadata() -> None:
    volume = Volume(TWO_GROUPS)
    first = volume.geometry.group_first_unit(0)
    assert volume.allocate(1).first_unit == first + GROUP_UNITS // 32
    assert volume.allocate_block(0) == (first + 1) * 16


def test_short_runs_only_where_there_is_no_long_one() -> None:
    volume = Volume(2 * GROUP_UNITS)
    first = volume.geometry.group_first_unit(0)
    # The first group keeps nothing but single units.
    for index in range(15):
        for position in range(index == 0, UNITS_PER_MAP, 64):
            volume.allocate(63, first + index * UNITS_PER_MAP + position, minimum=1)
    run = volume.allocate(100, first + 100)
    assert volume.geometry.group_of_unit(run.first_unit) == 1 and run.units == 100
    assert volume.allocate(1, first + 100).first_unit == first + 128


def test_preferred_groups_come_before_the_others() -> None:
    volume = Volume(4 * GROUP_UNITS)
    first = volume.geometry.group_first_unit
    assert volume.geometry.group_of_unit(volume.allocate(1, groups=[2, 3]).first_unit) == 2
    volume.blocks.locks.busy = {volume.resources.group(1), volume.resources.group(2)}
    assert volume.geometry.group_of_unit(volume.allocate(1, first(1), groups=[2, 3])[0]) == 3
    assert volume.geometry.group_of(volume.allocate_block(1, groups=[2])) == 3
    assert volume.blocks.locks.busy, "nobody waited"


def test_a_busy_group_is_waited_for_when_all_others_are_full() -> None:
    volume = Volume(100)
    volume.blocks.locks.busy = {volume.resources.group(0)}
    volume.allocate(1)
    assert not volume.blocks.locks.busy
    volume.fill()
    with pytest.raises(NoSpace):
        volume.allocate(1)


def test_the_reserve_is_for_the_privileged() -> None:
    volume = Volume(GROUP_UNITS + 100)
    assert volume.fill() == GROUP_UNITS + 100 - 2 - 2 * RESERVE_UNITS
    assert volume.totals() == Totals(GROUP_UNITS + 100, 2 * RESERVE_UNITS, 0, 0)
    with pytest.raises(NoSpace):
        volume.allocate_block(0)
    address = volume.allocate_block(0, privileged=True)
    volume.allocate_block(0)
    assert volume.totals().free_metadata_blocks == 14
    volume.free_block(address)
    assert volume.fill(privileged=True) == 2 * RESERVE_UNITS - 1
    assert volume.totals().free_units == 0


def test_what_is_freed_is_found_again_in_a_full_volume() -> None:
    volume = Volume(2 * GROUP_UNITS + 500)
    volume.fill()
    unit = volume.geometry.group_first_unit(1) + 20_000
    volume.free(unit, 3)
    assert volume.allocate(10, volume.geometry.group_first_unit(0)) == Run(unit, 3)
    # Another node freed some: this one last saw the group full.
    other = Groups(volume.geometry, volume.resources)
    volume.blocks.transact(lambda tx: other.free_units(tx, unit, 3))
    assert volume.allocate(3, volume.geometry.group_first_unit(0), minimum=3) == Run(unit, 3)
    with pytest.raises(NoSpace, match="2 free units in a row"):
        volume.allocate(2, minimum=2)


def test_metadata_units_are_filled_and_become_free_again() -> None:
    volume = Volume(TWO_GROUPS, forget=0.3)
    addresses = [volume.allocate_block(0) for _ in range(40)]
    assert len({address // 16 for address in addresses}) == 3
    assert all(volume.is_metadata(address) for address in addresses)
    assert not volume.is_metadata(max(addresses) + 1)
    assert not volume.is_metadata(0)
    assert volume.totals().free_metadata_blocks == 8
    volume.free_block(addresses[3])
    assert not volume.is_metadata(addresses[3])
    assert volume.allocate_block(0) == addresses[3]
    before = volume.totals().free_units
    for address in addresses:
        volume.free_block(address)
    assert volume.totals() == Totals(TWO_GROUPS, before + 3, before + 3 - 2 * RESERVE_UNITS, 0)


def test_wrong_frees_name_the_unit_and_change_nothing() -> None:
    volume = Volume(TWO_GROUPS)
    first = volume.geometry.group_first_unit(0)
    run = volume.allocate(20, first + 100)
    block = volume.allocate_block(0)
    before = dict(volume.blocks.home)
    second = volume.geometry.group_first_unit(1)
    for unit, count, words in (
        (first + 110, 11, f"unit {first + 120} of group 0 .* is free"),
        (first + 99, 3, f"unit {first + 99} of group 0 .* is free"),
        (first, 1, f"unit {first} of group 0 .* is reserved"),
        (block // 16, 1, f"unit {block // 16} of group 0 .* is metadata"),
        (first + 9000, 1, f"unit {first + 9000} of group 0 .* is free"),
        (second - 1, 2, "are not within group 0"),
        (3, 1, "unit 3 .* in no allocation group"),
        (run.first_unit, 0, "are not within group 0"),
    ):
        with pytest.raises(Damaged, match=words):
            volume.free(unit, count)
    for address, words in (
        (block + 1, f"block {block + 1} .unit {block // 16} of group 0"),
        (run.first_unit * 16, f"unit {run.first_unit} of group 0 .* is data"),
        (first * 16, "is reserved"),
        (5, "in no allocation group"),
    ):
        with pytest.raises(Damaged, match=words):
            volume.free_block(address)
    assert volume.blocks.home == before
    volume.free(*run)
    with pytest.raises(Damaged, match="is free"):
        volume.free(*run)


def test_a_free_over_several_maps() -> None:
    volume = Volume(TWO_GROUPS, forget=0.5)
    first = volume.geometry.group_first_unit(0) + 3000
    position = first
    while position < first + 6000:
        position += volume.allocate(first + 6000 - position, position).units
    volume.free(first, 6000)
    assert volume.states() == (set(), set())


def test_a_header_that_contradicts_its_maps_is_an_error() -> None:
    volume = Volume(100)
    volume.fill(privileged=True)
    address = volume.geometry.group_header(0)
    block = bytearray(volume.blocks.home[address])
    fields = GroupHeader.unpack(block)
    GroupHeader(
        fields.index, fields.first_unit, fields.unit_count, 5, 3, fields.map_ready, fields.flags
    ).pack_into(block)
    volume.blocks.home[address] = bytes(block)
    with pytest.raises(Damaged, match="group 0: the header says 5 free units"):
        volume.allocate(1)
    with pytest.raises(Damaged, match="group 0: the header says 5 free units"):
        volume.allocate_block(0)
    faults = volume.blocks.run(lambda reader: list(Group(reader, volume.geometry, 0).faults()))
    assert len(faults) == 2


def test_the_headers_of_full_groups_are_read_in_few_rounds() -> None:
    volume = Volume(60 * GROUP_UNITS)
    for number in volume.numbers[:-1]:
        address = volume.geometry.group_header(number)
        header = GroupHeader(number, address // 16, GROUP_UNITS, 0)
        volume.blocks.home[address] = bytes(header.encode(VOLUME_ID, 1))
    run = volume.allocate(1, volume.geometry.group_first_unit(0))
    assert volume.geometry.group_of_unit(run.first_unit) == 59
    assert volume.blocks.restarts <= 5


def test_groups_that_were_seen_full_are_not_looked_into_again() -> None:
    volume = Volume(60 * GROUP_UNITS)
    for number in volume.numbers[:-1]:
        address = volume.geometry.group_header(number)
        header = GroupHeader(number, address // 16, GROUP_UNITS, RESERVE_UNITS)
        volume.blocks.home[address] = bytes(header.encode(VOLUME_ID, 1))
    for allocate in (volume.allocate, lambda _: volume.allocate_block(0)):
        allocate(1)
        volume.blocks.locks.taken.clear()
        allocate(1)
        assert volume.blocks.locks.taken == [volume.resources.group(59)]


def test_a_body_may_allocate_and_free_many_times() -> None:
    volume = Volume(TWO_GROUPS, forget=1.0)
    first = volume.geometry.group_first_unit(0)

    def body(tx: Transaction) -> list[Run]:
        runs = [volume.groups.allocate_units(tx, 7, first + 2000 * n) for n in range(1, 10)]
        for run in runs[::2]:
            volume.groups.free_units(tx, *run)
        assert tx.blocks_used <= 1 + 9
        return runs[1::2]

    kept = volume.blocks.transact(body)
    data, _ = volume.states()
    assert data == {unit for run in kept for unit in range(run[0], run[0] + run[1])}
