"""What a host costs that nobody wants anything of: `python -m benchmarks.idle_hosts [--hosts N]`.

The hosts of a lab (three), each with files that it has created. Memory is resident memory, the
supervisor's beside the daemon's; processor time that of all threads, in percent of one core. The
coordinator, which answers everybody, is told apart.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

from benchmarks.lab_hosts import Hosts, cpu_seconds, open_lab
from benchmarks.mounted import resident_bytes

MEMORY_BOUND_MIB = 100
CPU_BOUND_PERCENT = 1.0
FILES = 500
SETTLE_S = 12.0
"""Commits, confirmations, memory given back."""
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Idle:
    """One host."""

    name: str
    coordinates: bool
    daemon_mib: float
    supervisor_mib: float
    daemon_percent: float
    supervisor_percent: float

    @property
    def mib(self) -> float:
        """Both processes."""
        return self.daemon_mib + self.supervisor_mib

    @property
    def percent(self) -> float:
        """Both processes."""
        return self.daemon_percent + self.supervisor_percent

    @property
    def ok(self) -> bool:
        """Within the bounds."""
        return self.mib <= MEMORY_BOUND_MIB and (
            self.coordinates or self.percent <= CPU_BOUND_PERCENT
        )


def measure(seconds: float, hosts: int = 3) -> list[Idle]:
    """Each host."""
    with open_lab(hosts) as lab:
        lab.each(lambda name: _use(lab, name))
        time.sleep(SETTLE_S)
        return look(lab, seconds)


def look(lab: Hosts, seconds: float) -> list[Idle]:
    """At hosts that are idle now."""
    pids = {name: (lab.daemon_pid(name), lab.supervisor_pid(name)) for name in lab.names}
    office = lab.coordinator()
    before = {pid: cpu_seconds(pid) for both in pids.values() for pid in both}
    started = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - started

    def percent(pid: int) -> float:
        return (cpu_seconds(pid) - before[pid]) / passed * 100

    return [
        Idle(
            name,
            name == office,
            resident_bytes(daemon) / MEBIBYTE,
            resident_bytes(supervisor) / MEBIBYTE,
            percent(daemon),
            percent(supervisor),
        )
        for name, (daemon, supervisor) in pids.items()
    ]


def _use(lab: Hosts, name: str) -> None:
    directory = lab.place(name) / f"of-{name}"
    directory.mkdir()
    for number in range(FILES):
        os.close(os.open(directory / f"file{number}", os.O_CREAT))


def main() -> None:
    """Print a table; exit 1 where a bound is missed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.idle_hosts", description=__doc__)
    options.add_argument("--hosts", type=int, default=3)
    found = measure(20, options.parse_args().hosts)
    for each in found:
        print(
            f"{each.name}{' (coordinator)' if each.coordinates else '':14} daemon "
            f"{each.daemon_mib:6.1f} MiB {each.daemon_percent:5.2f} %  supervisor "
            f"{each.supervisor_mib:6.1f} MiB {each.supervisor_percent:5.2f} %"
        )
    if not all(each.ok for each in found):
        raise SystemExit("a bound is missed")


if __name__ == "__main__":
    main()
