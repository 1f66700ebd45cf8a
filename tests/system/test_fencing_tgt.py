"""Fences of hosts that wake up again, on a real tgtd: nothing of theirs lands, nothing is answered.

The hosts are other processes (`tests.zombie_host`), stopped by SIGSTOP; this one holds and fences.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from redirector.block.device import InitiatorPort, OutcomeUnknown
from redirector.block.keys import PathKey
from redirector.block.reservations import (
    PathClosed,
    Registration,
    Victim,
    fence,
    survey,
    victims_of,
)
from redirector.block.url import open_lun
from redirector.flow import boottime_s
from tests import zombie_host
from tests.tgt import Tgt
from tests.zombie_host import BLOCK, IMAGE_BYTES, SLOW, VIEW_AT, image_at

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LEASE_S = 1.0
FENCER = InitiatorPort("iqn.2026-11.test.csvfs:fencer", 0x8000_0000_0000 + 9)
OLD, NEW = b"o", b"n"


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(late_gate=True) as tgt:
        yield tgt


class Zombies:
    """A process with one host or several."""

    def __init__(self, tgt: Tgt, first_slot: int, hosts: int, mode: str) -> None:
        self.slots = range(first_slot, first_slot + hosts)
        arguments = (tgt.url, str(first_slot), str(hosts), mode, str(LEASE_S))
        self.process = subprocess.Popen(
            (sys.executable, "-m", "tests.zombie_host", *arguments),
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout

    def wait_busy(self) -> None:
        assert self._output.readline() == b"busy\n"

    def freeze(self) -> float:
        """When it was frozen, on CLOCK_BOOTTIME."""
        os.kill(self.process.pid, signal.SIGSTOP)
        while b"State:\tT" not in Path(f"/proc/{self.process.pid}/status").read_bytes():
            time.sleep(0.001)
        return boottime_s()

    def thaw(self) -> list[dict[str, Any]]:
        """Let it go on, and return what each host has told in the end."""
        os.kill(self.process.pid, signal.SIGCONT)
        told: list[dict[str, Any]] = json.loads(self._output.read())
        assert self.process.wait(timeout=20) == 0
        return told

    def victims(self) -> tuple[Victim, ...]:
        return tuple(
            victim
            for slot in self.slots
            for victim in victims_of(zombie_host.keys(slot), zombie_host.ports(slot))
        )


@contextlib.contextmanager
def zombies(tgt: Tgt, first_slot: int, hosts: int, mode: str) -> Iterator[Zombies]:
    found = Zombies(tgt, first_slot, hosts, mode)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        found._output.close()


async def holder_of(tgt: Tgt) -> Registration:
    """A host in slot 0 that holds, and has written old images and a view that lists 1 to 20."""
    held = await Registration.register(
        await open_lun(tgt.url).login(FENCER), PathKey(0, 1, 1).pack()
    )
    await held.reserve()
    await write(held, VIEW_AT, bytes([1] * 21).ljust(BLOCK, b"\0"))
    for slot in range(21):
        await write(held, image_at(slot), OLD * IMAGE_BYTES)
    return held


async def write(path: Registration, at: int, data: bytes) -> None:
    await path.ask(lambda: path.device.write(at, data))


async def evict(tgt: Tgt, held: Registration, hosts: Zombies) -> float:
    """The view without them, then the fence; how long that took."""
    view = bytearray(await held.ask(lambda: held.device.read(VIEW_AT, BLOCK)))
    for slot in hosts.slots:
        view[slot] = 0
    await write(held, VIEW_AT, bytes(view))
    start = trio.current_time()
    await fence(open_lun(tgt.url), held, hosts.victims())
    return trio.current_time() - start


async def lease_over(since: float) -> None:
    """What a coordinator waits for before anything that the victim held is granted."""
    await trio.sleep(max(0.0, since + LEASE_S - boottime_s() + 0.05))


async def wait_held(tgt: Tgt, writes: int) -> None:
    with trio.fail_after(20):
        while tgt.held_writes() < writes:  # noqa: ASYNC110 (another process's file)
            await trio.sleep(0.005)


def assert_new(tgt: Tgt, slots: range) -> None:
    data = tgt.backing().read_bytes()
    for slot in slots:
        assert data[image_at(slot) : image_at(slot) + IMAGE_BYTES] == NEW * IMAGE_BYTES


async def test_not_one_old_write_lands(tgt: Tgt) -> None:
    """Frozen with writes in the target: the fence waits for them, and nothing comes after it."""
    held = await holder_of(tgt)
    tgt.hold_writes()
    with zombies(tgt, 1, 1, "write") as hosts:
        hosts.wait_busy()
        await wait_held(tgt, zombie_host.WRITERS)
        frozen_at = hosts.freeze()
        fenced_s: list[float] = []
        async with trio.open_nursery() as nursery:

            async def fence_it() -> None:
                fenced_s.append(await evict(tgt, held, hosts))

            nursery.start_soon(fence_it)
            await trio.sleep(0.5)
            assert not fenced_s, "the fence does not return over writes on their way"
            tgt.release_writes()
        landed = tgt.backing().read_bytes()[image_at(1) : image_at(1) + 8 * BLOCK]
        assert landed == SLOW * 8, "what was on its way has landed before the fence returned"
        await lease_over(frozen_at)
        await write(held, image_at(1), NEW * IMAGE_BYTES)
        (told,) = hosts.thaw()
    assert told["closed"], "it noticed"
    assert told["writes"] == []
    assert told["evicted_calls"] == zombie_host.WRITERS
    assert_new(tgt, hosts.slots)
    await held.device.aclose()


async def test_not_one_stale_read_is_answered(tgt: Tgt) -> None:
    """Frozen with megabytes of answers in its socket: they are old when it wakes up."""
    held = await holder_of(tgt)
    with zombies(tgt, 1, 1, "read") as hosts:
        hosts.wait_busy()
        await trio.sleep(0.3)  # in the middle of reading, whenever that is
        frozen_at = hosts.freeze()
        with trio.fail_after(10):
            await evict(tgt, held, hosts)
        await lease_over(frozen_at)
        await write(held, image_at(1), NEW * IMAGE_BYTES)
        (told,) = hosts.thaw()
    assert told["closed"], "it noticed"
    assert told["reads"], "it was reading"
    assert {letters for _, letters in told["reads"]} == {OLD.decode()}
    assert max(at for at, _ in told["reads"]) <= frozen_at, "nothing is answered after the thaw"
    assert told["evicted_calls"] == zombie_host.READERS
    assert_new(tgt, hosts.slots)
    await held.device.aclose()


@pytest.mark.parametrize("mode", ["read", "write"])
async def test_fifteen_of_sixteen_at_once(tgt: Tgt, mode: str) -> None:
    held = await holder_of(tgt)
    if mode == "write":
        tgt.hold_writes()
    with zombies(tgt, 1, 15, mode) as hosts:
        hosts.wait_busy()
        if mode == "write":
            await wait_held(tgt, 16)  # as many as tgt carries out at a time
        frozen_at = hosts.freeze()
        tgt.release_writes()
        with trio.fail_after(20):
            took_s = await evict(tgt, held, hosts)
        print(f"30 sessions of 15 hosts ({mode}): fenced in {took_s:.2f} s")
        assert took_s < 5
        assert (await survey(held.device)).keys.keys == (held.key,)
        await lease_over(frozen_at)
        for slot in hosts.slots:
            await write(held, image_at(slot), NEW * IMAGE_BYTES)
        for told in hosts.thaw():
            assert all(at <= frozen_at for at, _ in told["reads"])
            assert all(at <= frozen_at for at in told["writes"])
            assert told["closed"]
            assert told["evicted_at"] > frozen_at
    assert_new(tgt, hosts.slots)
    await held.device.aclose()


async def test_deposed_coordinator_with_a_view_write_on_its_way(tgt: Tgt) -> None:
    """The successor reads the view only when the late write is over."""
    lun = open_lun(tgt.url)
    deposed = await holder_of(tgt)
    port = InitiatorPort("iqn.2026-11.test.csvfs:successor", 0x8000_0000_0000 + 8)
    successor = await Registration.register(await lun.login(port), PathKey(1, 1, 1).pack())
    tgt.hold_writes()
    ended: list[str] = []
    async with trio.open_nursery() as nursery:

        async def write_view() -> None:
            try:
                await deposed.device.write(VIEW_AT, SLOW)
            except OutcomeUnknown:
                ended.append("unknown")

        async def succeed() -> None:
            await successor.take(deposed.key)
            with pytest.raises(PathClosed):
                await fence(lun, deposed, ())  # only the holder fences
            victims = (Victim(deposed.key, FENCER),)
            await fence(lun, successor, victims)
            ended.append("fenced")

        nursery.start_soon(write_view)
        await wait_held(tgt, 1)
        nursery.start_soon(succeed)
        await trio.sleep(0.7)
        assert "fenced" not in ended
        assert tgt.backing().read_bytes()[:4] != SLOW[:4]
        tgt.release_writes()
    assert sorted(ended) == ["fenced", "unknown"]
    assert await successor.device.read(VIEW_AT, BLOCK) == SLOW, "the deposed one's view stands"
    await write(successor, VIEW_AT, NEW * BLOCK)
    # It comes back with a new session, as it would after a thaw.
    again = await Registration.register(await lun.login(FENCER), PathKey(0, 1, 2).pack())
    assert await again.holder() == successor.key
    with pytest.raises((OutcomeUnknown, PathClosed)):
        await write(deposed, VIEW_AT, OLD * BLOCK)
    assert await successor.device.read(VIEW_AT, BLOCK) == NEW * BLOCK
    for path in (again, successor, deposed):
        await path.device.aclose()
