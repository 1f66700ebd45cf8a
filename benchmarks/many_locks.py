"""What the others notice when a host comes or goes: `python -m benchmarks.many_locks [--rounds N]`.

Four hosts of a lab, each with 5,000 cached locks. The fourth leaves, comes back, is killed, comes
back, hangs until it is evicted. On the other three, who want nothing of it, `pause_probe` does what
users do; the longest gap is what they notice. In "quiet" nothing happens: what the machine itself
makes of gaps.

join          seconds from the start of the daemon until it is active; beside it, from the command
              until the volume is mounted
pauses        of the probes: on files in use, and where a lock is needed that the host has not
              cached. The lock of a fresh file may be mastered by the host that hangs: nobody can
              give that one before the host is evicted and its lease is over.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lab_hosts import Fault, Hosts, Joined, open_lab

LOCKS = 5_000
FILES = LOCKS // 2
"""Each has two locks: of its inode, and of its being open."""
JOIN_BOUND_S = 1.0
JOIN_PAUSE_BOUND_S = 0.2
EVICTION_PAUSE_BOUND_S = 1.0
FRESH_A_SECOND = 100
"""More than a probe can use up."""
WINDOW_S = {"quiet": 5.0, "join": 16.0, "killed": 5.0, "hangs": 14.0}
AFTER_S = 2.0
MOUNT_LIMIT_S = 60.0


@dataclass
class Pauses:
    """The longest gaps of all probes, one for each round, in seconds."""

    own_s: list[float] = field(default_factory=list)
    fresh_s: list[float] = field(default_factory=list)

    @property
    def own(self) -> float:
        """Median."""
        return statistics.median(self.own_s)

    @property
    def fresh(self) -> float:
        """Median."""
        return statistics.median(self.fresh_s)

    @property
    def longest_s(self) -> float:
        """Of all."""
        return max(*self.own_s, *self.fresh_s)


@dataclass
class Found:
    """All rounds."""

    locks_cached: list[int] = field(default_factory=list)
    joins: list[Joined] = field(default_factory=list)
    pauses: dict[str, Pauses] = field(default_factory=lambda: {name: Pauses() for name in WINDOW_S})

    @property
    def join_s(self) -> float:
        """Median."""
        return statistics.median(each.active_s for each in self.joins)

    @property
    def mounted_s(self) -> float:
        """Median."""
        return statistics.median(each.mounted_s for each in self.joins)


class Bench:
    """The hosts, and how far the fresh files are used up."""

    def __init__(self, hosts: Hosts, rounds: int) -> None:
        self.hosts = hosts
        *self.others, self.last = hosts.names
        self._next = 0
        self._fresh = int(sum(WINDOW_S.values()) * rounds * FRESH_A_SECOND)
        self.found = Found()

    def prepare(self) -> None:
        """Directories, fresh files that nobody has a lock of, cached locks."""
        base = self.hosts.place(self.last)
        for name in self.others:
            (base / f"fresh-{name}").mkdir()
            (self.hosts.place(name) / f"own-{name}").mkdir()
        self.hosts.each(self._make_fresh, self.others)
        self.hosts.umount_all()
        self.hosts.host(self.others[0]).mount()
        self.hosts.mount_all(self.hosts.names[1:])
        self.hosts.each(self.fill)
        cached = [self.hosts.ask(name, "status")["locks_cached"] for name in self.hosts.names]
        self.found.locks_cached = cached

    def _make_fresh(self, name: str) -> None:
        directory = self.hosts.place(self.last) / f"fresh-{name}"
        for number in range(self._fresh):
            os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_EXCL))

    def fill(self, name: str) -> None:
        """So many cached locks: of files that the host creates."""
        directory = self.hosts.place(name) / f"many-{name}-{time.time_ns()}"
        directory.mkdir()
        for number in range(FILES):
            os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_EXCL))

    @contextmanager
    def probed(self, what: str) -> Iterator[None]:
        """What the others notice of what happens inside."""
        probes = [self._probe(name) for name in self.others]
        try:
            time.sleep(0.5)
            began = time.monotonic()
            yield
            time.sleep(AFTER_S)
            told = [json.loads(probe.communicate(timeout=60)[0]) for probe in probes]
        finally:
            for probe in probes:
                probe.kill()
                probe.wait()
        self._next += 1 + max(each["fresh"]["count"] for each in told)
        for each in told:
            for calls in each.values():
                if calls["error"]:
                    raise RuntimeError(calls["error"])
        pauses = self.found.pauses[what]
        pauses.own_s.append(max(_longest(each["own"], began) for each in told))
        pauses.fresh_s.append(max(_longest(each["fresh"], began) for each in told))

    def _probe(self, name: str) -> subprocess.Popen[bytes]:
        place = self.hosts.place(name)
        probe = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.pause_probe"),
                *(str(place / f"own-{name}"), str(place / f"fresh-{name}"), str(self._next)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert probe.stdout is not None
        probe.stdout.readline()
        return probe

    def once(self) -> None:
        """One round."""
        hosts, last = self.hosts, self.last
        with self.probed("quiet"):
            time.sleep(WINDOW_S["quiet"] - AFTER_S)
        hosts.host(last).umount()
        self._join("join")
        self.fill(last)
        with self.probed("killed"):
            hosts.strike(Fault.KILL, last)
            self._wait_gone()
        self._join("join")
        self.fill(last)
        with self.probed("hangs"):
            hosts.strike(Fault.FREEZE, last)
            self._wait_gone()
        hosts.mend(last)
        hosts.host(last).wait_daemon_ended()
        hosts.mount(last)
        self.fill(last)

    def _join(self, what: str) -> None:
        with self.probed(what):
            self.found.joins.append(self.hosts.mount(self.last))

    def _wait_gone(self) -> None:
        limit = time.monotonic() + 30
        while self.last in self.hosts.ask(self.others[0], "status")["members"]:
            if time.monotonic() > limit:
                raise TimeoutError(f"{self.last} is not evicted")
            time.sleep(0.05)


def _longest(calls: dict[str, Any], since: float) -> float:
    return max((seconds for ended, seconds in calls["gaps"] if ended > since), default=0.0)


def measure(rounds: int) -> Found:
    """All of it."""
    with open_lab(4) as hosts:
        bench = Bench(hosts, rounds)
        bench.prepare()
        for _ in range(rounds):
            bench.once()
        return bench.found


def main() -> None:
    """Print a table; exit 1 where a bound is missed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.many_locks", description=__doc__)
    options.add_argument("--rounds", type=int, default=1)
    found = measure(options.parse_args().rounds)
    print(f"locks cached      {found.locks_cached}")
    joins = ", ".join(f"{each.active_s:.2f} ({each.mounted_s:.2f})" for each in found.joins)
    print(f"join (mounted)    {joins} s")
    for name, pauses in found.pauses.items():
        print(f"{name:10} own   {', '.join(f'{each:.3f}' for each in pauses.own_s)} s")
        print(f"{name:10} fresh {', '.join(f'{each:.3f}' for each in pauses.fresh_s)} s")


if __name__ == "__main__":
    main()
