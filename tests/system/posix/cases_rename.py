"""rename(2) and renameat2(2)."""

from __future__ import annotations

import ctypes
import os

from .case import KINDS, Observation, Times, case, does, each, make, opened, seen

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: str, new: str, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@each("rename", *[f"{old}-{new}" for old in KINDS for new in (*KINDS, "nothing")])
def _(pair: str) -> Observation:
    old, new = pair.split("-")
    os.mkdir("p")
    os.mkdir("q")
    make(old, "p/old")
    if new != "nothing":
        make(new, "q/new", 0o600)
    times = Times("p", "q", "p/old")
    before = os.lstat("p/old").st_ino
    answer = does(os.rename, "p/old", "q/new")
    left = [sorted(os.listdir("p")), sorted(os.listdir("q"))]
    moved = [times.moved("p"), times.moved("q"), os.stat("p").st_nlink, os.stat("q").st_nlink]
    kept = answer != "ok" or os.lstat("q/new").st_ino == before
    return [answer, left, moved, kept, seen("q/new") if answer == "ok" else seen("p/old")]


@case("rename-same")
def _() -> Observation:
    make("file", "a")
    os.link("a", "b")
    os.mkdir("d")
    return [
        does(os.rename, "a", "a"),
        does(os.rename, "a", "b"),
        sorted(os.listdir(".")),
        does(os.rename, "d", "d"),
        os.stat("a").st_nlink,
    ]


@case("rename-directories")
def _() -> Observation:
    os.makedirs("a/b/c")
    os.mkdir("full")
    make("file", "full/f")
    os.mkdir("empty")
    answers: Observation = [
        does(os.rename, "a", "a/b"),
        does(os.rename, "a", "a/b/c"),
        does(os.rename, "a", "a/b/c/d"),
        does(os.rename, "a/b/c", "a"),
        does(os.rename, "a/b", "full"),
        does(os.rename, "a/.", "x"),
        does(os.rename, "a/..", "x"),
        does(os.rename, "empty", "a/."),
        does(os.rename, "a/b", "empty"),
        sorted(os.listdir(".")),
        os.listdir("empty"),
        os.stat("empty/..").st_ino == os.stat(".").st_ino,
        os.stat("a").st_nlink,
    ]
    os.rename("empty/c", "a/moved")
    answers += [os.stat("a/moved/..").st_ino == os.stat("a").st_ino, os.stat("a").st_nlink]
    return answers


@case("rename-errors")
def _() -> Observation:
    make("file", "f")
    os.mkdir("d")
    os.symlink("loop", "loop")
    pairs = [("absent", "n"), ("f", "absent/n"), ("f/x", "n"), ("f", "f/n"), ("loop/x", "n")]
    pairs += [
        ("f", "loop/n"),
        ("x" * 256, "n"),
        ("f", "x" * 256),
        ("f", "n/"),
        ("f", "d/"),
        ("d", "f/"),
    ]
    return [does(os.rename, old, new) for old, new in pairs]


@case("rename-over-open")
def _() -> Observation:
    with opened("b", os.O_CREAT | os.O_RDWR) as b:
        os.write(b, b"old")
        make("file", "a")
        answers: Observation = [does(os.rename, "a", "b"), os.pread(b, 3, 0), os.fstat(b).st_nlink]
        return [*answers, os.stat("b").st_size]


@each("rename-noreplace", *KINDS)
def _(kind: str) -> Observation:
    make("file", "f")
    make(kind, "n")
    answers: Observation = [does(renameat2, "f", "n", RENAME_NOREPLACE), sorted(os.listdir("."))]
    answers += [does(renameat2, "f", "g", RENAME_NOREPLACE), sorted(os.listdir("."))]
    return [*answers, does(renameat2, "g", "g", RENAME_NOREPLACE)]


@each("rename-exchange", *[f"{old}-{new}" for old in KINDS for new in KINDS if old <= new])
def _(pair: str) -> Observation:
    old, new = pair.split("-")
    os.mkdir("p")
    os.mkdir("q")
    make(old, "p/a")
    make(new, "q/b")
    first, second = os.lstat("p/a").st_ino, os.lstat("q/b").st_ino
    times = Times("p", "q", "p/a", "q/b")
    answer = does(renameat2, "p/a", "q/b", RENAME_EXCHANGE)
    swapped = os.lstat("p/a").st_ino == second and os.lstat("q/b").st_ino == first
    links = [os.stat("p").st_nlink, os.stat("q").st_nlink]
    parents = [
        os.stat(f"{name}/..").st_ino == os.stat(name[0]).st_ino
        for name in ("p/a", "q/b")
        if os.path.isdir(name)
    ]
    return [answer, swapped, links, parents, times.moved("p"), times.moved("q")]


@case("rename-exchange-errors")
def _() -> Observation:
    os.makedirs("a/b")
    make("file", "f")
    return [
        does(renameat2, "a", "absent", RENAME_EXCHANGE),
        does(renameat2, "absent", "a", RENAME_EXCHANGE),
        does(renameat2, "a", "a/b", RENAME_EXCHANGE),
        does(renameat2, "a/b", "a", RENAME_EXCHANGE),
        does(renameat2, "f", "f", RENAME_EXCHANGE),
        does(renameat2, "a", "f", RENAME_EXCHANGE | RENAME_NOREPLACE),
        does(renameat2, "a", "f", 64),
    ]
