"""The FUSE side by itself: real /dev/fuse, a volume in memory behind it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from csvfs.host.fuse import MAX_BACKGROUND, Connection
from csvfs.host.mountpoint import mounts
from tests.memory_volume import memory_mount
from tests.tgt import wait_until

pytestmark = pytest.mark.system

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def mnt() -> Iterator[Path]:
    with memory_mount() as (directory, log):
        yield directory
        assert log.read_text() == ""


def rename2(old: Path, new: Path, flags: int) -> int:
    """renameat2(2): 0 or the errno."""
    done = libc.renameat2(-100, bytes(old), -100, bytes(new), flags)
    return 0 if done == 0 else ctypes.get_errno()


def test_mount_is_nosuid_nodev_and_checks_permissions(mnt: Path) -> None:
    found = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mnt) in line)
    source, _, kind, options, *_ = found.split()
    assert (source, kind) == ("memory", "fuse.csvfs")
    assert {"nosuid", "nodev", "allow_other", "default_permissions"} <= set(options.split(","))


def test_max_background_is_raised(mnt: Path) -> None:
    number = Connection.of(str(mnt)).number
    assert any(each.kind == "fusectl" for each in mounts())
    shown = Path(f"/sys/fs/fuse/connections/{number}/max_background").read_text()
    assert int(shown) == MAX_BACKGROUND


def test_names_of_all_kinds(mnt: Path) -> None:
    (mnt / "dir").mkdir()
    (mnt / "file").write_bytes(b"hello")
    (mnt / "symlink").symlink_to("file")
    os.link(mnt / "file", mnt / "dir" / "second")
    os.mkfifo(mnt / "fifo")
    os.mknod(mnt / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert (mnt / "symlink").read_bytes() == b"hello"
    assert (mnt / "dir" / "second").stat().st_nlink == 2
    assert os.stat(mnt / "device").st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO(os.stat(mnt / "fifo").st_mode)
    long = mnt / ("n" * 255)
    long.touch()
    assert long.exists()
    with pytest.raises(OSError, match="too long"):
        (mnt / ("n" * 256)).touch()
    (mnt / "dir" / "second").unlink()
    (mnt / "dir").rmdir()
    assert sorted(os.listdir(mnt)) == sorted(["file", "symlink", "fifo", "device", "n" * 255])


def test_rename_flags(mnt: Path) -> None:
    (mnt / "a").write_text("a")
    (mnt / "b").write_text("b")
    assert rename2(mnt / "a", mnt / "b", pyfuse3.RENAME_NOREPLACE) == errno.EEXIST
    assert rename2(mnt / "a", mnt / "b", pyfuse3.RENAME_EXCHANGE) == 0
    assert ((mnt / "a").read_text(), (mnt / "b").read_text()) == ("b", "a")
    whiteout = 4
    assert rename2(mnt / "a", mnt / "b", whiteout) == errno.EINVAL
    assert rename2(mnt / "a", mnt / "b", 0) == 0
    assert os.listdir(mnt) == ["b"]


def test_attributes_are_not_cached(mnt: Path) -> None:
    path = mnt / "file"
    path.write_bytes(b"12345")
    assert path.stat().st_size == 5
    os.setxattr(path, "user.grow", b"100")
    assert path.stat().st_size == 105


def test_setattr_changes_only_what_is_asked(mnt: Path) -> None:
    path = mnt / "file"
    path.write_bytes(b"12345")
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    os.chmod(path, 0o640)
    os.chown(path, 12, 34)
    os.truncate(path, 3)
    found = path.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 12, 34)
    assert path.read_bytes() == b"123"


def test_open_flags(mnt: Path) -> None:
    path = mnt / "file"
    path.write_bytes(b"0123456789")
    first = os.open(path, os.O_WRONLY | os.O_APPEND)
    second = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(first, b"a")
    os.write(second, b"b")
    os.close(first)
    os.close(second)
    assert path.read_bytes() == b"0123456789ab"
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0


@pytest.mark.parametrize(
    ("flag", "synced"), [(0, None), (os.O_DSYNC, b"data"), (os.O_SYNC, b"all")]
)
def test_synchronous_writes(mnt: Path, flag: int, synced: bytes | None) -> None:
    path = mnt / "file"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | flag)
    os.write(fd, b"x")
    names = os.listxattr(path)
    assert (os.getxattr(path, "user.synced") if names else None) == synced
    os.fdatasync(fd)
    assert os.getxattr(path, "user.synced") == b"data"
    os.fsync(fd)
    assert os.getxattr(path, "user.synced") == b"all"
    os.close(fd)


def test_direct_reads_are_of_whole_sectors(mnt: Path) -> None:
    """QEMU's probe of cache=none: a read of 1 byte fails, of 512 succeeds."""
    path = mnt / "image"
    path.write_bytes(os.urandom(8192))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    for length in (1, 511, 513):
        with pytest.raises(OSError, match="Invalid argument"):
            os.preadv(fd, [memoryview(buffer)[:length]], 0)
    with pytest.raises(OSError, match="Invalid argument"):
        os.preadv(fd, [memoryview(buffer)[:512]], 100)
    assert os.preadv(fd, [memoryview(buffer)[:512]], 512) == 512
    assert buffer[:512] == path.read_bytes()[512:1024]
    os.close(fd)


def test_extended_attributes(mnt: Path) -> None:
    path = mnt / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    with pytest.raises(OSError, match="No data"):
        os.setxattr(path, "user.b", b"2", os.XATTR_REPLACE)
    assert os.listxattr(path) == ["user.a"]
    os.removexattr(path, "user.a")
    assert os.listxattr(path) == []
    with pytest.raises(OSError, match="No data"):
        os.removexattr(path, "user.a")


@pytest.mark.parametrize("flags", [4, 0x80, 0x40000000])
def test_unknown_setxattr_flags_end_no_mount(mnt: Path, flags: int) -> None:
    (mnt / "file").touch()
    done = libc.setxattr(bytes(mnt / "file"), b"user.a", b"1", 1, flags)
    assert (done, ctypes.get_errno()) == (-1, errno.EINVAL)
    assert os.listxattr(mnt / "file") == []


def test_listing_is_stable_while_entries_come_and_go(mnt: Path) -> None:
    stay = {f"stay{n:04}" for n in range(400)}
    for n in range(400):
        (mnt / f"stay{n:04}").touch()
        (mnt / f"go{n:04}").touch()
    seen: list[str] = []
    with os.scandir(mnt) as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n < 400:
                (mnt / f"go{n:04}").unlink()
                (mnt / f"new{n:04}").touch()
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)


def test_inodes_live_as_long_as_the_kernel_knows_them(mnt: Path) -> None:
    def inodes() -> int:
        return os.statvfs(mnt).f_files

    for n in range(100):
        (mnt / f"f{n}").write_text("x")
    (mnt / "d").mkdir()
    os.listdir(mnt)
    with (mnt / "f0").open() as held:
        for n in range(100):
            (mnt / f"f{n}").unlink()
        (mnt / "d").rmdir()
        assert held.read() == "x"
        assert os.fstat(held.fileno()).st_nlink == 0
        wait_until(lambda: inodes() == 2, "all but the root and the open file to be forgotten")
    wait_until(lambda: inodes() == 1, "the closed file to be forgotten")


def test_more_requests_wait_than_pyfuse3_has_tasks_by_default(mnt: Path) -> None:
    def ask(n: int) -> None:
        assert not (mnt / f"d{n}" / "wait").exists()

    # In one directory the kernel asks for one name at a time: pyfuse3 has no PARALLEL_DIROPS.
    for n in range(150):
        (mnt / f"d{n}").mkdir()
    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(150)]
    for thread in threads:
        thread.start()
    connection = Connection.of(str(mnt))
    wait_until(lambda: connection.waiting() >= 150, "150 requests in the daemon")
    (mnt / "go").touch()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_statvfs(mnt: Path) -> None:
    found = os.statvfs(mnt)
    assert (found.f_bsize, found.f_blocks, found.f_bfree, found.f_bavail) == (4096, 1000, 600, 500)
    assert found.f_namemax == 255


def test_other_users_get_in_as_far_as_the_mode_says(mnt: Path) -> None:
    (mnt / "open").write_text("1")
    (mnt / "shut").write_text("2")
    (mnt / "shut").chmod(0o600)
    done = subprocess.run(
        ["cat", str(mnt / "open"), str(mnt / "shut")],
        user="nobody",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1"
    assert "Permission denied" in done.stderr


def test_an_unexpected_error_is_answered_and_told() -> None:
    with memory_mount(trouble=True) as (mnt, log):
        with pytest.raises(OSError, match="Input/output") as raised:
            os.stat(mnt / "boom")
        assert raised.value.errno == errno.EIO
        with (mnt / "file").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="Input/output"):
                file.write(b"boom")
            assert file.write(b"fine") == 4
        assert (mnt / "file").read_bytes() == b"fine"
        told = log.read_text()
        assert told.count("unexpected error, answered EIO") == 2
        assert "RuntimeError: trouble with b'boom'" in told
