"""The daemon's lock file: whoever holds it is this host's one daemon of a volume.

A write lock of an open file description (fcntl(2) F_OFD_SETLK) on /run/csvfs/<volume id>.lock. The
kernel drops it when the daemon ends, however it ends; /run is empty after a boot. So who obtains
it has proof that no earlier daemon of this host lives. Others can ask without taking it (GETLK).
The file itself is never removed: two processes could then lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from types import TracebackType
from typing import Self

from csvfs.host.places import lock_path, make_run_directory

_POLL_S = 0.01
_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid (0 for OFD locks)."""


class DaemonLock:
    """Obtained at most once; held until `release` or the end of the process."""

    def __init__(self) -> None:
        self._fd = -1
        self._volume_id = b""

    def take(self, volume_id: bytes) -> bool:
        """Obtain the lock of a volume, or say False if another process has it. Idempotent.

        Raises OSError, ValueError if this lock is held for another volume.
        """
        if self._fd >= 0:
            if volume_id != self._volume_id:
                raise ValueError("the lock is held for another volume")
            return True
        make_run_directory()
        fd = os.open(lock_path(volume_id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd, self._volume_id = fd, volume_id
        return True

    def release(self) -> None:
        """Give it back; not held is no error."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _whole_file(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def daemon_lives(volume_id: bytes) -> bool:
    """True if a process of this host holds the volume's lock. Raises OSError."""
    try:
        fd = os.open(lock_path(volume_id), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    finally:
        os.close(fd)
    kind: int = _FLOCK.unpack(found)[0]
    return kind != fcntl.F_UNLCK


def wait_daemon_ended(volume_id: bytes, timeout_s: float) -> bool:
    """Wait (blocking) until nobody holds the lock; False if somebody still does."""
    end = time.monotonic() + timeout_s
    while daemon_lives(volume_id):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True
