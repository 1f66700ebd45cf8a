"""Attributes: mode, owner, times, size, link count, filesystem totals, extended attributes."""

from __future__ import annotations

import os
import stat

from .case import (
    KINDS,
    OTHER,
    USER,
    Observation,
    Times,
    call,
    case,
    does,
    each,
    make,
    opened,
    seen,
    user,
)

FOLLOWED = tuple(kind for kind in KINDS if kind != "symlink")


@each("chmod", *FOLLOWED)
def _(kind: str) -> Observation:
    make(kind, "n")
    times = Times("n")
    answers: Observation = []
    for mode in (0, 0o777, 0o4755, 0o2711, 0o1700, 0o7777, 0o644):
        answers += [does(os.chmod, "n", mode), seen("n")]
    return [*answers, times.moved()]


@case("chmod-errors")
def _() -> Observation:
    make("file", "f")
    os.symlink("loop", "loop")
    os.symlink("f", "s")
    names = ("absent", "f/x", "loop", "x" * 256, "s")
    return [*[does(os.chmod, name, 0o600) for name in names], seen("f"), seen("s")]


@each("chmod-by", "owner", "group", "other")
def _(who: str) -> Observation:
    make("file", "f")
    os.chown("f", USER, USER)
    uid, gid = {"owner": (USER, USER), "group": (OTHER, USER), "other": (OTHER, OTHER)}[who]
    answers: Observation = []
    with user(uid, gid):
        for mode in (0o600, 0o4755, 0o2755, 0o1755):
            answers += [does(os.chmod, "f", mode), seen("f")]
    return answers


@case("chmod-setgid-not-in-group")
def _() -> Observation:
    make("file", "f")
    os.chown("f", USER, OTHER)
    with user(USER):
        return [does(os.chmod, "f", 0o2755), seen("f")]


@each("chown", *KINDS)
def _(kind: str) -> Observation:
    make(kind, "n")
    times = Times("n")
    answers: Observation = []
    for uid, gid in ((1, 2), (-1, 3), (4, -1), (-1, -1), (2**31 + 5, 2**31 + 6)):
        answers += [does(os.chown, "n", uid, gid, follow_symlinks=False), seen("n")]
    return [*answers, times.moved()]


@each("chown-clears-suid", *FOLLOWED)
def _(kind: str) -> Observation:
    make(kind, "n")
    answers: Observation = []
    for mode in (0o6755, 0o6745, 0o2745, 0o4644):
        os.chmod("n", mode)
        os.chown("n", 1, 2)
        answers.append(seen("n"))
        os.chmod("n", mode)
        os.chown("n", -1, -1)
        answers.append(seen("n"))
        os.chown("n", 0, 0)
    return answers


@each("chown-by", "owner", "group", "other")
def _(who: str) -> Observation:
    make("file", "f", 0o6755)
    os.chown("f", USER, USER)
    os.chmod("f", 0o6755)
    uid, gid = {"owner": (USER, USER), "group": (OTHER, USER), "other": (OTHER, OTHER)}[who]
    answers: Observation = []
    with user(uid, gid, (USER, 7000)):
        for owner, group in ((-1, USER), (-1, 7000), (-1, 7001), (USER, -1), (OTHER, -1), (0, 0)):
            answers += [does(os.chown, "f", owner, group), seen("f")]
    return answers


@each("truncate", *FOLLOWED)
def _(kind: str) -> Observation:
    make(kind, "n")
    if kind in ("fifo", "char", "block", "socket"):
        return [does(os.truncate, "n", 10)]
    return [does(os.truncate, "n", 10), seen("n"), does(os.truncate, "n", 0), seen("n")]


@case("truncate-errors")
def _() -> Observation:
    make("file", "f", 0o444)
    os.symlink("loop", "loop")
    answers: Observation = [
        does(os.truncate, name, 1) for name in ("absent", "f/x", "loop", "x" * 256)
    ]
    answers += [does(os.truncate, "f", -1)]
    with opened("f", os.O_RDONLY) as f:
        answers += [does(os.ftruncate, f, 0), does(os.ftruncate, f, -1)]
    with user(USER):
        answers.append(does(os.truncate, "f", 0))
    return answers


@case("truncate-clears-suid")
def _() -> Observation:
    make("file", "f")
    os.chown("f", USER, USER)
    answers: Observation = []
    for mode in (0o6755, 0o2745, 0o4700):
        for size in (10, 10, 5):
            os.chmod("f", mode)
            with user(USER):
                os.truncate("f", size)
            answers.append(oct(os.stat("f").st_mode))
        os.chmod("f", mode)
        with user(USER), opened("f", os.O_WRONLY | os.O_TRUNC):
            answers.append(oct(os.stat("f").st_mode))
    return answers


@case("write-clears-suid")
def _() -> Observation:
    make("file", "f")
    os.chown("f", USER, USER)
    answers: Observation = []
    for mode in (0o6777, 0o4777, 0o2777):
        for uid in (USER, OTHER, 0):
            os.chmod("f", mode)
            with user(uid), opened("f", os.O_WRONLY) as f:
                os.write(f, b"x")
            answers.append(oct(os.stat("f").st_mode))
    return answers


@each("write-and-setgid-without-execute", USER, OTHER, 0)
def _(uid: int) -> Observation:
    make("file", "f")
    os.chown("f", USER, USER)
    os.chmod("f", 0o2767)
    with user(uid), opened("f", os.O_WRONLY) as f:
        os.write(f, b"x")
    return [oct(os.stat("f").st_mode)]


@case("truncate-content")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"a" * 200_000)
        answers: Observation = []
        for size in (100_001, 65_536, 65_535, 4097, 511, 1):
            os.ftruncate(f, size)
            os.ftruncate(f, 200_000)
            data = os.pread(f, 200_000, 0)
            answers.append((size, len(data), data.count(b"a"), data.rstrip(b"\0") == b"a" * size))
            os.pwrite(f, b"a" * 200_000, 0)
        return answers


@case("access-of-attributes")
def _() -> Observation:
    make("file", "f", 0o640)
    make("dir", "d", 0o750)
    os.chown("f", USER, OTHER)
    os.chown("d", USER, OTHER)
    answers: Observation = []
    for uid, gid in ((USER, USER), (OTHER, OTHER), (1, 1)):
        with user(uid, gid):
            for name in ("f", "d"):
                for mode in (os.R_OK, os.W_OK, os.X_OK):
                    answers.append(os.access(name, mode, effective_ids=True))
    return answers


@case("statvfs")
def _() -> Observation:
    totals = os.statvfs(".")
    return [
        totals.f_namemax,
        totals.f_bsize > 0 and totals.f_bsize % 512 == 0,
        totals.f_blocks > totals.f_bfree >= totals.f_bavail > 0,
        totals.f_files >= totals.f_ffree > 0,
    ]


@case("stat-of-special-files")
def _() -> Observation:
    answers: Observation = []
    for major, minor in ((0, 0), (1, 3), (255, 255), (4095, 1048575)):
        os.mknod(f"c{major}", stat.S_IFCHR | 0o600, os.makedev(major, minor))
        answers.append(seen(f"c{major}"))
    return answers


@each("xattr", "file", "dir")
def _(kind: str) -> Observation:
    make(kind, "n")
    times = Times("n")
    answers: Observation = [
        os.listxattr("n"),
        call(os.getxattr, "n", "user.a"),
        does(os.setxattr, "n", "user.a", b"one", os.XATTR_REPLACE),
        does(os.setxattr, "n", "user.a", b"one", os.XATTR_CREATE),
        times.moved(),
        does(os.setxattr, "n", "user.a", b"two", os.XATTR_CREATE),
        does(os.setxattr, "n", "user.a", b"three", os.XATTR_REPLACE),
        call(os.getxattr, "n", "user.a"),
        does(os.setxattr, "n", "user.b", b""),
        call(os.getxattr, "n", "user.b"),
        does(os.setxattr, "n", "trusted.t", b"\0\xff"),
        sorted(os.listxattr("n")),
        does(os.removexattr, "n", "user.a"),
        does(os.removexattr, "n", "user.a"),
        sorted(os.listxattr("n")),
        does(os.setxattr, "n", "user." + "x" * 250, b"v"),
        does(os.setxattr, "n", "user." + "x" * 251, b"v"),
        does(os.setxattr, "n", "user.", b"v"),
        does(os.setxattr, "n", "nonsense.a", b"v"),
        does(os.setxattr, "n", "plain", b"v"),
        call(os.getxattr, "n", "nonsense.a"),
        does(os.setxattr, "n", "user.large", b"v" * 2000),
        len(os.getxattr("n", "user.large")),
        does(os.setxattr, "n", "user.huge", b"v" * 65_537),
    ]
    with user(USER):
        answers += [does(os.setxattr, "n", "user.c", b"v"), call(os.getxattr, "n", "trusted.t")]
        answers += [sorted(os.listxattr("n")), does(os.setxattr, "n", "trusted.u", b"v")]
    return answers


@each("xattr-special", "fifo", "char", "symlink")
def _(kind: str) -> Observation:
    make(kind, "n")
    return [
        does(os.setxattr, "n", "user.a", b"v", follow_symlinks=False),
        does(os.setxattr, "n", "trusted.a", b"v", follow_symlinks=False),
        call(os.getxattr, "n", "trusted.a", follow_symlinks=False),
        os.listxattr("n", follow_symlinks=False),
    ]


@case("xattr-errors")
def _() -> Observation:
    make("file", "f")
    return [
        call(os.listxattr, "absent"),
        call(os.getxattr, "absent", "user.a"),
        does(os.setxattr, "absent", "user.a", b""),
        does(os.removexattr, "absent", "user.a"),
    ]


@case("xattr-create-and-replace")
def _() -> Observation:
    make("file", "f")
    return [does(os.setxattr, "f", "user.a", b"", os.XATTR_CREATE | os.XATTR_REPLACE)]


@case("xattr-follow-the-inode")
def _() -> Observation:
    make("file", "f")
    os.setxattr("f", "user.a", b"kept")
    os.link("f", "g")
    os.rename("f", "h")
    answers: Observation = [os.getxattr("g", "user.a"), os.getxattr("h", "user.a")]
    os.chmod("h", 0o600)
    with opened("h", os.O_RDWR | os.O_TRUNC) as h:
        os.write(h, b"x" * 100_000)
    return [*answers, os.getxattr("g", "user.a")]
