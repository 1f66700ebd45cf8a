"""Crash tests: run a workload once, then look at the LUN as a power loss at any write leaves it.

    run = record_workload(lun, workload, seed=7)        the workload runs to its end, recorded
    report = cut_everywhere(run, verify, every=1)       and is cut after every write

The workload calls `CrashRun.acknowledge` for whatever a user was promised (fsync returned), and
`CrashRun.count` for the types of what it did. The verifier gets a `Cut`: a LUN of its own, on
which each write that was not stable is kept, lost or torn at random, and the promises given until
then. It recovers the volume there and raises if a promise was broken.

Everything follows from the seed: the scheduler's choices, the order in which commands land and
are answered, the fate of unflushed writes. Time is virtual.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio
import trio.testing
from trio._core import _run as trio_scheduler

from csvfs.namespace import inode
from redirector.block.device import InitiatorPort
from redirector.block.medium import Keep, keep_all, keep_by, keep_none
from redirector.block.simulated import SimulatedDevice, SimulatedLun

PORT = InitiatorPort("iqn.2026-01.test:crash", 1)


@dataclass(eq=False)
class CrashRun:
    """A recorded run of a workload."""

    lun: SimulatedLun
    seed: int
    rng: Random
    types: Counter[str] = field(default_factory=Counter)
    """What the workload did, by type."""
    promises: list[tuple[int, Any]] = field(default_factory=list)
    """What was acknowledged, with the position in the medium's journal at that moment."""
    device: SimulatedDevice = field(init=False)

    @property
    def position(self) -> int:
        """Now, as a position in the medium's journal."""
        return self.lun.journal.position

    def count(self, kind: str) -> None:
        """One more transaction of this type."""
        self.types[kind] += 1

    def acknowledge(self, promise: Any) -> None:
        """From now on this must survive every crash."""
        self.promises.append((self.position, promise))


@dataclass(eq=False)
class Cut:
    """The LUN after a power loss."""

    run: CrashRun
    position: int
    writes: int
    lun: SimulatedLun
    rng: Random

    def promises(self) -> Iterator[Any]:
        """What had been acknowledged when the power was lost."""
        for position, promise in self.run.promises:
            if position > self.position:
                return
            yield promise


@dataclass
class CrashReport:
    """What a crash test did; print it."""

    cuts: int = 0
    writes: int = 0
    seconds: float = 0.0
    types: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    """What the verifier returned, counted: which kinds of recovery were met."""

    def __str__(self) -> str:
        rate = self.cuts / self.seconds if self.seconds else 0.0
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        ends = ", ".join(f"{count} {kind}" for kind, count in sorted(self.outcomes.items()))
        return (
            f"{self.cuts} cuts in {self.writes} writes, {rate:.0f}/s;"
            f" {sum(self.types.values())} transactions: {kinds}; recoveries: {ends}"
        )

    def add(self, other: CrashReport) -> None:
        """Sum up."""
        self.cuts += other.cuts
        self.writes += other.writes
        self.seconds += other.seconds
        self.types += other.types
        self.outcomes += other.outcomes


Workload = Callable[[CrashRun], Awaitable[None]]
Verifier = Callable[[Cut], Awaitable[str]]


class BrokenPromise(AssertionError):
    """A verifier failed; the message says how to run just that cut again."""


def deterministic_run(function: Callable[[], Awaitable[None]], seed: int) -> None:
    """`trio.run` in virtual time with a scheduler that makes its choices from ``seed``, and inodes
    whose generation and hash seed come from there, too."""
    scheduler: Any = trio_scheduler
    allowed, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    random_bytes, inode.random_bytes = inode.random_bytes, Random(seed).randbytes
    try:
        trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        inode.random_bytes = random_bytes
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = allowed
        scheduler._r.setstate(state)


async def _land_at_random(lun: SimulatedLun, rng: Random, share: float) -> None:
    """Let a ``share`` of all commands land late, and in another order than they came."""
    hold = lun.hold(lambda _: rng.random() < share)
    while True:
        await hold.wait_held()
        await trio.sleep(rng.choice((0.0, 0.0001, 0.001)))
        if hold.commands:
            hold.land(rng.choice(hold.commands))


def record_workload(lun: SimulatedLun, workload: Workload, *, seed: int) -> CrashRun:
    """Run ``workload`` to its end on a LUN made with ``record=True``."""
    run = CrashRun(lun, seed, Random(seed))

    async def main() -> None:
        run.device = await lun.login(PORT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_land_at_random, lun, Random(seed), seed % 3 * 0.3)
            await workload(run)
            nursery.cancel_scope.cancel()

    deterministic_run(main, seed)
    return run


def _keeps(rng: Random) -> Keep:
    """The two extremes now and then, chance else."""
    return rng.choice((keep_all, keep_none, keep_by(rng), keep_by(rng), keep_by(rng)))


def cut_everywhere(
    run: CrashRun,
    verify: Verifier,
    *,
    every: int = 1,
    images: int = 1,
    first_write: int = 0,
) -> CrashReport:
    """Verify ``images`` LUNs for the moment after each ``every``-th write, and just before it is
    answered or a while later, up to the next write."""
    journal = run.lun.journal
    report = CrashReport(types=run.types.copy(), writes=journal.writes)
    started = time.perf_counter()

    async def main() -> None:
        for writes in range(first_write, journal.writes + 1, every):
            low = journal.position_after(writes)
            high = journal.position_after(writes + 1) if writes < journal.writes else run.position
            for image in range(images):
                cut = make_cut(run, writes, image, low, high)
                try:
                    report.outcomes[await verify(cut)] += 1
                except Exception as error:
                    raise BrokenPromise(
                        f"seed {run.seed}, after write {writes} of {journal.writes}, image {image}"
                        f" (position {cut.position}): {error}"
                    ) from error
                report.cuts += 1

    deterministic_run(main, run.seed)
    report.seconds = time.perf_counter() - started
    return report


def make_cut(run: CrashRun, writes: int, image: int, low: int, high: int) -> Cut:
    """The image number ``image`` of the moment after a write: its own dice, so that one cut can
    be built again alone."""
    rng = Random(f"{run.seed} {writes} {image}")
    position = low if image == 0 else rng.randrange(low, max(low + 1, high))
    lun = run.lun.crashed(position=position, keep=_keeps(rng))
    lun.yields = False
    return Cut(run, position, writes, lun, rng)


def show(report: CrashReport) -> None:
    """Print a report where `pytest -rP` or ``-s`` shows it."""
    sys.stdout.write(f"{report}\n")
