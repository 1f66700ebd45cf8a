"""The directory a volume is mounted at: what stands there, and how a dead mount is taken away.

All from /proc/self/mountinfo (proc(5)) and the directory's own parent: nothing here asks the
mounted filesystem itself except `is_dead`, because a daemon that hangs would hang the asker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

FILESYSTEM_TYPE: Final = "fuse.csvfs"
MNT_DETACH: Final = 2

_MOUNTINFO = "/proc/self/mountinfo"


class MountPointError(Exception):
    """The directory cannot be mounted at, or is not mounted."""


class Missing(MountPointError):
    """There is no such directory."""


class NotADirectory(MountPointError):
    """Something that is no directory."""


class NotEmpty(MountPointError):
    """A mount would hide what is in it."""


class Occupied(MountPointError):
    """Something is mounted there."""


class NotMounted(MountPointError):
    """No csvfs volume is mounted there."""


class InUse(MountPointError):
    """umount(2) EBUSY: files below it are open."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of mountinfo."""

    device: int
    """major << 20 | minor, which for FUSE is the number of its connection."""
    path: str
    kind: str
    source: str


def _unescape(field: str) -> str:
    # proc(5): space, tab, newline and backslash appear as \040, \011, \012, \134.
    raw = field.encode("utf-8", "surrogateescape")
    parts = raw.split(b"\\")
    out = parts[0] + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])
    return os.fsdecode(out)


def parse_mountinfo(text: str) -> list[Mounted]:
    """Every mount, in the order in which they were made (a later one covers an earlier one)."""
    found = []
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        words, kinds = fields.split(" "), tail.split(" ")
        major, minor = words[2].split(":")
        found.append(
            Mounted(
                int(major) << 20 | int(minor), _unescape(words[4]), kinds[0], _unescape(kinds[1])
            )
        )
    return found


def mounts() -> list[Mounted]:
    """Every mount of this process's namespace."""
    with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def resolve(path: str) -> str:
    """The absolute path without symbolic links, found without asking what is mounted at its end.

    (`os.path.realpath` would lstat the last component, which a hung daemon never answers.)
    """
    head, tail = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(head), tail)


def find(path: str) -> Mounted | None:
    """What is mounted at ``path`` now (the topmost), or None."""
    wanted = {resolve(path)}
    found = None
    for each in mounts():
        if each.path in wanted:
            found = each
    if found is None and os.path.islink(path):
        return find(os.path.realpath(path))
    return found


def is_dead(path: str) -> bool:
    """True if a FUSE mount whose daemon is gone stands there (ENOTCONN)."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def detach(path: str) -> None:
    """Take the mount away at once, open files or not (umount2(2) MNT_DETACH). Raises OSError."""
    unmount(path, MNT_DETACH)


def unmount(path: str, flags: int = 0) -> None:
    """umount2(2). Raises `InUse` when files are open, `NotMounted`, OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EBUSY:
        raise InUse(f"{path}: files below it are open")
    if number in (errno.EINVAL, errno.ENOENT):
        raise NotMounted(f"{path}: nothing is mounted there")
    raise OSError(number, os.strerror(number), path)


def mount(source: str, path: str, kind: str) -> None:
    """mount(2) without flags or options. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(source), os.fsencode(path), kind.encode(), 0, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def check_free(path: str) -> str:
    """The resolved path of a directory that a volume may be mounted at.

    Raises `Missing`, `NotADirectory`, `NotEmpty`, `Occupied`. A dead mount is not free: see
    `is_dead` and `detach`.
    """
    found = find(path)
    if found is not None:
        raise Occupied(f"{path}: {found.source} ({found.kind}) is mounted there")
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            raise NotADirectory(f"{path} is not a directory")
        with os.scandir(path) as entries:
            first = next(entries, None)
    except FileNotFoundError:
        raise Missing(f"{path} does not exist") from None
    if first is not None:
        raise NotEmpty(f"{path} is not empty: it holds {first.name!r}")
    return os.path.realpath(path)


def users(path: str) -> list[tuple[int, str]]:
    """(pid, command) of the processes that keep a mount busy: open files, directories, maps."""
    mounted = find(path)
    if mounted is None:
        return []
    prefix = mounted.path.rstrip("/") + "/"
    return [
        (int(pid), _command(pid))
        for pid in filter(str.isdigit, os.listdir("/proc"))
        if any((link + "/").startswith(prefix) for link in _links(pid))
    ]


def _links(pid: str) -> list[str]:
    names = ["cwd", "root", "exe"]
    try:
        names += [f"fd/{each}" for each in os.listdir(f"/proc/{pid}/fd")]
    except OSError:  # it ended, or is not ours to look at
        pass
    return [_readlink(f"/proc/{pid}/{name}") for name in names]


def _readlink(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # it ended meanwhile
        return ""


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
