"""A daemon that serves the disks of the machine it runs on must not wait for that machine.

Under memory pressure the kernel writes dirty pages of guests back *through* the daemon. So it must
not be swapped out or have its code dropped (mlockall), must not be made to write back to itself
when it allocates (PR_SET_IO_FLUSHER), and must not be what the OOM killer takes. None of that is
needed to be correct: where the kernel refuses, the mount goes on and the log says what is missing.

Nor may it stop for long to look after its own memory (`collect_seldom`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from pathlib import Path
from typing import Final

_log = logging.getLogger("csvfs.host.hardening")

MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
PR_SET_IO_FLUSHER: Final = 57
_OOM_SCORE_ADJ_MIN: Final = -1000
_COLLECT_AFTER: Final = (5_000, 10, 200)
"""New objects; collections of the youngest; of the middle ones (gc.set_threshold)."""


def harden() -> list[str]:
    """Do all three; what could not be done, in words (logged as well)."""
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    if _lock_memory(libc):
        missing.append(f"its memory may be swapped out (mlockall: {_error()})")
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        missing.append(f"it may wait for itself under memory pressure (IO_FLUSHER: {_error()})")
    try:
        protect_from_oom()
    except OSError as error:
        missing.append(f"the OOM killer may take it ({error.strerror})")
    if missing:
        _log.warning("the daemon is not fully protected: %s", "; ".join(missing))
    return missing


def _lock_memory(libc: ctypes.CDLL) -> int:
    # ON_FAULT: pages are locked when touched. Plain mlockall would fault in 80 MiB of never-used
    # stacks and library code.
    failed: int = libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)
    return failed


def collect_seldom() -> None:
    """Let Python's collector of cycles look at everything but rarely.

    It stops the whole daemon while it looks, a tenth of a second with ten thousand locks, and by
    default whenever there is a quarter more than before: just when a view has changed and every
    guest waits. What is loaded stays for ever and is never looked at again. Young objects are
    looked at as they were, a few more at a time; what does not outlive those costs no memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def resident_bytes() -> int:
    """How much memory this process holds (RSS)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_memory_back() -> None:
    """Return freed memory to the system (blocking; milliseconds).

    malloc_trim(3) does it by madvise(MADV_DONTNEED), which the kernel refuses on locked pages: so
    for that moment the process is not locked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.munlockall()
    libc.malloc_trim(0)
    _lock_memory(libc)


def protect_from_oom() -> None:
    """Never to be taken by the OOM killer. Raises OSError."""
    Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ_MIN))


def _error() -> str:
    return os.strerror(ctypes.get_errno())
