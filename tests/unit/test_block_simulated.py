"""The simulated LUN: the conformance suite, its faults, and the images that crashes leave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redirector.block.arbiter import Op
from redirector.block.simulated import TGT, Faults, SimulatedLun
from tests.block_conformance import BlockConformance, Harness


class SimulatedHarness(Harness):
    def __init__(self, faults: Faults) -> None:
        self.lun: SimulatedLun = SimulatedLun(64 << 20, faults=faults, record=True)
        self.leaks = frozenset(op.value for op in faults.arbiter.leaks)

    def hold_writes(self) -> None:
        self.lun.drains_wait()
        self._hold = self.lun.hold(lambda c: c.op is Op.WRITE and c.data.startswith(b"SLOW"))

    async def wait_held(self, writes: int = 1) -> None:
        await self._hold.wait_held(writes)

    def release_writes(self) -> None:
        self._hold.lift()


class TestSimulated(BlockConformance):
    @pytest.fixture(params=[Faults(), TGT], ids=["good", "tgt"])
    def harness(self, request: pytest.FixtureRequest) -> Iterator[Harness]:
        harness = SimulatedHarness(request.param)
        yield harness
        harness.lun.check()
