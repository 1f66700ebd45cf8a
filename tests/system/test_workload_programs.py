"""Programs that check their own data, on the mount: fio, git, sqlite, qemu-img."""

from __future__ import annotations

import filecmp
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.mounts import Mount
from tests.workload import ledger

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20


def run(
    *argv: str | Path,
    cwd: Path | None = None,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a program printed; it must end with ``code``."""
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def again(mounted: Mount) -> None:
    """Leave the volume and mount it again: nothing comes from a cache any more."""
    mounted.umount()
    mounted.remount()


# -- fio -----------------------------------------------------------------------------------------
FIO = {
    "direct": "--rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --numjobs=3",
    "buffered": "--rw=randwrite --bs=4k --fsync=64 --ioengine=psync --numjobs=3",
    "units": "--rw=randwrite --bs=64k --direct=1 --ioengine=libaio --iodepth=8 --numjobs=2",
    "unaligned": "--rw=randwrite --bs=5003 --ioengine=psync --fdatasync=50 --numjobs=2",
    "across-units": "--rw=write --bs=70000 --ioengine=psync --numjobs=2",
    "mixed-sizes": "--rw=write --bsrange=512-300k --bs_unaligned=1 --ioengine=psync --numjobs=2",
    "sectors": "--rw=randwrite --bs=512 --direct=1 --ioengine=libaio --iodepth=8 --numjobs=2",
    "read-write": "--rw=randrw --bs=8k --direct=1 --ioengine=libaio --iodepth=16 --numjobs=3",
}
QUICK = {"direct": "4m", "unaligned": "4m", "mixed-sizes": "8m"}


def fio(area: Path, name: str, size: str, *options: str) -> None:
    """One of `FIO`: write and verify; with ``--verify_only`` verify what an earlier one wrote."""
    printed = run(
        "fio",
        "--output-format=json",
        f"--name={name}",
        f"--directory={area}",
        f"--size={size}",
        "--randseed=42",
        "--fallocate=truncate",  # else fio takes a file that ends before its size for a new one
        "--verify=crc32c",
        "--verify_fatal=1",
        "--group_reporting",
        *FIO[name].split(),
        *options,
        cwd=area,
    )
    report: dict[str, Any] = json.loads(printed[printed.index("{") :])
    (job,) = report["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] > 0


@pytest.mark.parametrize("name", QUICK)
def test_fio_verifies_what_it_wrote(name: str, area: Path, mounted: Mount) -> None:
    fio(area, name, QUICK[name], "--do_verify=1")
    again(mounted)
    fio(area, name, QUICK[name], "--verify_only")


@pytest.mark.full
@pytest.mark.parametrize("name", FIO)
def test_fio_verifies_much(name: str, area: Path, mounted: Mount) -> None:
    size = "8m" if name == "sectors" else "64m"
    fio(area, name, size, "--do_verify=1")
    again(mounted)
    fio(area, name, size, "--verify_only")


# -- git -----------------------------------------------------------------------------------------
def test_git_clone_of_a_repository(area: Path, mounted: Mount, tmp_path: Path) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the tests do not run from a git repository")
    clone = area / "clone"
    config = tmp_path / "gitconfig"
    config.write_text("[safe]\n\tdirectory = *\n[user]\n\tname = t\n\temail = t@example.org\n")
    environment = {"GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*words: str | Path, cwd: Path = clone) -> str:
        return run("git", *words, cwd=cwd, environment=environment)

    git("clone", "--quiet", "--no-local", REPOSITORY, clone, cwd=area)
    git("fsck", "--full", "--strict")
    (clone / "README.md").write_text("changed\n")
    git("commit", "--quiet", "-am", "a change")
    git("gc", "--quiet", "--prune=now")
    head = git("rev-parse", "HEAD")
    again(mounted)
    git("fsck", "--full", "--strict")
    assert git("rev-parse", "HEAD") == head
    assert git("status", "--porcelain") == ""


# -- sqlite --------------------------------------------------------------------------------------
@pytest.mark.parametrize("journal", ["delete", pytest.param("truncate", marks=pytest.mark.full)])
def test_sqlite_with_concurrent_transactions(
    journal: str, area: Path, mounted: Mount, tmp_path: Path
) -> None:
    database = area / "ledger.db"
    ledger.create(database, journal)
    logs = [tmp_path / f"log{number}" for number in range(3)]
    clerks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.workload.ledger", log, database, "40"], cwd=REPOSITORY
        )
        for log in logs
    ]
    assert [clerk.wait(120) for clerk in clerks] == [0, 0, 0]
    assert ledger.audit(database, logs) == []
    assert sum(len(log.read_text().splitlines()) for log in logs) == 120
    again(mounted)
    assert ledger.audit(database, logs) == []


# -- qemu-img ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk outside the volume: data, holes, zeros, and an end that is no whole unit."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    chooser = random.Random(7)
    with path.open("wb") as out:
        for _ in range(40):
            out.seek(chooser.randrange(24 * MIB) & ~511)
            out.write(chooser.randbytes(chooser.randrange(1, 200_000)))
        out.seek(30 * MIB)
        out.write(bytes(MIB))
        out.truncate(32 * MIB + 512 * 3)
    return path


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "vpc", "vhdx"])
def test_qemu_img(kind: str, cache: str, area: Path, mounted: Mount, disk: Path) -> None:
    image, back = area / f"image.{kind}", area / "back.raw"
    # By default vpc rounds the size up to a geometry of cylinders.
    options = ("-o", "force_size=on") if kind == "vpc" else ()
    run("qemu-img", "create", "-q", "-f", kind, *options, image, "32M")
    run("qemu-img", "convert", "-f", "raw", "-O", kind, "-t", cache, *options, disk, image)
    check_image(kind, image)
    run("qemu-img", "compare", "-f", "raw", "-F", kind, "-T", cache, disk, image)
    again(mounted)
    check_image(kind, image)
    run("qemu-img", "compare", "-f", "raw", "-F", kind, disk, image)
    run("qemu-img", "convert", "-f", kind, "-O", "raw", "-T", cache, "-t", cache, image, back)
    with back.open("rb+") as file:
        file.truncate(disk.stat().st_size)  # some formats know whole MiB or clusters only
    assert filecmp.cmp(disk, back, shallow=False)


def check_image(kind: str, image: Path) -> None:
    """``qemu-img check``, where the format has such a thing (63: it has none)."""
    run("qemu-img", "check", "-f", kind, image, code=63 if kind in ("raw", "vpc") else 0)


def test_qemu_img_grows_and_shrinks(area: Path) -> None:
    image = area / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "10M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 2M", "-c", "flush", image)
    run("qemu-img", "snapshot", "-c", "first", image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 1M", "-c", "discard 4M 1M", image)
    run("qemu-img", "resize", "-q", image, "20M")
    check_image("qcow2", image)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 9 3M 1M", image)
    run("qemu-img", "snapshot", "-a", "first", image)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 3M 2M", image)
    check_image("qcow2", image)
