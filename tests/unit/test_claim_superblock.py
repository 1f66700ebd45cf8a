# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""A claim that may rebuild: both superblocks are destroyed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import Superblock
from csvfs.membership.claim import Claim
from csvfs.membership.fixed_area import SuperblocksDestroyed
from csvfs.membership.refusals import RefuseOther
from csvfs.membership.superblock_rebuild import LABEL, CannotRebuild
from csvfs.mkfs import FormatOptions, make_filesystem
from redirector.block.device import InitiatorPort
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_menders import (
    SECRET,
    Mender,
    alpha,
    assert_refused,
    beta,
    tear_views,
)
from tests.unit.claim_nodes import (
    SIZE,
    formatted,
    registered,
    release,
)


@asynccontextmanager
async def rebuilt(lun: SimulatedLun, node: Mender) -> AsyncIterator[Claim]:
    claim = await node.claim(lun)
    try:
        yield claim
    finally:
        claim.abort()


def lose_superblocks(lun: SimulatedLun, size: int = SIZE) -> Superblock:
    old = Superblock.decode(lun.blocks[0])
    for address in (0, size // 4096 - 16):
        lun.blocks[address] = b"\xee" * 4096
    return old


@pytest.mark.parametrize(
    ("size", "slots", "journal_bytes"),
    [(SIZE, 4, None), (64 << 20, 1, 3 << 20), (5 << 30, 16, None), (5 << 30, 7, 100 << 20)],
)
async def test_a_superblock_is_derived(
    size: int, slots: int, journal_bytes: int | None, autojump_clock: MockClock
) -> None:
    lun = SimulatedLun(size, yields=False)
    options = FormatOptions(label="v", slots=slots, journal_bytes=journal_bytes)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 1)) as device:
        await make_filesystem(device, options, now_ns=77, rng=Random(5))
    old = lose_superblocks(lun, size)
    with pytest.raises(SuperblocksDestroyed):
        await alpha().claim(lun, rebuild=False)
    async with rebuilt(lun, alpha()) as claim:
        assert claim.superblock == replace(old, label=LABEL)
        for words in ("label", "UNMAP", "copy"):
            assert words in claim.superblock_rebuilt
        # It lies in memory only: who has the claim writes it.
        assert lun.blocks[0] == b"\xee" * 4096


async def test_what_cannot_be_derived_promises_least(autojump_clock: MockClock) -> None:
    lun = await formatted()
    old = Superblock.decode(lun.blocks[0])
    best = replace(
        old, probe=fmt.ProbeFlag.PROBED | fmt.ProbeFlag.UNMAP_WORKS, write_cache=fmt.WriteCache(1)
    )
    lun.blocks[0] = bytes(best.encode(0))
    lose_superblocks(lun)
    async with rebuilt(lun, alpha()) as claim:
        assert not claim.superblock.unmap_allowed
        assert claim.superblock.write_cache is fmt.WriteCache.VOLATILE


async def test_the_device_id_is_that_of_the_lun_it_lies_on(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lose_superblocks(lun)
    copy = SimulatedLun(SIZE, seed=6, blocks=dict(lun.blocks))
    async with rebuilt(copy, alpha()) as claim:
        device_id = claim.data.device.identity.device_id
        assert claim.superblock.device_id == device_id
        assert device_id.hex() in claim.superblock_rebuilt


async def test_others_are_respected_under_a_derived_superblock(autojump_clock: MockClock) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    lose_superblocks(lun)
    refused = await assert_refused(lun, alpha())
    assert isinstance(refused.refusal, RefuseOther)
    await release(theirs)
    async with rebuilt(lun, alpha()) as claim:
        claim.check()
        assert registered(lun) == sorted([claim.data.key, claim.control.key])


def no_views(lun: SimulatedLun, old: Superblock) -> None:
    tear_views(lun)


def no_groups(lun: SimulatedLun, old: Superblock) -> None:
    lun.blocks[old.geometry.group_header(0)] = b"\xee" * 4096


def root_of_another(lun: SimulatedLun, old: Superblock) -> None:
    block = bytearray(lun.blocks[fmt.ROOT_INODE])
    block[fmt.VOLUME_ID_OFFSET] ^= 1
    fmt.seal(block, 5)
    lun.blocks[fmt.ROOT_INODE] = bytes(block)


def view_of_another(lun: SimulatedLun, old: Superblock) -> None:
    view = fmt.encode_view(fmt.View.empty(4, 8, secret=SECRET), b"other volume    ")
    for at in range(16):
        lun.blocks[fmt.VIEW_ADDRESSES[0] + at] = bytes(view[at * 4096 : at * 4096 + 4096])


def forged_group(lun: SimulatedLun, old: Superblock) -> None:
    """As a guest can write it into its image, where journals one unit longer would end."""
    geometry = old.geometry
    false = fmt.Geometry.of_units(geometry.size_units, geometry.slots, geometry.journal_units + 1)
    header = fmt.GroupHeader.fresh(0, false.group_first_unit(0), false.group_units(0))
    lun.blocks[header.address] = bytes(header.encode(old.volume_id, 1))


def other_size(lun: SimulatedLun, old: Superblock) -> None:
    """The group ends elsewhere than the LUN: it was made larger or smaller."""
    geometry = old.geometry
    count = geometry.group_units(0) - 64
    header = fmt.GroupHeader.fresh(0, geometry.group_first_unit(0), count)
    lun.blocks[header.address] = bytes(header.encode(old.volume_id, 9))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_views, "number of slots"),
        (no_groups, "group headers"),
        (root_of_another, "root inode"),
        (view_of_another, "one view is of volume"),
        (forged_group, "forgery"),
        (other_size, "resized"),
    ],
)
async def test_ambiguous_evidence_is_refused(
    damage: Callable[[SimulatedLun, Superblock], None], reason: str, autojump_clock: MockClock
) -> None:
    lun = await formatted()
    old = lose_superblocks(lun)
    damage(lun, old)
    writes = lun.journal.writes
    with pytest.raises(CannotRebuild, match=reason):
        await alpha().claim(lun)
    assert lun.journal.writes == writes
    assert registered(lun) == []


async def test_half_of_the_groups_are_enough(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(7 << 30, yields=False)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 1)) as device:
        options = FormatOptions(label="v", slots=64, journal_bytes=1 << 20)
        await make_filesystem(device, options, now_ns=1, rng=Random(5))
    old = lose_superblocks(lun, 7 << 30)
    count = old.geometry.group_count
    assert count == 5
    for group in (0, 2):
        lun.blocks[old.geometry.group_header(group)] = b"\xee" * 4096
    async with rebuilt(lun, alpha()) as claim:
        assert claim.superblock.geometry == old.geometry
        assert "3 of 5 group headers" in claim.superblock_rebuilt
    lun.blocks[old.geometry.group_header(3)] = b"\xee" * 4096
    with pytest.raises(CannotRebuild, match="half of the group headers"):
        await alpha(2).claim(lun)
    lun.blocks[old.geometry.group_header(0)] = bytes(
        fmt.GroupHeader.fresh(
            0, old.geometry.group_first_unit(0), old.geometry.group_units(0)
        ).encode(old.volume_id, 3)
    )
    lun.blocks[old.geometry.group_header(4)] = b"\xee" * 4096
    with pytest.raises(CannotRebuild):
        await alpha(3).claim(lun)
