"""`LunArbiter` on a real tgtd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from redirector.block.device import Lun
from redirector.block.url import open_lun
from tests.arbiter_conformance import ArbiterConformance, Stage
from tests.member_nodes import QUICK, Cluster, open_cluster
from tests.tgt import Tgt

pytestmark = pytest.mark.system


class TgtStage(Stage):
    def __init__(self, tgt: Tgt) -> None:
        self.tgt = tgt

    def cluster(self) -> AbstractAsyncContextManager[Cluster]:
        return open_cluster(self.lun, QUICK)

    def lun(self) -> Lun:
        return open_lun(self.tgt.url)

    def hold_writes(self) -> None:
        self.tgt.hold_writes()

    async def wait_held(self) -> None:
        with trio.fail_after(20):
            while not self.tgt.held_writes():  # noqa: ASYNC110 (another process's file)
                await trio.sleep(0.005)

    def release_writes(self) -> None:
        self.tgt.release_writes()

    def restart(self) -> None:
        self.tgt.restart()


class TestTgt(ArbiterConformance):
    @pytest.fixture
    def stage(self) -> Iterator[Stage]:
        with Tgt(late_gate=True) as tgt:
            yield TgtStage(tgt)

    @pytest.fixture
    def clock(self) -> None:
        """The real one."""
