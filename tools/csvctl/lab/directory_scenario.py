"""Many hosts in one directory: rounds of calls at the same time, each round held against the model.

After a round, when nobody does anything, every host must find the same directory, and the model
(`csvctl.lab.directory_model`) an order of the calls that leads to it.
"""

from __future__ import annotations

import errno
import json
import random
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from csvctl.lab.directory_model import Call, directory, is_possible
from csvctl.lab.stage import Stage

_ROUNDS: Final = 150
_CALLS: Final = 5
_NAMES: Final = ("a", "b", "c", "d")
_ANSWER_LIMIT_S: Final = 60.0
_EXPECTED: Final = (0, -errno.ENOENT, -errno.EEXIST)

Content = dict[str, tuple[int, tuple[str, ...]]]


class _Worker:
    """The process of one host."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.process = process

    def ask(self, calls: list[list[str]]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(calls).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> list[list[Any]]:
        """Raises TimeoutError, OSError when the process has ended."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], _ANSWER_LIMIT_S)[0]:
            raise TimeoutError(f"a call on {self.name} has no answer for {_ANSWER_LIMIT_S:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"the program in the directory ended on {self.name}")
        found: list[list[Any]] = json.loads(line)
        return found


def many_in_one_directory(stage: Stage) -> None:
    """Play it; a round that cannot be is a mistake."""
    name = f"{stage.work.name}.d"
    first = stage.hosts()[0]
    (first.mountpoint / name).mkdir()
    chooser = random.Random(stage.seed)
    before: Content = {}
    with _workers(stage, name) as workers:
        for number in range(_ROUNDS):
            for worker in workers:
                worker.ask(_plan(chooser, f"{number}.{worker.name}"))
            calls = [
                Call(host, kind, tuple(arguments), result, begun, ended)
                for host, worker in enumerate(workers)
                for kind, arguments, result, begun, ended in worker.answer()
            ]
            after = _look(stage, workers)
            _judge(stage, before, calls, after)
            before = after
    stage.details["rounds"] = _ROUNDS
    shutil.rmtree(first.mountpoint / name)


def _plan(chooser: random.Random, mark: str) -> list[list[str]]:
    calls = []
    for number in range(_CALLS):
        kind = chooser.choice(("create", "create", "append", "append", "rename", "unlink"))
        name = chooser.choice(_NAMES)
        if kind == "rename":
            calls.append([kind, *chooser.sample(_NAMES, 2)])
        elif kind == "append":
            calls.append([kind, name, f"{mark}.{number}"])
        else:
            calls.append([kind, name])
    return calls


def _look(stage: Stage, workers: list[_Worker]) -> Content:
    found: list[Content] = []
    for worker in workers:
        worker.ask([["list"]])
    for worker in workers:
        content = worker.answer()[0][1]
        found.append({name: (inode, tuple(rows)) for name, (inode, rows) in content.items()})
    for worker, each in zip(workers, found, strict=True):
        if each != found[0]:
            stage.mistakes.append(f"{worker.name} finds {each}, {workers[0].name} {found[0]}")
    return found[0]


def _judge(stage: Stage, before: Content, calls: list[Call], after: Content) -> None:
    for call in calls:
        if call.result not in _EXPECTED and call.result < 0:
            words = errno.errorcode.get(-call.result, str(call.result))
            stage.mistakes.append(f"{call.kind} {' '.join(call.arguments)}: {words}")
    hosts = len({call.host for call in calls})
    if not is_possible(directory(before, hosts), calls, after):
        start = min(c.begun_ns for c in calls)
        told = [
            f"{(c.begun_ns - start) // 1000}..{(c.ended_ns - start) // 1000} us host{c.host + 1} "
            f"{c.kind} {' '.join(c.arguments)}: {c.result}"
            for c in sorted(calls, key=lambda c: c.begun_ns)
        ]
        stage.mistakes.append(f"no order of {told} leads from {before} to {after}")


@contextmanager
def _workers(stage: Stage, name: str) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        for host in stage.hosts():
            place = str(host.mountpoint / name)
            process = host.start(
                [sys.executable, "-m", "csvctl.lab.directory_work", place],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
            )
            workers.append(_Worker(host.name, process))
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()
