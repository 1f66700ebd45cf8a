"""Figures of several hosts, and of the lock manager: each with its goal."""

from __future__ import annotations

import trio

from benchmarks import (
    fail_over,
    idle_hosts,
    lock_acquire,
    many_locks,
    own_directories,
    remote_locks,
)
from benchmarks.figures import Figure, at_least, at_most, told


def locks(_seconds: int, rounds: int) -> list[Figure]:
    """Of the lock manager alone, without a LUN."""
    cached = trio.run(lock_acquire.measure, rounds)["cached try"]
    remote = remote_locks.measure(runs=rounds, count=2000)
    command = "python -m benchmarks.remote_locks"
    return [
        at_most(
            "lock that is cached",
            cached,
            "us",
            lock_acquire.CACHED_BOUND_US,
            "python -m benchmarks.lock_acquire",
        ),
        at_most(
            "lock of another node's, median",
            remote.median_ms,
            "ms",
            remote_locks.MEDIAN_BOUND_MS,
            command,
        ),
        at_least("locks of another node's", remote.rate, "/s", remote_locks.RATE_BOUND, command),
    ]


def fail_overs(_seconds: int, rounds: int) -> list[Figure]:
    """From a death to the first write of a survivor; the worst round has to be good enough."""
    figures = []
    command = "python -m benchmarks.fail_over"
    for each in fail_over.measure(rounds):
        name = f"fail-over, {each.name}"
        figures.append(told(f"{name}: median", each.median_s, "s", command))
        bound = fail_over.BOUNDS_S[each.kind]
        figures.append(at_most(f"{name}: worst", each.worst_s, "s", bound, command))
    return figures


def comings_and_goings(_seconds: int, rounds: int) -> list[Figure]:
    """What the others notice, with 5,000 cached locks a host; medians of the rounds."""
    found = many_locks.measure(rounds)
    command = "python -m benchmarks.many_locks"
    bounds = {
        "join": many_locks.JOIN_PAUSE_BOUND_S,
        "killed": many_locks.EVICTION_PAUSE_BOUND_S,
        "hangs": many_locks.EVICTION_PAUSE_BOUND_S,
    }
    whats = {"join": "a join", "killed": "a dead host", "hangs": "a host that hangs"}
    figures = [
        told("locks cached, each host at least", min(found.locks_cached), "", command),
        at_most(
            "join, daemon started to active", found.join_s, "s", many_locks.JOIN_BOUND_S, command
        ),
        told("join, csvctl mount to mounted", found.mounted_s, "s", command),
        told("longest gap while nothing happens", found.pauses["quiet"].longest_s, "s", command),
    ]
    for what, bound in bounds.items():
        pauses = found.pauses[what]
        name = f"{whats[what]} pauses others"
        figures.append(at_most(f"{name}: files in use", pauses.own, "s", bound, command))
        if what == "hangs":  # that host masters some of them: nobody can give those
            figures.append(told(f"{name}: fresh files", pauses.fresh, "s", command))
        else:
            figures.append(at_most(f"{name}: fresh files", pauses.fresh, "s", bound, command))
    return figures


def idle(seconds: int, _rounds: int) -> list[Figure]:
    """Memory and processor time of hosts that nobody wants anything of."""
    found = idle_hosts.measure(max(20, 4 * seconds))
    others = [each for each in found if not each.coordinates]
    office = next(each for each in found if each.coordinates)
    command = "python -m benchmarks.idle_hosts"
    largest = max(found, key=lambda each: each.mib)
    return [
        at_most(
            "idle host, daemon and supervisor",
            largest.mib,
            "MiB",
            idle_hosts.MEMORY_BOUND_MIB,
            command,
        ),
        told("idle host, supervisor alone", largest.supervisor_mib, "MiB", command),
        at_most(
            "idle host, the busiest",
            max(each.percent for each in others),
            "% of a core",
            idle_hosts.CPU_BOUND_PERCENT,
            command,
        ),
        told("idle coordinator", office.percent, "% of a core", command),
    ]


def messages(_seconds: int, _rounds: int) -> list[Figure]:
    """Of two hosts that create files in directories of their own."""
    said = own_directories.measure()
    return [
        at_most(
            "lock messages a file, in directories of one's own",
            said.each,
            "",
            own_directories.BOUND,
            "python -m benchmarks.own_directories",
        )
    ]
