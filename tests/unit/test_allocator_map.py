"""Searching and changing one map block, against loops over a list."""

from __future__ import annotations

from random import Random

import pytest

from csvfs.allocation.unit_map import (
    ALL_BLOCKS,
    find_partial,
    find_run,
    first_other,
    free_mask,
    longest_run,
    metadata_mask,
    run_at,
    set_states,
    take_block,
    unused_map_mask,
)
from csvfs.ondisk.geometry import UNITS_PER_MAP
from csvfs.ondisk.groups import UnitState, new_map_block, set_used_blocks, unit_state, used_blocks
from tests.unit.forgetful import VOLUME_ID


def random_map(random: Random) -> tuple[list[bool], int]:
    """Which units are free, and the same as a mask."""
    share = random.choice([0, 0.01, 0.1, 0.5, 0.9, 0.99, 1])
    free = [random.random() < share for _ in range(UNITS_PER_MAP)]
    low, high = sorted(random.randrange(UNITS_PER_MAP + 1) for _ in range(2))
    if random.random() < 0.5:
        free[low:high] = [True] * (high - low)
    return free, sum(1 << 2 * unit for unit, is_free in enumerate(free) if is_free)


def length_at(free: list[bool], position: int) -> int:
    count = 0
    while position + count < len(free) and free[position + count]:
        count += 1
    return count


@pytest.mark.parametrize("seed", range(60))
def test_runs(seed: int) -> None:
    random = Random(seed)
    free, mask = random_map(random)
    start = random.randrange(UNITS_PER_MAP)
    count = random.choice([1, 2, 3, 7, 64, 100, UNITS_PER_MAP, random.randrange(1, UNITS_PER_MAP)])
    lengths = [0] * UNITS_PER_MAP
    for unit in reversed(range(UNITS_PER_MAP)):
        following = lengths[unit + 1] if unit + 1 < UNITS_PER_MAP else 0
        lengths[unit] = following + 1 if free[unit] else 0

    def expected(length: int) -> int | None:
        starts = [unit for unit, found in enumerate(lengths) if found >= length]
        return min((s for s in starts if s >= start), default=max(starts, default=None))

    assert find_run(mask, count, start) == expected(count)
    assert run_at(mask, start, count) == min(lengths[start], count)
    found = longest_run(mask, count, start)
    assert found.units == min(max(lengths), count)
    if found.units:
        assert found.position == expected(found.units)


@pytest.mark.parametrize("seed", range(20))
def test_states(seed: int) -> None:
    random = Random(seed)
    block = new_map_block(VOLUME_ID, 0, 100, 1, 26880)
    model = [UnitState.FREE] * UNITS_PER_MAP
    for _ in range(30):
        position = random.randrange(UNITS_PER_MAP)
        count = random.randrange(1, min(300, UNITS_PER_MAP - position) + 1)
        state = random.choice(list(UnitState))
        set_states(block, position, count, state)
        model[position : position + count] = [state] * count
        assert first_other(block, position, count, state) is None
        low = random.randrange(UNITS_PER_MAP)
        others = [u for u in range(low, UNITS_PER_MAP) if model[u] != state]
        assert first_other(block, low, UNITS_PER_MAP - low, state) == min(others, default=None)
    assert [unit_state(block, unit) for unit in range(UNITS_PER_MAP)] == model
    for mask, state in ((free_mask, UnitState.FREE), (metadata_mask, UnitState.METADATA)):
        bits = sum(1 << 2 * unit for unit in range(UNITS_PER_MAP) if model[unit] == state)
        assert mask(block) == bits


def test_partly_used_metadata_units() -> None:
    block = new_map_block(VOLUME_ID, 0, 100, 1, 26880)
    assert find_partial(block) is None
    for position in (5, 6, 1791):
        set_states(block, position, 1, UnitState.METADATA)
        set_used_blocks(block, position, ALL_BLOCKS)
    assert find_partial(block) is None
    set_used_blocks(block, 1791, ALL_BLOCKS & ~(1 << 9))
    assert find_partial(block) == 1791
    set_used_blocks(block, 6, 0b1011)
    assert find_partial(block) == 6
    assert [take_block(block, 6) for _ in range(13)] == [2, *range(4, 16)]
    assert used_blocks(block, 6) == ALL_BLOCKS
    assert take_block(block, find_partial(block) or 0) == 9
    assert find_partial(block) is None


@pytest.mark.parametrize(("index", "units"), [(0, 26880), (1, 26880), (0, 40), (3, 3 * 1792 + 9)])
def test_a_map_that_was_never_written_has_the_mask_of_a_fresh_one(index: int, units: int) -> None:
    here = min(units - index * UNITS_PER_MAP, UNITS_PER_MAP)
    block = new_map_block(VOLUME_ID, 0, 100, index, units)
    assert unused_map_mask(here, first_of_group=index == 0) == free_mask(block)
