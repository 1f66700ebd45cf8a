"""The registry of cases, and the words in which they write down what they saw."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

Observation = list[object]
CASES: dict[str, Callable[[], Observation]] = {}

KINDS = ("file", "dir", "fifo", "char", "block", "socket", "symlink")
USER, OTHER = 65533, 65532
NAME_MAX, PATH_MAX = 255, 4096


def case(name: str) -> Callable[[Callable[[], Observation]], Callable[[], Observation]]:
    """Register a case without a parameter."""

    def register(function: Callable[[], Observation]) -> Callable[[], Observation]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


def each(name: str, *values: Any) -> Callable[[Callable[[Any], Observation]], object]:
    """Register one case for every value, named ``name-value``."""

    def register(function: Callable[[Any], Observation]) -> object:
        for value in values:
            label = getattr(value, "__name__", str(value))
            case(f"{name}-{label}")(partial(function, value))
        return function

    return register


def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> object:
    """What a system call answered: the errno's name, or its value."""
    try:
        value = function(*arguments, **keywords)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok" if value is None else value


def does(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> object:
    """As `call`, for calls whose value says nothing (a descriptor is closed)."""
    value = call(function, *arguments, **keywords)
    if function is os.open and isinstance(value, int):
        os.close(value)
    return value if isinstance(value, str) else "ok"


def make(kind: str, name: str, mode: int = 0o644) -> None:
    """Create an object of one of `KINDS`."""
    match kind:
        case "file":
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        case "dir":
            os.mkdir(name, mode)
        case "fifo":
            os.mkfifo(name, mode)
        case "char":
            os.mknod(name, mode | stat.S_IFCHR, os.makedev(1, 3))
        case "block":
            os.mknod(name, mode | stat.S_IFBLK, os.makedev(7, 200))
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
        case "symlink":
            os.symlink("nowhere", name)
    if kind != "symlink":
        os.chmod(name, mode)


def remove(kind: str, name: str) -> None:
    """Remove what `make` made."""
    if kind == "dir":
        os.rmdir(name)
    else:
        os.unlink(name)


def seen(name: str | int) -> Observation:
    """Everything of an object's attributes that two filesystems must agree on."""
    info = os.lstat(name) if isinstance(name, str) else os.fstat(name)
    size = info.st_size if not stat.S_ISDIR(info.st_mode) else "directory"
    device = info.st_rdev if stat.S_IFMT(info.st_mode) in (stat.S_IFCHR, stat.S_IFBLK) else 0
    return [oct(info.st_mode), info.st_nlink, info.st_uid, info.st_gid, size, device]


class Times:
    """Which of an object's times a step moves. All are set to the past first; ctime cannot be set,
    so it is compared with what it was."""

    PAST_NS = 1_000_000_000_123_456_789

    def __init__(self, *names: str) -> None:
        self._names = names
        self._before: dict[str, os.stat_result] = {}
        for name in names:
            os.utime(name, ns=(self.PAST_NS, self.PAST_NS), follow_symlinks=False)
            self._before[name] = os.lstat(name)
        self._let_the_clock_move()

    def _let_the_clock_move(self) -> None:
        """Kernel times move in ticks: go on only when a new time differs from what was stamped."""
        newest = max(info.st_ctime_ns for info in self._before.values())
        probe = "clock-probe"
        while True:
            os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
            os.utime(probe)
            moved = os.lstat(probe).st_mtime_ns > newest
            os.unlink(probe)
            if moved:
                break

    def before(self, name: str) -> os.stat_result:
        """What ``name`` was when the times were set."""
        return self._before[name]

    def moved(self, name: str | None = None) -> str:
        """The times of ``name`` (default: the first) that are not what they were, like "mc"."""
        name = name or self._names[0]
        before, after = self._before[name], os.lstat(name)
        return "".join(
            letter
            for letter, field in (("m", "st_mtime_ns"), ("c", "st_ctime_ns"))
            if getattr(before, field) != getattr(after, field)
        )


@contextmanager
def user(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> Iterator[None]:
    """Make the system calls inside as somebody else."""
    os.setgroups(list(groups))
    os.setegid(uid if gid is None else gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])


@contextmanager
def opened(name: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    """A descriptor for the time of a block."""
    descriptor = os.open(name, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
