"""What the supervisor needs to say, once its daemon is dead, that it is: the daemon's credentials.

The daemon puts them into memory that both have (memfd_create(2)) before it becomes anybody, so the
private key is on no disk, and nothing has to be asked of a daemon that hangs. Whom to tell stands
in a file beside the lock file (`lockmgr.cluster.obituary`), which a clean leave removes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgpack

_log = logging.getLogger("csvfs.host.last_will")

_LIMIT_BYTES = 64 << 10


def make_will_memory() -> int:
    """Memory for a will, inherited by children that are given it. Raises OSError."""
    return os.memfd_create("csvfs-last-will", 0)


def leave_will(fd: int, obituary: Path, certificate: bytes, key_pem: bytes) -> None:
    """Write it; below 0: nobody will read it. Raises OSError."""
    if fd >= 0:
        os.pwrite(fd, msgpack.packb((str(obituary), certificate, key_pem)), 0)


def execute_will(fd: int) -> None:
    """The daemon is reaped: tell whoever it talked to, so that they need not wait for its silence.

    Never raises: they find out by themselves, and the mount has to be taken away all the same.
    """
    _hurry()
    try:
        raw = os.pread(fd, _LIMIT_BYTES, 0)
        if not raw:
            return  # it had not begun
        path, certificate, key_pem = msgpack.unpackb(raw)
        if Path(path).exists():
            _tell(Path(path), certificate, key_pem)
    except Exception:
        _log.exception("the other hosts could not be told that the daemon is dead")


def _hurry() -> None:
    """Every image of this host is out of reach until somebody knows. What there is to do takes a
    quarter of a second of a processor: that must not be seconds where all processors are busy.

    The lowest real-time priority, as the heartbeats have it: a nice value counts for nothing
    against other sessions (sched(7), autogroups).
    """
    try:
        lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        os.sched_setscheduler(0, os.SCHED_RR, lowest)
    except OSError as error:
        _log.info("the other hosts may be told late: no real-time priority (%s)", error.strerror)


def _tell(obituary: Path, certificate: bytes, key_pem: bytes) -> None:
    import trio

    from lockmgr.cluster.certificates import Credentials
    from lockmgr.cluster.obituary import read_obituary, report_death_from

    credentials = Credentials(certificate, key_pem)
    peers = len(read_obituary(obituary).peers)
    if peers:
        noted = trio.run(report_death_from, obituary, credentials)
        _log.info("%d of %d hosts have noted that the daemon is dead", len(noted), peers)
