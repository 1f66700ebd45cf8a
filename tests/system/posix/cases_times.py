"""Times: utimensat(2), and which call moves which of them."""

from __future__ import annotations

import ctypes
import os

from .case import KINDS, OTHER, USER, Observation, Times, case, does, each, make, opened, user

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def utimensat(name: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2) with what Python does not offer: `UTIME_NOW` and `UTIME_OMIT`."""
    times = (ctypes.c_long * 4)(*atime, *mtime)
    if _libc.utimensat(AT_FDCWD, os.fsencode(name), times, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@each("utimens", *KINDS)
def _(kind: str) -> Observation:
    make(kind, "n")
    answers: Observation = []
    for atime, mtime in ((1, 2), (1_999_999_999, 5_000_000_123), (-5, -1), (2**33 * 10**9, 7)):
        answers.append(does(os.utime, "n", ns=(atime, mtime), follow_symlinks=False))
        info = os.lstat("n")
        answers += [info.st_atime_ns, info.st_mtime_ns]
    times = Times("n")
    os.utime("n", ns=(3, 4), follow_symlinks=False)
    return [*answers, times.moved()]


@case("utimens-permissions")
def _() -> Observation:
    answers: Observation = []
    for mode in (0o600, 0o666):
        name = f"f{mode}"
        make("file", name, mode)
        os.chown(name, USER, USER)
        for uid in (USER, OTHER):
            with user(uid):
                answers += [does(os.utime, name), does(os.utime, name, ns=(1, 2))]
    return answers


@case("times-of-data")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"x" * 10)
        answers: Observation = []
        for step in ("write", "empty write", "read", "fsync", "truncate same", "truncate", "grow"):
            times = Times("f")
            match step:
                case "write":
                    os.pwrite(f, b"y", 3)
                case "empty write":
                    os.pwrite(f, b"", 3)
                case "read":
                    os.pread(f, 5, 0)
                case "fsync":
                    os.fsync(f)
                case "truncate same":
                    os.ftruncate(f, 10)
                case "truncate":
                    os.ftruncate(f, 5)
                case "grow":
                    os.truncate("f", 50)
            answers.append((step, times.moved()))
    for step, flags in (("O_TRUNC", os.O_TRUNC), ("open", 0)):
        times = Times("f")
        os.close(os.open("f", os.O_WRONLY | flags))
        answers.append((step, times.moved()))
    return answers


@case("times-survive-rename")
def _() -> Observation:
    make("file", "f")
    os.utime("f", ns=(11, 22))
    os.rename("f", "g")
    info = os.stat("g")
    return [info.st_atime_ns, info.st_mtime_ns]


@case("utimens-now-and-omit")
def _() -> Observation:
    answers: Observation = []
    now, omit, past = (0, UTIME_NOW), (0, UTIME_OMIT), (77, 5)
    for number, (atime, mtime) in enumerate(
        [
            (now, now),
            (now, omit),
            (omit, now),
            (omit, omit),
            (past, omit),
            (omit, past),
            (now, past),
        ]
    ):
        name = f"f{number}"
        make("file", name)
        times = Times(name)
        answers.append(does(utimensat, name, atime, mtime))
        info = os.stat(name)
        for value in (info.st_atime_ns, info.st_mtime_ns):
            exact = value in (Times.PAST_NS, 77_000_000_005)
            answers.append(value if exact else "now")
        answers.append(times.moved())
    answers += [does(utimensat, "f0", (0, 10**9), omit), does(utimensat, "f0", omit, (0, -1))]
    return answers


@each("utimens-now-and-omit-by", "owner", "writer", "reader")
def _(who: str) -> Observation:
    make("file", "f", 0o664)
    os.chown("f", USER, USER)
    os.chmod("f", 0o664)
    uid, gid = {"owner": (USER, USER), "writer": (OTHER, USER), "reader": (OTHER, OTHER)}[who]
    now, omit, past = (0, UTIME_NOW), (0, UTIME_OMIT), (77, 5)
    with user(uid, gid):
        return [
            does(utimensat, "f", atime, mtime)
            for atime, mtime in (
                [(now, now), (omit, omit), (now, omit), (omit, now), (past, omit), (past, now)]
            )
        ]


@case("times-of-a-renamed-inode")
def _() -> Observation:
    answers: Observation = []
    for kind in ("file", "dir", "symlink"):
        make(kind, "old")
        times = Times("old")
        os.rename("old", kind)
        before, after = times.before("old"), os.lstat(kind)
        answers.append((kind, before.st_ctime_ns != after.st_ctime_ns))
        answers.append(before.st_mtime_ns == after.st_mtime_ns)
    return answers


@each("times-of-xattrs", "set", "replace", "remove", "get", "list")
def _(step: str) -> Observation:
    make("file", "f")
    os.setxattr("f", "user.a", b"1")
    times = Times("f")
    match step:
        case "set":
            os.setxattr("f", "user.b", b"1")
        case "replace":
            os.setxattr("f", "user.a", b"2")
        case "remove":
            os.removexattr("f", "user.a")
        case "get":
            os.getxattr("f", "user.a")
        case "list":
            os.listxattr("f")
    return [times.moved()]
