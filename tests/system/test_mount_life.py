"""A volume's life on one host: mount, use, unmount in every way, and what follows a SIGKILL."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvfs.host import mountpoint
from tests.mounts import CSVCTL, Host, Mount
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

GIB = 1 << 30
DEAD = r"not connected|Software caused"
"""ENOTCONN, ECONNABORTED: what a FUSE mount without a daemon answers."""


@pytest.fixture(scope="module")
def volume() -> Iterator[Tgt]:
    """A LUN with a volume on it that no test leaves mounted."""
    with Tgt(lun_bytes=GIB) as tgt:
        with Host("formatter") as host:
            host.format(tgt.url)
        yield tgt


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


@pytest.fixture
def mnt(volume: Tgt, host: Host) -> Iterator[Mount]:
    with host.mounted(volume.url) as found:
        for name in os.listdir(found.path):
            found.path.joinpath(name).unlink()
        yield found


def wait_left(host: Host) -> None:
    wait_until(lambda: not host.daemons(), "the daemon and its supervisor to end")


def close_dead(fd: int) -> None:
    """close(2) of a file whose mount is gone: it says so, and closes."""
    with contextlib.suppress(OSError):
        os.close(fd)


def test_csvctl_umount_returns_when_the_volume_is_left(mnt: Mount) -> None:
    (mnt.path / "file").write_text("kept")
    mnt.umount()
    assert mountpoint.find(str(mnt.path)) is None
    assert "the volume is left" in mnt.host.log()
    mnt.remount()
    assert (mnt.path / "file").read_text() == "kept"


def test_umount_8_leaves_cleanly_too(mnt: Mount) -> None:
    (mnt.path / "file").write_text("kept")
    subprocess.run(["umount", str(mnt.path)], check=True)
    # At once: the next mount waits for the daemon that is still leaving.
    mnt.remount()
    assert (mnt.path / "file").read_text() == "kept"
    assert "replayed" not in mnt.host.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_leaves(mnt: Mount, number: signal.Signals) -> None:
    (mnt.path / "file").write_text("kept")
    os.kill(mnt.pid, number)
    wait_left(mnt.host)
    assert mountpoint.find(str(mnt.path)) is None
    assert "the volume is left" in mnt.host.log()


def test_a_signal_to_the_supervisor_is_passed_on(mnt: Mount) -> None:
    os.kill(mnt.supervisor, signal.SIGTERM)
    wait_left(mnt.host)
    assert "the volume is left" in mnt.host.log()


def test_sigterm_waits_for_open_files(mnt: Mount) -> None:
    """The directory goes, the files that are open stay until they are closed."""
    mnt.host.expect("detached, and served until the last is closed")
    with (mnt.path / "file").open("w+b", buffering=0) as file:
        file.write(b"first")
        os.kill(mnt.pid, signal.SIGTERM)
        wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the mount to be detached")
        file.write(b" second")
        file.seek(0)
        assert file.read() == b"first second"
        os.fsync(file.fileno())
    wait_left(mnt.host)
    assert "the volume is left" in mnt.host.log()
    mnt.remount()
    assert (mnt.path / "file").read_bytes() == b"first second"


def test_a_second_sigterm_insists(mnt: Mount) -> None:
    mnt.host.expect("detached, and served until the last is closed")
    mnt.host.expect("a second SIGTERM")
    fd = os.open(mnt.path / "file", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"kept")
    pid = mnt.pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the mount to be detached")
    os.kill(pid, signal.SIGTERM)
    wait_left(mnt.host)
    with pytest.raises(OSError, match=DEAD):
        os.write(fd, b"x")
    close_dead(fd)
    mnt.remount()
    assert (mnt.path / "file").read_bytes() == b"kept"
    assert "replayed" not in mnt.host.log(), "the volume itself was left cleanly"


def test_sigkill_detaches_and_a_plain_mount_recovers(mnt: Mount) -> None:
    mnt.host.expect("the mount was dead and is detached: .* killed by SIGKILL")
    fd = os.open(mnt.path / "file", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(fd, b"acknowledged" * 1000)
    os.fsync(fd)
    mnt.kill()
    with pytest.raises(OSError, match=DEAD):
        os.fsync(fd)
    close_dead(fd)
    wait_left(mnt.host)
    shown = mnt.status()
    assert shown["state"] == "failed"
    assert "killed by SIGKILL" in shown["reason"]
    mnt.remount()
    assert "replayed" in mnt.host.log()
    assert (mnt.path / "file").read_bytes() == b"acknowledged" * 1000
    assert mnt.status()["state"] == "mounted"


def test_mount_detaches_what_no_supervisor_did(mnt: Mount) -> None:
    """Both killed: the directory answers ENOTCONN until csvctl looks at it."""
    pid = mnt.pid
    os.kill(mnt.supervisor, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_left(mnt.host)
    assert mountpoint.is_dead(str(mnt.path))
    assert mnt.status()["state"] == "failed"
    done = mnt.host.csvctl("mount", mnt.url, str(mnt.path), "--node", mnt.host.name)
    assert "its mount is detached" in done.stderr
    assert mnt.status()["state"] == "mounted"


def test_umount_takes_a_dead_mount_away(mnt: Mount) -> None:
    pid = mnt.pid
    os.kill(mnt.supervisor, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_left(mnt.host)
    done = mnt.host.csvctl("umount", str(mnt.path))
    assert "dead mount is detached" in done.stdout
    mnt.remount()


def test_the_daemon_outlives_its_supervisor(mnt: Mount) -> None:
    os.kill(mnt.supervisor, signal.SIGKILL)
    wait_until(lambda: len(mnt.host.daemons()) == 1, "the supervisor to be gone")
    (mnt.path / "file").write_text("still served")
    mnt.umount()


def test_a_late_supervisor_says_nothing_of_the_next_daemon(mnt: Mount) -> None:
    mnt.host.expect("replayed")
    with (mnt.path / "file").open("w") as file:
        file.write("kept")
        file.flush()
        os.fsync(file.fileno())
    supervisor = mnt.supervisor
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(mnt.pid, signal.SIGKILL)
        wait_until(lambda: mountpoint.is_dead(str(mnt.path)), "the mount to be dead")
        mnt.remount()
        pid = mnt.pid
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait_until(lambda: supervisor not in mnt.host.daemons(), "the first supervisor to end")
    assert (mnt.status()["state"], mnt.pid) == ("mounted", pid)
    (record,) = mnt.host.run.glob("*.json")
    assert '"state": "mounted"' in record.read_text()
    assert (mnt.path / "file").read_text() == "kept"


def test_kill_in_the_middle_of_writing(volume: Tgt, host: Host) -> None:
    """What was acknowledged by O_DSYNC is there; list kept outside the volume."""
    host.expect("the mount was dead and is detached")
    acknowledged = 0
    with host.mounted(volume.url) as mnt:
        fd = os.open(mnt.path / "log", os.O_CREAT | os.O_WRONLY | os.O_DSYNC | os.O_TRUNC, 0o600)
        pid = mnt.pid
        with contextlib.suppress(OSError):
            while True:
                os.pwrite(fd, acknowledged.to_bytes(8, "big") * 512, acknowledged * 4096)
                acknowledged += 1
                if acknowledged == 200:
                    os.kill(pid, signal.SIGKILL)
        close_dead(fd)
        wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the dead mount to be detached")
        mnt.remount()
        data = (mnt.path / "log").read_bytes()
        assert acknowledged >= 200
        for number in range(acknowledged):
            block = data[number * 4096 : (number + 1) * 4096]
            assert block == number.to_bytes(8, "big") * 512, f"write {number} is lost"
    done = host.csvctl("check", volume.url)
    assert "the volume is clean" in done.stdout


def test_foreground_ends_with_the_mount(volume: Tgt, host: Host) -> None:
    """As systemd runs it: told when it is ready, stopped by SIGTERM."""
    path = host.mountpoint("fg")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(host.directory / "notify"))
    manager.settimeout(60)
    process = subprocess.Popen(
        [CSVCTL, "mount", volume.url, str(path), "--foreground", "--node", host.name],
        env=host.environment | {"NOTIFY_SOCKET": str(host.directory / "notify")},
        stderr=subprocess.PIPE,
        text=True,
    )
    with manager:
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=test is mounted at ")
    assert mountpoint.find(str(path)) is not None
    (path / "file").write_text("x")
    wait_until(lambda: host.csvctl("status", str(path)).stdout.count("MOUNTED") == 1, "its record")
    process.terminate()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "is mounted at" in told
    assert "the volume is left" in told
    assert mountpoint.find(str(path)) is None


def test_an_idle_daemon_is_small(mnt: Mount) -> None:
    """After a mount, and soon after much I/O, too."""
    assert mnt.status()["memory_bytes"] < 60 << 20
    command = ["fio", "--name=x", f"--filename={mnt.path}/image", "--rw=randwrite", "--bs=4k"]
    command += [
        "--iodepth=32",
        "--ioengine=libaio",
        "--direct=1",
        "--size=64M",
        "--number_ios=8000",
    ]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wait_until(lambda: mnt.status()["memory_bytes"] < 80 << 20, "memory to be given back")


def test_the_daemon_is_protected(mnt: Mount) -> None:
    """As far as this machine allows; the log names what it does not."""
    status = Path(f"/proc/{mnt.pid}/status").read_text()
    locked = int(re.search(r"VmLck:\s+(\d+)", status)[1])  # type: ignore[index]  # it is there
    assert locked > 0 or "swapped out" in mnt.host.log()
    score = int(Path(f"/proc/{mnt.pid}/oom_score_adj").read_text())
    assert score == -1000 or "OOM killer" in mnt.host.log()


def test_options_of_the_mount(mnt: Mount) -> None:
    line = next(x for x in Path("/proc/mounts").read_text().splitlines() if str(mnt.path) in x)
    assert {"nosuid", "nodev", "allow_other"} <= set(line.split()[3].split(","))
    wait_until(lambda: mnt.connection.waiting() == 0, "the kernel to have its answers")
