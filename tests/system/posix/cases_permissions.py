"""Who may do what: search and write permission of directories, the sticky bit, ownership."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from .case import (
    KINDS,
    OTHER,
    USER,
    Observation,
    call,
    case,
    does,
    each,
    make,
    opened,
    remove,
    seen,
    user,
)
from .cases_namespace import CREATORS


@each("permission-create", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    answers: Observation = []
    for mode in (0o700, 0o500, 0o600, 0o300, 0o070, 0o007):
        os.mkdir(f"d{mode}")
        os.chmod(f"d{mode}", mode)
        os.chown(f"d{mode}", USER, USER)
        make("file", f"d{mode}/link-source")
        os.chown(f"d{mode}/link-source", USER, USER)
        if create.__name__.startswith("mknod_"):
            continue
        with user(USER):
            answers.append(create(f"d{mode}/n"))
        with user(OTHER):
            answers.append(create(f"d{mode}/m"))
    return answers


@each("permission-remove", *KINDS)
def _(kind: str) -> Observation:
    answers: Observation = []
    for mode in (0o777, 0o1777, 0o755, 0o1755, 0o300, 0o500):
        directory = f"d{mode}"
        os.mkdir(directory)
        for owner in (USER, OTHER):
            make(kind, f"{directory}/of{owner}")
            os.chown(f"{directory}/of{owner}", owner, owner, follow_symlinks=False)
        os.chmod(directory, mode)
        for owner in (USER, OTHER):
            with user(USER):
                answers.append(does(remove, kind, f"{directory}/of{owner}"))
    return answers


@each("permission-rename", *KINDS)
def _(kind: str) -> Observation:
    answers: Observation = []
    for source in (0o777, 0o1777, 0o555):
        for target in (0o777, 0o1777, 0o555):
            for owner in (USER, OTHER):
                name = f"{source}-{target}-{owner}"
                os.mkdir(f"s{name}")
                os.mkdir(f"t{name}")
                make(kind, f"s{name}/n")
                os.chown(f"s{name}/n", owner, owner, follow_symlinks=False)
                os.chmod(f"s{name}", source)
                os.chmod(f"t{name}", target)
                with user(USER):
                    answers.append(does(os.rename, f"s{name}/n", f"t{name}/n"))
    return answers


@each("permission-sticky-replace", "file", "dir")
def _(kind: str) -> Observation:
    answers: Observation = []
    for owner in (USER, OTHER):
        name = f"d{owner}"
        os.mkdir(name)
        for entry, holder in (("mine", USER), ("target", owner)):
            make(kind, f"{name}/{entry}")
            os.chown(f"{name}/{entry}", holder, holder)
        os.chmod(name, 0o1777)
        with user(USER):
            answers.append(does(os.rename, f"{name}/mine", f"{name}/target"))
    return answers


@each("permission-search", "stat", "open", "listdir", "chdir", "readlink")
def _(what: str) -> Observation:
    answers: Observation = []
    home = os.getcwd()
    for mode in (0o700, 0o100, 0o600, 0o400, 0):
        os.mkdir(f"d{mode}")
        make("file", f"d{mode}/f")
        os.symlink("f", f"d{mode}/s")
        os.chown(f"d{mode}", USER, USER)
        os.chmod(f"d{mode}", mode)
        with user(USER):
            match what:
                case "stat":
                    answers.append(does(os.stat, f"d{mode}/f"))
                case "open":
                    answers.append(does(os.open, f"d{mode}/f", os.O_RDONLY))
                case "listdir":
                    answers.append(does(os.listdir, f"d{mode}"))
                case "chdir":
                    answers.append(does(os.chdir, f"d{mode}"))
                case "readlink":
                    answers.append(does(os.readlink, f"d{mode}/s"))
        os.chdir(home)
    return answers


@each("permission-group", 0o060, 0o040, 0o020, 0o606)
def _(mode: int) -> Observation:
    make("file", "f", mode)
    os.chown("f", OTHER, 7000)
    answers: Observation = []
    for groups in ((), (7000,)):
        with user(USER, USER, groups):
            answers += [does(os.open, "f", os.O_RDONLY), does(os.open, "f", os.O_WRONLY)]
    return answers


@each("permission-is-checked-at-open", "read", "write")
def _(what: str) -> Observation:
    make("file", "f", 0o666)
    os.chmod("f", 0o666)
    with user(USER):
        f = os.open("f", os.O_RDWR)
    os.chmod("f", 0)
    with user(USER):
        if what == "write":
            answers: Observation = [does(os.pwrite, f, b"x", 0), does(os.ftruncate, f, 3)]
        else:
            answers = [does(os.pread, f, 1, 0), does(os.fstat, f)]
    os.close(f)
    return answers


@case("permission-mknod")
def _() -> Observation:
    """Devices are root's; the other kinds are anybody's."""
    os.mkdir("d")
    os.chmod("d", 0o777)
    with user(USER):
        return [
            does(os.mknod, f"d/{kind:o}", kind | 0o600, os.makedev(1, 3))
            for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK)
        ] + [does(os.mknod, "d/directory", stat.S_IFDIR | 0o700)]


@each("permission-link", *KINDS)
def _(kind: str) -> Observation:
    """Hard links to what one cannot write (fs.protected_hardlinks decides, on both)."""
    os.mkdir("d")
    os.chmod("d", 0o777)
    answers: Observation = []
    for owner in (USER, OTHER):
        for mode in (0o600, 0o666):
            make(kind, f"d/{owner}{mode}")
            if kind != "symlink":
                os.chmod(f"d/{owner}{mode}", mode)
            os.chown(f"d/{owner}{mode}", owner, owner, follow_symlinks=False)
            with user(USER):
                answers.append(
                    does(os.link, f"d/{owner}{mode}", f"d/{owner}{mode}n", follow_symlinks=False)
                )
    return answers


@each("permission-sticky-owner", *KINDS)
def _(kind: str) -> Observation:
    """Who owns a sticky directory may remove and rename everybody's entries in it."""
    os.mkdir("d")
    os.chown("d", USER, USER)
    os.chmod("d", 0o1777)
    for name in ("a", "b"):
        make(kind, f"d/{name}")
        os.chown(f"d/{name}", OTHER, OTHER, follow_symlinks=False)
    with user(7001):
        answers: Observation = [does(remove, kind, "d/a"), does(os.rename, "d/b", "d/c")]
    with user(USER):
        answers += [does(remove, kind, "d/a"), does(os.rename, "d/b", "d/c")]
    return answers


@case("permission-setgid-directory")
def _() -> Observation:
    """What users create in a set-group-ID directory, members of its group and others."""
    os.mkdir("d")
    os.chown("d", 0, 4242)
    os.chmod("d", 0o2777)
    answers: Observation = []
    os.umask(0)
    for label, groups in (("member", (4242,)), ("other", ())):
        with user(USER, USER, groups):
            for mode in (0o2755, 0o2745, 0o6711):
                name = f"d/{label}{mode}"
                with opened(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode):
                    answers.append(seen(name))
            os.mkdir(f"d/{label}", 0o755)
            os.mkfifo(f"d/{label}fifo", 0o2755)
            answers += [seen(f"d/{label}"), seen(f"d/{label}fifo")]
    return answers


@each("permission-open-flags", 0o400, 0o200, 0o600, 0)
def _(mode: int) -> Observation:
    make("file", "f", mode)
    with opened("f", os.O_WRONLY) as f:
        os.write(f, b"content")
    os.chown("f", USER, USER)
    answers: Observation = []
    with user(USER):
        for flags in (
            os.O_WRONLY | os.O_TRUNC,
            os.O_RDONLY | os.O_TRUNC,
            os.O_WRONLY | os.O_APPEND,
            os.O_RDWR | os.O_APPEND,
            os.O_CREAT | os.O_RDONLY,
            os.O_CREAT | os.O_RDWR,
            os.O_RDONLY | os.O_NOATIME,
            os.O_PATH,
        ):
            answers.append(does(os.open, "f", flags))
    answers.append(os.stat("f").st_size)
    with user(OTHER):
        answers.append(does(os.open, "f", os.O_RDONLY | os.O_NOATIME))
    return answers


@case("permission-of-descriptors")
def _() -> Observation:
    """fchmod(2) and fchown(2) ask who calls, not how the file was opened."""
    make("file", "f", 0o666)
    os.chown("f", USER, USER)
    os.chmod("f", 0o666)
    answers: Observation = []
    with opened("f", os.O_RDONLY) as f:
        for uid in (USER, OTHER):
            with user(uid):
                answers += [
                    does(os.fchmod, f, 0o666),
                    does(os.fchown, f, -1, uid),
                    does(os.utime, f, ns=(1, 2)),
                    does(os.utime, f),
                    does(os.setxattr, f, "user.a", b"1"),
                    call(os.getxattr, f, "user.a"),
                ]
        answers.append(seen(f))
    return answers
