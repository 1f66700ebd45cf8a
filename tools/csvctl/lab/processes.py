"""Who lives in a lab's network namespaces, and how they end.

A lab keeps no list of process ids: a number may be somebody else's by the time it is read. A
process is the lab's if, and only if, its network namespace is one of the lab's; and it is signalled
through a pidfd (pidfd_open(2)) whose process was looked at after the pidfd was had.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csvctl.lab.state import NAMESPACES

_END_LIMIT_S: Final = 20.0

Namespace = tuple[int, int]
"""Device and inode number of a namespace (namespaces(7))."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process that lives in a namespace."""

    pid: int
    command: tuple[str, ...]

    @property
    def module(self) -> str:
        """The Python module that it runs (``python -m MODULE``), or ''."""
        words = self.command
        return words[2] if len(words) > 2 and words[1] == "-m" else ""


def namespace_of(name: str) -> Namespace | None:
    """The named network namespace; None if there is no such name, or nothing behind it."""
    path = NAMESPACES / name
    try:
        found, parent = os.stat(path), os.stat(NAMESPACES)
    except FileNotFoundError:
        return None
    # A name whose maker was killed before it was bound is a plain file.
    return None if found.st_dev == parent.st_dev else (found.st_dev, found.st_ino)


def members(namespaces: Iterable[Namespace]) -> list[Member]:
    """Every process that lives in one of them."""
    wanted = frozenset(namespaces)
    return [
        Member(int(pid), _command(int(pid)))
        for pid in filter(str.isdigit, os.listdir("/proc"))
        if wanted and _lives_in(int(pid)) in wanted
    ]


def send(process: Member, namespaces: Iterable[Namespace], number: signal.Signals) -> bool:
    """Signal a member; False if it has gone meanwhile."""
    with _handle(process.pid) as handle:
        if handle < 0 or _lives_in(process.pid) not in frozenset(namespaces):
            return False
        try:
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        return True


def end(processes: Iterable[Member], namespaces: Iterable[Namespace]) -> None:
    """SIGKILL them, all before any is waited for; returns when they have ended.

    Raises TimeoutError if one does not end.
    """
    wanted = frozenset(namespaces)
    handles: list[tuple[int, int]] = []
    try:
        for each in processes:
            handle = _open(each.pid)
            if handle >= 0:
                handles.append((each.pid, handle))
                if _lives_in(each.pid) in wanted:
                    _kill(handle)
                else:
                    os.close(handles.pop()[1])
        limit = time.monotonic() + _END_LIMIT_S
        for pid, handle in handles:
            left_ms = max(0.0, limit - time.monotonic()) * 1000
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(left_ms):
                raise TimeoutError(f"process {pid} does not end {_END_LIMIT_S:g} s after SIGKILL")
    finally:
        for _, handle in handles:
            os.close(handle)


@contextmanager
def _handle(pid: int) -> Iterator[int]:
    handle = _open(pid)
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)


def _open(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _kill(handle: int) -> None:
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return


def _lives_in(pid: int) -> Namespace | None:
    try:
        found = os.stat(f"/proc/{pid}/ns/net")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or a kernel thread
        return None
    return found.st_dev, found.st_ino


def _command(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(os.fsdecode(word) for word in raw.split(b"\0")[:-1])


def wait_until(condition: Callable[[], object], what: str, limit_s: float) -> None:
    """Return as soon as ``condition()`` is true. Raises TimeoutError, which names ``what``."""
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.01)
