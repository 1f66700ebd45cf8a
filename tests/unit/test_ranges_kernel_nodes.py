"""The byte-range locks of one kernel and those of three nodes, given the same programs.

Each process of the kernel is one on a node of its own. What they do is random: they lock, with and
without waiting, test, unlock, close, are interrupted while they wait, and are killed; nodes die and
join. After each step the same processes wait, and the others were told the same.

Whom the kernel wakes first of two that want the same bytes is a matter of luck, so nobody begins to
wait for what another waits for. And nobody waits for two at once: the kernel knows of one of them
only, and so overlooks circles through the other, which we find.
"""

from __future__ import annotations

import errno
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockmgr.messages import Resource
from lockmgr.ranges_events import SetRange
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner
from tests.unit import lock_process
from tests.unit.ranges_joined import RangesCluster

FILES = [Resource(b"file %d" % number, bytes([number])) for number in range(3)]
"""Mastered by three nodes."""
POSIX, OFD, FLOCK = Kind
ERRNO = {
    Outcome.DONE: 0,
    Outcome.WOULD_BLOCK: errno.EAGAIN,
    Outcome.DEADLOCK: errno.EDEADLK,
    Outcome.CANCELLED: errno.EINTR,
}
BLOCKED = {"72", "73"}
"""fcntl and flock of x86-64, as /proc/PID/syscall shows a process that sleeps in one."""


class Process:
    """A child of ours, and what it has open: descriptor, file, number of the open file."""

    def __init__(self, paths: list[Path], node: int) -> None:
        self.node = node
        self.child = subprocess.Popen(
            [sys.executable, lock_process.__file__, *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.files: dict[int, tuple[int, int]] = {}
        self.waits: tuple[int, SetRange] | None = None
        """Ticket and request, while it is blocked."""

    def say(self, *words: object) -> None:
        assert self.child.stdin is not None
        print(*words, file=self.child.stdin, flush=True)

    def answer(self) -> int:
        """The errno of what it was told to do."""
        assert self.child.stdout is not None
        assert select.select([self.child.stdout], [], [], 60)[0], "the kernel lets it wait"
        return int(self.child.stdout.readline().split()[0])

    def is_blocked(self) -> bool:
        """In the kernel, for a lock. Or it has answered: one of both comes soon."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if Path(f"/proc/{self.child.pid}/syscall").read_text().split()[0] in BLOCKED:
                return True
            assert self.child.stdout is not None
            if select.select([self.child.stdout], [], [], 0.0005)[0]:
                return False
        raise AssertionError("it neither waits nor answers")

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            assert stream is not None
            stream.close()


class Nodes(RangesCluster):
    """With the owners that there are."""

    def __init__(self) -> None:
        self.owners: dict[int, list[Owner]] = {}
        super().__init__(len(FILES))

    def owners_of(self, node: int) -> list[Owner]:
        return self.owners.get(node, [])


class Script:
    """Random commands, each given to a process and to its node."""

    def __init__(self, seed: int, paths: list[Path]) -> None:
        self.random = random.Random(seed)
        self.paths = paths
        self.cluster = Nodes()
        self.opened = 0
        self.told: set[str] = set()
        self.processes = [Process(paths, node) for node in range(3)]

    def run(self, steps: int) -> None:
        actions = [*[self._lock] * 30, self._open, self._close, *[self._interrupt] * 3, self._kill]
        for _ in range(steps):
            self.cluster.sleep(0.01)  # so that one of a circle is the youngest
            self.random.choice(actions)()
            self._same()

    def close(self) -> None:
        for process in self.processes:
            process.end()

    # -- what they do --------------------------------------------------------------------------
    def _free(self) -> Process | None:
        free = [process for process in self.processes if process.waits is None]
        return self.random.choice(free) if free else None

    def _owner(self, kind: Kind, process: Process, number: int) -> Owner:
        node = process.node
        owner = Owner(kind, node, node + 1 if kind is POSIX else process.files[number][1])
        owners = self.cluster.owners.setdefault(node, [])
        if owner not in owners:
            owners.append(owner)
        return owner

    def _open(self) -> None:
        process = self._free()
        if process is None:
            return
        unused = [number for number in range(4) if number not in process.files]
        if unused:
            self.opened += 1
            file = self.random.randrange(len(FILES))
            process.files[unused[0]] = (file, 100 + self.opened)
            process.say("open", unused[0], file)
            assert process.answer() == 0

    def _close(self) -> None:
        process = self._free()
        if process is None or not process.files:
            return
        number = self.random.choice(list(process.files))
        owners = [self._owner(kind, process, number) for kind in Kind]
        file, _opened = process.files.pop(number)
        process.say("close", number)
        assert process.answer() == 0
        for owner in owners:
            self.cluster.close_file(FILES[file], owner)
            self.cluster.settle()

    def _lock(self) -> None:
        process = self._free()
        if process is None or not process.files:
            self._open()
            return
        rng = self.random
        number = rng.choice(list(process.files))
        kind = rng.choice([POSIX, POSIX, POSIX, OFD, FLOCK])
        access = rng.choice([Access.NONE, Access.READ, Access.WRITE, Access.WRITE])
        start = rng.randrange(8)
        end = END if rng.random() < 0.15 else start + rng.randint(1, 5)
        if kind is FLOCK:
            start, end = 0, END
        file = process.files[number][0]
        owner = self._owner(kind, process, number)
        wait = rng.random() < 0.6
        if kind is POSIX and rng.random() < 0.5:
            wanted = self._what_who_waits_has(FILES[file])
            if wanted:
                (start, end), access, wait = rng.choice(wanted), Access.WRITE, True
        if self._meets_who_waits(FILES[file], kind, start, end):
            return
        wait = wait and self._in_the_way(FILES[file], owner, start, end, access) < 2
        command = kind.name.lower() + ("_wait" if wait else "")
        length = 0 if end == END else end - start
        process.say(command, number, int(access), start, length)
        ticket = self.cluster.lock(FILES[file], owner, start, end, access, wait)
        self.cluster.settle()
        request = self.cluster.busy.get(owner)
        if request is not None and self._somebody_waits():
            self.cluster.sleep(1.1)
            self.cluster.settle()
        outcome = self.cluster.outcomes.get(ticket)
        if outcome is None:
            assert isinstance(request, SetRange)
            assert process.is_blocked(), request
            process.waits = (ticket, request)
            self.told.add(f"{kind.name} waits")
        else:
            self._told(process, kind, outcome)

    def _in_the_way(
        self, file: Resource, owner: Owner, start: int, end: int, access: Access
    ) -> int:
        """How many owners are."""
        return sum(
            other_file == file
            and other != owner
            and (other.kind is FLOCK) == (owner.kind is FLOCK)
            and any(
                span.start < end
                and start < span.end
                and Access.WRITE in (span.access, access)
                and access is not Access.NONE
                for span in holdings.spans
            )
            for (other_file, other), holdings in self.cluster.truth.items()
        )

    def _somebody_waits(self) -> bool:
        """There may be a circle."""
        return any(process.waits is not None for process in self.processes)

    def _what_who_waits_has(self, file: Resource) -> list[tuple[int, int]]:
        """To wait for that may close a circle."""
        waiting = [process.waits[1].owner for process in self.processes if process.waits]
        return [
            (span.start, span.end)
            for owner in waiting
            if owner.kind is POSIX and (file, owner) in self.cluster.truth
            for span in self.cluster.truth[file, owner].spans
        ]

    def _meets_who_waits(self, file: Resource, kind: Kind, start: int, end: int) -> bool:
        for process in self.processes:
            if process.waits is None:
                continue
            other = process.waits[1]
            alike = (other.owner.kind is FLOCK) == (kind is FLOCK)
            if (
                other.resource == file
                and alike
                and start < other.end_bytes
                and other.start_bytes < end
            ):
                return True
        return False

    def _told(self, process: Process, kind: Kind, outcome: Outcome) -> None:
        assert process.answer() == ERRNO[outcome], (kind, outcome)
        self.told.add(f"{kind.name} {outcome.name}")

    def _interrupt(self) -> None:
        waiting = [process for process in self.processes if process.waits is not None]
        if not waiting:
            return
        process = self.random.choice(waiting)
        assert process.waits is not None
        ticket, request = process.waits
        process.waits = None
        process.child.send_signal(lock_process.INTERRUPT)
        self.cluster.cancel_range(request.owner)
        self.cluster.settle()
        self._told(process, request.owner.kind, self.cluster.outcomes[ticket])

    def _kill(self) -> None:
        """A process dies; or its node does, with it."""
        position = self.random.randrange(3)
        process = self.processes[position]
        process.end()
        node, cluster = process.node, self.cluster
        if self.random.random() < 0.5:
            for owner in cluster.owners.pop(node, []):
                cluster.owner_died(owner)
            cluster.settle()
            self.told.add("a process died")
        else:
            cluster.kill(node, self.random.choice([0, 1]))
            cluster.owners.pop(node, None)
            cluster.change_view()
            cluster.recover()
            cluster.replay(node)
            cluster.clear(node)
            cluster.settle()
            node = cluster.join()
            cluster.recover()
            self.told.add("a node died")
        self.processes[position] = Process(self.paths, node)
        self._open()

    # -- what is compared ----------------------------------------------------------------------
    def _same(self) -> None:
        """Who is granted now what it waited for, is so by the kernel, too; and nobody else."""
        for process in self.processes:
            if process.waits is None:
                continue
            ticket, request = process.waits
            outcome = self.cluster.outcomes.get(ticket)
            if outcome is None:
                assert process.is_blocked(), request
            else:
                process.waits = None
                self._told(process, request.owner.kind, outcome)


@pytest.fixture
def paths() -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        found = [Path(directory) / str(number) for number in range(len(FILES))]
        for path in found:
            path.touch()
        yield found


def _run(seed: int, paths: list[Path], steps: int) -> set[str]:
    script = Script(seed, paths)
    try:
        script.run(steps)
    finally:
        script.close()
    return script.told


def test_the_same_as_one_kernel(paths: list[Path]) -> None:
    told: set[str] = set()
    for seed in range(3):
        told |= _run(seed, paths, 250)
    assert told == {
        *(f"{kind.name} {how}" for kind in Kind for how in ("DONE", "WOULD_BLOCK", "CANCELLED")),
        *(f"{kind.name} waits" for kind in Kind),
        *("POSIX DEADLOCK", "a process died", "a node died"),
    }


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 120))
def test_the_same_as_one_kernel_at_length(paths: list[Path], seed: int) -> None:
    _run(seed, paths, 1000)
