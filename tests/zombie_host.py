"""Hosts that do I/O until somebody freezes and fences them, and what they do when they wake up.

    python -m tests.zombie_host URL FIRST_SLOT HOSTS read|write LEASE_S

Each host has a control and a data session and a `DataPath`; its lease is renewed by writes of its
heartbeat block. When its path is closed it opens the next one and reads the view: a byte for each
slot, 1: listed. Says "busy" when all hosts are at work; ends when all were evicted, with one line
of JSON: what each has answered, and when (`Told`).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import trio

from redirector.block.device import BlockError, InitiatorPort
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration
from redirector.block.url import open_lun
from redirector.data_path import DataPath, Evicted
from redirector.flow import boottime_s

BLOCK = 4096
VIEW_AT = 0
HEARTBEATS_AT = 1 << 20
IMAGES_AT = 4 << 20
IMAGE_BYTES = 1 << 20
"""One image for each slot."""
READERS = 8
WRITERS = 8
SLOW = b"SLOW" * (BLOCK // 4)


def ports(slot: int) -> tuple[InitiatorPort, InitiatorPort]:
    """Of control and data session."""
    name = f"iqn.2026-11.test.csvfs:zombie{slot}"
    return InitiatorPort(name, 0x8000_0000_0000 + 1), InitiatorPort(name, 0x8000_0000_0000 + 2)


def keys(slot: int) -> tuple[int, int]:
    """Of its first control and data session."""
    return PathKey(slot, 1, 1).pack(), PathKey(slot, 1, 2).pack()


def image_at(slot: int) -> int:
    return IMAGES_AT + slot * IMAGE_BYTES


@dataclass
class Told:
    """What a host did, times on CLOCK_BOOTTIME."""

    reads: list[tuple[float, str]] = field(default_factory=list)
    """When one was answered, and every letter in it."""
    writes: list[float] = field(default_factory=list)
    """When one was answered."""
    evicted_calls: int = 0
    closed: str = ""
    """What the path found."""
    evicted_at: float = 0


class Host:
    """One of them."""

    def __init__(self, url: str, slot: int, lease_s: float) -> None:
        self.lun = open_lun(url)
        self.slot = slot
        self.lease_s = lease_s
        self.told = Told()
        self.busy = trio.Event()
        self._lost = trio.Event()
        self._generation = PathKey(slot, 1, 2)

    async def run(self, mode: str) -> None:
        opened = [
            await Registration.register(await self.lun.login(port), key)
            for port, key in zip(ports(self.slot), keys(self.slot), strict=True)
        ]
        control, data = opened
        self.path = path = DataPath(
            data.device.identity, on_closed=self._closed, on_stranger=lambda: None
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.run)
            path.use(data, restarted=False)
            path.ready(data)
            nursery.start_soon(self._beat, control)
            work, tasks = (self._read, READERS) if mode == "read" else (self._write, WRITERS)
            for number in range(tasks):
                nursery.start_soon(self._until_evicted, partial(work, number))
            await self._lost.wait()
            control.device.abort()
            await self._expect_eviction()
        self.told.evicted_at = boottime_s()

    def _closed(self, registration: Registration, why: BlockError) -> None:
        self.told.closed = self.told.closed or str(why)
        self.path.lost(registration, str(why))
        self._lost.set()

    async def _beat(self, control: Registration) -> None:
        at = HEARTBEATS_AT + self.slot * BLOCK
        try:
            while not self._lost.is_set():
                sent = boottime_s()
                await control.ask(partial(control.device.write, at, bytes(BLOCK)))
                self.path.lease_until(sent + self.lease_s)
                await trio.sleep(0.1)
        except BlockError:
            # Somebody has fenced us. The data path is to find out by itself.
            with contextlib.suppress(Evicted):
                await self.path.read(image_at(self.slot), BLOCK)

    async def _expect_eviction(self) -> None:
        self._generation = self._generation.next()
        device = await self.lun.login(ports(self.slot)[1])
        data = await Registration.register(device, self._generation.pack())
        view = await data.ask(lambda: device.read(VIEW_AT, BLOCK))
        if view[self.slot]:
            raise AssertionError("a path was lost, and the view lists this host")
        self.path.evict("the view does not list this host")
        await device.aclose()

    # -- work ------------------------------------------------------------------------------------
    async def _until_evicted(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Evicted:
            self.told.evicted_calls += 1

    async def _read(self, number: int) -> None:
        del number
        self.busy.set()
        while True:
            data = await self.path.read(image_at(self.slot), IMAGE_BYTES)
            self.told.reads.append((boottime_s(), "".join(sorted(map(chr, set(data))))))

    async def _write(self, number: int) -> None:
        self.busy.set()
        await self.path.write(image_at(self.slot) + number * BLOCK, SLOW)
        self.told.writes.append(boottime_s())


async def main(*arguments: str) -> None:
    url, first_slot, hosts, mode, lease_s = arguments
    first = int(first_slot)
    living = [Host(url, slot, float(lease_s)) for slot in range(first, first + int(hosts))]
    async with trio.open_nursery() as nursery:
        for host in living:
            nursery.start_soon(host.run, mode)
        for host in living:
            await host.busy.wait()
        print("busy", flush=True)
    print(json.dumps([asdict(host.told) for host in living]))


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
