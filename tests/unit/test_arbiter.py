"""`LunArbiter` on the simulated LUN and on ``file://``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from trio.abc import Clock
from trio.testing import MockClock

from redirector.block.device import Lun
from redirector.block.file import FileLun
from redirector.block.file_data import side_path
from redirector.block.side_file import STATE, SideFile
from redirector.block.simulated import Hold, SimulatedLun
from tests.arbiter_conformance import SLOW, ArbiterConformance, Stage
from tests.member_nodes import QUICK, Cluster, open_cluster
from tests.unit.test_block_file import FileHarness

SIZE = 64 << 20


class SimulatedStage(Stage):
    def __init__(self) -> None:
        self._lun = SimulatedLun(SIZE)
        self._hold: Hold | None = None

    def cluster(self) -> AbstractAsyncContextManager[Cluster]:
        return open_cluster(self.lun)

    def lun(self) -> Lun:
        return self._lun

    def hold_writes(self) -> None:
        self._lun.drains_wait()
        self._hold = self._lun.hold(lambda command: command.data.startswith(SLOW[:4]))

    async def wait_held(self) -> None:
        assert self._hold is not None
        await self._hold.wait_held()

    def release_writes(self) -> None:
        assert self._hold is not None
        self._hold.lift()

    def restart(self) -> None:
        self._lun.restart()


class TestSimulated(ArbiterConformance):
    @pytest.fixture
    def stage(self) -> Stage:
        return SimulatedStage()

    @pytest.fixture
    def clock(self) -> Clock:
        return MockClock(autojump_threshold=0)


class FileStage(Stage):
    """Each node has a `FileLun` of its own, as in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.harness = FileHarness(path)

    def cluster(self) -> AbstractAsyncContextManager[Cluster]:
        return open_cluster(self.lun, QUICK)

    def lun(self) -> Lun:
        return FileLun(self.harness.lun.path)

    def hold_writes(self) -> None:
        self.harness.hold_writes()

    async def wait_held(self) -> None:
        await self.harness.wait_held()

    def release_writes(self) -> None:
        self.harness.release_writes()

    def restart(self) -> None:
        side = SideFile(side_path(self.harness.lun.path))
        assert side.try_lock(STATE, exclusive=True)
        with side.changing() as state:
            for nexus in list(state.sessions):
                state.close_session(nexus)
            state.arbiter.forget()
        side.close()


class TestFile(ArbiterConformance):
    @pytest.fixture
    def stage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
        stage = FileStage(tmp_path / "lun")
        monkeypatch.setattr("redirector.block.file.os.pwritev", stage.harness.pwritev)
        yield stage
        stage.release_writes()

    @pytest.fixture
    def clock(self) -> None:
        """The real one."""
