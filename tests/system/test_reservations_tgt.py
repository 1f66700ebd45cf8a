"""Fences, succession and the probe on a real tgtd."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from redirector.block.device import InitiatorPort, OutcomeUnknown, ReservationConflict
from redirector.block.keys import PathKey, choose_port, newcomer_key
from redirector.block.probe import ProbeFlag, probe
from redirector.block.reservations import (
    PathClosed,
    Registration,
    Victim,
    fence,
    survey,
    victims_of,
)
from redirector.block.url import open_lun
from tests.tgt import Tgt

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
BLOCK = 4096
NAME = "iqn.2026-11.test.csvfs:host"
SLOW = b"SLOW" * (BLOCK // 4)
CONTROL, DATA = (PathKey(3, 7, generation).pack() for generation in (1, 2))


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(late_gate=True) as tgt:
        yield tgt


def port(number: int) -> InitiatorPort:
    return InitiatorPort(f"{NAME}{number}", 0x80_0000_0000_00 + number)


async def wait_held(tgt: Tgt, writes: int) -> None:
    with trio.fail_after(20):
        while tgt.held_writes() < writes:  # noqa: ASYNC110 (another process's file)
            await trio.sleep(0.005)


async def close_all(*paths: Registration) -> None:
    for path in paths:
        await path.device.aclose()


async def write_slowly(path: Registration, block: int) -> None:
    with contextlib.suppress(OutcomeUnknown, PathClosed, ReservationConflict):
        await path.device.write(block * BLOCK, SLOW)


async def test_own_dead_predecessor_with_writes_on_their_way(tgt: Tgt) -> None:
    """The daemon died; what it had sent is still in the target. Its heir takes over and fences."""
    lun = open_lun(tgt.url)
    control = await Registration.register(await lun.login(port(1)), CONTROL)
    data = await Registration.register(await lun.login(port(2)), DATA)
    await control.reserve()
    tgt.hold_writes()
    fenced_at = 0.0
    async with trio.open_nursery() as nursery:
        for block in range(4):
            nursery.start_soon(write_slowly, data, block)
        await wait_held(tgt, 4)
        for path in (control, data):
            path.device.abort()

        async def release() -> None:
            nonlocal fenced_at
            await trio.sleep(0.5)
            assert not fenced_at
            tgt.release_writes()

        nursery.start_soon(release)
        heir = await Registration.register(
            await lun.login(choose_port(f"{NAME}9", Random(1))), newcomer_key(Random(2))
        )
        standing = await survey(heir.device)
        assert standing.holder_key == CONTROL
        assert standing.of_incarnation(3, 7) == (CONTROL, DATA)
        await heir.take(CONTROL)
        await fence(lun, heir, victims_of(standing.of_incarnation(3, 7), [port(1), port(2)]))
        fenced_at = trio.current_time()
    for block in range(4):
        await heir.device.write(block * BLOCK, b"heir" * (BLOCK // 4))
    await trio.sleep(0.2)
    for block in range(4):
        assert await heir.device.read(block * BLOCK, BLOCK) == b"heir" * (BLOCK // 4)
    assert (await survey(heir.device)).keys.keys == (heir.key,)
    await close_all(heir, control, data)


READER = """
import sys, trio
from redirector.block.device import InitiatorPort
from redirector.block.reservations import Registration
from redirector.block.url import open_lun

async def main(url, name, isid, key):
    device = await open_lun(url).login(InitiatorPort(name, int(isid)))
    await Registration.register(device, int(key))
    print("reading", flush=True)
    async def read():
        while True:
            await device.read(0, 1 << 20)
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(read)

trio.run(main, *sys.argv[1:])
"""


@contextlib.contextmanager
def frozen_reader(url: str, reader: InitiatorPort, key: int) -> Iterator[None]:
    """Another process, stopped with megabytes of unread answers before it."""
    arguments = (sys.executable, "-c", READER, url, reader.name, str(reader.isid), str(key))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"reading\n"
            time.sleep(0.2)  # it is in the middle of reading now, whenever that is
            os.kill(process.pid, signal.SIGSTOP)
            yield
        finally:
            process.kill()


async def test_a_frozen_reader_does_not_stop_the_fence(tgt: Tgt) -> None:
    """Unread megabytes block a drain until reinstatement closes their session."""
    lun = open_lun(tgt.url)
    holder = await Registration.register(await lun.login(port(1)), CONTROL)
    await holder.reserve()
    with frozen_reader(tgt.url, port(2), DATA):
        with trio.fail_after(10):
            await fence(lun, holder, [Victim(DATA, port(2))])
    assert (await survey(holder.device)).keys.keys == (CONTROL,)
    await holder.device.aclose()


async def test_fences_at_the_same_time(tgt: Tgt) -> None:
    """Of two resets at a time tgt never answers the first: it is issued again."""
    lun = open_lun(tgt.url)
    holder = await Registration.register(await lun.login(port(1)), CONTROL)
    victims = []
    for number in range(2, 6):
        key = PathKey(number, 1, 1).pack()
        victims.append(await Registration.register(await lun.login(port(number)), key))
    await holder.reserve()
    tgt.hold_writes()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for block, victim in enumerate(victims):
                nursery.start_soon(write_slowly, victim, block)
            await wait_held(tgt, 4)
            for victim in victims:
                nursery.start_soon(fence, lun, holder, [Victim(victim.key, victim.device.port)])
            await trio.sleep(0.3)
            tgt.release_writes()
    assert (await survey(holder.device)).keys.keys == (CONTROL,)
    await close_all(holder, *victims)


async def test_probe_of_tgt(tgt: Tgt) -> None:
    lun = open_lun(tgt.url)
    original = Random(3).randbytes(64 << 10)
    async with await lun.login(port(1)) as device:
        await device.write(0, original)
    with trio.fail_after(30):
        result = await probe(lun, (f"{NAME}1", f"{NAME}2"), (32 << 10, 32 << 10))
    print("\n".join(result.lines()))
    assert not result.refusals
    assert result.flags == (
        ProbeFlag.PROBED
        | ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS
        | ProbeFlag.FENCE_STOPS_READ
        | ProbeFlag.FENCE_STOPS_WRITE
        | ProbeFlag.REINSTATEMENT_CLOSES
        | ProbeFlag.RESET_DRAINS
        | ProbeFlag.UNMAP_WORKS
        | ProbeFlag.WRITE_SAME_WORKS
    )
    async with await lun.login(port(1)) as device:
        standing = await survey(device)
        assert standing.keys.keys == ()
        assert standing.holder_key == 0
        assert await device.read(0, 64 << 10) == original
