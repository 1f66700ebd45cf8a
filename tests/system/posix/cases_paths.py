"""What every call on a path answers when the path leads nowhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from .case import NAME_MAX, PATH_MAX, USER, Observation, case, does, each, make, user


def _calls() -> list[Callable[[str], object]]:
    """Every system call that takes a path, by the name of the function."""

    def stat_(name: str) -> object:
        return does(os.stat, name)

    def lstat(name: str) -> object:
        return does(os.lstat, name)

    def access(name: str) -> object:
        return os.access(name, os.F_OK)

    def statvfs(name: str) -> object:
        return does(os.statvfs, name)

    def chmod(name: str) -> object:
        return does(os.chmod, name, 0o600)

    def chown(name: str) -> object:
        return does(os.chown, name, -1, -1)

    def lchown(name: str) -> object:
        return does(os.lchown, name, -1, -1)

    def utime(name: str) -> object:
        return does(os.utime, name, ns=(1, 1))

    def truncate(name: str) -> object:
        return does(os.truncate, name, 0)

    def open_(name: str) -> object:
        return does(os.open, name, os.O_RDONLY)

    def creat(name: str) -> object:
        return does(os.open, name, os.O_CREAT | os.O_WRONLY, 0o600)

    def mkdir(name: str) -> object:
        return does(os.mkdir, name)

    def mkfifo(name: str) -> object:
        return does(os.mkfifo, name)

    def mknod(name: str) -> object:
        return does(os.mknod, name, stat.S_IFREG | 0o600)

    def symlink(name: str) -> object:
        return does(os.symlink, "target", name)

    def readlink(name: str) -> object:
        return does(os.readlink, name)

    def link_from(name: str) -> object:
        return does(os.link, name, "fresh")

    def link_to(name: str) -> object:
        return does(os.link, "file", name)

    def rename_from(name: str) -> object:
        return does(os.rename, name, "fresh")

    def rename_to(name: str) -> object:
        return does(os.rename, "file", name)

    def unlink(name: str) -> object:
        return does(os.unlink, name)

    def rmdir(name: str) -> object:
        return does(os.rmdir, name)

    def chdir(name: str) -> object:
        return does(os.chdir, name)

    def listdir(name: str) -> object:
        return does(os.listdir, name)

    def getxattr(name: str) -> object:
        return does(os.getxattr, name, "user.a")

    def setxattr(name: str) -> object:
        return does(os.setxattr, name, "user.a", b"1")

    def removexattr(name: str) -> object:
        return does(os.removexattr, name, "user.a")

    return [
        *(stat_, lstat, access, statvfs, chmod, chown, lchown, utime, truncate, open_, creat),
        *(mkdir, mkfifo, mknod, symlink, readlink, link_from, link_to, rename_from, rename_to),
        *(unlink, rmdir, chdir, listdir, getxattr, setxattr, removexattr),
    ]


CALLS = _calls()


def _bad_paths() -> list[str]:
    """Paths that fail for each reason that POSIX lists, seen from the working directory."""
    here = os.getcwd()
    longest = here + "/" + "./" * ((PATH_MAX - len(here) - 7) // 2) + "absent"
    return [
        "absent/name",  # ENOENT
        "dangling/name",
        "",
        "file/name",  # ENOTDIR
        "fifo/name",
        "file/",
        "file/.",
        "loop/name",  # ELOOP
        "one/name",
        "n" * (NAME_MAX + 1),  # ENAMETOOLONG
        "n" * (NAME_MAX + 1) + "/name",
        "directory/" + "n" * (NAME_MAX + 1),
        "./" * (PATH_MAX // 2) + "absent",
        longest.replace("absent", "absent/name"),
        "shut/name",  # EACCES
        "shut/directory/name",
    ]


@each("path-errors", *CALLS)
def _(function: Callable[[str], object]) -> Observation:
    make("file", "file")
    os.mkdir("directory")
    os.mkfifo("fifo")
    os.symlink("absent", "dangling")
    os.symlink("loop", "loop")
    os.symlink("two", "one")
    os.symlink("one", "two")
    os.makedirs("shut/directory")
    make("file", "shut/name")
    os.chmod("shut", 0)
    os.chown("file", USER, USER)
    answers: Observation = []
    with user(USER):
        for path in _bad_paths():
            answers.append((path[-40:], function(path)))
    answers.append(sorted(os.listdir(".")))
    return answers


@case("path-of-PATH_MAX")
def _() -> Observation:
    """The longest path that the kernel takes, through directories with the longest names."""
    make("file", "f")
    here = os.getcwd()
    longest = here + "/" * (PATH_MAX - 1 - len(here) - 1) + "f"
    answers: Observation = [len(longest), does(os.stat, longest), does(os.stat, "/" + longest)]
    deep, depth = "", 0
    while len(deep) + NAME_MAX + 1 < PATH_MAX:
        deep = os.path.join(deep, "d" * NAME_MAX)
        os.mkdir(deep)
        depth += 1
    answers += [depth, does(os.stat, deep), does(os.mkdir, deep + "/" + "d" * NAME_MAX)]
    while deep:
        answers.append(does(os.rmdir, deep))
        deep = os.path.dirname(deep)
    return answers


@case("working-directory-renamed")
def _() -> Observation:
    home = os.getcwd()
    os.makedirs("a/b")
    os.mkdir("c")
    os.chdir("a/b")
    os.rename(home + "/a", home + "/c/moved")
    answers: Observation = [
        os.getcwd().removeprefix(home),
        os.stat("../..").st_ino == os.stat(home + "/c").st_ino,
        does(os.mkdir, "new"),
        os.listdir(home + "/c/moved/b"),
    ]
    os.chdir(home)
    return answers


@each("other-filesystem", "link", "rename", "symlink")
def _(call_: str) -> Observation:
    make("file", "f")
    elsewhere = f"/dev/shm/posix-case-{os.getpid()}"
    try:
        return [
            does(getattr(os, call_), "f", elsewhere),
            os.path.lexists(elsewhere),
            os.path.lexists("f"),
        ]
    finally:
        if os.path.lexists(elsewhere):
            os.unlink(elsewhere)
