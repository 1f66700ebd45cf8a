"""A volume that real programs fill to the brim: ENOSPC, nothing damaged, and the way back."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mounts import Host, Mount
from tests.tgt import Tgt, wait_until
from tests.workload import ledger

pytestmark = pytest.mark.system

MIB = 1 << 20


@pytest.fixture
def small() -> Iterator[Mount]:
    """A mounted volume of 128 MiB, which must be clean in the end."""
    with Tgt(lun_bytes=128 * MIB) as tgt, Host() as host:
        host.format(tgt.url, "--slots", "2")
        with host.mounted(tgt.url) as found:
            yield found
        assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def free_bytes(mnt: Mount) -> int:
    found = os.statvfs(mnt.path)
    return found.f_bavail * found.f_frsize


def wait_free(mnt: Mount, size_bytes: int) -> None:
    """Space is free again once the transactions that gave it up are stable: a commit is due every
    5 s, and comes sooner where a name that was just made is synced."""

    def there() -> bool:
        (mnt.path / "name").touch()
        (mnt.path / "name").unlink()
        root = os.open(mnt.path, os.O_RDONLY)
        os.fsync(root)
        os.close(root)
        return free_bytes(mnt) >= size_bytes

    wait_until(there, f"{size_bytes} bytes to be free")


def program(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, timeout=300, check=False
    )


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def fill(mnt: Mount, name: str) -> Path:
    """Let dd write until there is no more space."""
    path = mnt.path / name
    done = program("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "conv=fsync")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    return path


def test_programs_fill_a_volume(small: Mount) -> None:
    empty = free_bytes(small)
    kept = small.path / "kept"
    shutil.copytree(Path(__file__).parents[1] / "unit", kept)
    ledger.create(small.path / "ledger.db", "delete")
    before = digests(kept)
    big = fill(small, "big")
    assert free_bytes(small) < MIB

    # Small things: names fit as long as metadata units have blocks, data has no place.
    refused = program("cp", "-r", kept, small.path / "copy")
    assert refused.returncode == 1
    assert "No space left on device" in refused.stderr
    shutil.rmtree(small.path / "copy", ignore_errors=True)
    fill(small, "kept/more")
    (kept / "more").unlink()

    # What is there already can be read, overwritten, renamed, and removed.
    size = big.stat().st_size
    with big.open("r+b", buffering=0) as file:
        file.write(b"overwritten")
        os.fsync(file.fileno())
    big.rename(small.path / "renamed")
    small.umount()
    small.remount()
    assert digests(kept) == before
    assert ledger.audit(small.path / "ledger.db", []) == []
    renamed = small.path / "renamed"
    assert renamed.stat().st_size == size
    assert renamed.read_bytes()[:11] == b"overwritten"
    with renamed.open("r+b", buffering=0) as file:
        file.truncate(size // 2)
        os.fsync(file.fileno())
    wait_free(small, size // 3)
    shutil.copytree(kept, small.path / "copy")
    assert digests(small.path / "copy") == before
    for name in os.listdir(small.path):
        path = small.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_free(small, empty - MIB)


FILES = 400
MAKE_FILES = "n=0; while [ $n -lt $1 ] && : > $0/$n; do n=$((n + 1)); done"


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.full)])
def test_sigkill_of_a_full_volume(rounds: int, small: Mount) -> None:
    """Killed while it is full and everything in it is being removed: all of it can be written."""
    small.host.expect("the mount was dead and is detached: .* killed by SIGKILL")
    big, tree = small.path / "big", small.path / "tree"
    for number in range(rounds):
        tree.mkdir()
        subprocess.run(["sh", "-c", MAKE_FILES, tree, str(FILES)], check=True)
        fill(small, "big")
        left = FILES * (rounds - number) // (rounds + 1)
        with subprocess.Popen(["rm", "-rf", big, tree], stderr=subprocess.DEVNULL):
            wait_until(partial(removed, tree, left), "the removal to go on")
            small.kill()
        small.remount()
        shutil.rmtree(tree, ignore_errors=True)
        big.unlink(missing_ok=True)
        assert os.listdir(small.path) == []
        fill(small, "big")
        assert big.stat().st_size > 80 * MIB
        big.unlink()


def removed(directory: Path, count: int) -> bool:
    """True if at most so many entries are left."""
    try:
        return len(os.listdir(directory)) <= count
    except FileNotFoundError:
        return True
