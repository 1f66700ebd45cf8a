"""``file://``: the conformance suite, and what several processes do to each other."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from redirector.block.device import (
    InitiatorPort,
    MediumError,
    NoSuchLun,
    OutcomeUnknown,
    SpaceExhausted,
    Unreachable,
)
from redirector.block.file import FileLun
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration, Victim, fence, survey
from redirector.block.side_file import STATE, SideFile
from tests.block_conformance import BLOCK, KEY_A, KEY_B, BlockConformance, Harness, port, session


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


ROOT = Path(__file__).parents[2]
NEIGHBOUR = """
import sys, trio
from redirector.block.device import InitiatorPort
from redirector.block.file import FileLun
from redirector.block.reservations import Registration

async def main(path, name, isid, key, role):
    lun = FileLun(path)
    own = await Registration.register(await lun.login(InitiatorPort(name, int(isid))), int(key))
    if role == "holds":
        await own.reserve()
    print("registered", flush=True)
    number = 0
    async def load():
        nonlocal number
        while True:
            number += 1
            data = number.to_bytes(8, "little") * 512
            await own.ask(lambda: own.device.write(0, data))
            await own.ask(lambda: own.device.read(0, 4096))
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(load)

trio.run(main, *sys.argv[1:])
"""


@contextlib.contextmanager
def neighbour(
    path: Path, owner: InitiatorPort, key: int, role: str = "writes"
) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with a registered session, that reads and writes block 0 all the time."""
    arguments = (sys.executable, "-c", NEIGHBOUR, path, owner.name, str(owner.isid), str(key), role)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"registered\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "lun"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


async def test_a_killed_process_leaves_its_key_and_a_dead_nexus(path: Path) -> None:
    lun = FileLun(path)
    with neighbour(path, port(1), KEY_A, "holds") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        heir = await Registration.register(await lun.login(port(2)), KEY_B)
        assert (await survey(heir.device)).holder_key == KEY_A
        await heir.take(KEY_A)
        await fence(lun, heir, [Victim(port=port(1))])
        assert (await survey(heir.device)).keys.keys == (KEY_B,)
        await heir.device.write(0, b"h" * BLOCK)
        await heir.device.aclose()
    side = SideFile(path.with_name("lun.reservations"))
    assert side.try_lock(STATE, exclusive=True)
    assert side.load().sessions == {}
    side.close()


@pytest.mark.parametrize("known_port", [True, False])
async def test_nothing_of_a_busy_process_lands_after_its_fence(
    path: Path, known_port: bool
) -> None:
    lun = FileLun(path)
    holder = await Registration.register(await lun.login(port(2)), KEY_B)
    await holder.reserve()
    with neighbour(path, port(1), KEY_A) as process:
        with trio.fail_after(10):
            await fence(lun, holder, [Victim(KEY_A, port(1) if known_port else None)])
        await holder.ask(lambda: holder.device.write(0, b"n" * BLOCK))
        with trio.fail_after(10):
            _, errors = await trio.to_thread.run_sync(process.communicate)
        assert (b"OutcomeUnknown" if known_port else b"PathClosed") in errors
    assert await holder.device.read(0, BLOCK) == b"n" * BLOCK
    await holder.device.aclose()


async def test_resets_do_not_starve_under_load(path: Path) -> None:
    lun = FileLun(path)
    with neighbour(path, port(1), KEY_A), neighbour(path, port(2), KEY_B):
        for _ in range(10):
            await lun.reset(timeout_s=5)


async def test_keys_of_many_processes(path: Path) -> None:
    lun = FileLun(path)
    first = await Registration.register(await lun.login(port(1)), KEY_A)
    await first.reserve()
    with contextlib.ExitStack() as stack:
        keys = [PathKey(slot, 1, 1).pack() for slot in range(4)]
        for number, key in enumerate(keys):
            stack.enter_context(neighbour(path, port(10 + number), key))
        assert sorted((await survey(first.device)).keys.keys) == sorted([KEY_A, *keys])
    await first.device.aclose()


# -- what can be wrong with a file -----------------------------------------------------------------
async def test_missing_file_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(NoSuchLun, match="no such file"):
        await FileLun(tmp_path / "none").login(port(1))
    with pytest.raises(NoSuchLun):
        await FileLun(tmp_path / "none").reset()
    (tmp_path / "dir").mkdir()
    with pytest.raises((NoSuchLun, Unreachable)):
        await FileLun(tmp_path / "dir").login(port(1))
    assert not (tmp_path / "none.reservations").exists()


async def test_errors_of_the_file_system_below(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lun = FileLun(path)
    code = errno.ENOSPC

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    async with session(lun, 1) as device:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            with pytest.raises(SpaceExhausted):
                await device.write(0, bytes(BLOCK))
            patch.setattr(os, "preadv", fail)
            code = errno.EIO
            with pytest.raises(MediumError):
                await device.read(0, BLOCK)
        await device.write(0, bytes(BLOCK))
        assert not device.lost
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OutcomeUnknown, match="may be gone"):
                await device.flush()
        with pytest.raises(OutcomeUnknown):
            await device.flush()


async def test_a_damaged_side_file_is_a_target_that_restarted(path: Path) -> None:
    lun = FileLun(path)
    holder = await Registration.register(await lun.login(port(1)), KEY_A)
    await holder.reserve()
    side_path = path.with_name("lun.reservations")
    data = bytearray(side_path.read_bytes())
    for at in range(4096, len(data), 1 << 20):
        data[at + 8] ^= 0xFF
    with side_path.open("r+b") as file:
        file.write(data)
    async with session(lun, 2) as other:
        standing = await survey(other)
        assert standing.keys.keys == ()
        assert standing.holder_key == 0
    with pytest.raises(OutcomeUnknown):
        await holder.device.write(0, bytes(BLOCK))
    await holder.device.aclose()


async def test_a_login_waits_for_a_locked_side_file_and_gives_up(path: Path) -> None:
    lun = FileLun(path)
    async with session(lun, 1):
        side = SideFile(path.with_name("lun.reservations"))
        assert side.try_lock(STATE, exclusive=True)
        with pytest.raises(Unreachable, match="stayed locked"):
            await lun.login(port(2), timeout_s=0.05)
        side.close()
        async with session(lun, 2):
            pass


async def test_a_resetter_that_died_leaves_io_working(path: Path) -> None:
    lun = FileLun(path)
    async with session(lun, 1) as device:
        side = SideFile(path.with_name("lun.reservations"))
        side.reset_pending = True
        side.close()
        await device.write(0, b"x" * BLOCK)
        await lun.reset()
        assert not device.lost
