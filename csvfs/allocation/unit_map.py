"""One map block of an allocation group: finding and changing the states of 1792 units.

Two bits a unit make 448 bytes, which are one integer of 3584 bits: whatever has to be asked of
all units at once is a few operations on that integer, and no loop goes over units. A *free mask*
is such an integer with bit 2u set if unit u is free. The 16-bit block maps of metadata units are
searched by a regular expression.

Positions are those of units within the map, 0..1791. Nothing here knows groups or transactions.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from csvfs.ondisk.block import BLOCKS_PER_UNIT
from csvfs.ondisk.geometry import UNITS_PER_MAP
from csvfs.ondisk.groups import (
    MAP_BLOCKS_OFFSET,
    MAP_STATES_BYTES,
    MAP_STATES_OFFSET,
    UnitState,
    set_used_blocks,
    used_blocks,
)

Block = bytes | bytearray

ALL_BLOCKS: Final = (1 << BLOCKS_PER_UNIT) - 1

_LOW_BITS: Final = int.from_bytes(b"\x55" * MAP_STATES_BYTES, "little")
_NO_FREE_BLOCK: Final = re.compile(rb"(?:\x00\x00|\xff\xff)*+")
"""Block maps of units that are no metadata, or that have every block in use."""


class Found(NamedTuple):
    """A run of free units."""

    position: int
    units: int


def _states(block: Block) -> int:
    return int.from_bytes(block[MAP_STATES_OFFSET : MAP_STATES_OFFSET + MAP_STATES_BYTES], "little")


def free_mask(block: Block) -> int:
    """Bit 2u is set if unit u is free."""
    states = _states(block)
    return ~(states | states >> 1) & _LOW_BITS


def metadata_mask(block: Block) -> int:
    """Bit 2u is set if unit u holds metadata."""
    states = _states(block)
    return states >> 1 & ~states & _LOW_BITS


def unused_map_mask(units: int, *, first_of_group: bool) -> int:
    """The free mask of a map block that was never written, of which ``units`` exist."""
    mask = _LOW_BITS & (1 << 2 * units) - 1
    return mask & ~1 if first_of_group else mask


def run_at(mask: int, position: int, limit: int) -> int:
    """How many units are free from ``position`` on, at most ``limit``."""
    if not mask >> 2 * position & 1:
        return 0
    used = ~(mask >> 2 * position) & (1 << 2 * limit) - 1 & _LOW_BITS
    return ((used & -used).bit_length() - 1) // 2 if used else limit


def find_run(mask: int, count: int, start: int) -> int | None:
    """Where ``count`` free units begin: the first place from ``start`` on, else the last before."""
    return _nearest(_starts(mask, count), start)


def longest_run(mask: int, limit: int, start: int) -> Found:
    """The longest run of free units, but not longer than ``limit``; (0, 0) if none is free."""
    if not mask:
        return Found(0, 0)
    length, starts, step = 1, mask, 1
    # Double the length while there are such runs, then try half of what was too much, and so on.
    while length + step <= limit and (longer := starts & starts >> 2 * step):
        starts, length = longer, length + step
        step = length
    while step > 1 and length < limit:
        step //= 2
        more = min(step, limit - length)
        if longer := starts & _starts(mask, more) >> 2 * length:
            starts, length = longer, length + more
    found = _nearest(starts, start)
    assert found is not None
    return Found(found, length)


def _starts(mask: int, count: int) -> int:
    """Bit 2u is set if ``count`` units from u on are free."""
    length = 1
    while length < count and mask:
        step = min(length, count - length)
        mask &= mask >> 2 * step
        length += step
    return mask


def _nearest(starts: int, position: int) -> int | None:
    """The first of ``starts`` from ``position`` on, else the last one before it."""
    behind = starts >> 2 * position
    if behind:
        return position + (behind & -behind).bit_length() // 2
    if starts:
        return (starts.bit_length() - 1) // 2
    return None


def set_states(block: bytearray, position: int, count: int, state: UnitState) -> None:
    """Give ``count`` units a state."""
    first, last = MAP_STATES_OFFSET + position // 4, MAP_STATES_OFFSET + (position + count + 3) // 4
    shift = 2 * (position % 4)
    field = (1 << 2 * count) - 1
    bits = int.from_bytes(block[first:last], "little") & ~(field << shift)
    bits |= (field // 3 * state) << shift
    block[first:last] = bits.to_bytes(last - first, "little")


def first_other(block: Block, position: int, count: int, state: UnitState) -> int | None:
    """The first of ``count`` units that is not in ``state``."""
    field = (1 << 2 * count) - 1
    other = (_states(block) >> 2 * position & field) ^ field // 3 * state
    if not other:
        return None
    return position + ((other & -other).bit_length() - 1) // 2


def find_partial(block: Block) -> int | None:
    """The first metadata unit that has a free block."""
    if not metadata_mask(block):
        return None
    match = _NO_FREE_BLOCK.match(block, MAP_BLOCKS_OFFSET)
    assert match is not None
    at = match.end()
    return (at - MAP_BLOCKS_OFFSET) // 2 if at < len(block) else None


def take_block(block: bytearray, position: int) -> int:
    """Mark the first free block of a metadata unit as in use: its number in the unit."""
    used = used_blocks(block, position)
    assert used != ALL_BLOCKS
    free = ~used & (used + 1)
    set_used_blocks(block, position, used | free)
    return free.bit_length() - 1


def count_free(mask: int) -> int:
    """Free units of a free mask."""
    return mask.bit_count()


assert _LOW_BITS.bit_count() == UNITS_PER_MAP
