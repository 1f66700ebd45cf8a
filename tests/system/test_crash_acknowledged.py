"""Nothing that fsync acknowledged is lost: writers outside, SIGKILL inside, a verifier after it."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csvfs.host import mountpoint
from tests.mounts import Host, Mount
from tests.tgt import Tgt, wait_until
from tests.workload import ledger

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
DETACHED = "the mount was dead and is detached: .* killed by SIGKILL"


def start(module: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A program of `tests.workload`, in a process of its own."""
    argv = [sys.executable, "-m", f"tests.workload.{module}", *map(str, arguments)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def images(directory: Path, count: int, size_bytes: int) -> list[Path]:
    """Sparse image files, made if they are not there."""
    found = [directory / f"image{number}.raw" for number in range(count)]
    for image in found:
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(size_bytes)
    return found


def verify(log: Path, files: list[Path]) -> str:
    """Run the program that compares the images with the list of acknowledged writes."""
    checker = start("verify", log, *files)
    told, _ = checker.communicate(timeout=120)
    assert checker.returncode == 0, told
    return told


@contextmanager
def writing(log: Path, files: list[Path], acknowledged: int) -> Iterator[subprocess.Popen[str]]:
    """A writer that runs in the block, which begins when so many writes are acknowledged, and has
    ended by itself after it."""
    before = lines(log)
    writer = start("writer", log, *files)
    try:
        wait_until(lambda: lines(log) >= before + acknowledged or writer.poll() is not None, "acks")
        assert writer.poll() is None, writer.communicate()
        yield writer
        told, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        assert "acknowledged writes" in told
    finally:
        writer.kill()
        writer.wait()


def kill_after(mnt: Mount, delay_s: float) -> None:
    """SIGKILL the daemon ``delay_s`` from now, in whatever it is doing then."""
    pid = mnt.pid
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the dead mount to be detached")


@pytest.mark.parametrize(("seed", "rounds"), [(1, 3), pytest.param(2, 25, marks=pytest.mark.full)])
def test_sigkill_while_writing(seed: int, rounds: int, mnt: Mount, tmp_path: Path) -> None:
    """Images grow by first writes and are overwritten; beside them names come and go."""
    mnt.host.expect(DETACHED)
    chooser = random.Random(seed)
    log = tmp_path / "acknowledged"
    for number in range(rounds):
        files = images(mnt.path, 3, 16 * MIB)
        with writing(log, files, 20), churning(mnt.path / f"churn{number}"):
            kill_after(mnt, chooser.random() * 0.7)
        mnt.remount()
        verify(log, files)
        if number:
            shutil.rmtree(mnt.path / f"churn{number - 1}")
    assert "replayed" in mnt.host.log()


CHURN = """
d=$1; mkdir $d || exit 0; n=0
while :; do
    mkdir $d/$n && cp /etc/passwd $d/$n/a && ln $d/$n/a $d/$n/b && mv $d/$n/a $d/c$n && \\
        ln -s target $d/$n/s && rm $d/$n/b || exit 0
    [ $((n % 3)) = 0 ] && { rm -r $d/$n $d/c$n || exit 0; }
    n=$((n + 1))
done 2>/dev/null
"""


@contextmanager
def churning(directory: Path) -> Iterator[None]:
    """A shell that makes, links, renames and removes, until the mount is gone."""
    shell = subprocess.Popen(["sh", "-c", CHURN, "sh", str(directory)], stderr=subprocess.DEVNULL)
    try:
        yield
        shell.wait(60)
    finally:
        shell.kill()
        shell.wait()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.full)])
def test_sigkill_under_sqlite(rounds: int, mnt: Mount, tmp_path: Path) -> None:
    mnt.host.expect(DETACHED)
    chooser = random.Random(rounds)
    database = mnt.path / "ledger.db"
    ledger.create(database, "delete")
    logs: list[Path] = []
    for number in range(rounds):
        mine = [tmp_path / f"log{number}-{clerk}" for clerk in range(2)]
        logs += mine
        clerks = [start("ledger", log, database, "0") for log in mine]
        wait_until(lambda mine=mine: sum(map(lines, mine)) >= 10, "transfers")  # type: ignore[misc]
        kill_after(mnt, chooser.random() * 0.3)
        told = [clerk.communicate(timeout=60)[0] for clerk in clerks]
        assert [clerk.returncode for clerk in clerks] == [2, 2], told
        mnt.remount()
        assert ledger.audit(database, logs) == []


def rebooted(host: Host) -> Host:
    """The same machine after a reboot: same identity, another boot id, an empty /run."""
    again = Host(host.name)
    again.initiator = host.initiator
    again.environment["CSVFS_MACHINE_ID"] = host.environment["CSVFS_MACHINE_ID"]
    again.environment["CSVFS_BOOT_ID"] = secrets.token_hex(16)
    return again


def test_a_crashed_host_comes_back(lun: Tgt, tmp_path: Path) -> None:
    """Power lost: nobody closes a session or detaches a mount; the host boots and mounts."""
    log = tmp_path / "acknowledged"
    with Host() as host, host.mounted(lun.url) as mnt:
        host.expect(DETACHED)
        files = images(mnt.path, 2, 8 * MIB)
        with writing(log, files, 20):
            mnt.kill()
        with rebooted(host) as again, again.mounted(lun.url) as back:
            assert "replayed" in again.log()
            verify(log, [back.path / file.name for file in files])


def test_a_frozen_daemon_is_fenced(lun: Tgt, tmp_path: Path) -> None:
    """A life of the host that only slept wakes up after the next one has taken the volume: it must
    not write any more, and must end."""
    log = tmp_path / "acknowledged"
    with Host() as host, host.mounted(lun.url) as mnt:
        host.expect("")  # in which words it notices is not of this test
        files = images(mnt.path, 2, 8 * MIB)
        with writing(log, files, 20):
            pid = mnt.pid
            os.kill(pid, signal.SIGSTOP)
            with rebooted(host) as again, again.mounted(lun.url) as back:
                moved = [back.path / file.name for file in files]
                verify(log, moved)
                with moved[0].open("r+b", buffering=0) as image:
                    old = image.read(MIB)
                    image.seek(0)
                    image.write(b"NEW!" * (MIB // 4))
                    os.fsync(image.fileno())
                os.kill(pid, signal.SIGCONT)
                wait_until(lambda: not host.daemons(), "the old daemon to end", 60)
                assert moved[0].read_bytes()[:MIB] == b"NEW!" * (MIB // 4)
                with moved[0].open("r+b", buffering=0) as image:
                    image.write(old)
                verify(log, moved)


def test_connections_are_cut_while_writing(lun: Tgt, mnt: Mount, tmp_path: Path) -> None:
    """The path is lost and found: the writer sees no error, and nothing is lost."""
    mnt.host.expect("")
    log = tmp_path / "acknowledged"
    files = images(mnt.path, 3, 8 * MIB)
    with writing(log, files, 20) as writer:
        for _ in range(3):
            before = lines(log)
            lun.cut()
            wait_until(lambda before=before: lines(log) > before + 20, "writes go on", 60)  # type: ignore[misc]
        writer.send_signal(signal.SIGTERM)
    verify(log, files)
