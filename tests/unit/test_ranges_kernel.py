"""The kernel's byte-range locks and ours, given the same script: the same outcomes."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lockmgr.messages import Resource
from lockmgr.ranges_core import RangeCore
from lockmgr.ranges_events import FindConflict, ForgetFile, RangeDone, RangeFound, SetRange
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner, RangeHold
from tests.unit import lock_process

FILE = Resource(b"file", b"\0")
PROCESSES = 3
ERRNO = {Outcome.DONE: 0, Outcome.WOULD_BLOCK: errno.EAGAIN}


class Process:
    """One child, and what our model calls its owners."""

    def __init__(self, path: Path, number: int) -> None:
        self.child = subprocess.Popen(
            [sys.executable, lock_process.__file__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.owner = Owner(Kind.POSIX, 0, number, pid=self.child.pid)
        self.files: dict[int, int] = {}
        """Descriptor to open file."""

    def do(self, *words: object) -> list[int]:
        assert self.child.stdin is not None and self.child.stdout is not None
        print(*words, file=self.child.stdin, flush=True)
        return [int(word) for word in self.child.stdout.readline().split()]

    def stop(self) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.close()
        self.child.stdout.close()
        assert self.child.wait(timeout=20) == 0


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))
        found = [Process(Path(file.name), number) for number in range(PROCESSES)]
        for process in found:
            stack.callback(process.stop)
        yield found


class Script:
    """Random commands, each given to a process and to the model."""

    def __init__(self, processes: list[Process], seed: int) -> None:
        self.random = random.Random(seed)
        self.processes = processes
        self.core = RangeCore(0, 1, lambda _resource: 0)
        self.tickets = 0
        self.opened = 0
        self.told: set[str] = set()

    def _ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def step(self) -> None:
        process = self.random.choice(self.processes)
        free = [number for number in range(3) if number not in process.files]
        if free and (not process.files or self.random.random() < 0.1):
            self.opened += 1
            process.files[free[0]] = self.opened
            assert process.do("open", free[0]) == [0]
            return
        number = self.random.choice(list(process.files))
        if self.random.random() < 0.03:
            self.close(process, number)
            return
        what = self.random.choice(["posix", "posix", "ofd", "ofd", "getlk", "ofd_getlk", "flock"])
        getattr(self, what)(process, number)
        self.core.check()

    def close(self, process: Process, number: int) -> None:
        assert process.do("close", number) == [0]
        opened = process.files.pop(number)
        for owner in (process.owner, Owner(Kind.OFD, 0, opened), Owner(Kind.FLOCK, 0, opened)):
            (done,) = self.core.step(ForgetFile(self._ticket(), FILE, owner), 0.0)
            assert isinstance(done, RangeDone) and done.outcome is Outcome.DONE

    def _range(self) -> tuple[int, int]:
        """Start, and end as ours: near 0, near the greatest offset, or to the end."""
        base = 0 if self.random.random() < 0.9 else END - 12
        start = base + self.random.randrange(11)
        if self.random.random() < 0.15:
            return start, END
        return start, min(END, start + self.random.randint(1, 6))

    def _set(self, words: list[object], process: Process, event: SetRange) -> None:
        done = self.core.step(event, 0.0)[-1]
        assert isinstance(done, RangeDone)
        assert process.do(*words)[0] == ERRNO[done.outcome], (words, done)
        self.told.add(f"{words[0]} {done.outcome.name}")

    def _fcntl(self, command: str, process: Process, number: int, owner: Owner) -> None:
        access = Access(self.random.randrange(3))
        start, end = self._range()
        length = 0 if end == END else end - start
        event = SetRange(self._ticket(), FILE, owner, start, end, access, wait=False)
        self._set([command, number, int(access), start, length], process, event)

    def posix(self, process: Process, number: int) -> None:
        self._fcntl("posix", process, number, process.owner)

    def ofd(self, process: Process, number: int) -> None:
        self._fcntl("ofd", process, number, Owner(Kind.OFD, 0, process.files[number]))

    def flock(self, process: Process, number: int) -> None:
        access = Access(self.random.randrange(3))
        owner = Owner(Kind.FLOCK, 0, process.files[number])
        event = SetRange(self._ticket(), FILE, owner, 0, END, access, wait=False)
        self._set(["flock", number, int(access)], process, event)

    def _find(self, command: str, process: Process, number: int, owner: Owner) -> None:
        access = self.random.choice([Access.READ, Access.WRITE])
        start, end = self._range()
        length = 0 if end == END else end - start
        answer = process.do(command, number, int(access), start, length)
        (found,) = self.core.step(
            FindConflict(self._ticket(), FILE, owner, start, end, access), 0.0
        )
        assert isinstance(found, RangeFound)
        self.told.add(f"{command} {found.conflict is not None}")
        if found.conflict is None:
            assert answer[:2] == [0, 0], answer
        else:
            assert tuple(answer[1:]) in set(self._in_the_way(owner, start, end, access)), answer

    def _in_the_way(
        self, owner: Owner, start: int, end: int, access: Access
    ) -> Iterator[tuple[int, int, int, int]]:
        """Each lock that the kernel may name, as it would."""
        for _file, hold in self.core.client.holds():
            clash = hold.start_bytes < end and start < hold.end_bytes
            excludes = Access.WRITE in (hold.access, access)
            another = hold.owner != owner and hold.owner.kind is not Kind.FLOCK
            if another and clash and excludes:
                yield self._as_kernel(hold)

    def _as_kernel(self, hold: RangeHold) -> tuple[int, int, int, int]:
        length = 0 if hold.end_bytes == END else hold.end_bytes - hold.start_bytes
        pid = hold.owner.pid if hold.owner.kind is Kind.POSIX else -1
        return int(hold.access), hold.start_bytes, length, pid

    def getlk(self, process: Process, number: int) -> None:
        self._find("getlk", process, number, process.owner)

    def ofd_getlk(self, process: Process, number: int) -> None:
        self._find("ofd_getlk", process, number, Owner(Kind.OFD, 0, process.files[number]))


@pytest.mark.parametrize("seed", range(6))
def test_same_outcomes_as_the_kernel(processes: list[Process], seed: int) -> None:
    script = Script(processes, seed)
    for _ in range(600):
        script.step()
    assert script.told == {
        *(f"{what} {how}" for what in ("posix", "ofd", "flock") for how in ("DONE", "WOULD_BLOCK")),
        *(f"{what} {found}" for what in ("getlk", "ofd_getlk") for found in (True, False)),
    }
