"""The kernel's side of a mount: options, the FUSE connection and its limits, its end.

Theory. libfuse mounts; the mount is one *connection*, whose number is the minor device number of
the filesystem, and fusectl (/sys/fs/fuse/connections/N) shows and sets what pyfuse3 cannot: the
number of background requests (asynchronous direct I/O counts as such), the abort switch.

One trap is closed here. pyfuse3 waits until its descriptor is readable and then calls a *blocking*
read with the interpreter lock held. If the one request that was there is withdrawn in between (its
process was killed), that read blocks everything: timers, heartbeats, the admin socket. An alarm
twice a second ends such a read with EINTR, which pyfuse3 takes for "look again".
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyfuse3

from csvfs.host import mountpoint

_log = logging.getLogger("csvfs.host.fuse")

CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
MAX_BACKGROUND: Final = 1024
"""Asynchronous requests that the kernel lets out at once (its default, 12, starves a guest)."""
MIN_TASKS: Final = 40
MAX_TASKS: Final = 4096
"""With fewer, waiting requests can fill every task, and the RELEASE that would free one never
gets in; with few idle ones each request pays for a new task."""
_ALARM_S: Final = 0.5


def mount_options(source: str, asked: set[str]) -> set[str]:
    """Options for `pyfuse3.init`: permissions checked by the kernel, every user let in.

    ``source`` is shown by mount(8). libfuse adds nodev and nosuid unless ``dev`` or ``suid`` was
    ``asked`` for; other options asked for are handed on (ro, noexec, noatime, ...).
    """
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    always = {"default_permissions", "allow_other", f"fsname={escaped}", "subtype=csvfs"}
    return always | asked


class Connection:
    """One FUSE connection in fusectl."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._directory = CONNECTIONS / str(number)

    @classmethod
    def of(cls, directory: str) -> Connection:
        """The connection of what is mounted at ``directory``. Raises `mountpoint.NotMounted`."""
        mounted = mountpoint.find(directory)
        if mounted is None or not mounted.kind.startswith("fuse"):
            raise mountpoint.NotMounted(f"{directory}: no FUSE filesystem is mounted there")
        return cls(mounted.device)

    def raise_limits(self) -> None:
        """Let `MAX_BACKGROUND` requests out at once; congested from three quarters on.

        Raises OSError where fusectl is not to be had.
        """
        (self._directory / "max_background").write_text(str(MAX_BACKGROUND))
        (self._directory / "congestion_threshold").write_text(str(MAX_BACKGROUND * 3 // 4))

    def waiting(self) -> int:
        """Requests that the kernel has not had answered yet. Raises OSError."""
        return int((self._directory / "waiting").read_text())

    def abort(self) -> None:
        """End the connection: each request, now and later, fails with ENOTCONN or ECONNABORTED.

        Raises OSError.
        """
        (self._directory / "abort").write_text("1")


def mount_fusectl() -> None:
    """Make sure that fusectl is mounted (systemd does it; a bare container may not have it).

    Raises OSError.
    """
    if any(
        each.kind == "fusectl" and each.path == str(CONNECTIONS) for each in mountpoint.mounts()
    ):
        return
    mountpoint.mount("fusectl", str(CONNECTIONS), "fusectl")


def prepare(directory: str) -> Connection:
    """The connection of a fresh mount, its limits raised; where that fails, the log says so."""
    connection = Connection.of(directory)
    try:
        mount_fusectl()
        connection.raise_limits()
    except OSError as error:
        _log.warning(
            "%s: cannot raise max_background (%s): few asynchronous requests will run at once",
            directory,
            error,
        )
    return connection


@contextmanager
def unblocked_reads() -> Iterator[None]:
    """Keep the alarm of the module's theory going. In the main thread only."""
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, _ALARM_S, _ALARM_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def serve() -> None:
    """Answer requests until the filesystem is unmounted or the connection aborted."""
    with unblocked_reads():
        await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)


def can_open_fuse() -> bool:
    """Can this process open /dev/fuse?"""
    return os.access("/dev/fuse", os.R_OK | os.W_OK)
