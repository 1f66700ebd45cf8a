"""The simulated LUN does what was measured on a real target (FACTS), under the product's fence."""

from __future__ import annotations

from typing import Any, cast

from redirector.block import reservations
from redirector.block.arbiter import Op
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
)
from redirector.block.keys import PathKey
from redirector.block.reservations import PathClosed, Registration, Victim
from tests.sim.lun import SanLink, Session, SimLun
from tests.sim.target import SimDevice, SimTarget, simulated_sleep
from tests.sim.world import Process, World

A, B = (PathKey(slot, 1, 1).pack() for slot in (1, 2))


class Bench:
    """Two processes on two hosts, each with a registered session; the first holds."""

    def __init__(self) -> None:
        self.world = World(1)
        self.lun = SimLun(self.world)
        self.landed: list[str] = []
        self.outcomes: list[object] = []
        self.links = [SanLink("one"), SanLink("two")]
        self.processes = [Process(self.world, name) for name in ("one", "two")]
        self.targets = [
            SimTarget(self.lun, process, link)
            for process, link in zip(self.processes, self.links, strict=True)
        ]
        self.registrations: list[Registration] = []
        self.ports = [InitiatorPort("iqn.test:one", 1), InitiatorPort("iqn.test:two", 2)]
        self.run(0, self._register(0, A))
        self.run(1, self._register(1, B))
        self.run(0, self.registrations[0].reserve())

    async def _register(self, number: int, key: int) -> None:
        device = SimDevice(await self.targets[number].session(self.ports[number]))
        self.registrations.append(await Registration.register(cast("BlockDevice", device), key))

    def begin(self, number: int, coroutine: Any) -> None:
        """Start something in a process."""

        async def guarded() -> object:
            try:
                return await coroutine
            except BlockError as error:
                return type(error)

        self.processes[number].start(guarded(), self.outcomes.append)

    def run(self, number: int, coroutine: Any) -> object:
        """The same, and wait for its end."""
        self.begin(number, coroutine)
        ended = len(self.outcomes)
        with simulated_sleep(self.world):
            self.world.run(self.world.now + 60.0)
        assert len(self.outcomes) >= ended
        return self.outcomes.pop()

    def session(self, number: int) -> Session:
        return cast("SimDevice", self.registrations[number].device).session

    async def write(self, number: int, words: str) -> None:
        session = self.session(number)
        await self.registrations[number].ask(
            lambda: session.ask(Op.WRITE, lambda: self.landed.append(words), words)
        )

    async def big_read(self, number: int) -> object:
        return await self.session(number).ask(Op.READ, lambda: list(self.landed), big=True)

    async def fence(self) -> str:
        lun = cast("Lun", self.targets[0])
        await reservations.fence(lun, self.registrations[0], [Victim(B, self.ports[1])])
        self.landed.append("fenced")
        return "fenced"


def test_what_was_admitted_lands_before_the_end_of_the_fence() -> None:
    bench = Bench()
    bench.lun.late_chance, bench.lun.late_s = 1.0, 3.0
    bench.begin(1, bench.write(1, "late"))
    bench.world.run(bench.world.now + 0.001)
    bench.lun.late_chance = 0.0
    assert bench.run(0, bench.fence()) == "fenced"
    assert bench.landed == ["late", "fenced"]
    assert bench.lun.slow_drains > 0
    # What it would have been told came over a session that is closed.
    assert bench.outcomes == [OutcomeUnknown]


def test_after_the_fence_nothing_lands() -> None:
    bench = Bench()
    assert bench.run(0, bench.fence()) == "fenced"
    assert bench.run(1, bench.write(1, "zombie")) is OutcomeUnknown
    assert bench.landed == ["fenced"]


def test_a_preempted_nexus_hears_of_it_and_conflicts() -> None:
    bench = Bench()
    assert bench.run(0, bench.registrations[0].preempt(B)) is None
    assert bench.run(1, bench.write(1, "zombie")) is PathClosed

    async def unregistered() -> None:
        await bench.session(1).ask(Op.WRITE, lambda: None)

    assert bench.run(1, unregistered()) is ReservationConflict
    assert bench.landed == []


def test_a_frozen_reader_holds_up_a_reset_until_its_session_is_closed() -> None:
    bench = Bench()
    bench.begin(1, bench.big_read(1))
    bench.processes[1].freeze()
    bench.world.run(bench.world.now + 1.0)

    async def reset() -> str:
        try:
            await bench.targets[0].reset(timeout_s=2.0)
        except TimeoutError:
            return "no answer"
        return "answered"

    assert bench.run(0, reset()) == "no answer"
    assert bench.run(0, bench.fence()) == "fenced"
    assert bench.run(0, reset()) == "answered"


def test_what_a_kernel_was_given_during_a_cut_may_arrive_after_it() -> None:
    arrived = 0
    for seed in range(8):
        bench = Bench()
        bench.world.rng.seed(seed)
        bench.links[1].cut_out = bench.links[1].cut_in = True
        assert bench.run(1, bench.write(1, "stalled")) is OutcomeUnknown
        assert bench.landed == []
        bench.links[1].cut_out = bench.links[1].cut_in = False
        bench.lun.healed(bench.links[1])
        bench.world.run(bench.world.now + 1.0)
        arrived += bench.landed == ["stalled"]
    assert 0 < arrived < 8


def test_a_restart_forgets_everything() -> None:
    bench = Bench()
    bench.lun.stop()
    bench.lun.begin()
    assert bench.run(0, bench.write(0, "after")) is OutcomeUnknown
    assert bench.lun.arbiter.read_keys().keys == ()
    bench.lun.arbiter.check()
