"""Where new things begin."""

from __future__ import annotations

from collections import Counter

from csvfs.allocation import placement
from csvfs.ondisk.geometry import GROUP_UNITS, Geometry

GEOMETRY = Geometry.of_units(39 + 8 * GROUP_UNITS + 100 + 1, 1, 16)


def test_a_file_begins_in_the_group_of_its_inode_behind_the_metadata() -> None:
    first = GEOMETRY.group_first_unit(3)
    goals = {placement.file_goal(GEOMETRY, first * 16 + n) for n in range(1000)}
    assert len(goals) == placement.STARTS
    assert min(goals) >= first + GROUP_UNITS // placement.METADATA_SHARE
    assert max(goals) < first + GROUP_UNITS


def test_files_made_one_after_the_other_begin_apart() -> None:
    first = GEOMETRY.group_first_unit(0) * 16 + 16
    goals = [placement.file_goal(GEOMETRY, first + n) for n in range(16)]
    assert len(set(goals)) >= 15


def test_a_short_group_and_inodes_outside_the_groups() -> None:
    unit = GEOMETRY.group_first_unit(8)
    for n in range(100):
        assert unit < placement.file_goal(GEOMETRY, unit * 16 + n) < unit + 100
    assert placement.near(GEOMETRY, 1) == 0
    assert GEOMETRY.group_of_unit(placement.file_goal(GEOMETRY, 1)) == 0


def test_directories_are_spread() -> None:
    keys = [n * 0x1234_5678_9ABC & 0x7FFF_FFFF_FFFF_FF00 for n in range(900)]
    counts = Counter(placement.directory_group(GEOMETRY, 1, key) for key in keys)
    assert len(counts) == 9 and max(counts.values()) < 200
    few = Counter(placement.directory_group(GEOMETRY, 1, key, [2, 5]) for key in keys)
    assert set(few) == {2, 5}
