"""The small process between csvctl and the daemon: it reaps the daemon and takes a dead mount away.

    csvctl mount --> supervisor --> daemon

It holds nothing of the mount: no /dev/fuse, no session, no lock. So when the daemon ends, however
it ends, the kernel has aborted the FUSE connection and released the daemon's lock before ``wait``
returns; what is left to do is to tell the other hosts that it is dead, for which they need not
wait for its silence then; umount2(MNT_DETACH) of a directory that answers ENOTCONN, a record
of how it ended, a line in the log. After that a plain ``csvctl mount`` works again. If the
supervisor itself is killed, the daemon serves on, and csvctl does the same when it next looks.

    python -m csvfs.supervisor EVENTS_FD DIRECTORY URL [--foreground] < settings

DIRECTORY and URL are there for ps; the settings, which may hold a password, come through stdin.
The daemon's end is this process's end: it exits with the same status.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from types import FrameType

from csvfs.host import logs
from csvfs.host.dead_mount import bury, detach_dead_mount
from csvfs.host.events import Reporter
from csvfs.host.hardening import protect_from_oom
from csvfs.host.last_will import execute_will, make_will_memory
from csvfs.host.problems import Kind, Problem
from csvfs.host.record import find_record

_log = logging.getLogger("csvfs.supervisor")


def main() -> int:
    """Run one daemon to its end."""
    events_fd, directory, url = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    foreground = "--foreground" in sys.argv[4:]
    settings = sys.stdin.buffer.read()
    with logs.logging_to(logs.destination(foreground)):
        return _supervise(settings, events_fd, directory, url)


def _supervise(settings: bytes, events_fd: int, directory: str, url: str) -> int:
    try:
        protect_from_oom()
    except OSError as error:
        _log.warning("the OOM killer may take the supervisor (%s)", error.strerror)
    will = make_will_memory()
    daemon = _start(settings, events_fd, will, directory, url)
    _forward_signals(daemon)
    status = daemon.wait()
    reporter = Reporter(events_fd)
    if status != 0:
        execute_will(will)
        _bury(directory, daemon.pid, _how(status))
        # Only if the daemon has not said it itself: csvctl takes the first.
        reporter.failed(Problem(Kind.ENDED, f"the daemon ended: {_how(status)}"))
    reporter.close()
    return status if status >= 0 else 128 - status


def _start(
    settings: bytes, events_fd: int, will_fd: int, directory: str, url: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "csvfs.daemon", str(events_fd), str(will_fd), directory, url]
    daemon = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        pass_fds=[will_fd, *([events_fd] if events_fd >= 0 else [])],
    )
    if daemon.stdin is None:
        raise AssertionError("stdin is a pipe")
    with daemon.stdin as pipe:
        pipe.write(settings)
    return daemon


def _forward_signals(daemon: subprocess.Popen[bytes]) -> None:
    def forward(number: int, _frame: FrameType | None) -> None:
        # The daemon is our child and unreaped until wait() returns, so the number is still its.
        daemon.send_signal(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, forward)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _how(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _bury(directory: str, pid: int, how: str) -> None:
    """Write down how the daemon ended, and detach its mount if it left one."""
    record = find_record(directory)
    # To tell the other hosts takes a while; the volume may be mounted again, by another daemon.
    if record is not None and record.pid == pid:
        how = bury(record, how).reason
    if detach_dead_mount(directory):
        _log.error(
            "%s: the mount was dead and is detached: %s. Programs that had files open there get "
            "errors; what fsync acknowledged is on the LUN. `csvctl mount` brings it back.",
            directory,
            how,
        )


if __name__ == "__main__":
    sys.exit(main())
