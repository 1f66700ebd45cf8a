"""`make sixteen`: sixteen hosts on one machine that has more to do than it can.

    python -m benchmarks.sixteen [--hosts 16] [--minutes 10] [--busy 2] [--json]

The hosts of a lab mount one volume. Then for so many minutes every processor is kept busy by
processes that compute, at normal priority (``--busy`` for each processor), while each host does a
little (`benchmarks.light_work`) in one directory. Nobody may be evicted, no lease may end, no call
may fail, and `csvctl check` must be clean. Heartbeats are timed on the wire, from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import idle_hosts
from benchmarks.lab_hosts import Hosts, busy, open_lab
from benchmarks.wire_beats import late_ms, quantile
from csvctl.lab import state
from csvctl.lab.host import enter
from csvfs.host.problems import Problem
from lockmgr.cluster.settings import Settings

LOOK_S = 2.0
PAUSE_S = 1.0
END_LIMIT_S = 60.0


@dataclass
class Report:
    """What happened; nothing in ``mistakes`` if all was well."""

    hosts: int
    minutes: float
    busy_processes: int
    up_s: float = 0.0
    last_join_s: float = 0.0
    """Of the last host: from the start of its daemon until it was active."""
    last_mount_s: float = 0.0
    daemon_mib: float = 0.0
    """Resident memory of a daemon, the largest."""
    supervisor_mib: float = 0.0
    all_mib: float = 0.0
    """Of all daemons and supervisors together."""
    idle_cpu_percent: float = 0.0
    """Of a daemon that does not coordinate, before the work begins: the most."""
    heartbeats: int = 0
    late_p50_ms: float = 0.0
    late_p99_ms: float = 0.0
    late_p999_ms: float = 0.0
    late_most_ms: float = 0.0
    lease_least_left_s: float = 0.0
    leases_lost: int = 0
    longest_silence_s: float = 0.0
    """The longest that anybody was seen to have heard nothing of somebody."""
    rounds: int = 0
    """Of the light work, on all hosts together."""
    longest_call: str = ""
    check: str = "not done"
    mistakes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.mistakes


class Watch:
    """Somebody outside who times heartbeats."""

    def __init__(self, hosts: Hosts) -> None:
        found = state.read(hosts.directory)
        ports = [f"{name}-net" for name in hosts.names]
        self._process = subprocess.Popen(
            [*enter(found, "switch"), sys.executable, "-m", "benchmarks.wire_beats", *ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def close(self) -> None:
        """Nothing is left of it."""
        self._process.kill()
        self._process.wait()

    def end(self) -> dict[str, list[float]]:
        """The times."""
        said, _ = self._process.communicate(timeout=END_LIMIT_S)
        times: dict[str, list[float]] = json.loads(said)
        return times


class Works:
    """The light work of all hosts."""

    def __init__(self, hosts: Hosts) -> None:
        (hosts.place(hosts.names[0]) / "work").mkdir()
        self._each = {
            name: subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.light_work"),
                    *(str(hosts.place(name) / "work"), name, str(PAUSE_S)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for name in hosts.names
        }

    def close(self) -> None:
        """Nothing is left of it."""
        for process in self._each.values():
            process.kill()
            process.wait()

    def end(self) -> dict[str, dict[str, Any]]:
        """By host."""
        for process in self._each.values():
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        found = {}
        for name, process in self._each.items():
            said, _ = process.communicate(timeout=END_LIMIT_S)
            found[name] = json.loads(said)
        return found


def describe_idle(hosts: Hosts, report: Report) -> None:
    """Memory and processor time before the work begins."""
    found = idle_hosts.look(hosts, 10)
    report.daemon_mib = max(each.daemon_mib for each in found)
    report.supervisor_mib = max(each.supervisor_mib for each in found)
    report.all_mib = sum(each.mib for each in found)
    report.idle_cpu_percent = max(each.percent for each in found if not each.coordinates)


def look(hosts: Hosts, members: dict[str, Any], report: Report) -> None:
    """Ask every host once; what is not as it was is a mistake."""
    for name in hosts.names:
        try:
            told, nodes = hosts.ask(name, "status"), hosts.ask(name, "nodes")
        except (Problem, OSError, ValueError) as error:
            report.mistakes.append(f"{name} does not answer: {error}")
            continue
        if {key: told[key] for key in members[name]} != members[name]:
            report.mistakes.append(f"{name}: {told['epoch']}, {told['members']}, {told['state']}")
        if told["lease_left_s"] <= 0:
            report.mistakes.append(f"{name} has no lease")
        report.lease_least_left_s = min(report.lease_least_left_s, told["lease_least_left_s"])
        seen = [each["last_seen_s"] for each in nodes["nodes"] if not each["is_this_host"]]
        report.longest_silence_s = max(report.longest_silence_s, *seen)


def run(chosen: argparse.Namespace, tell: Callable[[str], None]) -> Report:
    """All of it."""
    processes = chosen.busy * (os.cpu_count() or 1)
    report = Report(chosen.hosts, chosen.minutes, processes)
    report.lease_least_left_s = Settings().lease_s
    started = time.monotonic()
    with open_lab(chosen.hosts) as hosts:
        report.up_s = time.monotonic() - started
        last = hosts.names[-1]
        hosts.host(last).umount()
        joined = hosts.mount(last)
        report.last_join_s, report.last_mount_s = joined.active_s, joined.mounted_s
        tell(f"{len(hosts.names)} hosts; idle")
        describe_idle(hosts, report)
        first = hosts.ask(hosts.names[0], "status")
        same = ("epoch", "members", "state", "path_losses")
        members = {name: {key: first[key] for key in same} for name in hosts.names}
        tell(f"{processes} processes compute for {chosen.minutes:g} minutes")
        end = time.monotonic() + chosen.minutes * 60
        with closing(Watch(hosts)) as watch, closing(Works(hosts)) as works, busy(processes):
            while time.monotonic() < end and not report.mistakes:
                time.sleep(LOOK_S)
                look(hosts, members, report)
            times = watch.end()
            done = works.end()
        judge(hosts, times, done, report)
        if report.mistakes:
            report.mistakes += evidence(hosts)
        else:
            tell("csvctl check")
            report.check = hosts.check()
            if report.check != "clean":
                report.mistakes.append(report.check)
    return report


def judge(
    hosts: Hosts,
    times: dict[str, list[float]],
    done: dict[str, dict[str, Any]],
    report: Report,
) -> None:
    """What the watch and the works have seen."""
    late = late_ms(times, Settings().heartbeat_s)
    report.heartbeats = len(late)
    report.late_p50_ms, report.late_p99_ms = quantile(late, 0.5), quantile(late, 0.99)
    report.late_p999_ms, report.late_most_ms = quantile(late, 0.999), late[-1]
    report.rounds = sum(each["rounds"] for each in done.values())
    slowest = max(done, key=lambda name: done[name]["longest_s"])
    longest = done[slowest]
    report.longest_call = f"{longest['longest']} {longest['longest_s']:.2f} s on {slowest}"
    for name, each in done.items():
        report.mistakes += [f"{name}: {error}" for error in each["errors"]]
    if report.mistakes:
        return
    lost = {name: hosts.ask(name, "status")["leases_lost"] for name in hosts.names}
    report.leases_lost = sum(lost.values())
    report.mistakes += [f"{name} lost {count} leases" for name, count in lost.items() if count]


def evidence(hosts: Hosts) -> list[str]:
    """The ends of all logs, for whoever wants to know why."""
    return [
        f"{name}: {line}"
        for name in hosts.names
        for line in hosts.host(name).log.read_text().splitlines()[-10:]
    ]


def main() -> int:
    """Print; exit 1 if anything is not as it should be."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.sixteen", description=__doc__)
    options.add_argument("--hosts", type=int, default=16)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--busy", type=int, default=2, help="computing processes a processor")
    options.add_argument("--json", action="store_true", help="for programs")
    chosen = options.parse_args()
    report = run(chosen, lambda words: print(words, file=sys.stderr, flush=True))
    if chosen.json:
        print(json.dumps({**asdict(report), "ok": report.ok}))
    else:
        for name, value in asdict(report).items():
            if name != "mistakes":
                print(
                    f"{name:20} {value:.2f}" if isinstance(value, float) else f"{name:20} {value}"
                )
        print("\n".join(report.mistakes) if report.mistakes else "ok")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
