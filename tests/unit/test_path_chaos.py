"""The direct path under random losses: nothing acknowledged is lost, nothing old comes back.

Each block of the LUN has one writer, which counts: block n holds the number of its last write. So
for every read there is a lowest value that it may show (what was answered, or read, before it
began) and a highest (what was issued before it ended). In the end the target loses its power, and
what was flushed must be there.
"""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import trio
from trio.testing import MockClock

from redirector.block.medium import keep_by
from redirector.block.simulated import Faults, Hold, Match, SimulatedLun
from redirector.path import DirectPath
from tests.unit.one_node import BLOCK, OneView, open_path

FIRST = 8
"""The blocks before belong to the view."""
BLOCKS = 24


def filled(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


@dataclass
class Counter:
    """One block: the writes issued, answered, seen by a read, and flushed."""

    issued: int = 0
    floor: int = 0
    flushed: int = 0


@dataclass
class Chaos:
    lun: SimulatedLun
    path: DirectPath
    rng: Random
    counters: list[Counter] = field(default_factory=lambda: [Counter() for _ in range(BLOCKS)])
    holds: list[Hold] = field(default_factory=list)
    losses: int = 0

    async def write(self, first: int, last: int) -> None:
        """Write blocks first..last-1 of one writer, as one command."""
        mine = self.counters[first:last]
        number = max(counter.issued for counter in mine) + 1
        for counter in mine:
            counter.issued = number
        data = filled(number) * (last - first)
        await self.path.write((FIRST + first) * BLOCK, data, fua=self.rng.random() < 0.2)
        for counter in mine:
            counter.floor = number

    async def writer(self, first: int, last: int) -> None:
        for _ in range(40):
            low = self.rng.randrange(first, last)
            await self.write(low, self.rng.randint(low + 1, last))
            await trio.sleep(self.rng.choice((0, 0, 0.01, 0.3)))

    async def reader(self) -> None:
        for _ in range(60):
            n = self.rng.randrange(BLOCKS)
            floor = self.counters[n].floor
            found = bytes(await self.path.read((FIRST + n) * BLOCK, BLOCK))
            number = int.from_bytes(found[:8], "little")
            assert found == filled(number), "torn"
            assert floor <= number <= self.counters[n].issued
            self.counters[n].floor = max(self.counters[n].floor, number)
            await trio.sleep(self.rng.choice((0, 0.02, 0.2)))

    async def flusher(self) -> None:
        for _ in range(25):
            answered = [counter.floor for counter in self.counters]
            await self.path.flush()
            for counter, number in zip(self.counters, answered, strict=True):
                counter.flushed = max(counter.flushed, number)
            await trio.sleep(self.rng.choice((0, 0.1, 0.4)))

    async def breaker(self) -> None:
        """Something breaks every now and then, also in the middle of a recovery."""
        for _ in range(25):
            await trio.sleep(self.rng.expovariate(3))
            match self.rng.randrange(7):
                case 0 | 1:
                    sessions = list(self.lun.sessions.values())
                    if sessions:
                        self.lun.close_session(self.rng.choice(sessions))
                        self.losses += 1
                case 2:
                    self.lun.disconnect()
                    await trio.sleep(self.rng.random() * 3)
                    self.lun.reconnect()
                case 3:
                    self.lun.restart(power_lost=self.rng.random() < 0.7)
                case 4:
                    await self.lun.reset(timeout_s=30)
                case 5:
                    self.holds.append(self.lun.hold(self.some_of(self.rng.random() / 2), limit=9))
                case 6:
                    landed = self.rng.random() < 0.5
                    self.lun.lose_answer(one_after(self.rng.randrange(9)), landed=landed)

    def some_of(self, share: float) -> Match:
        return lambda _: self.rng.random() < share

    async def lander(self) -> None:
        """What is held lands late, in any order."""
        while True:
            await trio.sleep(self.rng.random() / 2)
            for hold in self.holds:
                if hold.commands and self.rng.random() < 0.7:
                    hold.land(self.rng.choice(hold.commands))

    async def run(self) -> None:
        async with trio.open_nursery() as outer:
            outer.start_soon(self.lander)
            async with trio.open_nursery() as nursery:
                for first in range(0, BLOCKS, 4):
                    nursery.start_soon(self.writer, first, first + 4)
                for _ in range(3):
                    nursery.start_soon(self.reader)
                nursery.start_soon(self.flusher)
                nursery.start_soon(self.breaker)
            for hold in self.holds:
                hold.lift()
            outer.cancel_scope.cancel()

    async def verify(self) -> None:
        """Everything answered is read back; after a power loss, everything flushed."""
        for n, counter in enumerate(self.counters):
            found = bytes(await self.path.read((FIRST + n) * BLOCK, BLOCK))
            assert found == filled(counter.issued) or counter.issued == 0
        dead = self.lun.crashed(keep=keep_by(self.rng))
        for n, counter in enumerate(self.counters):
            sectors = dead.blocks.get(FIRST + n, bytes(BLOCK))
            for at in range(0, BLOCK, 512):
                number = int.from_bytes(sectors[at : at + 8], "little")
                assert counter.flushed <= number <= counter.issued


def one_after(skip: int) -> Match:
    """Matches one command, after so many others."""
    count = iter(range(skip + 1))
    return lambda _: next(count, None) == skip


async def one_run(seed: int, faults: Faults) -> int:
    lun = SimulatedLun(1 << 20, seed=seed, faults=faults)
    async with open_path(lun, view := OneView()) as path:
        view.writes_on_move = True
        chaos = Chaos(lun, path, Random(seed))
        with trio.fail_after(3600):
            await chaos.run()
            await path._keeper.wait_healthy()
            await chaos.verify()
        status = path.status()
        assert sorted(lun.arbiter.read_keys().keys) == sorted((status.control_key, status.data_key))
        lun.check()
        return status.recoveries


KINDS = {
    "good": Faults(),
    "port": Faults(registrations_follow_port=True),
    "aborts": Faults(reset_aborts=True),
    "both": Faults(registrations_follow_port=True, reset_aborts=True),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_chaos(autojump_clock: MockClock, kind: str) -> None:
    recoveries = [await one_run(seed, KINDS[kind]) for seed in range(8)]
    assert sum(recoveries) > 20


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
async def test_much_chaos(autojump_clock: MockClock, kind: str) -> None:
    for seed in range(100, 300):
        await one_run(seed, KINDS[kind])
