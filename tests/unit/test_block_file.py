"""``file://``: the conformance suite, and what several processes do to each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from redirector.block.file import FileLun
from tests.block_conformance import BlockConformance, Harness


class FileHarness(Harness):
    """Holds writes by replacing the system call under the device."""

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(64 << 20)
        self.lun: FileLun = FileLun(path)
        self._held = 0
        self._gate = threading.Event()
        self._gate.set()
        self._pwritev = os.pwritev

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not self._gate.is_set() and bytes(buffers[0][:4]) == b"SLOW":
            if flags & os.RWF_NOWAIT:
                raise BlockingIOError
            self._held += 1
            self._gate.wait()
        return self._pwritev(fd, buffers, offset, flags)

    def hold_writes(self) -> None:
        self._gate.clear()

    async def wait_held(self, writes: int = 1) -> None:
        while self._held < writes:  # noqa: ASYNC110 (threads count)
            await trio.sleep(0.001)

    def release_writes(self) -> None:
        self._gate.set()


class TestFile(BlockConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
        harness = FileHarness(tmp_path / "lun")
        monkeypatch.setattr(os, "pwritev", harness.pwritev)
        yield harness
        harness.release_writes()
