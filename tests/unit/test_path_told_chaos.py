"""The data path under random losses and random words: nothing acknowledged is lost, nothing old
comes back, every call ends once.

Each block of the LUN has one writer, which counts: block n holds the number of its last write. So
for every read there is a lowest value that it may show (what was answered, or read, before it
began) and a highest (what was issued before it ended). In the end the target loses its power, and
what was flushed must be there. `ToldLun` asserts for every command that it is on a proven session,
and at each proof that nothing of an earlier one may still land.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import pytest
import trio

from redirector.block.medium import keep_by
from redirector.block.simulated import Faults, Hold, Match
from redirector.data_path import DataPath, Evicted
from tests.crash import deterministic_run
from tests.unit.told_path import (
    BLOCK,
    COORDINATOR_PORT,
    DATA_PORT,
    Membership,
    ToldLun,
    port,
    told_path,
)

FIRST = 8
"""The blocks before belong to the view."""
BLOCKS = 24


def filled(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


@dataclass
class Counter:
    """One block: the writes issued, answered or seen by a read, and flushed."""

    issued: int = 0
    floor: int = 0
    flushed: int = 0


@dataclass
class Chaos:
    lun: ToldLun
    path: DataPath
    told: Membership
    rng: Random
    counters: list[Counter] = field(default_factory=lambda: [Counter() for _ in range(BLOCKS)])
    holds: list[Hold] = field(default_factory=list)
    calls: int = 0
    """That were made, and have not ended."""
    evicted: int = 0
    """Calls that ended so."""

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    # -- users -----------------------------------------------------------------------------------
    async def write(self, first: int, last: int) -> None:
        """Write blocks first..last-1 of one writer, as one command."""
        mine = self.counters[first:last]
        number = max(counter.issued for counter in mine) + 1
        for counter in mine:
            counter.issued = number
        data = filled(number) * (last - first)
        async with self.call():
            await self.path.write((FIRST + first) * BLOCK, data, fua=self.rng.random() < 0.2)
        for counter in mine:
            counter.floor = number

    async def writer(self, first: int, last: int) -> None:
        for _ in range(25):
            low = self.rng.randrange(first, last)
            await self.write(low, self.rng.randint(low + 1, last))
            await trio.sleep(self.rng.choice((0, 0, 0.01, 0.3)))

    async def reader(self) -> None:
        for _ in range(40):
            n = self.rng.randrange(BLOCKS)
            floor = self.counters[n].floor
            async with self.call():
                found = bytes(await self.path.read((FIRST + n) * BLOCK, BLOCK))
            number = int.from_bytes(found[:8], "little")
            assert found == filled(number), "torn"
            assert floor <= number <= self.counters[n].issued
            self.counters[n].floor = max(self.counters[n].floor, number)
            await trio.sleep(self.rng.choice((0, 0.02, 0.2)))

    async def flusher(self) -> None:
        for _ in range(15):
            answered = [counter.floor for counter in self.counters]
            async with self.call():
                await self.path.flush()
            for counter, number in zip(self.counters, answered, strict=True):
                counter.flushed = max(counter.flushed, number)
            await trio.sleep(self.rng.choice((0, 0.1, 0.4)))

    # -- trouble ---------------------------------------------------------------------------------
    async def breaker(self) -> None:
        """Something breaks every now and then, also in the middle of a recovery."""
        for _ in range(18):
            await trio.sleep(self.rng.expovariate(3))
            self.path.check()
            match self.rng.randrange(10):
                case 0 | 1:
                    if sessions := list(self.lun.sessions.values()):
                        self.lun.close_session(self.rng.choice(sessions))
                case 2:
                    whose = self.rng.choice(
                        ((COORDINATOR_PORT,), (DATA_PORT,), (DATA_PORT, COORDINATOR_PORT))
                    )
                    self.lun.disconnect(whose.__contains__)
                    await trio.sleep(self.rng.random() * 3)
                    self.lun.reconnect()
                case 3:
                    self.lun.restart(power_lost=self.rng.random() < 0.7)
                case 4:
                    await self.lun.reset(timeout_s=30)
                case 5:
                    share = self.rng.random() / 2
                    self.holds.append(self.lun.hold(self.some_of(share), limit=9))
                case 6:
                    landed = self.rng.random() < 0.5
                    self.lun.lose_answer(one_after(self.rng.randrange(12)), landed=landed)
                case 7:
                    if (session := self.told.session) is not None:
                        self.told.drop(session, "the membership says so")
                case 8:
                    if (session := self.told.session) is not None:
                        await self.told.coordinator.fence((session.key,))
                case 9:
                    stranger = await self.lun.login(port(7))
                    if self.lun.arbiter.legacy_holder is None:
                        self.lun.arbiter.reserve_legacy(stranger.nexus)

    def some_of(self, share: float) -> Match:
        return lambda _: self.rng.random() < share

    async def lander(self) -> None:
        """What is held lands late, in any order."""
        while True:
            await trio.sleep(self.rng.random() / 2)
            for hold in self.holds:
                if hold.commands and self.rng.random() < 0.7:
                    hold.land(self.rng.choice(hold.commands))

    async def leases(self) -> None:
        """They are renewed most of the time."""
        while True:
            self.path.lease_until(trio.current_time() + self.rng.random())
            await trio.sleep(self.rng.choice((0.1, 0.1, 0.5, 1.5)))

    # -- runs ------------------------------------------------------------------------------------
    async def run(self, evict_after_s: float | None = None) -> None:
        async with trio.open_nursery() as outer:
            outer.start_soon(self.lander)
            outer.start_soon(self.leases)
            async with trio.open_nursery() as nursery:
                for first in range(0, BLOCKS, 4):
                    nursery.start_soon(self.until_evicted, self.writer, first, first + 4)
                for _ in range(3):
                    nursery.start_soon(self.until_evicted, self.reader)
                nursery.start_soon(self.until_evicted, self.flusher)
                nursery.start_soon(self.breaker)
                if evict_after_s is not None:
                    await trio.sleep(evict_after_s)
                    self.path.evict("evicted by the test")
                    self.lun.evicted = True
            for hold in self.holds:
                hold.lift()
            self.path.check()
            assert not self.calls
            outer.cancel_scope.cancel()

    async def until_evicted(self, user: Callable[..., Awaitable[None]], *arguments: int) -> None:
        try:
            await user(*arguments)
        except Evicted:
            assert self.path.status().trouble == "evicted by the test"
            self.evicted += 1

    async def verify(self) -> None:
        """Everything answered is read back; after a power loss, everything flushed."""
        self.path.lease_until(float("inf"))
        for n, counter in enumerate(self.counters):
            found = bytes(await self.path.read((FIRST + n) * BLOCK, BLOCK))
            assert found == filled(counter.issued) or counter.issued == 0
        self.verify_flushed()

    def verify_flushed(self) -> None:
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


def one_run(seed: int, faults: Faults, *, evict: bool = False) -> int:
    """How many sessions were lost. The same seed is the same run."""
    losses = 0

    async def run() -> None:
        nonlocal losses
        lun = ToldLun(1 << 20, seed=seed, faults=faults)
        rng = Random(seed)
        async with told_path(lun, lease_s=0) as (path, told):
            told.pause = lambda: rng.choice((0, 0, 0.01, 0.4))
            chaos = Chaos(lun, path, told, rng)
            with trio.fail_after(3600):
                await chaos.run(rng.random() * 8 if evict else None)
                if evict:
                    with pytest.raises(Evicted):
                        await path.read(0, BLOCK)
                    chaos.verify_flushed()
                else:
                    await chaos.verify()
            lun.check()
            losses = path.status().losses

    deterministic_run(run, seed)
    return losses


KINDS = {
    "good": Faults(),
    "port": Faults(registrations_follow_port=True),
    "aborts": Faults(reset_aborts=True),
    "both": Faults(registrations_follow_port=True, reset_aborts=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_chaos(kind: str) -> None:
    assert sum(one_run(seed, KINDS[kind]) for seed in range(50)) > 200


@pytest.mark.parametrize("kind", KINDS)
def test_chaos_that_ends_in_an_eviction(kind: str) -> None:
    for seed in range(1000, 1025):
        one_run(seed, KINDS[kind], evict=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_much_chaos(kind: str) -> None:
    for seed in range(100, 600):
        one_run(seed, KINDS[kind], evict=seed % 5 == 0)
