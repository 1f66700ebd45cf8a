"""Where a scenario is played: files, the programs that use them, faults, and the result.

A scenario starts programs on hosts, breaks things and mends them; the stage keeps account. At its
end everything is mended and stopped, every host reads every file, all unmount, `csvctl check` looks
at the volume, and all mount again.

A host is *down* from when its mount was ended by a fault, or it was evicted, until it has mounted
again: errors of the programs that were on it are as they must be, and their pauses count for
nothing.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from csvctl.lab import faults, lab, state
from csvctl.lab.block import Version
from csvctl.lab.faults import Fault
from csvctl.lab.history import Diary, History, Place, read_log
from csvctl.lab.host import Host
from csvctl.lab.processes import end, wait_until
from csvctl.lab.verdict import judge
from csvctl.lab.workload import Job
from csvfs.host.problems import Kind, Problem

PROGRESS_LIMIT_S: Final = 120.0
_STOP_LIMIT_S: Final = 60.0
_CHECK_LIMIT_S: Final = 300.0
_LONG_S: Final = 1.0
"""A pause that nobody should have who has nothing to do with what was broken."""
_PROGRAMS: Final = ("csvctl.lab.workload", "csvctl.lab.directory_work")
_SHOWN: Final = 10
"""Of a long list of mistakes, so many are shown."""


@dataclass
class Running:
    """A program of the workload, on its host."""

    host: str
    what: str
    job: Job
    process: subprocess.Popen[bytes]
    hung: bool = False
    doomed: bool = False
    """Its mount was lost while it ran."""
    _seen_bytes: int = 0
    _done: int = 0

    @property
    def done(self) -> int:
        """How many writes were acknowledged, or blocks read, so far."""
        path = Path(self.job.log)
        if path.exists():
            with path.open("rb") as log:
                log.seek(self._seen_bytes)
                fresh = log.read().rpartition(b"\n")[0] + b"\n"
            if len(fresh) > 1:
                self._seen_bytes += len(fresh)
                self._done += fresh.count(b"ACKED ") + fresh.count(b"READ ")
        return self._done

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def name(self) -> str:
        what = {"write": "writer", "read": "reader"}[self.what]
        return f"{what} of file {self.job.file} on {self.host}"


@dataclass
class File:
    """A file of the scenario; each writer of it has the next term."""

    number: int
    name: str
    blocks: int
    block_bytes: int
    term: int = 0
    removed: bool = False


@dataclass
class Stage:
    """One scenario in one lab."""

    directory: Path
    scenario: str
    tell: Callable[[str], None]
    seed: int
    files: list[File] = field(default_factory=list)
    programs: list[Running] = field(default_factory=list)
    down: set[str] = field(default_factory=set)
    """Hosts whose mount is lost, until they mount again."""
    details: dict[str, Any] = field(default_factory=dict)
    final: dict[Place, Version] = field(default_factory=dict)
    foreign: dict[Place, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    """What is wrong beside the four counts; the scenario has failed if there is any."""

    def __post_init__(self) -> None:
        self.work = self.directory / "work" / f"{self.scenario}-{time.time_ns()}"
        self.work.mkdir(parents=True)

    # -- hosts ---------------------------------------------------------------------------------
    def hosts(self) -> list[Host]:
        """All, as they are now."""
        found = state.read(self.directory)
        return [Host(found, member) for member in found.hosts]

    def host(self, name: str) -> Host:
        found = state.read(self.directory)
        return Host(found, found.host(name))

    def strike(self, kind: Fault, name: str) -> None:
        """Cause a fault."""
        self.tell(f"{kind} on {name}")
        if faults.FAULTS[kind].ends_daemon:
            self.lose(name)
        with state.changing(self.directory) as found:
            faults.strike(Host(found, found.host(name)), kind)

    def mend(self, name: str) -> None:
        """Undo the faults of a host; a lost mount stays lost."""
        self.tell(f"heal {name}")
        with state.changing(self.directory) as found:
            faults.mend(Host(found, found.host(name)))

    def lose(self, name: str) -> None:
        """A host's mount is lost, and with it the programs that are there now."""
        self.down.add(name)
        for program in self.programs:
            program.doomed = program.doomed or program.host == name

    def mount_again(self, name: str) -> None:
        """A new incarnation, once the daemon of the last one has ended."""
        self.lose(name)
        host = self.host(name)
        host.wait_daemon_ended()
        host.mount()
        self.down.discard(name)

    def sweep(self) -> None:
        """Take away what a scenario that was killed has left: its programs, and its files."""
        earlier = {path.name for path in self.work.parent.iterdir()} - {self.work.name}
        for host in self.hosts():
            left = [each for each in host.processes() if each.module in _PROGRAMS]
            end(left, [host.namespace])
        place = self.hosts()[0].mountpoint
        for path in place.iterdir():
            if path.suffix == ".d" and path.stem in earlier:
                shutil.rmtree(path)
            elif path.suffix == ".img" and path.stem.rpartition("-")[0] in earlier:
                path.unlink()

    # -- programs ------------------------------------------------------------------------------
    def new_file(self, *, blocks: int = 256, block_bytes: int = 4096) -> File:
        """A file that does not exist yet."""
        number = len(self.files) + 1
        made = File(number, f"{self.work.name}-{number}.img", blocks, block_bytes)
        self.files.append(made)
        return made

    def write(self, name: str, file: File, **options: Any) -> Running:
        """Start the next writer of a file."""
        file.term += 1
        return self._start(name, "write", file, term=file.term, **options)

    def read(self, name: str, file: File) -> Running:
        """Start a reader of a file that exists."""
        return self._start(name, "read", file, pause_s=0.001)

    def _job(self, host: Host, file: File, **options: Any) -> Job:
        log = self.work / f"{len(self.programs)}-{host.name}.log"
        place = host.mountpoint
        return Job(
            mountpoint=str(place),
            path=str(place / file.name),
            file=file.number,
            blocks=file.blocks,
            block_bytes=file.block_bytes,
            log=str(log),
            **options,
        )

    def _start(self, name: str, what: str, file: File, **options: Any) -> Running:
        host = self.host(name)
        job = self._job(host, file, **options)
        process = host.start(
            [sys.executable, "-m", "csvctl.lab.workload", what, job.encode()],
            stdin=subprocess.DEVNULL,
            cwd="/",
        )
        started = Running(name, what, job, process)
        self.programs.append(started)
        return started

    def wait_progress(self, program: Running, more: int = 20) -> bool:
        """Wait until it has done ``more``; False if it ended before. Raises TimeoutError."""
        wanted = program.done + more

        def over() -> bool:
            return program.ended or program.done >= wanted

        wait_until(over, f"the {program.name} to go on", PROGRESS_LIMIT_S)
        return program.done >= wanted

    def wait_ended(self, program: Running, limit_s: float = PROGRESS_LIMIT_S) -> int:
        """Its exit status. Raises TimeoutError."""
        wait_until(lambda: program.ended, f"the {program.name} to end", limit_s)
        return program.process.returncode

    def stop(self, program: Running) -> None:
        """Have it end after what it is about; one that does not is killed, and a mistake."""
        if program.ended:
            return
        program.process.terminate()
        try:
            program.process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            program.hung = True
            program.process.kill()
            program.process.wait(_STOP_LIMIT_S)

    def verify(self, name: str, file: File) -> None:
        """Read a whole file on a host; what it holds is judged in the end."""
        host = self.host(name)
        process = host.start(
            [sys.executable, "-m", "csvctl.lab.workload", "verify", self._job(host, file).encode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        said, words = process.communicate(timeout=PROGRESS_LIMIT_S)
        if process.returncode:
            last = words.decode(errors="replace").strip().rpartition("\n")[2]
            self.mistakes.append(f"{file.name} could not be read on {name}: {last}")
            return
        found = json.loads(said)
        for offset, version in found["versions"].items():
            place = (file.number, int(offset))
            if self.final.setdefault(place, tuple(version)) != tuple(version):
                self.mistakes.append(f"{file.name} at {offset} differs on {name}")
        for offset, why in found["foreign"].items():
            self.foreign[file.number, int(offset)] = why

    # -- the end -------------------------------------------------------------------------------
    def finish(self) -> dict[str, Any]:
        """Mend, stop, compare, check. The result, which says in ``ok`` whether all was well."""
        for host in self.hosts():
            if host.state.faults:
                self.mend(host.name)
        for program in self.programs:
            self.stop(program)
        for host in self.hosts():
            if host.daemon() is None:
                if host.name not in self.down:
                    self.mistakes.append(f"{host.name} has lost its mount, and nobody expected it")
                self.mount_again(host.name)
        self.tell("comparing")
        for file in self.files:
            if not file.removed:
                for host in self.hosts():
                    self.verify(host.name, file)
        return self.result(self._check())

    def _check(self) -> str:
        self.tell("csvctl check")
        hosts = self.hosts()
        for host in hosts:
            for file in self.files:
                if host is hosts[0] and not file.removed:
                    (host.mountpoint / file.name).unlink(missing_ok=True)
            host.umount()
        done = hosts[0].csvctl("check", hosts[0].lab.lun, "--json", limit_s=_CHECK_LIMIT_S)
        hosts[0].mount()
        lab.mount_all(hosts[1:])
        if done.returncode == 0:
            return "clean"
        findings = json.loads(done.stdout)["left"] if done.stdout else [done.stderr.strip()]
        return "; ".join(map(str, findings[:_SHOWN])) or f"ended with {done.returncode}"

    def result(self, check: str) -> dict[str, Any]:
        """The judgement over every log, as `csvctl lab run --json` prints it."""
        history, pause_s = History(), 0.0
        errors: list[str] = []
        long: dict[str, float] = {}
        for program in self.programs:
            diary = read_log(Path(program.job.log), history)
            self._blame(program, diary, errors)
            if not program.doomed:
                pause_s = max(pause_s, diary.max_pause_s)
                if diary.max_pause_s > _LONG_S:
                    long[program.name] = round(diary.max_pause_s, 2)
        verdict = judge(history, self.final, self.foreign)
        for name, found in (
            ("errors", errors),
            ("lost", verdict.lost),
            ("stale", verdict.stale),
            ("zombies", verdict.zombies),
            ("mistakes", self.mistakes),
        ):
            if found:
                self.details[name] = found[:_SHOWN]
        if long:
            self.details["long_pauses_s"] = long
        acked = sum(map(len, history.acked.values()))
        reads = sum(map(len, history.reads.values()))
        return {
            "scenario": self.scenario,
            "ok": verdict.ok and not errors and not self.mistakes and check == "clean",
            "max_pause_s": round(pause_s, 3),
            "io_errors": len(errors),
            "lost_writes": len(verdict.lost),
            "stale_reads": len(verdict.stale),
            "zombie_writes": len(verdict.zombies),
            "check": check,
            "details": {"seed": self.seed, "acknowledged": acked, "reads": reads, **self.details},
        }

    def _blame(self, program: Running, diary: Diary, errors: list[str]) -> None:
        if program.doomed:
            return
        name = program.name
        errors += [f"{name}: {error}" for error in diary.errors]
        if program.hung:
            self.mistakes.append(f"the {name} did not end")
        elif diary.ended_ns is None and not diary.errors:
            self.mistakes.append(f"the {name} ended with {program.process.poll()}")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """While the block runs no other scenario is played in the lab. Raises `Problem`."""
    with open(directory / "work" / "lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(Kind.USAGE, f"a scenario is being played in {directory}") from None
        yield


def require_idle(directory: Path, least: int, scenario: str) -> None:
    """Raises `Problem` (kind USAGE) if the lab has too few hosts for a scenario, or faults."""
    found = state.read(directory)
    if len(found.hosts) < least:
        raise Problem(Kind.USAGE, f"{scenario} wants {least} hosts; the lab has {len(found.hosts)}")
    for member in found.hosts:
        if member.faults:
            raise Problem(Kind.USAGE, f"{member.name} has faults: `csvctl lab heal {member.name}`")
        if Host(found, member).daemon() is None:
            raise Problem(
                Kind.USAGE, f"{member.name} is not mounted: `csvctl lab heal {member.name}`"
            )
