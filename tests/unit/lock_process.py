"""A process that locks what it is told to: one command a line in, one answer a line out.

``open N [FILE]``, ``close N``, ``posix|ofd N ACCESS START LENGTH``, ``getlk|ofd_getlk N ACCESS
START LENGTH``, ``flock N ACCESS``: N names a descriptor, ACCESS is 0 (unlock), 1 (read) or 2
(write), and FILE is the position of a path among the arguments. ``posix_wait``, ``ofd_wait`` and
``flock_wait`` wait, until `INTERRUPT`. Answers are an errno or 0, and for ``getlk`` the lock in the
way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys
from typing import Final

FLOCK: Final = struct.Struct("hhqqi4x")
TYPES: Final = (fcntl.F_UNLCK, fcntl.F_RDLCK, fcntl.F_WRLCK)
FLOCK_TYPES: Final = (fcntl.LOCK_UN, fcntl.LOCK_SH, fcntl.LOCK_EX)
OFD_GETLK: Final = 36
OFD_SETLK: Final = 37
OFD_SETLKW: Final = 38
INTERRUPT: Final = signal.SIGUSR1
COMMANDS: Final = {
    "posix": fcntl.F_SETLK,
    "ofd": OFD_SETLK,
    "posix_wait": fcntl.F_SETLKW,
    "ofd_wait": OFD_SETLKW,
    "getlk": fcntl.F_GETLK,
    "ofd_getlk": OFD_GETLK,
}


def interrupted(*_: object) -> None:
    """So that Python does not call again what a signal has interrupted."""
    raise InterruptedError(errno.EINTR, "interrupted")


def carry_out(paths: list[str], files: dict[int, int], words: list[str]) -> str:
    number = int(words[1])
    if words[0] == "open":
        files[number] = os.open(paths[int(words[2]) if words[2:] else 0], os.O_RDWR)
        return "0"
    if words[0] == "close":
        os.close(files.pop(number))
        return "0"
    access = int(words[2])
    try:
        if words[0].startswith("flock"):
            at_once = 0 if words[0].endswith("wait") else fcntl.LOCK_NB
            fcntl.flock(files[number], FLOCK_TYPES[access] | at_once)
            return "0"
        lock = FLOCK.pack(TYPES[access], os.SEEK_SET, int(words[3]), int(words[4]), 0)
        answer = fcntl.fcntl(files[number], COMMANDS[words[0]], lock)
    except OSError as error:
        return str(error.errno)
    kind, _whence, start, length, pid = FLOCK.unpack(answer)
    return f"0 {TYPES.index(kind)} {start} {length} {pid}"


def main() -> None:
    files: dict[int, int] = {}
    signal.signal(INTERRUPT, interrupted)
    for line in sys.stdin:
        print(carry_out(sys.argv[1:], files, line.split()), flush=True)


if __name__ == "__main__":
    main()
