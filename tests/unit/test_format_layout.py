"""Where things lie: the view's copies, the geometry, the maps, the place of an extent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs import format as fmt
from csvfs.format import BadBlock, Geometry

VOLUME = bytes(range(16))
VIEW = fmt.View(4, 9, (fmt.ViewSlot(1, fmt.SlotState.ACTIVE, node_name="node"),) * 4)


# -- the view's two copies -----------------------------------------------------------------------
def _view_copies(*epochs: int) -> list[bytearray]:
    copies = [bytearray(fmt.VIEW_BYTES), bytearray(fmt.VIEW_BYTES)]
    for epoch in epochs:
        copies[epoch % 2] = fmt.encode_view(replace(VIEW, epoch=epoch), VOLUME)
    return copies


@pytest.mark.parametrize(("epochs", "newest"), [((1, 2), 2), ((3, 2), 3), ((5,), 5), ((4,), 4)])
def test_the_valid_copy_of_the_higher_epoch_is_the_view(
    epochs: tuple[int, ...], newest: int
) -> None:
    assert fmt.newest_view(_view_copies(*epochs), VOLUME).epoch == newest


@given(st.integers(1, fmt.VIEW_BYTES // 512 - 1))
def test_a_torn_view_leaves_the_one_before_it(sectors: int) -> None:
    copies = _view_copies(3, 4)
    new = fmt.encode_view(replace(VIEW, epoch=5, holder_key=77, written_ns=5), VOLUME)
    copies[1][: sectors * 512] = new[: sectors * 512]
    expected = 5 if copies[1] == new else 4
    assert fmt.newest_view(copies, VOLUME).epoch == expected


def test_no_valid_copy_is_a_clear_error() -> None:
    copies = _view_copies(1, 2)
    copies[0][100] ^= 1
    copies[1][100] ^= 1
    with pytest.raises(fmt.NoView, match=r"block 16 .* block 32 "):
        fmt.newest_view(copies, VOLUME)


def test_a_view_in_the_wrong_place_is_no_view() -> None:
    block = fmt.encode_view(replace(VIEW, epoch=3), VOLUME)
    with pytest.raises(BadBlock):
        fmt.decode_view(block, 16, VOLUME)


# -- geometry ------------------------------------------------------------------------------------
@given(st.integers(fmt.MIN_LUN_BYTES, 1 << 45), st.integers(1, 64), st.integers(16, 1024))
def test_nothing_overlaps(size: int, slots: int, journal_units: int) -> None:
    try:
        g = Geometry.for_lun(size, slots, journal_units * fmt.UNIT_BYTES)
    except fmt.BadGeometry:
        assert size < (23 + slots * journal_units + 34) * fmt.UNIT_BYTES
        return
    assert g.journal(slots - 1) + g.journal_blocks == g.groups_unit * 16
    ends = g.groups_unit
    for group in {0, g.group_count // 2, g.group_count - 1}:
        first = g.group_first_unit(group)
        units = g.group_units(group)
        assert first >= ends
        assert fmt.MIN_GROUP_UNITS <= units <= fmt.GROUP_UNITS
        assert g.map_place(first) == (group, 0, 0)
        last = first + units - 1
        assert g.map_place(last) == (group, (units - 1) // 1792, (units - 1) % 1792)
        assert g.map_count(group) == (units - 1) // 1792 + 1
        assert g.group_of(last * 16 + 15) == group
    assert g.groups_end_unit * 16 <= g.backup_superblock
    assert (g.backup_superblock + 16) * 4096 <= size
    assert g.size_units - 1 - g.groups_end_unit < fmt.MIN_GROUP_UNITS
    for outside in (0, 1, g.groups_unit * 16 - 1, g.groups_end_unit * 16):
        assert not g.holds(outside)
        with pytest.raises(ValueError, match="no allocation group"):
            g.group_of(outside)


def test_default_journal_size() -> None:
    assert fmt.default_journal_bytes(1 << 40) == 64 << 20
    assert fmt.default_journal_bytes(1 << 30) == 4 << 20
    assert fmt.default_journal_bytes(64 << 20) == 1 << 20


def test_refusals_name_the_number() -> None:
    with pytest.raises(fmt.BadGeometry, match=str(fmt.MIN_LUN_BYTES)):
        Geometry.for_lun(fmt.MIN_LUN_BYTES - 1, 1)
    with pytest.raises(fmt.BadGeometry, match="a LUN of at least 70778880 bytes"):
        Geometry.for_lun(fmt.MIN_LUN_BYTES, 64)
    Geometry.for_lun(70778880, 64)


# -- maps ----------------------------------------------------------------------------------------
@given(
    st.dictionaries(
        st.integers(0, 1791), st.tuples(st.sampled_from(fmt.UnitState), st.integers(0, 65535))
    )
)
def test_map_accessors(wanted: dict[int, tuple[fmt.UnitState, int]]) -> None:
    block = fmt.new_map_block(VOLUME, 3, 99, 1, fmt.GROUP_UNITS)
    for position, (state, bits) in wanted.items():
        fmt.set_unit_state(block, position, fmt.UnitState.RESERVED)
        fmt.set_unit_state(block, position, state)
        fmt.set_used_blocks(block, position, bits)
    for position in range(1792):
        state, bits = wanted.get(position, (fmt.UnitState.FREE, 0))
        assert fmt.unit_state(block, position) == state
        assert fmt.used_blocks(block, position) == bits


def test_fresh_map_reserves_what_is_no_unit() -> None:
    first = fmt.new_map_block(VOLUME, 0, 99, 0, 2000)
    assert fmt.unit_state(first, 0) == fmt.UnitState.RESERVED
    assert all(fmt.unit_state(first, n) == fmt.UnitState.FREE for n in range(1, 1792))
    second = fmt.new_map_block(VOLUME, 0, 100, 1, 2000)
    states = [fmt.unit_state(second, n) for n in range(1792)]
    assert states == [fmt.UnitState.FREE] * 208 + [fmt.UnitState.RESERVED] * 1584


@given(st.integers(1, (1 << 40) - 1), st.integers(1, 64))
def test_place_of_an_extent(unit: int, count: int) -> None:
    word = fmt.pack_place(unit, count)
    assert word < 1 << 48
    assert fmt.unpack_place(word) == (unit, count)
