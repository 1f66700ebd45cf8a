"""The told data path on a real tgtd: connections cut, late writes, a target frozen or restarted."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import trio

from redirector.block.iscsi import IscsiLun, IscsiOptions
from redirector.data_path import DataPath
from tests.tgt import Tgt
from tests.unit.told_path import BLOCK, NAME, told_path

pytestmark = pytest.mark.system

SLOW = b"SLOW" * (BLOCK // 4)
FAST = b"FAST" * (BLOCK // 4)


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(late_gate=True) as tgt:
        yield tgt


def open_lun(tgt: Tgt) -> IscsiLun:
    options = IscsiOptions(ping_interval_s=0.3, ping_timeout_s=1.0)
    return IscsiLun("127.0.0.1", tgt.port, tgt.iqn, 1, options=options)


async def wait_held(tgt: Tgt, writes: int) -> None:
    while tgt.held_writes() < writes:  # noqa: ASYNC110 (another process's file)
        await trio.sleep(0.005)


async def settled(path: DataPath) -> None:
    while not path.status().flows:  # noqa: ASYNC110 (what an admin sees)
        await trio.sleep(0.005)
    path.check()


async def test_late_writes_over_a_cut_connection(tgt: Tgt) -> None:
    """What tgtd still holds lands before it is written again, never after what came later."""
    with trio.fail_after(60):
        async with told_path(open_lun(tgt)) as (path, _):
            done = []

            async def slow_then_fast(block: int) -> None:
                await path.write(block * BLOCK, SLOW)
                done.append(block)
                await path.write(block * BLOCK, FAST)

            tgt.hold_writes()
            async with trio.open_nursery() as nursery:
                for block in range(1, 9):
                    nursery.start_soon(slow_then_fast, block)
                await wait_held(tgt, 8)
                assert tgt.cut(f"{NAME}2") == 1
                await trio.sleep(1)
                assert not done
                tgt.release_writes()
            await settled(path)
            assert await path.read(BLOCK, 8 * BLOCK) == FAST * 8
            assert path.status().losses >= 1
            await path.flush()


async def test_cuts_of_every_connection_under_load(tgt: Tgt) -> None:
    with trio.fail_after(60):
        async with told_path(open_lun(tgt)) as (path, told):
            stop = trio.Event()
            written = dict.fromkeys(range(8), b"")

            async def load(block: int) -> None:
                rng = Random(block)
                while not stop.is_set():
                    data = rng.randbytes(BLOCK)
                    await path.write((block + 1) * BLOCK, data, fua=rng.random() < 0.1)
                    written[block] = data
                    assert await path.read((block + 1) * BLOCK, BLOCK) == data

            async def flush() -> None:
                while not stop.is_set():
                    await path.flush()
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                for block in range(8):
                    nursery.start_soon(load, block)
                nursery.start_soon(flush)
                for victim in (f"{NAME}2", f"{NAME}1", None, f"{NAME}2", None):
                    await trio.sleep(0.2)
                    tgt.cut(victim)
                    await trio.sleep(0.02)
                    await settled(path)
                stop.set()
            for block, data in written.items():
                assert await path.read((block + 1) * BLOCK, BLOCK) == data
            assert path.status().losses >= 4
            assert told.proofs >= 4


async def test_a_target_that_freezes_and_goes_on(tgt: Tgt) -> None:
    with trio.fail_after(60):
        async with told_path(open_lun(tgt)) as (path, _):
            await path.write(BLOCK, FAST)
            async with trio.open_nursery() as nursery:
                with tgt.paused():
                    for block in range(1, 5):
                        nursery.start_soon(path.write, block * BLOCK, FAST)
                    await trio.sleep(3)
                    assert not path.status().flows
            await settled(path)
            assert await path.read(BLOCK, 4 * BLOCK) == FAST * 4


@pytest.mark.parametrize("freeze_first", [False, True])
async def test_a_target_freezes_with_its_window_full(tgt: Tgt, freeze_first: bool) -> None:
    """With the patience of real life: two seconds, not the timeout of a command."""
    window, writes = 16, 48
    update = ("--op", "update", "--mode", "target", "--tid", "1")
    tgt.admin(*update, "--name", "MaxQueueCmd", "--value", str(window))
    lun = IscsiLun("127.0.0.1", tgt.port, tgt.iqn, 1)
    answered: list[int] = []

    async def write(path: DataPath, block: int) -> None:
        await path.write(block * BLOCK, SLOW)
        answered.append(block)
        await path.write(block * BLOCK, FAST)

    with trio.fail_after(60):
        async with told_path(lun) as (path, _), trio.open_nursery() as nursery:
            tgt.hold_writes()
            if freeze_first:
                tgt.pause()
            for block in range(1, writes + 1):
                nursery.start_soon(write, path, block)
            if not freeze_first:
                await wait_held(tgt, window)
                await trio.sleep(1)  # so long it is merely slow
                assert path.status().flows
                tgt.pause()
            frozen_at = trio.current_time()
            while path.status().flows:  # noqa: ASYNC110 (what an admin sees)
                await trio.sleep(0.01)
            assert trio.current_time() - frozen_at <= 3.5
            assert not answered
            tgt.resume()
            tgt.release_writes()
        assert sorted(answered) == list(range(1, writes + 1))
    data = tgt.backing().read_bytes()[BLOCK : BLOCK * (writes + 1)]
    assert data == FAST * writes


async def test_a_target_that_restarts_and_lost_its_cache(tgt: Tgt) -> None:
    """Its backing file is set back to what it was at the flush: the unflushed writes come again."""
    with trio.fail_after(60):
        async with told_path(open_lun(tgt)) as (path, _):
            await path.write(BLOCK, SLOW)
            await path.flush()
            stable = tgt.backing().read_bytes()
            for block in range(1, 20):
                await path.write(block * BLOCK, FAST)
            tgt.kill()
            tgt.backing().write_bytes(stable)
            tgt.restart()
            await path.flush()
            assert tgt.backing().read_bytes()[BLOCK : 20 * BLOCK] == FAST * 19
            await settled(path)
            assert path.status().retained_bytes == 0
            assert await path.read(BLOCK, 19 * BLOCK) == FAST * 19
