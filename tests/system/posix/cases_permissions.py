"""Who may do what: search and write permission of directories, the sticky bit, ownership."""

from __future__ import annotations

import os
from collections.abc import Callable

from .case import KINDS, OTHER, USER, Observation, does, each, make, remove, user
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
