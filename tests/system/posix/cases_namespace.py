"""Names: creation, removal, hard links, symbolic links."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from .case import KINDS, NAME_MAX, Observation, Times, call, case, does, each, make, opened, seen


def _creators() -> list[Callable[[str], object]]:
    def create(name: str) -> object:
        return does(os.open, name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)

    def mkdir(name: str) -> object:
        return does(os.mkdir, name, 0o750)

    def mkfifo(name: str) -> object:
        return does(os.mkfifo, name, 0o640)

    def mknod_char(name: str) -> object:
        return does(os.mknod, name, stat.S_IFCHR | 0o640, os.makedev(1, 3))

    def mknod_block(name: str) -> object:
        return does(os.mknod, name, stat.S_IFBLK | 0o640, os.makedev(7, 200))

    def mknod_file(name: str) -> object:
        return does(os.mknod, name, stat.S_IFREG | 0o640)

    def symlink(name: str) -> object:
        return does(os.symlink, "target", name)

    def link(name: str) -> object:
        source = os.path.join(os.path.dirname(name[:300]), "link-source")
        if not os.path.lexists(source):
            source = "link-source"
            does(os.open, source, os.O_CREAT | os.O_WRONLY)
        return does(os.link, source, name)

    return [create, mkdir, mkfifo, mknod_char, mknod_block, mknod_file, symlink, link]


CREATORS = _creators()


@each("create-attributes", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    answers: Observation = []
    for umask in (0o022, 0o077, 0):
        old = os.umask(umask)
        name = f"n{umask}"
        answers += [create(name), seen(name)]
        os.umask(old)
    return answers


@each("create-times", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    os.mkdir("d")
    make("file", "link-source")
    times = Times("d")
    return [create("d/n"), times.moved("d")]


@each("create-EEXIST", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    answers: Observation = []
    for kind in KINDS:
        make(kind, kind)
        answers += [create(kind), seen(kind)]
    return answers


@each("create-bad-path", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    make("file", "f")
    os.symlink("loop", "loop")
    os.symlink("gone", "dangling")
    return [
        create("absent/n"),
        create("f/n"),
        create("loop/n"),
        create("dangling/n"),
        create(""),
        create("x" * NAME_MAX),
        create("x" * (NAME_MAX + 1)),
        create("y" * (NAME_MAX + 1) + "/n"),
        create("./" * 2100 + "n"),
        create("\xff\xfe\t\n"),
        len(os.listdir(".")),
    ]


@each("create-in-removed-directory", *CREATORS)
def _(create: Callable[[str], object]) -> Observation:
    home = os.getcwd()
    make("file", "link-source")
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    answers: Observation = [
        create("n"),
        os.listdir("."),
        does(os.stat, ".."),
        os.stat(".").st_nlink,
    ]
    os.chdir(home)
    return answers


@case("mkdir-links")
def _() -> Observation:
    os.mkdir("d")
    answers: Observation = [os.stat("d").st_nlink]
    for name in ("d/a", "d/b"):
        os.mkdir(name)
        answers.append(os.stat("d").st_nlink)
    make("file", "d/f")
    answers.append(os.stat("d").st_nlink)
    os.rmdir("d/a")
    answers += [os.stat("d").st_nlink, os.stat("d/b/..").st_ino == os.stat("d").st_ino]
    return answers


@case("mkdir-dot")
def _() -> Observation:
    return [does(os.mkdir, "."), does(os.mkdir, ".."), does(os.mkdir, "d/"), does(os.mkdir, "d/.")]


@case("setgid-directory")
def _() -> Observation:
    os.mkdir("d")
    os.chown("d", 0, 4242)
    os.chmod("d", 0o2775)
    os.mkdir("d/sub")
    make("file", "d/file")
    os.symlink("x", "d/link")
    os.mkfifo("d/fifo")
    return [seen(f"d/{name}") for name in ("sub", "file", "link", "fifo")]


@each("unlink", *KINDS)
def _(kind: str) -> Observation:
    os.mkdir("p")
    make(kind, "p/n")
    times = Times("p")
    return [does(os.unlink, "p/n"), times.moved("p"), os.listdir("p")]


@each("unlink-hard-link", "file", "fifo", "char", "block", "socket", "symlink")
def _(kind: str) -> Observation:
    make(kind, "a")
    os.link("a", "b", follow_symlinks=False)
    times = Times("b")
    return [os.lstat("a").st_nlink, does(os.unlink, "a"), seen("b"), times.moved("b")]


@case("unlink-errors")
def _() -> Observation:
    make("file", "f")
    os.symlink("loop", "loop")
    os.mkdir("d")
    names = ("absent", "f/x", "absent/x", "x" * (NAME_MAX + 1), "loop/x", "f/", "d/", ".", "..", "")
    return [does(os.unlink, name) for name in names]


@case("unlink-open")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"kept")
        os.unlink("f")
        answers: Observation = [os.path.exists("f"), seen(f), os.pread(f, 10, 0)]
        os.pwrite(f, b"more", 100_000)
        os.ftruncate(f, 200_000)
        answers += [seen(f), os.pread(f, 4, 100_000), os.pread(f, 4, 4)]
        make("file", "f")
        answers += [os.fstat(f).st_ino != os.stat("f").st_ino, does(os.fsync, f)]
    return answers


@case("link-of-unlinked")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.unlink("f")
        return [does(os.link, f"/proc/self/fd/{f}", "g"), os.path.exists("g")]


@each("rmdir", *KINDS)
def _(kind: str) -> Observation:
    os.mkdir("p")
    make(kind, "p/n")
    times = Times("p")
    return [does(os.rmdir, "p/n"), times.moved("p"), len(os.listdir("p")), os.stat("p").st_nlink]


@each("rmdir-not-empty", *KINDS)
def _(kind: str) -> Observation:
    os.mkdir("d")
    make(kind, "d/n")
    return [does(os.rmdir, "d"), os.listdir("d")]


@case("rmdir-errors")
def _() -> Observation:
    os.makedirs("d/e")
    os.symlink("d", "s")
    os.symlink("loop", "loop")
    names = (
        "absent",
        "absent/x",
        "d/.",
        "d/..",
        ".",
        "s",
        "s/",
        "loop",
        "x" * 256,
        "d/e/",
        "d",
        "",
    )
    return [does(os.rmdir, name) for name in names]


@each("link", *KINDS)
def _(kind: str) -> Observation:
    make(kind, "a")
    os.mkdir("p")
    times = Times("a", "p")
    answer = does(os.link, "a", "p/b", follow_symlinks=False)
    same = os.path.lexists("p/b") and os.lstat("p/b").st_ino == os.lstat("a").st_ino
    return [answer, same, seen("a"), times.moved("a"), times.moved("p")]


@case("link-errors")
def _() -> Observation:
    make("file", "f")
    os.symlink("loop", "loop")
    pairs = [("absent", "n"), ("f", "absent/n"), ("f/x", "n"), ("f", "f"), ("f", "f/n")]
    pairs += [("loop/x", "n"), ("f", "loop/n"), ("f", "x" * 256), ("x" * 256, "n"), ("f", "n/")]
    return [does(os.link, old, new) for old, new in pairs]


@case("link-many")
def _() -> Observation:
    make("file", "f")
    for number in range(300):
        os.link("f", f"l{number}")
    answers: Observation = [os.stat("f").st_nlink]
    for number in range(300):
        os.unlink(f"l{number}")
    return [*answers, os.stat("f").st_nlink]


@each("symlink-length", 1, 59, 60, 1000, 3839, 3840, 3841, 4094, 4095, 4096)
def _(length: int) -> Observation:
    target = ("t" * 200 + "/") * 30
    answer = does(os.symlink, target[:length], "s")
    if answer != "ok":
        return [answer]
    return [
        answer,
        os.readlink("s") == target[:length],
        os.lstat("s").st_size,
        does(os.unlink, "s"),
    ]


@case("symlink-errors")
def _() -> Observation:
    make("file", "f")
    return [
        does(os.symlink, "", "s"),
        does(os.symlink, "t", "f/s"),
        does(os.symlink, "t", "absent/s"),
        does(os.symlink, "t", "x" * 256),
        does(os.symlink, "t", "f"),
    ]


@each("readlink", *KINDS)
def _(kind: str) -> Observation:
    make(kind, "n")
    return [call(os.readlink, "n"), call(os.readlink, "n/"), call(os.readlink, "absent")]


@case("symlink-follow")
def _() -> Observation:
    os.mkdir("d")
    make("file", "d/f")
    os.symlink("d", "s")
    os.symlink("s/f", "t")
    os.symlink(os.getcwd() + "/d/f", "absolute")
    answers: Observation = [os.stat(name).st_ino == os.stat("d/f").st_ino for name in ("s/f", "t")]
    answers.append(os.stat("absolute").st_ino == os.stat("d/f").st_ino)
    for number in range(41):
        os.symlink("d" if number == 0 else f"c{number - 1}", f"c{number}")
    return [*answers, does(os.stat, "c39"), does(os.stat, "c40"), does(os.open, "t", os.O_NOFOLLOW)]
