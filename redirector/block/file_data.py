"""The data file of a ``file://`` LUN: the system calls, and what their errors mean."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from redirector.block.arbiter import Op
from redirector.block.device import (
    BlockError,
    IllegalRequest,
    LunIdentity,
    MediumError,
    NoSuchLun,
    SpaceExhausted,
    Unreachable,
)

SECTOR_BYTES = 512

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Make a hole (FALLOC_FL_PUNCH_HOLE). Raises OSError."""
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate64(fd, mode, offset_bytes, length_bytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def side_path(path: Path) -> Path:
    """Where the reservations of the LUN in ``path`` are kept."""
    return path.with_name(path.name + ".reservations")


def translate(op: Op, error: OSError) -> BlockError:
    """What a failed system call on the data file means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceExhausted(
            op.value, sense_key=7, asc_ascq=0x2707, words="the file system below is full"
        )
    if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
        return IllegalRequest(op.value, sense_key=5, asc_ascq=0x2000, words=str(error))
    return MediumError(op.value, sense_key=3, asc_ascq=0x1100, words=str(error))


def open_data(path: Path, url: str) -> int:
    """A descriptor of the data file. Raises `NoSuchLun`, `Unreachable`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NoSuchLun(f"{url}: there is no such file") from error
    except OSError as error:
        raise Unreachable(f"{url}: {error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NoSuchLun(f"{url}: not a regular file")
    return fd


def identify(fd: int, side_fd: int) -> LunIdentity:
    """Size and names of the LUN; whether holes can be punched is tried on the side file."""
    status = os.fstat(fd)
    try:
        punch(side_fd, 1 << 40, 4096)
        granularity = 4096
    except OSError:
        granularity = 0
    return LunIdentity(
        size_bytes=status.st_size // SECTOR_BYTES * SECTOR_BYTES,
        logical_block_bytes=SECTOR_BYTES,
        vendor="CSVFS",
        product="FILE",
        revision="1",
        serial=f"{status.st_ino:x}",
        device_id=(0x3 << 60 | status.st_ino & (1 << 60) - 1).to_bytes(8, "big"),
        thin=granularity > 0,
        unmap_granularity_bytes=granularity,
        max_unmap_bytes=1 << 40,
        volatile_cache=True,
    )
