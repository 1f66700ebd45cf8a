"""How an iSCSI session is lost, and what that leaves behind: nothing."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from redirector.block.device import InitiatorPort, LoginFailed, OutcomeUnknown, Unreachable
from redirector.block.iscsi import IscsiLun, IscsiOptions
from redirector.block.iscsi_device import IscsiDevice
from tests.tgt import Tgt

pytestmark = pytest.mark.system

NAME = "iqn.2026-11.test.csvfs:loss"
A = InitiatorPort(NAME, 0x80_0000_0000_01)
HASTY = IscsiOptions(ping_interval_s=0.1, ping_timeout_s=0.3, command_timeout_s=20)
SLOW = b"SLOW" + bytes(4092)


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(late_gate=True) as running:
        yield running


def lun_of(tgt: Tgt, options: IscsiOptions = HASTY) -> IscsiLun:
    return IscsiLun(tgt.address, tgt.port, tgt.iqn, 1, options=options)


def set_window(tgt: Tgt, commands: int) -> None:
    update = ("--op", "update", "--mode", "target", "--tid", "1")
    tgt.admin(*update, "--name", "MaxQueueCmd", "--value", str(commands))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 (another process changes it)
            await trio.sleep(0.005)


async def expect_unknown(device: IscsiDevice) -> None:
    with pytest.raises(OutcomeUnknown):
        await device.write(0, SLOW)


async def lose_in_flight(tgt: Tgt, device: IscsiDevice, lose: Callable[[], object]) -> None:
    """Put writes in flight that tgtd holds, and many more that wait for them; lose them all."""
    tgt.hold_writes()
    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(expect_unknown, device)
        await until(lambda: tgt.held_writes() >= 16)
        lose()
        with trio.fail_after(10):
            await device.wait_lost()
    assert device.lost
    await expect_unknown(device)
    await device.aclose()


async def test_the_target_cuts_the_connection(tgt: Tgt) -> None:
    device = await lun_of(tgt).login(A)
    await lose_in_flight(tgt, device, tgt.cut)
    tgt.release_writes()
    # What was in flight still lands: outcome unknown means just that.
    await lun_of(tgt).reset(timeout_s=10)
    assert tgt.backing().read_bytes()[:4] == b"SLOW"


async def test_an_idle_connection_that_closes_is_noticed(tgt: Tgt) -> None:
    device = await lun_of(tgt).login(A)
    tgt.cut()
    with trio.fail_after(10):
        await device.wait_lost()
    await device.aclose()


async def test_the_target_dies(tgt: Tgt) -> None:
    device = await lun_of(tgt).login(A)
    await lose_in_flight(tgt, device, tgt.kill)
    with pytest.raises(Unreachable):
        await lun_of(tgt).login(A)
    tgt.restart()
    async with await lun_of(tgt).login(A) as again:
        assert await again.read(1 << 20, 512) == bytes(512)


@pytest.mark.parametrize("window", [4, 16, 128])
async def test_a_frozen_target_is_lost_with_writes_in_flight(tgt: Tgt, window: int) -> None:
    set_window(tgt, window)
    device = await lun_of(tgt).login(A)
    with tgt.paused():
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(expect_unknown, device)
        assert 0.3 <= trio.current_time() - started < 5
        assert device.lost
        await device.aclose()
        with pytest.raises(Unreachable, match="no answer"):
            await lun_of(tgt).login(A, timeout_s=0.3)


async def test_a_frozen_target_is_lost_when_idle(tgt: Tgt) -> None:
    device = await lun_of(tgt).login(A)
    with tgt.paused(), trio.fail_after(5):
        await device.wait_lost()
    with pytest.raises(OutcomeUnknown, match="silent"):
        await device.read(0, 512)
    await device.aclose()


@pytest.mark.parametrize("window", [4, 16, 128])
async def test_a_slow_target_that_answers_pings_is_not_lost(tgt: Tgt, window: int) -> None:
    """All of tgtd's threads hang in a write for three ping timeouts; its window may be closed."""
    set_window(tgt, window)
    async with await lun_of(tgt).login(A) as device:
        tgt.hold_writes()
        async with trio.open_nursery() as nursery:
            for turn in range(300):
                nursery.start_soon(device.write, turn * 4096, SLOW)
            pings = device.statistics()["pings"]
            await until(lambda: device.statistics()["pings"] >= pings + 9 or device.lost)
            assert not device.lost
            tgt.release_writes()
        assert await device.read(299 * 4096, 4096) == SLOW


async def test_a_command_without_an_answer_loses_the_session(tgt: Tgt) -> None:
    device = await lun_of(tgt, IscsiOptions(command_timeout_s=0.5)).login(A)
    tgt.hold_writes()
    with trio.fail_after(10), pytest.raises(OutcomeUnknown, match="no answer in time"):
        await device.write(0, SLOW)
    assert device.lost
    await device.aclose()


async def test_a_cancelled_close_drops_the_connection(tgt: Tgt) -> None:
    device = await lun_of(tgt).login(A)
    tgt.hold_writes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_unknown, device)
        await until(lambda: tgt.held_writes() == 1)
        with trio.move_on_after(0.05) as scope:
            await device.aclose()
        assert scope.cancelled_caught
    assert device.lost


async def test_a_reset_whose_connection_is_cut(tgt: Tgt) -> None:
    lun = lun_of(tgt)
    async with await lun.login(A) as device:
        tgt.hold_writes()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_unknown, device)
            await until(lambda: tgt.held_writes() == 1)

            async def reset() -> None:
                with pytest.raises(Unreachable):
                    await lun.reset(timeout_s=20)

            nursery.start_soon(reset)
            await until(lambda: len(tgt.connections()) == 2)
            tgt.cut()


@pytest.mark.parametrize("window", [1, 3, 16])
async def test_the_target_has_a_small_window(window: int) -> None:
    """Thousands of commands at once: what does not fit the target's window waits here."""
    with Tgt(lun_bytes=16 << 20) as tgt:
        set_window(tgt, window)
        async with await lun_of(tgt).login(A) as device:
            await many_commands(device, 2000)
            assert device.statistics()["window"] < 120


async def test_thousands_of_commands_at_once(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        await many_commands(device, 5000)
        statistics = device.statistics()
        assert 32 <= statistics["peak_in_flight"] <= 120
        assert statistics["in_flight"] == 0


async def many_commands(device: IscsiDevice, commands: int) -> None:
    async def turn(number: int) -> None:
        data = number.to_bytes(4, "big") * 128
        at = number % 8192 * 512
        await device.write(at, data)
        assert await device.read(at, 512) == data

    async with trio.open_nursery() as nursery:
        for number in range(commands // 2):
            nursery.start_soon(turn, number)


async def test_cancelled_callers_are_held_until_their_command_ends(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        buffers = [bytearray(64 << 10) for _ in range(64)]
        await device.write(0, b"r" * (64 << 10))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for buffer in buffers:
                    nursery.start_soon(device.read_into, 0, buffer)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        # Nobody's buffer may be written to any more: those that were issued are complete.
        filled = [buffer for buffer in buffers if any(buffer)]
        assert all(buffer == b"r" * (64 << 10) for buffer in filled)
        for buffer in buffers:
            buffer.extend(b"x")  # BufferError while it is pinned
        assert not device.lost


# -- nothing is left behind ------------------------------------------------------------------------
def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def native_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("csvfs-iscsi")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def open_and_drop(tgt: Tgt, number: int, rng: Random) -> None:
    """One session, ended in one of the ways in which sessions end."""
    port = InitiatorPort(NAME, A.isid + number)
    way = number % 5
    try:
        device = await lun_of(tgt).login(port)
    except LoginFailed as error:  # reported with the way, to be understood
        raise AssertionError(f"session {number}: {error}") from error

    async def traffic() -> None:
        try:
            while True:
                await device.write(rng.randrange(256) * 65536, bytes(65536))
                await device.read(rng.randrange(256) * 65536, 65536)
        except OutcomeUnknown:
            return

    if way == 0:
        await device.aclose()
        return
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(traffic)
        for _ in range(rng.randrange(4)):
            await device.test_unit_ready()
        if way == 1:
            device.abort()
        elif way == 2:
            tgt.cut(NAME)
        elif way == 3:
            await device.aclose()
        else:
            nursery.cancel_scope.cancel()
    await device.aclose()


async def test_200_sessions_leave_nothing_behind() -> None:
    with Tgt(late_gate=True) as tgt:
        rng = Random(1)
        for number in range(20):  # caches fill
            await open_and_drop(tgt, number, rng)
        gc.collect()
        before = descriptors(), native_threads(), threading.active_count()
        memory = resident_bytes()
        for number in range(20, 220):
            await open_and_drop(tgt, number, rng)
        gc.collect()
        after = descriptors(), native_threads(), threading.active_count()
        # Fewer is well: an idle worker thread of trio ends by itself.
        assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
        assert native_threads() == 0
        assert resident_bytes() - memory < 8 << 20


async def test_a_device_that_nobody_closes_ends_with_the_loop(tgt: Tgt) -> None:
    gc.collect()
    before = descriptors(), native_threads()

    def run() -> None:
        async def forget() -> None:
            await lun_of(tgt).login(A)

        trio.run(forget)

    await trio.to_thread.run_sync(run)
    assert (descriptors(), native_threads()) == before
