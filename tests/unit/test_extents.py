"""Extents against a list of units, on a cache that forgets."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from csvfs.btree.edit import TreeEditor
from csvfs.btree.tree import TreeRoot
from csvfs.btree.verify import verify
from csvfs.data import extents
from csvfs.data.extents import Extent, RemovedUnits, Segment
from csvfs.journal.transaction import Transaction
from csvfs.ondisk.block import BadBlock, BlockType, new_block
from csvfs.ondisk.inode import EXTENT_VALUE
from tests.unit.forgetful import VOLUME_ID, Addresses, ForgetfulBlocks

INO = 77
ROOT = TreeRoot.of_file(INO)
T = TypeVar("T")


class File:
    """The extents of one file."""

    def __init__(self, seed: int = 0, forget: float = 0.0) -> None:
        self.blocks = ForgetfulBlocks(seed, forget)
        self.addresses = Addresses()
        block = new_block(BlockType.INODE, INO, INO, VOLUME_ID)
        ROOT.initialise(block)
        self.blocks.home[INO] = bytes(block)

    def editor(self, tx: Transaction) -> TreeEditor:
        source = self.addresses.for_body(tx)
        return TreeEditor(tx, ROOT, source.allocate, source.release)

    def insert(self, logical: int, physical: int, count: int, written: bool = False) -> None:
        self.blocks.transact(
            lambda tx: extents.insert_units(
                self.editor(tx), logical, physical, count, written=written
            )
        )

    def set_written(self, first: int, count: int, written: bool = True) -> int:
        return self.blocks.transact(
            lambda tx: extents.set_written(self.editor(tx), first, count, written=written)
        )

    def remove(
        self, first: int, end: int, blocks: int | None = None, records: int | None = None
    ) -> RemovedUnits:
        return self.blocks.transact(
            lambda tx: extents.remove_range(
                self.editor(tx), first, end, max_blocks=blocks, max_extents=records
            )
        )

    def lookup(self, first: int, count: int) -> list[Segment]:
        return self.blocks.run(lambda reader: extents.lookup(reader, ROOT, first, count))

    def records(self) -> list[Extent]:
        return self.blocks.run(lambda reader: list(extents.extents(reader, ROOT)))

    def goal(self, unit: int) -> int | None:
        return self.blocks.run(lambda reader: extents.goal(reader, ROOT, unit))


def test_a_file_without_extents_is_one_hole() -> None:
    file = File()
    assert file.lookup(5, 10) == [Segment(5, None, 10, 0)]
    assert file.goal(5) is None
    assert file.remove(0, 1 << 40) == ([], 1 << 40, True)


def test_appending_joins_up_to_64_units() -> None:
    file = File()
    for unit in range(130):
        file.insert(unit, 1000 + unit, 1, written=unit % 2 == 0)
    even = 0x5555_5555_5555_5555
    assert file.records() == [
        Extent(0, 1000, 64, even),
        Extent(64, 1064, 64, even),
        Extent(128, 1128, 2, 1),
    ]


def test_filling_a_hole_joins_both_sides() -> None:
    file = File()
    file.insert(0, 1000, 10, written=True)
    file.insert(20, 1020, 10)
    file.insert(10, 1010, 10)
    assert file.records() == [Extent(0, 1000, 30, (1 << 10) - 1)]


def test_what_is_not_contiguous_stays_apart() -> None:
    file = File()
    file.insert(0, 1000, 10)
    file.insert(10, 2000, 10)
    file.insert(21, 2011, 10)
    assert [e.logical for e in file.records()] == [0, 10, 21]
    assert file.lookup(5, 20) == [
        Segment(5, 1005, 5, 0),
        Segment(10, 2000, 10, 0),
        Segment(20, None, 1, 0),
        Segment(21, 2011, 4, 0),
    ]


def test_a_big_run_becomes_full_records() -> None:
    file = File()
    file.insert(3, 5000, 26000)
    assert len(file.records()) == -(-26000 // 64)
    assert file.lookup(3, 26000)[0] == Segment(3, 5000, 64, 0)
    assert file.set_written(3, 26000) == 26000
    assert file.set_written(3, 26000) == 0
    assert file.set_written(10, 100, written=False) == 100
    assert sum(e.written.bit_count() for e in file.records()) == 25900


def test_punching_the_middle_of_a_record() -> None:
    file = File()
    file.insert(0, 1000, 64, written=True)
    assert file.remove(10, 20) == RemovedUnits([(1010, 10)], 20, True)
    assert file.records() == [
        Extent(0, 1000, 10, (1 << 10) - 1),
        Extent(20, 1020, 44, (1 << 44) - 1),
    ]
    assert file.lookup(9, 12) == [
        Segment(9, 1009, 1, 1),
        Segment(10, None, 10, 0),
        Segment(20, 1020, 1, 1),
    ]


def test_removal_in_batches_gives_every_unit_once() -> None:
    file = File(forget=0.3)
    for unit in range(0, 2000, 2):
        file.insert(unit, 10_000 + unit, 1)
    runs: list[tuple[int, int]] = []
    position, batches = 3, 0
    while True:
        batch = file.remove(position, 1801, 3, 100)
        runs += batch.runs
        assert batch.units == len(batch.runs)
        position = batch.next_unit
        batches += 1
        if batch.done:
            break
    assert batches > 8 and position == 1801
    assert runs == [(10_000 + unit, 1) for unit in range(4, 1801, 2)]
    assert file.blocks.run(lambda reader: verify(reader, ROOT)).entries == 1000 - len(runs)


def test_a_batch_that_only_cuts_a_record_gets_on() -> None:
    file = File()
    file.insert(0, 1000, 10)
    file.insert(10, 2000, 10)
    assert file.remove(5, 20, 1) == RemovedUnits([(1005, 5)], 10, False)
    assert file.remove(10, 20, 1) == RemovedUnits([(2000, 10)], 20, True)


def test_mapping_twice_and_writing_a_hole_are_refused() -> None:
    file = File()
    file.insert(10, 1000, 10)
    before = dict(file.blocks.home)
    for logical, count in ((10, 1), (5, 6), (19, 5), (5, 50), (12, 2)):
        with pytest.raises(extents.RangeMapped):
            file.insert(logical, 5000, count)
    for logical, count in ((9, 2), (19, 2), (30, 1), (0, 1)):
        with pytest.raises(extents.RangeNotMapped):
            file.set_written(logical, count)
    assert file.blocks.home == before


def test_goals() -> None:
    file = File()
    file.insert(100, 5000, 10)
    assert file.goal(110) == 5010
    assert file.goal(150) == 5050, "room for the gap"
    assert file.goal(110 + extents.NEAR_UNITS + 1) == 5010, "too far: go on behind it"
    assert file.goal(90) == 4990
    assert file.goal(0) == 4900
    file.insert(5000, 10, 1)
    assert file.goal(4999) == 5010


@pytest.mark.parametrize(
    ("place", "written", "reason"),
    [
        (1000 << 8 | 64, 0, "65 units"),
        (1000 << 8 | 9, 1 << 10, "written mask 0x400"),
        (0 << 8 | 9, 0, "units at 0"),
    ],
)
def test_an_impossible_record_is_an_error_that_names_the_block(
    place: int, written: int, reason: str
) -> None:
    file = File()
    value = EXTENT_VALUE.pack(place, written)
    file.blocks.transact(lambda tx: file.editor(tx).insert(7, value))
    for call in (
        lambda: file.lookup(0, 100),
        lambda: file.insert(0, 5000, 1),
        lambda: file.set_written(7, 3),
        lambda: file.remove(0, 100),
        file.records,
    ):
        with pytest.raises(BadBlock, match=reason) as caught:
            call()
        assert caught.value.address == INO


def test_overlapping_records_are_an_error() -> None:
    file = File()
    file.insert(0, 1000, 10)
    value = EXTENT_VALUE.pack(2000 << 8 | 4, 0)
    file.blocks.transact(lambda tx: file.editor(tx).insert(5, value))
    with pytest.raises(BadBlock, match="unit 5 overlaps"):
        file.records()


UNITS = 700


class ExtentMachine(RuleBasedStateMachine):
    """A file and a list: for each logical unit its physical one and whether it is written."""

    @initialize(seed=st.integers(0, 1000), forget=st.sampled_from([0.0, 0.5, 1.0]))
    def start(self, seed: int, forget: float) -> None:
        self.file = File(seed, forget)
        self.model: dict[int, tuple[int, bool]] = {}
        self.next_physical = 1

    @rule(
        first=st.integers(0, UNITS),
        count=st.integers(1, 200),
        written=st.booleans(),
        how=st.sampled_from(["continue", "room", "apart"]),
    )
    def fill_the_holes(self, first: int, count: int, written: bool, how: str) -> None:
        for segment in self.file.lookup(first, count):
            if segment.physical is not None:
                continue
            physical = self.next_physical
            if how == "continue":
                physical = self.file.goal(segment.logical) or physical
            run = range(physical, physical + segment.units)
            if physical <= 0 or any(p in run for p, _ in self.model.values()):
                run = range(self.next_physical, self.next_physical + segment.units)
            self.file.insert(segment.logical, run.start, segment.units, written)
            for at, unit in enumerate(range(segment.logical, segment.end)):
                self.model[unit] = (run.start + at, written)
            self.next_physical = max(self.next_physical, run.stop) + (how == "apart")

    @rule(count=st.integers(1, 250), stride=st.integers(2, 5), first=st.integers(0, 50))
    def many_small_ones(self, count: int, stride: int, first: int) -> None:
        for unit in range(first, first + count * stride, stride):
            if unit not in self.model:
                self.file.insert(unit, self.next_physical, 1)
                self.model[unit] = (self.next_physical, False)
                self.next_physical += 2

    @rule(first=st.integers(0, UNITS), count=st.integers(1, 150), written=st.booleans())
    def set_written(self, first: int, count: int, written: bool) -> None:
        units = range(first, first + count)
        if any(unit not in self.model for unit in units):
            with pytest.raises(extents.RangeNotMapped):
                self.file.set_written(first, count, written)
            return
        changed = sum(self.model[unit][1] != written for unit in units)
        assert self.file.set_written(first, count, written) == changed
        for unit in units:
            self.model[unit] = (self.model[unit][0], written)

    @rule(
        first=st.integers(0, UNITS),
        count=st.integers(1, 400),
        blocks=st.none() | st.integers(1, 6),
        records=st.none() | st.integers(1, 80),
    )
    def remove_range(self, first: int, count: int, blocks: int | None, records: int | None) -> None:
        end = first + count
        expected = [self.model.pop(unit)[0] for unit in range(first, end) if unit in self.model]
        removed: list[int] = []
        while True:
            batch = self.file.remove(first, end, blocks, records)
            for physical, run in batch.runs:
                removed += range(physical, physical + run)
            assert batch.done or batch.next_unit > first
            first = batch.next_unit
            if batch.done:
                break
        assert removed == expected

    @rule(first=st.integers(0, UNITS + 100), count=st.integers(1, 300))
    def look_up(self, first: int, count: int) -> None:
        position = first
        for segment in self.file.lookup(first, count):
            assert segment.logical == position and segment.units > 0
            for at in range(segment.units):
                found = self.model.get(position)
                if segment.physical is None:
                    assert found is None
                else:
                    assert found == (segment.physical + at, bool(segment.written >> at & 1))
                position += 1
        assert position == first + count

    @invariant()
    def equals_the_model(self) -> None:
        mapped = {
            extent.logical + at: (extent.physical + at, bool(extent.written >> at & 1))
            for extent in self.file.records()
            for at in range(extent.units)
        }
        assert mapped == self.model
        self.file.blocks.run(lambda reader: verify(reader, ROOT))

    @precondition(lambda self: self.model)
    @invariant()
    def counts(self) -> None:
        count = partial(extents.count_units, root=ROOT)
        assert self.file.blocks.run(count) == len(self.model)


TestExtentMachine = ExtentMachine.TestCase
TestExtentMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.full
def test_long_histories() -> None:
    run_state_machine_as_test(
        ExtentMachine,
        settings=settings(max_examples=300, stateful_step_count=50, deadline=None),
    )
