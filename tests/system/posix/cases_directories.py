"""Reading directories, also while they change."""

from __future__ import annotations

import os

from .case import KINDS, NAME_MAX, Observation, call, case, each, make, opened


@each("listdir-size", 0, 1, 10, 100, 1500)
def _(count: int) -> Observation:
    os.mkdir("d")
    for number in range(count):
        make("file", f"d/{number}")
    entries = [entry.name for entry in os.scandir("d")]
    return [len(entries), len(set(entries)), sorted(entries) == sorted(map(str, range(count)))]


@case("listdir-long-names")
def _() -> Observation:
    os.mkdir("d")
    names = [f"{number:03}" + "n" * (NAME_MAX - 3) for number in range(200)]
    for name in names:
        make("file", f"d/{name}")
    return [sorted(os.listdir("d")) == names]


@case("listdir-types")
def _() -> Observation:
    os.mkdir("d")
    for kind in KINDS:
        make(kind, f"d/{kind}")
    with os.scandir("d") as entries:
        found = {
            entry.name: (
                entry.is_dir(follow_symlinks=False),
                entry.is_file(follow_symlinks=False),
                entry.is_symlink(),
                entry.inode() == os.lstat(f"d/{entry.name}").st_ino,
            )
            for entry in entries
        }
    return [sorted(found.items())]


@case("listdir-while-removing")
def _() -> Observation:
    """Every entry that stays is seen exactly once while others go."""
    os.mkdir("d")
    for number in range(1000):
        make("file", f"d/{number}")
    seen: list[str] = []
    with os.scandir("d") as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position == 10:
                for number in range(0, 1000, 2):
                    os.unlink(f"d/{number}")
    stayed = [name for name in seen if int(name) % 2]
    return [len(stayed), len(set(seen)) == len(seen), len(os.listdir("d"))]


@case("listdir-while-adding")
def _() -> Observation:
    os.mkdir("d")
    for number in range(1000):
        make("file", f"d/{number}")
    seen: list[str] = []
    with os.scandir("d") as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position == 10:
                for number in range(1000, 2000):
                    make("file", f"d/{number}")
    old = [name for name in seen if int(name) < 1000]
    return [len(old), len(set(seen)) == len(seen), len(os.listdir("d"))]


@case("listdir-rewind")
def _() -> Observation:
    os.mkdir("d")
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as d:
        first = os.listdir(d)
        make("file", "d/new")
        return [first, os.listdir(d), call(os.listdir, "absent")]


@each("names", ". .", " ", "-", "a\\b", "ä", "ａ", "\x01", "x" * NAME_MAX, "...", "a:b", "日本")
def _(name: str) -> Observation:
    make("file", name)
    answers: Observation = [os.listdir("."), os.path.exists(name)]
    os.rename(name, "plain")
    return [*answers, os.listdir(".")]


@case("names-are-bytes")
def _() -> Observation:
    name = bytes(byte for byte in range(1, 256) if byte != ord("/"))[:NAME_MAX]
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    answers: Observation = [os.listdir(b".") == [name]]
    os.unlink(name)
    make("file", "Case")
    return [*answers, os.path.exists("case"), os.listdir(".")]
