"""Where the units of one file lie, as far as reads and writes have asked: a cache of its tree.

Theory. A look-up in the extent tree costs some ten microseconds, a look-up here a tenth of one.
The file is cut into chunks of 64 units (4 MiB); a chunk is loaded whole and says for each unit

    0                       hole
    physical << 1           allocated, not written: reads as zeroes
    physical << 1 | 1       written

The tree is the truth: whoever changes it says so here when that is merged. When the maps of a
volume together have grown beyond `MAX_CHUNKS`, all are emptied (as a TLB is); that many chunks
map 64 GiB in some 12 MiB of memory.

invariants: a chunk that is here agrees with the extent tree as the cache of this node has it;
`MapBudget.chunks` counts the chunks of all maps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final, TypeAlias

CHUNK_UNITS: Final = 64
CHUNK_SHIFT: Final = 6
CHUNK_MASK: Final = CHUNK_UNITS - 1
MAX_CHUNKS: Final = 16384

WRITTEN: Final = 1
"""The bit of a place that says so."""

Chunk: TypeAlias = "array[int]"
Placed = tuple[int, int]
"""(logical unit, place)."""

_EMPTY: Final = bytes(8 * CHUNK_UNITS)


class MapBudget:
    """What the maps of one volume share."""

    __slots__ = ("_maps", "chunks", "limit")

    def __init__(self, limit: int = MAX_CHUNKS) -> None:
        self.limit = limit
        self.chunks = 0
        self._maps: set[ExtentMap] = set()

    def count(self, owner: ExtentMap) -> None:
        """``owner`` has one chunk more."""
        if self.chunks >= self.limit:
            for each in self._maps:
                each.chunks.clear()
            self._maps.clear()
            self.chunks = 0
        self._maps.add(owner)
        self.chunks += 1

    def uncount(self, owner: ExtentMap) -> None:
        """``owner`` is about to be emptied."""
        self.chunks -= len(owner.chunks)
        self._maps.discard(owner)

    def check(self) -> None:
        """Assert the invariant on the count."""
        assert self.chunks == sum(len(each.chunks) for each in self._maps)


class ExtentMap:
    """The chunks of one file. ``chunks`` is read directly where every microsecond counts."""

    __slots__ = ("_budget", "chunks")

    def __init__(self, budget: MapBudget) -> None:
        self._budget = budget
        self.chunks: dict[int, Chunk] = {}

    def load(self, number: int, places: Iterable[Placed]) -> Chunk:
        """Keep chunk ``number``, whose units that are no holes are at ``places``."""
        chunk = array("Q", _EMPTY)
        for unit, place in places:
            chunk[unit & CHUNK_MASK] = place
        if number not in self.chunks:
            self._budget.count(self)
        self.chunks[number] = chunk
        return chunk

    def places(self, first: int, count: int) -> list[int] | None:
        """Places of the units [first, first + count); None if a chunk is absent."""
        found: list[int] = []
        unit, end = first, first + count
        while unit < end:
            chunk = self.chunks.get(unit >> CHUNK_SHIFT)
            if chunk is None:
                return None
            stop = min(end, (unit | CHUNK_MASK) + 1)
            at = unit & CHUNK_MASK
            found += chunk[at : at + stop - unit]
            unit = stop
        return found

    def update(self, places: Iterable[Placed]) -> None:
        """The tree was changed: these units are at these places now."""
        chunks = self.chunks
        for unit, place in places:
            chunk = chunks.get(unit >> CHUNK_SHIFT)
            if chunk is not None:
                chunk[unit & CHUNK_MASK] = place

    def clear(self) -> None:
        """Forget everything."""
        self._budget.uncount(self)
        self.chunks.clear()
