"""The allocation maps: read before the walk, compared with what is owned after it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import cast

from csvfs.btree.node import Block
from csvfs.check.claims import METADATA, Claims
from csvfs.check.finding import Damage, Finding, Repair
from csvfs.check.image import VolumeImage
from csvfs.check.workbench import Workbench
from csvfs.format import (
    BLOCKS_PER_UNIT,
    MAP_STATES_BYTES,
    MAP_STATES_OFFSET,
    UNITS_PER_MAP,
    BadBlock,
    BlockType,
    Geometry,
    GroupFlag,
    GroupHeader,
    UnitState,
    new_map_block,
    unit_state,
)
from csvfs.journal.transaction import BlockKey

GROUPS_AT_ONCE = 64
_MAP_WORDS = struct.Struct(f"<{UNITS_PER_MAP}H")


class Space:
    """What the maps say. A map that cannot be read says nothing."""

    def __init__(
        self, image: VolumeImage, geometry: Geometry, report: Callable[[Finding], None]
    ) -> None:
        self._image = image
        self._geometry = geometry
        self._report = report
        self._headers: dict[int, GroupHeader | None] = {}
        self._maps: dict[tuple[int, int], bytes | None] = {}
        """The states and block words of each map that exists on disk."""

    async def read(self) -> None:
        """Read all headers and maps, a few groups at a time; note those that are damaged."""
        geometry = self._geometry
        for start in range(0, geometry.group_count, GROUPS_AT_ONCE):
            groups = range(start, min(start + GROUPS_AT_ONCE, geometry.group_count))
            headers = await self._image.read(geometry.group_header(group) for group in groups)
            for group in groups:
                self._read_header(group, headers[geometry.group_header(group)])
            await self._read_maps(groups)

    def _read_header(self, group: int, block: object) -> None:
        address = self._geometry.group_header(group)
        try:
            self._image.verify(cast(Block, block), BlockKey(address, BlockType.GROUP_HEADER, group))
            header = GroupHeader.decode(cast(Block, block), address, self._image.volume_id, group)
            if header.unit_count != self._geometry.group_units(group):
                raise BadBlock(
                    address, BlockType.GROUP_HEADER, f"it says {header.unit_count} units"
                )
            self._headers[group] = header
        except BadBlock as error:
            self._headers[group] = None
            self._find(Damage.GROUP_HEADER, group, error.reason)

    async def _read_maps(self, groups: range) -> None:
        keys = []
        for group in groups:
            header = self._headers[group]
            for index in range(self._geometry.map_count(group)):
                if header is not None and header.map_ready >> index & 1:
                    address = self._geometry.group_map(group, index)
                    keys.append((group, index, BlockKey(address, BlockType.GROUP_MAP, group)))
        good, bad = await self._image.read_verified(key for _, _, key in keys)
        for group, index, key in keys:
            if key.address in bad:
                self._maps[group, index] = None
                self._find(Damage.GROUP_MAP, group, f"map {index}: {bad[key.address].reason}")
            else:
                self._maps[group, index] = bytes(good[key.address][MAP_STATES_OFFSET:])

    def _find(self, damage: Damage, group: int, detail: str, repair: Repair | None = None) -> None:
        self._report(Finding(damage, f"group {group}", detail, repair))

    # -- what the maps say -------------------------------------------------------------------
    def state_of(self, unit: int) -> UnitState | None:
        """State of a unit inside the groups; None where no map can say."""
        group, index, position = self._geometry.map_place(unit)
        header = self._headers.get(group)
        if header is None:
            return None
        if not header.map_ready >> index & 1:
            return UnitState.FREE
        packed = self._maps.get((group, index))
        if packed is None:
            return None
        return unit_state(bytes(MAP_STATES_OFFSET) + packed[:MAP_STATES_BYTES], position)

    def unclaimed_blocks(self, claims: Claims) -> list[int]:
        """Metadata blocks that the maps say are in use and that nobody has claimed."""
        found: list[int] = []
        for (group, index), packed in self._maps.items():
            if packed is None:
                continue
            first = self._geometry.group_first_unit(group) + index * UNITS_PER_MAP
            words = _MAP_WORDS.unpack_from(packed, MAP_STATES_BYTES)
            for position, used in enumerate(words):
                left = used & ~claims.blocks.get(first + position, 0)
                if left:
                    base = (first + position) * BLOCKS_PER_UNIT
                    found += [base + i for i in range(BLOCKS_PER_UNIT) if left >> i & 1]
        return found

    # -- comparison --------------------------------------------------------------------------
    def compare(self, claims: Claims) -> None:
        """Note where a group's maps and counts are not what the claims say; one repair a group."""
        for group in range(self._geometry.group_count):
            self._compare_group(group, claims)

    def _compare_group(self, group: int, claims: Claims) -> None:
        header = self._headers[group]
        wrong: list[tuple[Damage, str]] = []
        free_units, free_blocks = 0, 0
        for index in range(self._geometry.map_count(group)):
            expected = expected_map(self._geometry, self._image.volume_id, group, index, claims)
            units, blocks = count_free(expected)
            free_units += units
            free_blocks += blocks
            wrong += self._compare_map(group, index, header, expected)
        counts = (free_units, free_blocks)
        if header is not None and counts != (header.free_units, header.free_metadata_blocks):
            detail = (
                f"it says {header.free_units} free units and {header.free_metadata_blocks}"
                f" free metadata blocks, there are {free_units} and {free_blocks}"
            )
            wrong.append((Damage.FREE_COUNT, detail))
        if (
            wrong
            or header is None
            or None
            in [
                self._maps.get((group, index), b"")
                for index in range(self._geometry.map_count(group))
            ]
        ):
            repair: Repair | None = partial(write_group, group=group)
            if not wrong:
                wrong.append((Damage.GROUP_MAP, "it must be written anew"))
            for damage, detail in wrong:
                self._find(damage, group, detail, repair)
                repair = None

    def _compare_map(
        self, group: int, index: int, header: GroupHeader | None, expected: bytes
    ) -> list[tuple[Damage, str]]:
        if header is None:
            return []
        if header.map_ready >> index & 1:
            found = self._maps[group, index]
        else:
            found = empty_map(self._geometry, self._image.volume_id, group, index)
        if found is None or found == expected:
            return []
        leaked, unmarked = difference(found, expected)
        first = self._geometry.group_first_unit(group) + index * UNITS_PER_MAP
        answers = []
        for damage, blocks, words in (
            (Damage.LEAKED, leaked, "nobody owns"),
            (Damage.UNMARKED, unmarked, "are owned but marked free or as another kind:"),
        ):
            if blocks:
                units = sorted({block // BLOCKS_PER_UNIT + first for block in blocks})
                answers.append((damage, f"map {index}: {words} {_some(units)}"))
        return answers


def _some(units: list[int]) -> str:
    shown = ", ".join(map(str, units[:8]))
    return f"unit {shown}" + (f" and {len(units) - 8} more" if len(units) > 8 else "")


def empty_map(geometry: Geometry, volume_id: bytes, group: int, index: int) -> bytes:
    """States and block words of a map that was never written."""
    address = geometry.group_map(group, index)
    block = new_map_block(volume_id, group, address, index, geometry.group_units(group))
    return bytes(block[MAP_STATES_OFFSET:])


def expected_map(
    geometry: Geometry, volume_id: bytes, group: int, index: int, claims: Claims
) -> bytes:
    """States and block words as the claims say they must be."""
    packed = bytearray(empty_map(geometry, volume_id, group, index))
    states = claims.states(group)[index * UNITS_PER_MAP : (index + 1) * UNITS_PER_MAP]
    if not any(states):
        return bytes(packed)
    padded = states + bytes(-len(states) % 4)
    quarters = [int.from_bytes(padded[at::4]) for at in range(4)]
    joined = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    bits = joined.to_bytes(len(padded) // 4)
    reserved = int.from_bytes(packed[: len(bits)])
    packed[: len(bits)] = (reserved | int.from_bytes(bits)).to_bytes(len(bits))
    first = geometry.group_first_unit(group) + index * UNITS_PER_MAP
    at = states.find(METADATA)
    while at >= 0:
        struct.pack_into("<H", packed, MAP_STATES_BYTES + 2 * at, claims.blocks[first + at])
        at = states.find(METADATA, at + 1)
    return bytes(packed)


def _states(packed: bytes) -> list[int]:
    return [byte >> shift & 3 for byte in packed[:MAP_STATES_BYTES] for shift in (0, 2, 4, 6)]


def count_free(packed: bytes) -> tuple[int, int]:
    """(free units, free blocks in metadata units) of a map."""
    if not any(packed[MAP_STATES_BYTES:]):
        free = sum(_FREE_IN_BYTE[byte] for byte in packed[:MAP_STATES_BYTES])
        return free, 0
    states = _states(packed)
    words = _MAP_WORDS.unpack_from(packed, MAP_STATES_BYTES)
    blocks = sum(
        BLOCKS_PER_UNIT - words[at].bit_count()
        for at, state in enumerate(states)
        if state == UnitState.METADATA
    )
    return states.count(UnitState.FREE), blocks


_FREE_IN_BYTE = [
    sum(byte >> shift & 3 == UnitState.FREE for shift in (0, 2, 4, 6)) for byte in range(256)
]


def difference(found: bytes, expected: bytes) -> tuple[list[int], list[int]]:
    """(leaked, unmarked) as block numbers from the map's first unit."""
    leaked: list[int] = []
    unmarked: list[int] = []
    found_words = _MAP_WORDS.unpack_from(found, MAP_STATES_BYTES)
    expected_words = _MAP_WORDS.unpack_from(expected, MAP_STATES_BYTES)
    for at, (was, due) in enumerate(zip(_states(found), _states(expected), strict=True)):
        base = at * BLOCKS_PER_UNIT
        if was != due:
            (leaked if due == UnitState.FREE else unmarked).append(base)
        elif found_words[at] != expected_words[at]:
            extra = found_words[at] & ~expected_words[at]
            missing = expected_words[at] & ~found_words[at]
            leaked += [base + i for i in range(BLOCKS_PER_UNIT) if extra >> i & 1]
            unmarked += [base + i for i in range(BLOCKS_PER_UNIT) if missing >> i & 1]
    return leaked, unmarked


async def write_group(bench: Workbench, *, group: int) -> None:
    """Write a group's maps and header as the claims say."""
    geometry, image, claims = bench.geometry, bench.image, bench.claims
    free_units = free_blocks = ready = 0
    for index in range(geometry.map_count(group)):
        packed = expected_map(geometry, image.volume_id, group, index, claims)
        units, blocks = count_free(packed)
        free_units += units
        free_blocks += blocks
        if packed == empty_map(geometry, image.volume_id, group, index):
            continue
        ready |= 1 << index
        address = geometry.group_map(group, index)
        block = new_map_block(image.volume_id, group, address, index, geometry.group_units(group))
        block[MAP_STATES_OFFSET:] = packed
        image.put(address, block)
    header = GroupHeader(
        group,
        geometry.group_first_unit(group),
        geometry.group_units(group),
        free_units,
        free_blocks,
        ready,
        GroupFlag(0) if ready else GroupFlag.UNINIT,
    )
    image.put(header.address, header.encode(image.volume_id, 1))
