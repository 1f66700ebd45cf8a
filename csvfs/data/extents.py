"""Extents: which physical units hold the data of a file. Records of the inode's B-tree.

Theory. A record maps up to 64 logical units, from its key on, to as many contiguous physical
units, and says by a mask which of them were ever written. What no record covers is a hole. A hole
reads as zeroes, and so does a unit that is mapped and not written.

Invariants (every reader of a record checks them, `BadBlock` names the node):
  1. a record has 1 to 64 units, and its mask has no bit beyond them
  2. records do not overlap
Insertion joins what is contiguous, up to 64 units; neighbours that could be one record may
nevertheless exist after a removal, and mean the same.

Numbers are units of 64 KiB, logical ones from the start of the file, physical ones from the start
of the LUN. Editing happens within one transaction, through a `TreeEditor` of the inode's tree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from csvfs.btree.edit import TreeEditor
from csvfs.btree.node import MAX_KEY, Block, FlatLayout, bad_node
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.journal.transaction import BlockReader
from csvfs.ondisk.inode import EXTENT_VALUE, MAX_EXTENT_UNITS, pack_place, unpack_place

NEAR_UNITS: Final = 1024
"""A write this close to an extent (64 MiB) gets a goal that leaves room for what lies between."""

_FULL: Final = (1 << MAX_EXTENT_UNITS) - 1


class Segment(NamedTuple):
    """A run of logical units that one record maps, or that none does."""

    logical: int
    physical: int | None
    """None: a hole."""
    units: int
    written: int
    """Bit i: unit ``logical + i`` holds data."""

    @property
    def end(self) -> int:
        """First logical unit behind the segment."""
        return self.logical + self.units


class Extent(NamedTuple):
    """One record, checked."""

    logical: int
    physical: int
    units: int
    written: int


class RemovedUnits(NamedTuple):
    """What one batch of `remove_range` took out of a file."""

    runs: list[tuple[int, int]]
    """(first physical unit, count), contiguous ones joined."""
    next_unit: int
    """Logical unit where the next batch begins; the end of the range when `done`."""
    done: bool

    @property
    def units(self) -> int:
        """How many physical units."""
        return sum(count for _, count in self.runs)


class RangeMapped(ValueError):
    """`insert_units` over units that are mapped: the caller did not look."""


class RangeNotMapped(ValueError):
    """`set_written` over a hole: the caller did not look."""


# -- reading -----------------------------------------------------------------------------------
def extents(reader: BlockReader, root: TreeRoot, first: int = 0) -> Iterator[Extent]:
    """The records that reach beyond logical unit ``first``, ascending, lazily.

    The tree must not be changed meanwhile. Raises `BadBlock` at the first invalid record.
    """
    tree = Tree(reader, root)
    steps = tree.path(first)
    leaf = steps[-1]
    if leaf.index:
        leaf.index -= 1
    elif len(steps) > 1:
        # The record that covers ``first`` may end the leaf before.
        back = tree.path(first)
        if tree.advance(back, -1):
            steps = back
    bound = 0
    while True:
        leaf = steps[-1]
        layout = leaf.layout
        assert isinstance(layout, FlatLayout)
        words = memoryview(leaf.block).cast("Q")
        for at in range(leaf.index, layout.count(leaf.block)):
            logical = words[layout.first_word + at]
            value_at = layout.first_value_word + 2 * at
            extent = _decode(leaf.block, logical, words[value_at], words[value_at + 1])
            if logical < bound:
                raise bad_node(leaf.block, f"the extent of unit {logical} overlaps another one")
            bound = logical + extent.units
            if bound > first:
                yield extent
        if not tree.advance(steps):
            return


def lookup(reader: BlockReader, root: TreeRoot, first: int, count: int) -> list[Segment]:
    """Segments that make up the logical units [first, first + count), without gaps."""
    block, layout, entries = Tree(reader, root).find_leaf(first)
    assert isinstance(layout, FlatLayout)
    words = memoryview(block).cast("Q")
    base = layout.first_word
    at = bisect_right(words, first, base, base + entries) - 1
    if at >= base:
        skip = first - words[at]
        value_at = layout.first_value_word + 2 * (at - base)
        place = words[value_at]
        # Almost every request ends within the record in which it begins.
        if skip + count <= (place & 0xFF) + 1 <= MAX_EXTENT_UNITS:
            written = words[value_at + 1] >> skip & (1 << count) - 1
            return [Segment(first, (place >> 8) + skip, count, written)]
    return _lookup_range(reader, root, first, count)


def _lookup_range(reader: BlockReader, root: TreeRoot, first: int, count: int) -> list[Segment]:
    segments = []
    position, end = first, first + count
    for extent in extents(reader, root, first):
        if extent.logical >= end:
            break
        if extent.logical > position:
            segments.append(Segment(position, None, extent.logical - position, 0))
            position = extent.logical
        skip = position - extent.logical
        units = min(extent.units - skip, end - position)
        written = extent.written >> skip & (1 << units) - 1
        segments.append(Segment(position, extent.physical + skip, units, written))
        position += units
        if position == end:
            break
    if position < end:
        segments.append(Segment(position, None, end - position, 0))
    return segments


def goal(reader: BlockReader, root: TreeRoot, unit: int) -> int | None:
    """Where logical ``unit`` is best allocated; None for the first unit of a file.

    The place that continues the record before it. Over a small gap that means room for the gap:
    a sparse image that is filled in any order becomes contiguous.
    """
    before = Tree(reader, root).floor(unit)
    if before is not None:
        physical, count = unpack_place(EXTENT_VALUE.unpack(before[1])[0])
        distance = unit - before[0]
        return physical + (distance if distance - count <= NEAR_UNITS else count)
    after = Tree(reader, root).ceiling(unit)
    if after is None:
        return None
    physical, _ = unpack_place(EXTENT_VALUE.unpack(after[1])[0])
    distance = after[0] - unit
    return max(physical - distance, 0) if distance <= NEAR_UNITS else physical


def count_units(reader: BlockReader, root: TreeRoot) -> int:
    """All physical units of a file; reads every leaf."""
    return sum(extent.units for extent in extents(reader, root))


def _decode(block: Block, logical: int, place: int, written: int) -> Extent:
    physical, count = unpack_place(place)
    if count > MAX_EXTENT_UNITS or written >> count or logical + count > MAX_KEY or not physical:
        raise bad_node(
            block,
            f"the extent of unit {logical} says {count} units at {physical},"
            f" written mask {written:#x}",
        )
    return Extent(logical, physical, count, written)


# -- changing ----------------------------------------------------------------------------------
def insert_units(
    tree: TreeEditor, logical: int, physical: int, count: int, *, written: bool = False
) -> None:
    """Map ``count`` units of a hole to a run of physical units, as written or not.

    Raises `RangeMapped` if a part is mapped already. Changes a leaf for every 64 x 160 units, and
    what its splitting needs.
    """
    assert count > 0
    before, after = _neighbours(tree, logical, count)
    mask = (1 << count) - 1 if written else 0
    replaced: int | None = None
    if (
        before is not None
        and before.units < MAX_EXTENT_UNITS
        and before.logical + before.units == logical
        and before.physical + before.units == physical
    ):
        replaced = before.logical
        mask = mask << before.units | before.written
        logical, physical, count = before.logical, before.physical, count + before.units
    if (
        after is not None
        and after.logical == logical + count
        and after.physical == physical + count
        and (count - 1) % MAX_EXTENT_UNITS + 1 + after.units <= MAX_EXTENT_UNITS
    ):
        tree.remove(after.logical)
        mask |= after.written << count
        count += after.units
    for start in range(0, count, MAX_EXTENT_UNITS):
        units = min(MAX_EXTENT_UNITS, count - start)
        value = EXTENT_VALUE.pack(
            pack_place(physical + start, units), mask >> start & (1 << units) - 1
        )
        if logical + start == replaced:
            tree.replace(logical + start, value)
        else:
            tree.insert(logical + start, value)


def _neighbours(tree: TreeEditor, logical: int, count: int) -> tuple[Extent | None, Extent | None]:
    """The records just before and behind a range, which must be a hole."""
    before = after = None
    for extent in extents(tree.reader, tree.root, max(logical - 1, 0)):
        if extent.logical + extent.units <= logical:
            before = extent
        elif extent.logical >= logical + count:
            after = extent
            break
        else:
            raise RangeMapped(f"units {extent.logical} to {extent.logical + extent.units - 1}")
    return before, after


def set_written(tree: TreeEditor, first: int, count: int, *, written: bool = True) -> int:
    """Note that [first, first + count) holds data (or no longer does). Returns the bits changed.

    Raises `RangeNotMapped`, before anything is changed, if a part is a hole.
    """
    end = first + count
    position = first
    changes: list[tuple[int, bytes, int]] = []
    for extent in extents(tree.reader, tree.root, first):
        if extent.logical > position:
            break
        low = position - extent.logical
        position = min(end, extent.logical + extent.units)
        bits = (1 << position - extent.logical) - (1 << low)
        mask = extent.written | bits if written else extent.written & ~bits
        if mask != extent.written:
            value = EXTENT_VALUE.pack(pack_place(extent.physical, extent.units), mask)
            changes.append((extent.logical, value, (mask ^ extent.written).bit_count()))
        if position == end:
            break
    if position < end:
        raise RangeNotMapped(f"unit {position} is a hole")
    for key, value, _ in changes:
        tree.replace(key, value)
    return sum(bits for _, _, bits in changes)


def contiguous(reader: BlockReader, root: TreeRoot, first: int, most_units: int) -> int:
    """How many records from logical unit ``first`` on lie one behind the other on the LUN, with
    at most ``most_units`` units together; a record that is cut at ``first`` does not count."""
    count = units = 0
    end: int | None = None
    for extent in extents(reader, root, first):
        if extent.logical < first:
            continue
        units += extent.units
        if units > most_units or end not in (None, extent.physical):
            break
        count += 1
        end = extent.physical + extent.units
    return count


def remove_range(
    tree: TreeEditor,
    first: int,
    end: int,
    *,
    max_blocks: int | None = None,
    max_extents: int | None = None,
) -> RemovedUnits:
    """Make a hole of the logical units [first, end), a batch at a time.

    One call takes at most ``max_extents`` records (and the two that it cuts) and ends when the
    transaction uses ``max_blocks`` blocks (it does nothing if that is so from the start, and a
    record is not cut); see `TreeEditor.remove_range`.
    """
    runs: list[tuple[int, int]] = []
    cut = next(iter(extents(tree.reader, tree.root, first)), None)
    if cut is not None and cut.logical < first < end:
        keep = first - cut.logical
        _put(tree, cut, 0, keep)
        removed = min(cut.units, end - cut.logical) - keep
        runs.append((cut.physical + keep, removed))
        if keep + removed < cut.units:
            _put(tree, cut, keep + removed, cut.units)
            return RemovedUnits(runs, end, True)
        first += removed
    batch = tree.remove_range(first, end, max_blocks=max_blocks, max_items=max_extents)
    next_unit = first
    for logical, value in batch.items:
        extent = _decode(tree.read_root()[0], logical, *EXTENT_VALUE.unpack(value))
        next_unit = logical + extent.units
        runs.append((extent.physical, min(extent.units, end - logical)))
        if next_unit > end:
            _put(tree, extent, end - logical, extent.units)
    done = batch.done or next_unit >= end
    return RemovedUnits(_joined(runs), end if done else next_unit, done)


def _put(tree: TreeEditor, extent: Extent, low: int, high: int) -> None:
    """Write units [low, high) of ``extent`` as a record; it replaces the one of the same key."""
    units = high - low
    value = EXTENT_VALUE.pack(
        pack_place(extent.physical + low, units), extent.written >> low & (1 << units) - 1
    )
    if low == 0:
        tree.replace(extent.logical, value)
    else:
        tree.insert(extent.logical + low, value)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in the same order, neighbours that are contiguous made one."""
    joined: list[tuple[int, int]] = []
    for physical, count in runs:
        if joined and sum(joined[-1]) == physical:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((physical, count))
    return joined
