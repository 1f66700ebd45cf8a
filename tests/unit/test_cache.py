"""The cache of metadata blocks: loading, eviction, and what makes it forget."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from csvfs.format import BLOCK_BYTES, BadBlock, BlockType
from csvfs.journal.cache import BLOCK_COST_BYTES, BlockCache
from csvfs.journal.transaction import BlockKey, Image, NeedBlocks
from redirector.block.arbiter import Op
from redirector.block.device import MediumError
from redirector.block.simulated import Command, SimulatedLun
from tests.small_store import FIRST, KIND, LUN_BYTES, PORT, VOLUME_ID, resource_of, sealed, tag_of


def is_read(command: Command) -> bool:
    return command.op is Op.READ


def keys(*addresses: int, owner: int = 0) -> list[BlockKey]:
    return [BlockKey(address, KIND, owner) for address in addresses]


def lun_with(*addresses: int, owner: int = 0, version: int = 1) -> SimulatedLun:
    return SimulatedLun(LUN_BYTES, blocks={a: sealed(a, a, version, owner) for a in addresses})


async def cache_on(lun: SimulatedLun, blocks: int = 1000) -> BlockCache:
    device = await lun.login(PORT)
    return BlockCache(device, VOLUME_ID, resource_of, clean_bytes=blocks * BLOCK_COST_BYTES)


def reads(lun: SimulatedLun) -> list[tuple[int, int]]:
    """Log (address, blocks) of the reads from now on."""
    seen: list[tuple[int, int]] = []

    def note(command: Command) -> bool:
        if is_read(command):
            seen.append((command.offset_bytes // BLOCK_BYTES, command.length_bytes // BLOCK_BYTES))
        return False

    lun.hold(note)
    return seen


async def test_neighbours_are_read_in_one_command() -> None:
    lun = lun_with(600, 601, 602, 610, 700)
    cache = await cache_on(lun)
    seen = reads(lun)
    with pytest.raises(NeedBlocks) as caught:
        cache.require(keys(700, 601, 600, 602, 610))
    await cache.load(caught.value.wanted)
    assert sorted(seen) == [(600, 3), (610, 1), (700, 1)]
    cache.require(keys(600, 601, 602, 610, 700))
    assert tag_of(cache.read(602, KIND, 0)) == 602
    assert cache.loads == len(cache) == 5
    cache.check()


async def test_runs_are_read_at_once() -> None:
    lun = lun_with(*range(600, 640, 2))
    cache = await cache_on(lun)
    hold = lun.hold(is_read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.load, keys(*range(600, 640, 2)))
        await hold.wait_held(20)
        hold.lift()


async def test_two_tasks_read_a_block_once() -> None:
    lun = lun_with(600, 601)
    cache = await cache_on(lun)
    seen = reads(lun)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.load, keys(600))
        nursery.start_soon(cache.load, keys(600, 601))
    assert sum(blocks for _, blocks in seen) == 2


async def test_who_waited_for_a_load_that_failed_loads_again() -> None:
    lun = lun_with(600)
    cache = await cache_on(lun)
    hold = lun.hold(is_read, limit=1)

    async def fail() -> None:
        with pytest.raises(MediumError):
            await cache.load(keys(600))

    async def try_again() -> None:
        await cache.load(keys(600))
        assert 600 not in cache
        lun.medium_errors.clear()
        await cache.load(keys(600))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await hold.wait_held()
        nursery.start_soon(try_again)
        await trio.testing.wait_all_tasks_blocked()
        lun.medium_errors.append(range(600 * BLOCK_BYTES, 601 * BLOCK_BYTES))
        hold.lift()
    assert tag_of(cache.read(600, KIND, 0)) == 600
    cache.check()


async def test_a_cancelled_load_leaves_nothing_behind() -> None:
    lun = lun_with(600, 650)
    cache = await cache_on(lun)
    with trio.CancelScope() as scope:
        scope.cancel()
        await cache.load(keys(600, 650))
    assert scope.cancelled_caught
    await cache.load(keys(600, 650))
    assert 600 in cache and 650 in cache


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (BlockKey(600, BlockType.INODE, 0), "type is xattr"),
        (BlockKey(600, KIND, 3), "owner is 0, not 3"),
        (BlockKey(600, KIND, 0, 2), "flags are 0x0, not 0x2"),
        (BlockKey(601, KIND, 0), "all zeroes"),
    ],
)
async def test_a_bad_block_is_named_and_not_kept(key: BlockKey, reason: str) -> None:
    lun = lun_with(600)
    cache = await cache_on(lun)
    with pytest.raises(BadBlock, match=reason) as caught:
        await cache.load([key])
    assert caught.value.address == key.address
    assert key.address not in cache
    cache.check()


async def test_a_bad_block_spoils_no_other() -> None:
    lun = lun_with(600, 602, 650)
    cache = await cache_on(lun)
    with pytest.raises(BadBlock, match="block 601"):
        await cache.load(keys(600, 601, 602, 650))
    assert [a in cache for a in (600, 601, 602, 650)] == [True, False, True, True]


async def test_a_medium_error_is_raised_when_all_reads_have_ended() -> None:
    lun = lun_with(600, 650)
    lun.medium_errors.append(range(600 * BLOCK_BYTES, 601 * BLOCK_BYTES))
    cache = await cache_on(lun)
    with pytest.raises(MediumError):
        await cache.load(keys(600, 650))
    assert 650 in cache
    cache.check()


async def test_a_cached_block_is_not_taken_for_another_kind() -> None:
    cache = await cache_on(lun_with(600))
    await cache.load(keys(600))
    with pytest.raises(BadBlock, match="known as xattr of 0"):
        cache.read(600, BlockType.INODE, 600)


async def test_the_greatest_version_is_remembered() -> None:
    lun = lun_with(600, version=70)
    lun.blocks[601] = sealed(601, 1, version=30)
    cache = await cache_on(lun)
    await cache.load(keys(600, 601))
    assert cache.greatest_version == 70


# -- eviction ------------------------------------------------------------------------------------
async def test_blocks_read_lately_stay() -> None:
    addresses = range(600, 640)
    cache = await cache_on(lun_with(*addresses), blocks=20)
    await cache.load(keys(*range(600, 620)))
    await cache.load(keys(620))  # sweeps: all marks are gone, 600 leaves
    cache.read(601, KIND, 0)
    await cache.load(keys(621, 622))
    assert 600 not in cache and 601 in cache and 602 not in cache
    assert len(cache) == 20
    cache.check()


async def test_pinned_blocks_are_never_evicted() -> None:
    addresses = range(600, 700)
    cache = await cache_on(lun_with(*addresses), blocks=16)
    cache.put(599, Image(KIND, 0, 0, bytearray(sealed(599, 1)), True))
    await cache.load(keys(*addresses))
    assert 599 in cache and cache.pinned() == {599}
    assert len(cache) == 17
    cache.unpin(599)
    await cache.load(keys(*range(600, 640)))
    assert 599 not in cache
    cache.check()


async def test_nothing_leaves_while_eviction_is_off() -> None:
    cache = await cache_on(lun_with(*range(600, 700)), blocks=16)
    with cache.eviction_off():
        await cache.load(keys(*range(600, 700)))
        assert len(cache) == 100
        cache.check()
    assert len(cache) == 16


# -- forgetting ----------------------------------------------------------------------------------
async def test_drop_forgets_what_a_lock_covers() -> None:
    lun = lun_with(600, 601)
    lun.blocks[602] = sealed(602, 2, owner=9)
    cache = await cache_on(lun)
    await cache.load([*keys(600, 601), *keys(602, owner=9)])
    assert cache.owned(9) == {602}
    cache.drop(0)
    assert 600 not in cache and 601 not in cache and 602 in cache
    cache.check()
    cache.put(602, Image(KIND, 9, 0, bytearray(sealed(602, 3, owner=9)), False))
    with pytest.raises(AssertionError, match="not home"):
        cache.drop(9)


@pytest.mark.parametrize("how", ["drop", "forget", "put"])
async def test_what_a_load_brings_too_late_is_not_kept(how: str) -> None:
    lun = lun_with(600)
    cache = await cache_on(lun)
    hold = lun.hold(is_read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.load, keys(600))
        await hold.wait_held()
        if how == "drop":
            cache.drop(0)
        elif how == "forget":
            cache.forget(600)
        else:
            cache.put(600, Image(KIND, 0, 0, bytearray(sealed(600, 7)), True))
        hold.lift()
    if how == "put":
        assert tag_of(cache.read(600, KIND, 0)) == 7
    else:
        assert 600 not in cache
    cache.check()


async def test_a_fresh_image_replaces_whatever_was_cached() -> None:
    cache = await cache_on(lun_with(FIRST))
    await cache.load(keys(FIRST))
    block = bytearray(sealed(FIRST, 7, owner=4))
    cache.put(FIRST, Image(KIND, 4, 0, block, True))
    assert cache.read(FIRST, KIND, 4) is block
    assert cache.owned(0) == frozenset() and cache.owned(4) == {FIRST}
    cache.check()
