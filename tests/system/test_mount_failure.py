"""The LUN fails under a mount: what users, log and status are told, and the way back."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.format import (
    BLOCK_BYTES,
    VIEW_ADDRESSES,
    VIEW_BYTES,
    Superblock,
    View,
    byte_offset,
    encode_view,
    newest_view,
    view_address,
)
from csvfs.host import mountpoint
from tests.mounts import CSVCTL, Host
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

DEAD = r"not connected|Software caused|Input/output"


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 << 20) as made:
        with Host("formatter") as host:
            host.format(made.url)
        yield made


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


def test_io_waits_for_a_target_that_goes_away(tgt: Tgt, host: Host) -> None:
    """Nobody sees an error: what was in flight, and what comes meanwhile, is done afterwards."""
    host.expect("")
    with host.mounted(tgt.url) as mnt:
        path = mnt.path / "file"
        path.write_bytes(b"before")
        tgt.kill()
        writer = subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=20", "conv=fsync"],
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: "waiting" in mnt.status()["path"], "the path to be seen as lost")
        assert writer.poll() is None
        tgt.restart()
        assert writer.wait(60) == 0
        assert path.read_bytes() == bytes(20 << 20)
        assert mnt.status()["path"] == "direct"
        assert mnt.status()["path_losses"] >= 1
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def test_a_signal_ends_a_leave_that_waits_for_the_target(tgt: Tgt, host: Host) -> None:
    """Who unmounts while the LUN is gone waits for it; who insists need not kill."""
    host.expect("")
    with host.mounted(tgt.url) as mnt:
        with (mnt.path / "file").open("wb", buffering=0) as file:
            file.write(b"kept")
            os.fsync(file.fileno())
        (mnt.path / "later").write_bytes(b"not fsynced")
        pid = mnt.pid
        tgt.kill()
        wait_until(lambda: "waiting" in mnt.status()["path"], "the path to be seen as lost")
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: mnt.status()["state"] == "leaving", "the volume to be being left")
        os.kill(pid, signal.SIGTERM)
        host.wait_logged("ended by a signal before the volume was left")
        wait_until(lambda: not host.daemons(), "the daemon and its supervisor to end")
        tgt.restart()
        mnt.remount()
        assert (mnt.path / "file").read_bytes() == b"kept"
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def test_csvctl_umount_waits_for_who_is_leaving(tgt: Tgt, host: Host) -> None:
    """The directory is free already, the volume is not: another host cannot mount it yet."""
    host.expect("")
    with host.mounted(tgt.url) as mnt:
        (mnt.path / "file").write_bytes(b"kept")
        tgt.kill()
        wait_until(lambda: "waiting" in mnt.status()["path"], "the path to be seen as lost")
        os.kill(mnt.pid, signal.SIGTERM)
        wait_until(lambda: mnt.status()["state"] == "leaving", "the volume to be being left")
        waiter = subprocess.Popen(
            [CSVCTL, "umount", str(mnt.path)], env=host.environment, stdout=subprocess.PIPE
        )
        assert waiter.stdout is not None
        assert b"waiting until the volume is left" in waiter.stdout.readline()
        assert waiter.poll() is None
        tgt.restart()
        with waiter.stdout:
            assert waiter.wait(60) == 0
        mnt.remount()
        assert (mnt.path / "file").read_bytes() == b"kept"


def test_a_cut_connection_is_no_error(tgt: Tgt, host: Host) -> None:
    host.expect("")
    with host.mounted(tgt.url) as mnt:
        with (mnt.path / "file").open("wb", buffering=0) as file:
            for n in range(30):
                file.write(bytes([n]) * 65536)
                if n % 10 == 5:
                    wait_until(lambda: len(tgt.connections()) == 2, "both sessions")
                    assert tgt.cut() >= 1  # one may just be lost, and made anew
        data = (mnt.path / "file").read_bytes()
        assert all(data[n * 65536 : (n + 1) * 65536] == bytes([n]) * 65536 for n in range(30))
    mounted_twice = host.log().count("is mounted at")
    assert mounted_twice == 1


def test_an_evicted_mount_ends_with_its_reason(tgt: Tgt, host: Host) -> None:
    """Another view rules: users get ENOTCONN, log and status the reason; nothing is released."""
    host.expect("the mount ends: ")
    host.expect("the mount was dead and is detached")
    host.expect("")
    with host.mounted(tgt.url) as mnt:
        fd = os.open(mnt.path / "file", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"acknowledged")
        os.fsync(fd)
        tgt.kill()
        forget_members(tgt.backing())
        tgt.restart()
        wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the mount to be detached")
        with pytest.raises(OSError, match=DEAD):
            os.pread(fd, 1, 0)
        with contextlib.suppress(OSError):
            os.close(fd)
        wait_until(lambda: not host.daemons(), "the daemon to end")
        shown = mnt.status()
        assert shown["state"] == "failed"
        assert "does not list this node" in shown["reason"]


def forget_members(lun: Path) -> None:
    """Write the view that somebody else would who has evicted everybody."""
    with lun.open("r+b") as file:
        superblock = Superblock.decode(file.read(BLOCK_BYTES))
        copies = []
        for address in VIEW_ADDRESSES:
            file.seek(byte_offset(address))
            copies.append(bytearray(file.read(VIEW_BYTES)))
        view = newest_view(copies, superblock.volume_id)
        empty = View.empty(len(view.slots), view.epoch + 1, secret=view.secret)
        file.seek(byte_offset(view_address(empty.epoch)))
        file.write(encode_view(empty, superblock.volume_id))


def test_a_full_volume(tgt: Tgt, host: Host) -> None:
    """ENOSPC, everything consistent, and unlink gives the space back."""
    with host.mounted(tgt.url) as mnt:
        (mnt.path / "first").write_bytes(os.urandom(1 << 20))
        written = 0
        with (mnt.path / "big").open("wb", buffering=0) as big:
            error = None
            while error is None:
                try:
                    written += big.write(bytes(1 << 20))
                except OSError as stopped:
                    error = stopped.errno
            assert error == errno.ENOSPC
            os.fsync(big.fileno())
        assert written > 200 << 20
        assert (mnt.path / "big").stat().st_size == written
        assert os.statvfs(mnt.path).f_bavail * 4096 < 2 << 20
        first = (mnt.path / "first").read_bytes()
        assert len(first) == 1 << 20
        (mnt.path / "big").unlink()
        (mnt.path / "again").write_bytes(bytes(100 << 20))
        assert (mnt.path / "first").read_bytes() == first
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def test_a_medium_error_concerns_the_files_that_lie_there(tgt: Tgt, host: Host) -> None:
    """The array loses half of the LUN: files there get EIO, others are read, the mount goes on."""
    host.expect("read.*answered EIO")
    contents = {f"file{n}": os.urandom(2 << 20) for n in range(60)}
    with host.mounted(tgt.url) as mnt:
        for name, data in contents.items():
            (mnt.path / name).write_bytes(data)
        os.sync()
        size = tgt.backing().stat().st_size
        whole = tgt.backing().read_bytes()
        os.truncate(tgt.backing(), size // 2)
        lost = []
        for name, data in contents.items():
            try:
                assert (mnt.path / name).read_bytes() == data
            except OSError as error:
                lost.append((name, error.errno))
        assert 0 < len(lost) < len(contents)
        assert {number for _, number in lost} == {errno.EIO}
        assert mnt.status()["state"] == "mounted"
        with tgt.backing().open("r+b") as array:
            array.seek(size // 2)
            array.write(whole[size // 2 :])
        for name, data in contents.items():
            assert (mnt.path / name).read_bytes() == data
