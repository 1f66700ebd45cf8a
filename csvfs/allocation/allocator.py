"""The allocator: units for data and blocks for metadata, out of allocation groups.

Theory. Everything happens inside a transaction, on the group headers and map blocks that it
edits, under the EX lock of the group: tried, never waited for, because other groups have space
too. `csvfs.allocation.placement` says which group suits whom; here it is only where the search
begins.

    goal's group, the groups that the caller prefers, then all others, upward from the goal's

A search for units ends in the first group that has the whole run, or a run of `GOOD_RUN_UNITS`;
only shorter ones in `PATIENCE_GROUPS` groups, and it takes the longest of them. A run never
crosses a map block: its next part begins the next one, and is asked for by the caller.

Metadata blocks are packed: a group's units of metadata are filled before a further unit, the first
free one of the group, becomes metadata; one whose last block is freed is a free unit again.

Invariants (`csvfs.allocation.group.Group.faults` verifies them for a whole group)
  1. a header's ``free_units`` and ``free_metadata_blocks`` are exactly what its maps say
  2. only a unit in state METADATA has bits in the block map, and it has at least one
  3. a map block whose bit in ``map_ready`` is clear was never written, and its units are free
  4. the last `csvfs.allocation.group.RESERVE_UNITS` of a group go to privileged transactions only
     (unlink, punch, reclaim): they need a few metadata blocks before they can give anything back

A unit is never free while a reclaim list holds it: its bits are cleared by the transaction that
takes it off the list. Whatever contradicts the maps raises `Damaged` before anything is changed.

What this module remembers between transactions (free units when last seen, where a group had a
free metadata block) only shortens searches. `NoSpace` is said after every group was looked into.
What statfs(2) tells is kept apart (`csvfs.allocation.space`), and follows only what is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from csvfs.allocation.group import Group
from csvfs.allocation.group_search import GroupSearch
from csvfs.allocation.placement import data_offset
from csvfs.allocation.space import SpaceCounts
from csvfs.allocation.unit_map import (
    Found,
    count_free,
    find_partial,
    find_run,
    first_other,
    longest_run,
    run_at,
    set_states,
    take_block,
)
from csvfs.engine.locks import Resources
from csvfs.errors import Damaged
from csvfs.journal.transaction import BlockReader, NeedLock, Transaction
from csvfs.ondisk.block import BLOCKS_PER_UNIT
from csvfs.ondisk.geometry import UNITS_PER_MAP, Geometry
from csvfs.ondisk.groups import UnitState, set_used_blocks, unit_state, used_blocks
from lockmgr.modes import Mode

GOOD_RUN_UNITS: Final = 64
"""As long as a full extent record: a longer run is no better for the file's map."""
PATIENCE_GROUPS: Final = 4


class Run(NamedTuple):
    """Contiguous units that were allocated."""

    first_unit: int
    units: int


class _Candidate(NamedTuple):
    group: Group
    map_index: int
    found: Found


def _free_units(group: Group) -> int:
    """Units for data that an ordinary transaction may take."""
    return group.available(False)


def _free_blocks(group: Group) -> int:
    """At least one: an ordinary transaction gets a metadata block."""
    return group.available(False) + group.free_metadata_blocks


class Groups:
    """The allocation groups of a volume."""

    def __init__(self, geometry: Geometry, resources: Resources) -> None:
        self.geometry = geometry
        self.space: Final = SpaceCounts(geometry)
        self._resources = resources
        self._seen_units: dict[int, int] = {}
        self._seen_blocks: dict[int, int] = {}
        self._partial: dict[int, int] = {}

    # -- units -----------------------------------------------------------------------------
    def allocate_units(
        self,
        tx: Transaction,
        count: int,
        goal: int | None = None,
        *,
        minimum: int = 1,
        groups: Iterable[int] = (),
    ) -> Run:
        """Take up to ``count``, at least ``minimum`` contiguous free units as data.

        ``goal`` is the physical unit where they are best (None: anywhere); ``groups`` are
        preferred once the goal's group has nothing.

        Raises `NoSpace` when no group has ``minimum`` units in a row, `NeedLock` when one that
        could not be locked may.
        """
        assert 1 <= minimum <= min(count, UNITS_PER_MAP)
        enough = max(minimum, min(count, GOOD_RUN_UNITS))
        search = self._search(tx, goal, groups, self._seen_units, _free_units)
        for numbers in search.passes(minimum):
            best: _Candidate | None = None
            short = 0
            for group in search.locked(numbers):
                candidate = self._search_group(tx, group, count, goal, enough)
                units = candidate.found.units
                if units >= enough:
                    return self._take(tx, candidate)
                if units < minimum:
                    continue
                if best is None or units > best.found.units:
                    best = candidate
                short += 1
                if short == PATIENCE_GROUPS:
                    break
            if best is not None:
                return self._take(tx, best)
        raise search.failure(f"no group has {minimum} free units in a row")

    def free_units(self, tx: Transaction, first: int, count: int) -> None:
        """Make data units of one group free again.

        Raises `Damaged`, before anything is changed, unless all of them are data, and `NeedLock`.
        """
        number, index, position = self._place(first)
        group = self._locked(tx, number)
        if count < 1 or first + count > group.first_unit + group.unit_count:
            raise Damaged(f"units {first} to {first + count - 1} are not within group {number}")
        parts = []
        while count:
            part = min(count, UNITS_PER_MAP - position)
            parts.append((index, position, part))
            count -= part
            index, position = index + 1, 0
        for index, position, part in parts:
            self._require_state(group, index, position, part, UnitState.DATA)
        for index, position, part in parts:
            set_states(group.edit_map(tx, index), position, part, UnitState.FREE)
            group.add(tx, units=part)
        self._note(tx, group)

    # -- metadata blocks -------------------------------------------------------------------
    def allocate_block(
        self, tx: Transaction, goal_group: int, *, groups: Iterable[int] = ()
    ) -> int:
        """Take a free metadata block, in ``goal_group`` if there is one: its address.

        Raises `NoSpace` when no group has one, `NeedLock` when one that could not be locked may.
        """
        goal = self.geometry.group_first_unit(goal_group)
        search = self._search(tx, goal, groups, self._seen_blocks, _free_blocks)
        for numbers in search.passes(1):
            for group in search.locked(numbers):
                if group.free_metadata_blocks:
                    return self._take_partial(tx, group)
                if group.available(tx.privileged):
                    return self._take_new(tx, group)
        raise search.failure("no group has a free metadata block")

    def free_block(self, tx: Transaction, address: int) -> None:
        """Make a metadata block free again, and its unit with the last one.

        Raises `Damaged`, before anything is changed, unless it is in use, and `NeedLock`.
        """
        unit, block_number = divmod(address, BLOCKS_PER_UNIT)
        number, index, position = self._place(unit)
        group = self._locked(tx, number)
        self._require_state(group, index, position, 1, UnitState.METADATA)
        used = used_blocks(group.read_map(index), position)
        if not used >> block_number & 1:
            raise Damaged(
                f"block {address} (unit {unit} of group {number}) is to be freed and is free"
            )
        block = group.edit_map(tx, index)
        used &= ~(1 << block_number)
        set_used_blocks(block, position, used)
        if used:
            group.add(tx, blocks=1)
            self._partial[number] = index
        else:
            set_states(block, position, 1, UnitState.FREE)
            group.add(tx, units=1, blocks=1 - BLOCKS_PER_UNIT)
        self._note(tx, group)

    def is_metadata_block(self, reader: BlockReader, address: int) -> bool:
        """Whether the group's map says that this block is metadata and in use.

        The caller holds the group's lock. False for every block outside the groups.
        """
        if not self.geometry.holds(address):
            return False
        unit, block_number = divmod(address, BLOCKS_PER_UNIT)
        number, index, position = self.geometry.map_place(unit)
        group = Group(reader, self.geometry, number)
        if not group.is_ready(index):
            return False
        block = group.read_map(index)
        return unit_state(block, position) is UnitState.METADATA and bool(
            used_blocks(block, position) >> block_number & 1
        )

    def _search(
        self,
        tx: Transaction,
        goal: int | None,
        preferred: Iterable[int],
        seen: dict[int, int],
        measure: Callable[[Group], int],
    ) -> GroupSearch:
        return GroupSearch(self.geometry, self._resources, tx, goal, preferred, seen, measure)

    def _note(self, tx: Transaction, group: Group) -> None:
        """Remember what a group has left: for searches at once, for statfs(2) once it is true."""
        left = group.number, group.free_units, group.free_metadata_blocks
        tx.after_merge(lambda: self.space.merged(*left))
        self._seen_units[group.number] = _free_units(group)
        self._seen_blocks[group.number] = _free_blocks(group)

    # -- within one group ------------------------------------------------------------------
    def _search_group(
        self, tx: Transaction, group: Group, count: int, goal: int | None, enough: int
    ) -> _Candidate:
        """``enough`` units at the goal, else the nearest run of ``count``, else the longest."""
        free = group.available(tx.privileged)
        if not free:
            return _Candidate(group, 0, Found(0, 0))
        count = min(count, free, UNITS_PER_MAP)
        offset = goal - group.first_unit if goal is not None else -1
        if not 0 <= offset < group.unit_count:
            offset = data_offset(self.geometry, group.number)
        start_map, start = divmod(offset, UNITS_PER_MAP)
        best = _Candidate(group, start_map, Found(0, 0))
        total = 0
        for step in range(group.map_count):
            index = (start_map + step) % group.map_count
            position = start if step == 0 else 0
            if step == 1:
                group.require_maps()
            mask = group.free_mask(index)
            if step == 0 and (at_goal := run_at(mask, start, count)) >= enough:
                return _Candidate(group, index, Found(start, at_goal))
            if mask:
                at = find_run(mask, count, position)
                if at is not None:
                    return _Candidate(group, index, Found(at, count))
                found = longest_run(mask, count, position)
                if found.units > best.found.units:
                    best = _Candidate(group, index, found)
                total += count_free(mask)
        if total != group.free_units:
            raise self._contradiction(group, f"{total} free units")
        return best

    def _take(self, tx: Transaction, candidate: _Candidate) -> Run:
        group, index, (position, units) = candidate
        set_states(group.edit_map(tx, index), position, units, UnitState.DATA)
        group.add(tx, units=-units)
        self._note(tx, group)
        return Run(group.first_unit + index * UNITS_PER_MAP + position, units)

    def _take_partial(self, tx: Transaction, group: Group) -> int:
        """A block of a unit that is metadata already."""
        first = self._partial.get(group.number, 0)
        for step in range(group.map_count):
            index = (first + step) % group.map_count
            if not group.is_ready(index):
                continue
            if step == 1:
                group.require_maps()
            position = find_partial(group.read_map(index))
            if position is not None:
                self._partial[group.number] = index
                group.add(tx, blocks=-1)
                self._note(tx, group)
                return self._block(group, index, position, group.edit_map(tx, index))
        raise self._contradiction(group, "no free metadata block")

    def _take_new(self, tx: Transaction, group: Group) -> int:
        """The first block of the group's first free unit, which becomes metadata."""
        for index in range(group.map_count):
            if index == 1:
                group.require_maps()
            position = find_run(group.free_mask(index), 1, 0)
            if position is not None:
                block = group.edit_map(tx, index)
                set_states(block, position, 1, UnitState.METADATA)
                group.add(tx, units=-1, blocks=BLOCKS_PER_UNIT - 1)
                self._note(tx, group)
                self._partial[group.number] = index
                return self._block(group, index, position, block)
        raise self._contradiction(group, "no free unit")

    def _block(self, group: Group, index: int, position: int, block: bytearray) -> int:
        unit = group.first_unit + index * UNITS_PER_MAP + position
        return unit * BLOCKS_PER_UNIT + take_block(block, position)

    def _locked(self, tx: Transaction, number: int) -> Group:
        resource = self._resources.group(number)
        if not tx.try_lock(resource, Mode.EX):
            raise NeedLock(resource, Mode.EX)
        return Group(tx, self.geometry, number)

    def _place(self, unit: int) -> tuple[int, int, int]:
        if not self.geometry.holds_unit(unit):
            raise Damaged(f"unit {unit} is to be freed and is in no allocation group")
        return self.geometry.map_place(unit)

    def _require_state(
        self, group: Group, index: int, position: int, count: int, state: UnitState
    ) -> None:
        """All of these units must be in ``state``."""
        other: int | None = position
        found = UnitState.FREE
        if group.is_ready(index):
            block = group.read_map(index)
            other = first_other(block, position, count, state)
            if other is not None:
                found = unit_state(block, other)
        if other is not None:
            unit = group.first_unit + index * UNITS_PER_MAP + other
            raise Damaged(
                f"unit {unit} of group {group.number} is to be freed as {state.name.lower()}"
                f" and is {found.name.lower()}"
            )

    def _contradiction(self, group: Group, maps: str) -> Damaged:
        return Damaged(
            f"group {group.number}: the header says {group.free_units} free units and"
            f" {group.free_metadata_blocks} free metadata blocks, the maps say {maps}"
        )
