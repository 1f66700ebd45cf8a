"""How long a dead host's image is out of reach: `python -m benchmarks.fail_over [--rounds N]`.

Three hosts of a lab. One writes to an image and keeps it open; then its daemon is killed, or the
host loses its power: links cut, everything killed at once, nobody left to say so. From that moment
another host opens the image and writes to it. Settings are the defaults. The victim is never the
coordinator, and then always the coordinator.

(seconds)               until the survivor's first write is answered
daemon killed           its supervisor proves its death to the peers
power off               nobody does: eviction after silence, then the lease must be over
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.lab_hosts import Fault, Hosts, open_lab

BOUNDS_S = {Fault.KILL: 2.0, Fault.POWER_OFF: 8.0}
NAMES = {Fault.KILL: "daemon killed", Fault.POWER_OFF: "power off"}
IMAGE_BYTES = 1 << 20
BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class FailOver:
    """All rounds of one kind of death, in seconds."""

    kind: Fault
    coordinator: bool
    took_s: tuple[float, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{NAMES[self.kind]}{', coordinator' if self.coordinator else ''}"

    @property
    def median_s(self) -> float:
        """Of all rounds."""
        return statistics.median(self.took_s)

    @property
    def worst_s(self) -> float:
        """Of all rounds."""
        return max(self.took_s)


def once(hosts: Hosts, kind: Fault, *, coordinator: bool, image: str) -> float:
    """One death; the victim has come back when this returns."""
    office = hosts.coordinator()
    victim = office if coordinator else next(name for name in hosts.names if name != office)
    survivor = next(name for name in hosts.names if name not in (office, victim))
    stays_open = _written(hosts, victim, image, b"a", IMAGE_BYTES)
    started = time.monotonic()
    hosts.strike(kind, victim)
    file = _written(hosts, survivor, image, b"b", BLOCK_BYTES)
    took_s = time.monotonic() - started
    os.close(file)
    with suppress(OSError):  # its mount is dead
        os.close(stays_open)
    hosts.come_back(victim)
    return took_s


def _written(hosts: Hosts, name: str, image: str, letter: bytes, length_bytes: int) -> int:
    file = os.open(hosts.place(name) / image, os.O_CREAT | os.O_RDWR)
    for offset in range(0, length_bytes, BLOCK_BYTES):
        os.pwrite(file, letter * BLOCK_BYTES, offset)
    os.fsync(file)
    return file


def measure(rounds: int) -> list[FailOver]:
    """Each kind, so many times."""
    found = []
    with open_lab(3) as hosts:
        for kind in BOUNDS_S:
            for coordinator in (False, True):
                took = [
                    once(hosts, kind, coordinator=coordinator, image=f"{kind}{coordinator}{number}")
                    for number in range(rounds)
                ]
                found.append(FailOver(kind, coordinator, tuple(took)))
    return found


def main() -> None:
    """Print a table; exit 1 where a bound is missed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.fail_over", description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    missed = False
    for each in measure(options.parse_args().rounds):
        bound = BOUNDS_S[each.kind]
        missed = missed or each.worst_s > bound
        print(f"{each.name:28} {each.median_s:6.2f} s  worst {each.worst_s:6.2f} s  (<= {bound:g})")
    if missed:
        raise SystemExit("a bound is missed")


if __name__ == "__main__":
    main()
