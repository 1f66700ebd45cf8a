"""A write that the target admitted and holds back, across the death of the daemon that sent it.

The next mount rewrites the block. When the old write is let go it must have landed before, or not
at all: the fence of the claim waits for it, and until then nothing is mounted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mounts import Mount
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

UNIT = 65536
LATE = b"SLOW" + b"o" * 4092
NEWER = b"newer" * 819 + b"!"


@contextmanager
def late_writer(path: str, offset: int) -> Iterator[None]:
    """In the background, a write that is never acknowledged."""

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY)
        with contextlib.suppress(OSError):  # the daemon is killed under it
            os.pwrite(descriptor, LATE, offset)
        with contextlib.suppress(OSError):
            os.close(descriptor)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def mounting(mnt: Mount) -> Iterator[threading.Thread]:
    """A mount in the background, which has succeeded at the end of the block."""
    trouble: list[BaseException] = []

    def mount() -> None:
        try:
            mnt.remount()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=mount)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(120)
    assert not thread.is_alive()
    assert not trouble, trouble


@pytest.mark.parametrize("where", ["written unit", "start of a hole"])
def test_no_mount_before_a_held_write_has_landed(where: str, lun: Tgt, mnt: Mount) -> None:
    mnt.host.expect("the mount was dead and is detached: .* killed by SIGKILL")
    mnt.host.expect("the target did not answer a reset")
    path = mnt.path / "image"
    offset = 3 * UNIT + (4096 if where == "written unit" else 16 * UNIT)
    with path.open("wb", buffering=0) as image:
        image.truncate(64 * UNIT)
        for unit in range(8):
            os.pwrite(image.fileno(), b"older" * 13107 + b"!", unit * UNIT)
        os.fsync(image.fileno())
    lun.hold_writes()
    with late_writer(str(path), offset):
        wait_until(lambda: lun.held_writes() == 1, "the write to be held in the target")
        mnt.kill()
    with mounting(mnt) as mount:
        mnt.host.wait_logged("the target did not answer a reset")
        assert mount.is_alive(), "mounted over a write that is still under way"
        lun.release_writes()
    with path.open("r+b", buffering=0) as image:
        if where == "written unit":
            assert os.pread(image.fileno(), 4096, offset) in (LATE, (b"older" * 13107)[4096:8192])
        else:
            assert os.pread(image.fileno(), 4096, offset) in (LATE, bytes(4096))
        os.pwrite(image.fileno(), NEWER, offset)
        os.fsync(image.fileno())
    mnt.umount()
    mnt.remount()
    with path.open("rb") as image:
        image.seek(offset)
        assert image.read(4096) == NEWER
