"""One seed: hosts join, programs run, things break, all heals; then the volume must be whole."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final
from unittest.mock import patch

import trio

from csvfs.check import check_volume
from lockmgr.cluster import service
from redirector.block.medium import keep_none
from tests.cluster_users import Key, Program, Promises, read_all
from tests.crash import deterministic_run
from tests.simulated_volume import LUN_BYTES, PORT, formatted
from tests.whole.cables import WatchedLun
from tests.whole.faults import Faults
from tests.whole.hosts import Host, Life, World
from tests.whole.machines import current_machine, let_machines_freeze, realtime_ns, virtual_time
from tests.whole.registers import NAMES, RegisterProgram, Registers, make_registers
from tests.whole.wires import opener

SERVES_WITHIN_S: Final = 90.0
"""After everything has healed, everybody has the volume within this time."""
SETTLED_S: Final = 15.0
"""Whatever is to follow from what has healed has followed after this time."""
STEPS: Final = 60
PROGRAM_STEPS: Final = 80


class PatientProgram(Program):
    """Its calls may have to wait for an eviction, and another one."""

    patience_s = 150.0
    pauses_s = (0, 0.001, 0.1, 0.6)
    node: Life

    def goes_on(self) -> bool:
        return not self.node.stopping


class Records(Promises):
    """The registers are no files of records; they are read by others."""

    def __init__(self) -> None:
        super().__init__()
        self.others: frozenset[Key] = frozenset()

    def verify(self, key: Key, content: bytes) -> None:
        if key not in self.others:
            super().verify(key, content)


class Failed(AssertionError):
    """A run went wrong; the words say how, and what happened before."""


@dataclass
class Report:
    """What a run came to."""

    seed: int
    counts: Counter[str]
    digest: str
    """Of the trace."""
    trace: str
    """Everything that was told, in order."""
    seconds: float
    """Of virtual time."""


def run(seed: int, kinds: tuple[str, ...] = ()) -> Report:
    """``kinds`` of faults: all, if none is named. Raises `Failed`."""
    found = Run(seed, kinds)
    try:
        with virtual_time(), found.logged():
            deterministic_run(found.main, seed)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        trace = "\n".join(found.trace)
        raise Failed(
            f"seed {seed}: {_causes(error)}\n{trace}\nseed {seed}: {_causes(error)}"
        ) from (error)
    return found.report()


def _causes(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_causes(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


class Run:
    """See the module's docstring."""

    def __init__(self, seed: int, kinds: tuple[str, ...] = ()) -> None:
        self.seed = seed
        self.kinds = kinds
        self.rng = Random(seed)
        self.counts: Counter[str] = Counter()
        self.trace: list[str] = []
        self.seconds = 0.0
        self.world: World
        self._numbers = iter(range(1, 10000))
        self.promises = Records()

    @contextmanager
    def logged(self) -> Iterator[None]:
        """What the product logs is part of the trace."""
        handler = _TraceHandler(self)
        loggers = [logging.getLogger(name) for name in ("csvfs", "lockmgr", "redirector")]
        before = [(logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, (level, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate

    def report(self) -> Report:
        trace = "\n".join(self.trace)
        digest = hashlib.sha256(trace.encode()).hexdigest()
        return Report(self.seed, self.counts, digest, trace, self.seconds)

    async def main(self) -> None:
        let_machines_freeze()
        rng = self.rng
        lun = WatchedLun(LUN_BYTES, seed=self.seed)
        superblock = await formatted(lun, slots=8)
        world = self.world = World(lun, superblock, Random(rng.random()))
        world.trace = self.trace
        share = rng.choice((0.0, 0.2, 0.5))
        network = opener(world.wires, world.host_of)
        with patch.object(service, "open_network", network):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_land_at_random, lun, Random(rng.random()), share)
                nursery.start_soon(world.wires.watch)
                try:
                    await self._hosts(nursery)
                finally:
                    for host in world.hosts:  # else a run that has failed would not end
                        host.machine.thaw()
                nursery.cancel_scope.cancel()
        self.seconds = trio.current_time()

    # -- the story -------------------------------------------------------------------------------
    async def _hosts(self, nursery: trio.Nursery) -> None:
        world, rng = self.world, self.rng
        for number in range(rng.choice((2, 3, 3, 4))):
            Host(world, f"host{number + 1}", nursery).start()
            await self._everybody_serves()
        await self._on(world.hosts[0], self._make_registers)
        self.registers = Registers(world)
        for host in world.hosts:
            self._programs(host)
        faults = Faults(world, Random(rng.random()), nursery, self._begun)
        await faults.run(rng.randrange(3, 7), self.kinds)
        self.counts += faults.counts
        await self._end()

    async def _end(self) -> None:
        world = self.world
        world.tell("** everything has healed")
        await self._everybody_serves()
        await trio.sleep(SETTLED_S)  # who was away for long is evicted only now
        await self._everybody_serves()
        for host in world.hosts:
            self._programs(host, steps=8)
        await trio.sleep(SETTLED_S)
        for host in world.hosts:
            await self._on(host, self._look)
        for host in self.rng.sample(world.hosts, len(world.hosts)):
            life = host.serving
            assert life is not None, f"{host.life} does not serve, and nothing was done to it"
            await host.leave()
            assert life.left, f"{life} has not left cleanly"
        assert not world.lun.wrongs, world.lun.wrongs
        await self._check()
        self.counts["promises kept"] = self.promises.verified + self.registers.promised()
        self.counts["reads"] = self.registers.reads

    async def _everybody_serves(self) -> None:
        """Whoever has failed is started again: an administrator mounts it."""
        with trio.fail_after(SERVES_WITHIN_S):
            while any(host.serving is None for host in self.world.hosts):
                for host in self.world.hosts:
                    if host.life is not None and host.life.ended.is_set():
                        host.start()
                await trio.sleep(0.2)

    def _begun(self, life: Life) -> None:
        life.host.run(self._when_it_serves, life)

    async def _when_it_serves(self, life: Life) -> None:
        await life.ready.wait()
        self._programs(life.host)

    def _programs(self, host: Host, steps: int = 0) -> None:
        life = host.serving
        if life is None:
            return
        rng = Random(self.rng.random())
        number = next(self._numbers)
        program: Any = PatientProgram(life, number, rng, self.counts, self.promises)
        host.run(program.run, steps or STEPS)
        host.run(RegisterProgram(life, self.registers, rng).run, steps or PROGRAM_STEPS)
        for name in NAMES:
            reader = RegisterProgram(life, self.registers, Random(rng.random()))
            host.run(reader.look, name, steps or PROGRAM_STEPS)

    async def _on(self, host: Host, work: Any) -> None:
        """Do it on a host, and wait for its end."""
        life, done = host.serving, trio.Event()
        assert life is not None, f"{host.life} does not serve, and nothing was done to it"

        async def do() -> None:
            await life.call(work, life)
            done.set()

        host.run(do)
        with trio.fail_after(120):
            await done.wait()

    async def _make_registers(self, life: Life) -> None:
        self.promises.others = await make_registers(life)

    async def _look(self, life: Life) -> None:
        volume: Any = life.volume
        volume.check()
        await RegisterProgram(life, self.registers, Random(0)).read_all()
        await read_all(life, self.promises)

    async def _check(self) -> None:
        """What nobody has flushed is lost, too: who leaves, leaves everything stable."""
        image = self.world.lun.crashed(keep=keep_none)
        async with await image.login(PORT) as device:
            report = await check_volume(device, self.world.superblock, now_ns=realtime_ns())
        assert not report.findings, "\n".join(map(str, report.findings))
        assert not report.totals.orphans and not report.totals.reclaim_entries, report.totals


class _TraceHandler(logging.Handler):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        at, machine = trio.current_time(), current_machine()
        where = "" if machine is None else machine.name
        self._run.trace.append(f"{at:10.4f}      {where} {record.name}: {record.getMessage()}")


async def _land_at_random(lun: WatchedLun, rng: Random, share: float) -> None:
    """Let a ``share`` of all commands land late, and in another order than they came."""
    hold = lun.hold(lambda _: rng.random() < share)
    while True:
        await hold.wait_held()
        await trio.sleep(rng.choice((0.0, 0.0001, 0.001)))
        if hold.commands:
            hold.land(rng.choice(hold.commands))
