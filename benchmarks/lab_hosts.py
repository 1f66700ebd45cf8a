"""Whole hosts for benchmarks: a lab of one's own, and what its hosts say and use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from csvctl.lab import faults, lab, state
from csvctl.lab.faults import Fault
from csvctl.lab.host import SUPERVISOR, Host
from csvfs.host import admin
from csvfs.host.problems import Problem

ANSWER_LIMIT_S = 30.0
ACTIVE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Joined:
    """How long a mount took, in seconds."""

    active_s: float
    """From the start of the daemon to the view, at the daemon, in which the host is active."""
    mounted_s: float
    """From `csvctl mount` to its end."""


class Hosts:
    """The hosts of a lab that is up."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names = [member.name for member in state.read(directory).hosts]

    def host(self, name: str) -> Host:
        """As it is now."""
        found = state.read(self.directory)
        return Host(found, found.host(name))

    @property
    def lun(self) -> str:
        """Its URL, inside the lab."""
        return state.read(self.directory).lun

    def place(self, name: str) -> Path:
        """Where a host's mount is seen."""
        return self.directory / name

    # -- what daemons say ------------------------------------------------------------------------
    def ask(self, name: str, command: str) -> dict[str, Any]:
        """A question to a host's daemon, without the price of a csvctl. Raises `Problem`."""
        (socket,) = (self.directory / "run" / name).glob("*.sock")
        return admin.ask(socket, command, timeout_s=ANSWER_LIMIT_S)

    def coordinator(self) -> str:
        """Its name."""
        return str(self.ask(self.names[0], "status")["coordinator"])

    # -- what they use -----------------------------------------------------------------------------
    def daemon_pid(self, name: str) -> int:
        """Process id."""
        daemon = self.host(name).daemon()
        if daemon is None:
            raise RuntimeError(f"{name} has no daemon")
        return daemon.pid

    def supervisor_pid(self, name: str) -> int:
        """Process id."""
        found = [each for each in self.host(name).processes() if each.module == SUPERVISOR]
        return found[0].pid

    # -- mounts ----------------------------------------------------------------------------------
    def mount(self, name: str) -> Joined:
        """Mount a host that is not mounted."""
        host = self.host(name)
        before = host.log.stat().st_size if host.log.exists() else 0
        started = time.monotonic()
        host.mount()
        mounted_s = time.monotonic() - started
        active_at = first_active(host.log.read_bytes()[before:].decode(), name)
        return Joined(active_at - process_started(self.daemon_pid(name)), mounted_s)

    def mount_all(self, names: list[str]) -> None:
        """At once."""
        lab.mount_all([self.host(name) for name in names])

    def umount_all(self) -> None:
        """One after the other, the first one last."""
        for name in reversed(self.names):
            self.host(name).umount()

    def strike(self, kind: Fault, name: str) -> None:
        """Cause a fault."""
        with state.changing(self.directory) as found:
            faults.strike(Host(found, found.host(name)), kind)

    def mend(self, name: str) -> None:
        """Undo the faults of a host; a lost mount stays lost."""
        with state.changing(self.directory) as found:
            faults.mend(Host(found, found.host(name)))

    def come_back(self, name: str) -> Joined:
        """Mend a host whose mount is lost, and mount again."""
        self.mend(name)
        host = self.host(name)
        host.wait_daemon_ended()
        return self.mount(name)

    def each(self, act: Callable[[str], Any], names: list[str] | None = None) -> list[Any]:
        """The same for several hosts at once."""
        chosen = self.names if names is None else names
        with ThreadPoolExecutor(len(chosen)) as pool:
            return list(pool.map(act, chosen))

    def check(self) -> str:
        """Unmount everything; "clean", or what `csvctl check` says."""
        self.umount_all()
        done = self.host(self.names[0]).csvctl("check", self.lun, limit_s=600)
        return "clean" if done.returncode == 0 else done.stdout + done.stderr


_LINE = re.compile(r"^(\S+ \S+) INFO lockmgr\.cluster: view \d+: active (.*?)(?:; .*)?$")


def first_active(log: str, name: str) -> float:
    """When a host's log first shows a view in which it is active: seconds of CLOCK_REALTIME."""
    for line in log.splitlines():
        found = _LINE.match(line)
        if found and any(each.split(" ")[0] == name for each in found[2].split(", ")):
            return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    raise RuntimeError(f"no view says that {name} is active:\n{log}")


def process_started(pid: int) -> float:
    """Seconds of CLOCK_REALTIME, to 10 ms."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def cpu_seconds(pid: int) -> float:
    """What the threads that a process has now have used so far."""
    used_ns = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        used_ns += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return used_ns / 1e9


@contextmanager
def open_lab(hosts: int, size_bytes: int = 8 << 30) -> Iterator[Hosts]:
    """A lab that goes in the end. Raises `Problem` when it cannot be made."""
    with tempfile.TemporaryDirectory(prefix="csvfs-bench-") as scratch:
        directory = Path(scratch) / "lab"
        made = lab.up(directory, hosts, size_bytes, lambda _words: None)
        try:
            yield Hosts(directory)
        finally:
            lab.down(made.id, made.path)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute, at normal priority."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


__all__ = [
    "Fault",
    "Hosts",
    "Joined",
    "Problem",
    "busy",
    "cpu_seconds",
    "first_active",
    "open_lab",
    "process_started",
]
