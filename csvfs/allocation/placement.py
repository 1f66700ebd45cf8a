"""Which group, and which place in it, suits what is new. Pure, and the same on every node.

  - Files are near their directory: an inode, and all that it owns, begins in the group of the
    directory that it was made in.
  - Directories are spread: each begins in a group of its own, so that what is in it has room.
  - The data of a file begins at one of `STARTS` places of its group, chosen by its number: images
    that grow at the same time do not get in each other's way for some time. Metadata units are
    taken from the start of a group, so no file begins there.

Of several nodes each begins in groups of its own (`csvfs.allocation.affinity`). Where a group has
no space, the allocator goes on from it (`csvfs.allocation.group_search`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from csvfs.ondisk.geometry import Geometry

STARTS: Final = 64
METADATA_SHARE: Final = 32
"""The first part in this many of a group is left to metadata while there is room elsewhere."""

_GOLDEN: Final = 0x9E37_79B9_7F4A_7C15
"""2^64 / golden ratio: multiples of it are spread evenly, whatever their stride (Knuth 6.4)."""


def _spread(number: int, places: int) -> int:
    return (number * _GOLDEN & (1 << 64) - 1) * places >> 64


def near(geometry: Geometry, address: int) -> int:
    """The group of a block; group 0 for one outside the groups (the root's inode, list roots)."""
    return geometry.group_of(address) if geometry.holds(address) else 0


def data_offset(geometry: Geometry, group: int) -> int:
    """Units of a group that are left to metadata, from its start."""
    return geometry.group_units(group) // METADATA_SHARE


def file_goal(geometry: Geometry, ino: int, group: int | None = None) -> int:
    """The physical unit where the first unit of a file is best: in ``group``, by default its
    inode's."""
    if group is None:
        group = near(geometry, ino)
    first = data_offset(geometry, group)
    room = geometry.group_units(group) - first
    return geometry.group_first_unit(group) + first + room * _spread(ino, STARTS) // STARTS


def directory_group(
    geometry: Geometry, parent_ino: int, entry_key: int, groups: Sequence[int] = ()
) -> int:
    """The group for a new directory: one of ``groups``, or of all if there are none.

    ``entry_key`` is the key of its name in the parent: brothers get different groups.
    """
    choice = groups or range(geometry.group_count)
    return choice[_spread(parent_ino ^ entry_key >> 8, len(choice))]
