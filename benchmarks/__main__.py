"""`make bench`: every figure with its goal, as a table and as benchmarks/results/latest.json.

    python -m benchmarks [--seconds 5] [--rounds 3] [--only GROUP] ...

The mount and the raw LUN are measured in one run on one target, because absolute figures drift.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import big_check, mounted, of_hosts, raw
from benchmarks.figures import Figure, at_least, at_most
from tests.tgt import Tgt

RESULTS = Path(__file__).with_name("results") / "latest.json"
CSVCTL = str(Path(sys.executable).with_name("csvctl"))
LUN_BYTES = 6 << 30
FILE_BYTES = 1 << 30
EXTENTS = 10_000


@dataclass(frozen=True, slots=True)
class Pair:
    """One workload on the mount and on the raw LUN."""

    name: str
    rw: str
    block_bytes: int
    depth: int
    goal: float
    """Least part of the raw figure."""


PAIRS = (
    Pair("4K random read, depth 32", "randread", 4096, 32, 0.2),
    Pair("4K random write, depth 32", "randwrite", 4096, 32, 0.2),
    Pair("1M sequential read, depth 4", "read", 1 << 20, 4, 0.4),
    Pair("1M sequential write, depth 4", "write", 1 << 20, 4, 0.5),
)


def csvctl(*arguments: str) -> str:
    """Run csvctl to its end."""
    return subprocess.run([CSVCTL, *arguments], capture_output=True, text=True, check=True).stdout


def timed(*arguments: str) -> float:
    """Seconds that a csvctl command takes."""
    started = time.monotonic()
    csvctl(*arguments)
    return time.monotonic() - started


def daemon_pid(directory: Path) -> int:
    """Process id of the daemon of a mount."""
    return int(json.loads(csvctl("status", str(directory), "--json"))["pid"])


def data_path(url: str, directory: Path, seconds: int, rounds: int) -> list[Figure]:
    """The four workloads, mount and raw in turn; medians."""
    image = directory / "bench.raw"
    figures = []
    mine: dict[str, list[float]] = {pair.name: [] for pair in PAIRS}
    for _ in range(rounds):
        for pair in PAIRS:
            mine[pair.name].append(
                mounted.fio_iops(image, pair.rw, pair.block_bytes, pair.depth, seconds, FILE_BYTES)
            )
    for pair in PAIRS:
        measure = raw.read_iops if "read" in pair.rw else raw.write_iops
        theirs = [
            measure(url, pair.block_bytes, pair.depth, seconds, random="rand" in pair.rw)
            for _ in range(rounds)
        ]
        value, base = statistics.median(mine[pair.name]), statistics.median(theirs)
        figures.append(
            Figure(
                pair.name,
                value,
                "/s",
                f">= {pair.goal} of raw",
                value >= pair.goal * base,
                f"fio --rw={pair.rw} --bs={pair.block_bytes} --iodepth={pair.depth}"
                " --ioengine=libaio --direct=1",
                base,
            )
        )
    return figures


def metadata(url: str, directory: Path) -> list[Figure]:
    """Creates, memory, remount, the fragmented image. The volume is mounted before and after."""
    figures = []
    rate = mounted.creates_a_second(directory / "creates", 5)
    figures.append(at_least("creates", rate, "/s", 500, "open(O_CREAT) in a row"))
    mounted.make_fragmented(directory / "fragmented.raw", EXTENTS)
    csvctl("umount", str(directory))
    seconds = timed("mount", url, str(directory))
    figures.append(at_most("mount after a clean leave", seconds, "s", 1, "csvctl mount LUN DIR"))
    time.sleep(1)  # the figure is an idle daemon's
    idle = mounted.resident_bytes(daemon_pid(directory)) / (1 << 20)
    figures.append(at_most("idle daemon", idle, "MiB", 100, "VmRSS of /proc/PID/status"))
    opened = mounted.open_and_read(directory / "fragmented.raw") * 1000
    figures.append(
        at_most(
            "open an image of 10,000 extents", opened, "ms", 50, "open(2) and three reads, cold"
        )
    )
    return figures


def volume(seconds: int, rounds: int) -> list[Figure]:
    """One host's mount, beside the raw LUN."""
    with Tgt(lun_bytes=1 << 40) as big:
        formatted_s = timed("format", big.url, "--label", "bench")
    figures = [
        at_most("format a 1 TiB sparse LUN", formatted_s, "s", 2, "csvctl format LUN --label bench")
    ]
    with ExitStack() as stack:
        target = stack.enter_context(Tgt(lun_bytes=LUN_BYTES))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csvfs-bench-")))
        directory = scratch / "mnt"
        directory.mkdir()
        csvctl("format", target.url, "--label", "bench")
        csvctl("mount", target.url, str(directory))
        stack.callback(subprocess.run, [CSVCTL, "umount", str(directory)], capture_output=True)
        figures += metadata(target.url, directory)
        mounted.fill(directory / "bench.raw", FILE_BYTES)
        other = target.lun_url(target.add_lun(2 << 30))
        figures += data_path(other, directory, seconds, rounds)
    return figures


def check(_seconds: int, _rounds: int) -> list[Figure]:
    """A full-size volume, checked."""
    return [at_most(*figure) for figure in big_check.check_tebibyte()]


GROUPS: dict[str, Callable[[int, int], list[Figure]]] = {
    "locks": of_hosts.locks,
    "volume": volume,
    "fail-over": of_hosts.fail_overs,
    "many-locks": of_hosts.comings_and_goings,
    "idle": of_hosts.idle,
    "messages": of_hosts.messages,
    "check": check,
}


def show(figures: list[Figure]) -> None:
    """The table."""
    table = Table("figure", "mount", "raw", "of raw", "goal", "", title="csvfs beside the raw LUN")
    for figure in figures:
        base = f"{figure.raw:,.0f}" if figure.raw else ""
        part = f"{figure.value / figure.raw:.2f}" if figure.raw else ""
        value = f"{figure.value:,.2f} {figure.unit}"
        table.add_row(figure.name, value, base, part, figure.goal, "ok" if figure.ok else "MISSED")
    Console(width=110).print(table)


def save(measured: list[Figure]) -> None:
    """The same as JSON. Figures of groups that were left out stay as they were, each with when it
    was measured."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    kept: list[dict[str, Any]] = []
    if RESULTS.exists():
        names = {figure.name for figure in measured}
        before = json.loads(RESULTS.read_text())
        kept = [
            {"when": before["when"], **each}
            for each in before["figures"]
            if each["name"] not in names
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "when": when,
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "figures": [*({"when": when, **asdict(figure)} for figure in measured), *kept],
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    """Measure, print, save; exit status 1 when a goal was missed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_argument("--seconds", type=int, default=5, help="length of each measurement")
    options.add_argument("--rounds", type=int, default=3, help="measurements a figure")
    options.add_argument(
        "--only", action="append", choices=list(GROUPS), help="this group; may be repeated"
    )
    options.add_argument("--no-check", action="store_true", help="leave out check of 1 TiB")
    chosen = options.parse_args()
    wanted = chosen.only or [name for name in GROUPS if name != "check" or not chosen.no_check]
    figures: list[Figure] = []
    for name, measure in GROUPS.items():
        if name in wanted:
            Console(stderr=True).print(f"measuring: {name}")
            figures += measure(chosen.seconds, chosen.rounds)
    show(figures)
    save(figures)
    return 0 if all(figure.ok for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
