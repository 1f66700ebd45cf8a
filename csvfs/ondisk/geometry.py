"""Where everything lies on a LUN: a pure function of its size, the slots and the journal size.

    unit 0          superblock (block 0), root inode (block 1), scratch of the target probe (8..15)
    units 1, 2      the two views
    4 units each    slot blocks, heartbeat blocks, join blocks, orphan roots, reclaim roots:
                    one block a slot, always 64 of each
    slots x journal the journals, one behind the other
    groups          26880 units each; the last one may be shorter
    last unit       block 0: backup superblock

Addresses are numbers of 4 KiB blocks from the LUN's start, units numbers of 64 KiB units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from csvfs.ondisk.block import BLOCK_BYTES, BLOCKS_PER_UNIT, MAX_SLOTS, UNIT_BYTES

SUPERBLOCK_ADDRESS: Final = 0
ROOT_INODE: Final = 1
SCRATCH_ADDRESS: Final = 8
SCRATCH_BLOCKS: Final = 8
VIEW_BYTES: Final = UNIT_BYTES
VIEW_ADDRESSES: Final = (1 * BLOCKS_PER_UNIT, 2 * BLOCKS_PER_UNIT)

_AREA_UNITS: Final = MAX_SLOTS // BLOCKS_PER_UNIT
SLOT_AREA: Final = 3 * BLOCKS_PER_UNIT
HEARTBEAT_AREA: Final = SLOT_AREA + MAX_SLOTS
JOIN_AREA: Final = HEARTBEAT_AREA + MAX_SLOTS
ORPHAN_AREA: Final = JOIN_AREA + MAX_SLOTS
RECLAIM_AREA: Final = ORPHAN_AREA + MAX_SLOTS
JOURNAL_AREA: Final = RECLAIM_AREA + MAX_SLOTS
"""First address behind the fixed area: where the journals begin."""

UNITS_PER_MAP: Final = 1792
MAPS_PER_GROUP: Final = 15
GROUP_UNITS: Final = MAPS_PER_GROUP * UNITS_PER_MAP
MIN_GROUP_UNITS: Final = 32
MIN_LUN_BYTES: Final = 64 << 20
MAX_LUN_BYTES: Final = 1 << 56
"""A physical unit has 40 bits in what is left of an extent record; 64 PiB are 2^40 units."""
MIN_JOURNAL_BYTES: Final = 1 << 20
MAX_JOURNAL_BYTES: Final = 64 << 20
JOURNAL_SHARE: Final = 256
"""Unless told otherwise a journal takes one part in this many of the LUN."""

assert _AREA_UNITS * BLOCKS_PER_UNIT == MAX_SLOTS
assert GROUP_UNITS == 26880
assert MAPS_PER_GROUP == BLOCKS_PER_UNIT - 1, "header and maps of a group fill its first unit"
assert JOURNAL_AREA % BLOCKS_PER_UNIT == 0
assert MAX_LUN_BYTES // UNIT_BYTES == 1 << 40


class BadGeometry(ValueError):
    """No volume of that shape fits on that LUN; the message says what would."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one volume; `for_lun` makes one and refuses what does not fit."""

    size_units: int
    slots: int
    journal_units: int
    groups_unit: int
    """First unit of group 0."""
    group_count: int
    groups_end_unit: int
    """First unit behind the last group."""

    @classmethod
    def for_lun(cls, size_bytes: int, slots: int, journal_bytes: int | None = None) -> Geometry:
        """Lay out a volume. Raises `BadGeometry` with the number that would fit."""
        if not MIN_LUN_BYTES <= size_bytes <= MAX_LUN_BYTES:
            raise BadGeometry(
                f"the LUN has {size_bytes} bytes; csvfs needs at least {MIN_LUN_BYTES}"
                f" ({MIN_LUN_BYTES >> 20} MiB) and takes at most {MAX_LUN_BYTES >> 50} PiB"
            )
        if not 1 <= slots <= MAX_SLOTS:
            raise BadGeometry(f"{slots} slots: a volume has 1 to {MAX_SLOTS}")
        if journal_bytes is None:
            journal_bytes = default_journal_bytes(size_bytes)
        if journal_bytes % UNIT_BYTES or journal_bytes < MIN_JOURNAL_BYTES:
            raise BadGeometry(
                f"a journal of {journal_bytes} bytes: it must be a multiple of 64 KiB"
                f" and at least {MIN_JOURNAL_BYTES >> 20} MiB"
            )
        return cls.of_units(size_bytes // UNIT_BYTES, slots, journal_bytes // UNIT_BYTES)

    @classmethod
    def of_units(cls, size_units: int, slots: int, journal_units: int) -> Geometry:
        """The shape as a superblock stores it. Raises `BadGeometry` when no group fits."""
        groups_unit = JOURNAL_AREA // BLOCKS_PER_UNIT + slots * journal_units
        space = size_units - 1 - groups_unit
        if space < MIN_GROUP_UNITS:
            raise BadGeometry(
                f"{slots} journals of {journal_units * UNIT_BYTES >> 10} KiB leave no room for"
                f" data on {size_units * UNIT_BYTES >> 20} MiB: take fewer slots, smaller"
                f" journals, or a LUN of at least"
                f" {(groups_unit + 1 + MIN_GROUP_UNITS) * UNIT_BYTES} bytes"
            )
        full, rest = divmod(space, GROUP_UNITS)
        if rest < MIN_GROUP_UNITS:
            rest = 0
        end = groups_unit + full * GROUP_UNITS + rest
        return cls(size_units, slots, journal_units, groups_unit, full + (rest > 0), end)

    # -- fixed places ----------------------------------------------------------------------
    @property
    def size_bytes(self) -> int:
        """Bytes of the LUN that the volume uses."""
        return self.size_units * UNIT_BYTES

    @property
    def backup_superblock(self) -> int:
        return (self.size_units - 1) * BLOCKS_PER_UNIT

    def slot_block(self, slot: int) -> int:
        return SLOT_AREA + self._checked(slot)

    def heartbeat(self, slot: int) -> int:
        return HEARTBEAT_AREA + self._checked(slot)

    def join_block(self, slot: int) -> int:
        return JOIN_AREA + self._checked(slot)

    def orphan_root(self, slot: int) -> int:
        return ORPHAN_AREA + self._checked(slot)

    def reclaim_root(self, slot: int) -> int:
        return RECLAIM_AREA + self._checked(slot)

    def journal(self, slot: int) -> int:
        """First block of a slot's journal: its first journal header."""
        return JOURNAL_AREA + self._checked(slot) * self.journal_blocks

    @property
    def journal_blocks(self) -> int:
        """Blocks of one journal, its two header blocks included."""
        return self.journal_units * BLOCKS_PER_UNIT

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}: the volume has {self.slots}")
        return slot

    # -- groups ----------------------------------------------------------------------------
    def group_first_unit(self, group: int) -> int:
        if not 0 <= group < self.group_count:
            raise ValueError(f"group {group}: the volume has {self.group_count}")
        return self.groups_unit + group * GROUP_UNITS

    def group_units(self, group: int) -> int:
        """Units of the group, its own metadata unit included."""
        return min(GROUP_UNITS, self.groups_end_unit - self.group_first_unit(group))

    def group_header(self, group: int) -> int:
        return self.group_first_unit(group) * BLOCKS_PER_UNIT

    def group_map(self, group: int, index: int) -> int:
        """Address of map block ``index`` (from 0) of a group."""
        if not 0 <= index < self.map_count(group):
            raise ValueError(f"map {index}: group {group} has {self.map_count(group)}")
        return self.group_header(group) + 1 + index

    def map_count(self, group: int) -> int:
        """Map blocks that have units: all 15 but in a short last group."""
        return -(-self.group_units(group) // UNITS_PER_MAP)

    def holds_unit(self, unit: int) -> bool:
        """True if the unit lies in a group."""
        return self.groups_unit <= unit < self.groups_end_unit

    def holds(self, address: int) -> bool:
        """True if the block lies in a group."""
        return self.holds_unit(address // BLOCKS_PER_UNIT)

    def group_of_unit(self, unit: int) -> int:
        """Raises ValueError for a unit outside the groups."""
        if not self.groups_unit <= unit < self.groups_end_unit:
            raise ValueError(f"unit {unit} is in no allocation group")
        return (unit - self.groups_unit) // GROUP_UNITS

    def group_of(self, address: int) -> int:
        """Group of a block. Raises ValueError for one outside the groups."""
        return self.group_of_unit(address // BLOCKS_PER_UNIT)

    def map_place(self, unit: int) -> tuple[int, int, int]:
        """(group, index of the map block, position in that map) of a unit."""
        group = self.group_of_unit(unit)
        index, position = divmod(unit - self.groups_unit - group * GROUP_UNITS, UNITS_PER_MAP)
        return group, index, position


def unit_of(address: int) -> int:
    """The unit that a block lies in."""
    return address // BLOCKS_PER_UNIT


def byte_offset(address: int) -> int:
    """The block's offset on the LUN in bytes."""
    return address * BLOCK_BYTES


def default_journal_bytes(size_bytes: int) -> int:
    """min(64 MiB, LUN/256), whole units, at least 1 MiB."""
    share = size_bytes // JOURNAL_SHARE // UNIT_BYTES * UNIT_BYTES
    return max(MIN_JOURNAL_BYTES, min(MAX_JOURNAL_BYTES, share))
