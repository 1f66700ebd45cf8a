"""Who owns which unit and which block, gathered from the owners' side.

Invariants:
  1. a unit is claimed as data by one owner, or holds metadata blocks, each of one owner, or nothing
  2. only units and blocks inside the groups are claimed
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from csvfs.format import BLOCKS_PER_UNIT, GROUP_UNITS, Geometry

FREE, DATA, METADATA = b"\0\1\2"


@dataclass(frozen=True, slots=True)
class Conflict:
    """Part of a claim that somebody else made before; ``owner`` is an inode number or 0."""

    first_unit: int
    count: int
    owner: int


class Claims:
    """One byte a unit, in groups made when they are first claimed from; 16 bits a metadata unit."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._states: dict[int, bytearray] = {}
        self.blocks: dict[int, int] = {}
        """Unit -> bit mask of the metadata blocks in use."""
        self._runs = array("Q")
        """Triples (first unit, count, owner) of the data claims, in their order."""
        self.data_units = 0
        self.metadata_blocks = 0

    def states(self, group: int) -> bytearray:
        """One byte a unit of the group: FREE, DATA, METADATA."""
        states = self._states.get(group)
        if states is None:
            states = self._states[group] = bytearray(self.geometry.group_units(group))
        return states

    def _place(self, unit: int) -> tuple[bytearray, int]:
        group, position = divmod(unit - self.geometry.groups_unit, GROUP_UNITS)
        return self.states(group), position

    def inside(self, first_unit: int, count: int) -> bool:
        """True if the run lies in one group and is none of the group's own metadata."""
        geometry = self.geometry
        if not geometry.groups_unit <= first_unit < first_unit + count <= geometry.groups_end_unit:
            return False
        group, position = divmod(first_unit - geometry.groups_unit, GROUP_UNITS)
        return position > 0 and position + count <= geometry.group_units(group)

    def claim_units(self, first_unit: int, count: int, owner: int) -> Conflict | None:
        """Claim data units, all or none; return the first conflict. The run must be `inside`."""
        states, position = self._place(first_unit)
        part = states[position : position + count]
        if any(part):
            start = next(index for index, state in enumerate(part) if state)
            end = next((i for i in range(start, count) if not part[i]), count)
            unit = first_unit + start
            return Conflict(unit, end - start, self.owner_of(unit))
        states[position : position + count] = b"\1" * count
        self._runs.extend((first_unit, count, owner))
        self.data_units += count
        return None

    def claim_block(self, address: int) -> bool:
        """Claim a metadata block; False if it is somebody's already or outside the groups."""
        unit, index = divmod(address, BLOCKS_PER_UNIT)
        if not self.inside(unit, 1):
            return False
        states, position = self._place(unit)
        used = self.blocks.get(unit, 0)
        if states[position] == DATA or used >> index & 1:
            return False
        states[position] = METADATA
        self.blocks[unit] = used | 1 << index
        self.metadata_blocks += 1
        return True

    def owner_of(self, unit: int) -> int:
        """The inode that claimed a data unit; 0 if none did."""
        runs = self._runs
        for index in range(0, len(runs), 3):
            if runs[index] <= unit < runs[index] + runs[index + 1]:
                return runs[index + 2]
        return 0

    def free_block(self, goal_group: int) -> int:
        """The address of a block that nobody claims, now claimed. Raises `LookupError`."""
        geometry = self.geometry
        for unit, used in self.blocks.items():
            if used != 0xFFFF:
                index = next(i for i in range(BLOCKS_PER_UNIT) if not used >> i & 1)
                address = unit * BLOCKS_PER_UNIT + index
                assert self.claim_block(address)
                return address
        for step in range(geometry.group_count):
            group = (goal_group + step) % geometry.group_count
            position = self.states(group).find(b"\0", 1)
            if position > 0:
                address = (geometry.group_first_unit(group) + position) * BLOCKS_PER_UNIT
                assert self.claim_block(address)
                return address
        raise LookupError("the volume is full: no block is free for the repair")

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for group, states in self._states.items():
            assert not states[0]
            first = self.geometry.group_first_unit(group)
            metadata = {first + i for i, state in enumerate(states) if state == METADATA}
            assert metadata == {
                unit for unit in self.blocks if unit in range(first, first + len(states))
            }
        assert sum(mask.bit_count() for mask in self.blocks.values()) == self.metadata_blocks
