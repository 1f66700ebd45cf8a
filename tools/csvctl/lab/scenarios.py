"""What `csvctl lab run` plays: one table. Each fault, pairs of faults, and what several hosts do.

With one host everything that one host can do is played: it writes, is broken, goes on, and all is
compared. With more, another host takes over what a lost host wrote, and others read meanwhile.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from csvctl.lab.directory_scenario import many_in_one_directory
from csvctl.lab.fault_scenario import Seat, begin, random_faults, take_over, with_faults
from csvctl.lab.faults import FAULTS, Fault
from csvctl.lab.stage import Stage, alone, require_idle
from csvfs.host.problems import Kind, Problem

_PING_PONG_ROUNDS: Final = 20
_FILL_BLOCK_BYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    summary: str
    least_hosts: int
    play: Callable[[Stage], None]
    """Raises TimeoutError, `Problem`, OSError: then it has failed."""


def play(
    directory: Path, name: str, tell: Callable[[str], None], seed: int | None = None
) -> dict[str, Any]:
    """Play a scenario; its result. Raises `Problem` if it cannot be played here.

    What a scenario does at random follows from the seed; without one it is another each time.
    """
    if name not in SCENARIOS:
        raise Problem(Kind.USAGE, f"there is no scenario {name!r}: see `csvctl lab run`")
    chosen = SCENARIOS[name]
    require_idle(directory, chosen.least_hosts, name)
    with alone(directory):
        stage = Stage(directory, name, tell, secrets.randbelow(1_000_000) if seed is None else seed)
        stage.sweep()
        return _play(stage, chosen)


def _play(stage: Stage, chosen: Scenario) -> dict[str, Any]:
    try:
        chosen.play(stage)
    except (TimeoutError, Problem, OSError) as error:
        stage.mistakes.append(f"while playing: {error}")
    try:
        return stage.finish()
    except (TimeoutError, Problem, OSError) as error:
        stage.mistakes.append(f"while finishing: {error}")
        return stage.result("not done")
    finally:
        for program in stage.programs:
            if not program.ended:
                program.process.kill()


def _quiet(stage: Stage) -> None:
    for seat in begin(stage):
        stage.wait_progress(seat.writer, 500)


def _fail_over(stage: Stage, *, rejoin: bool = False) -> None:
    """The writer is frozen while it writes; another host takes its file; it is thawed."""
    first, second = (host.name for host in stage.hosts()[:2])
    file = stage.new_file()
    writer = stage.write(second, file)
    stage.wait_progress(writer, 200)
    begun = time.monotonic_ns()
    stage.strike(Fault.FREEZE, second)
    seat = Seat(second, file, writer)
    take_over(stage, seat, first, begun)
    stage.wait_progress(seat.writer, file.blocks)
    stage.lose(second)
    stage.mend(second)
    stage.host(second).wait_daemon_ended()
    stage.wait_ended(writer)
    stage.wait_progress(seat.writer)
    if rejoin:
        stage.mount_again(second)
        stage.stop(seat.writer)
        again = stage.write(second, file, rewrite=True)
        stage.wait_progress(again, 2 * file.blocks)


def _rejoin(stage: Stage) -> None:
    _fail_over(stage, rejoin=True)


def _fill(stage: Stage) -> None:
    """All write until the volume is full; then the files go, and the space is there again."""
    lab = stage.hosts()[0].lab
    blocks = lab.size_bytes // _FILL_BLOCK_BYTES
    for attempt in ("first", "again"):
        files, writers = [], []
        for host in stage.hosts():
            file = stage.new_file(blocks=blocks, block_bytes=_FILL_BLOCK_BYTES)
            files.append(file)
            writers.append(
                stage.write(host.name, file, rewrite=True, once=True, until_full=True, batch=32)
            )
        stage.tell(f"filling the volume: {attempt}")
        for writer in writers:
            stage.wait_ended(writer, limit_s=900)
        stage.details[f"{attempt}_bytes"] = sum(each.done for each in writers) * _FILL_BLOCK_BYTES
        for host, file in zip(stage.hosts(), files, strict=True):
            stage.verify(host.name, file)
            (host.mountpoint / file.name).unlink()
            file.removed = True
    if stage.details["again_bytes"] < 0.95 * stage.details["first_bytes"]:
        stage.mistakes.append("the space of removed files did not come back")


def _ping_pong(stage: Stage) -> None:
    """One file, written whole by one host after the other; each first looks at it."""
    hosts = [host.name for host in stage.hosts()]
    file = stage.new_file(blocks=64)
    for number in range(_PING_PONG_ROUNDS):
        writer = stage.write(hosts[number % len(hosts)], file, rewrite=True, once=True)
        stage.tell(f"round {number + 1} of {_PING_PONG_ROUNDS}")
        stage.wait_ended(writer)


def _table() -> dict[str, Scenario]:
    table = {"quiet": Scenario("every host writes and reads; nothing breaks", 1, _quiet)}
    for kind in Fault:
        table[kind] = Scenario(FAULTS[kind].means, 1, with_faults(kind))
    for one, other in itertools.combinations_with_replacement(Fault, 2):
        least = 2 if one is other else 1
        summary = f"{one} on one host, {other} on another"
        table[f"{one}+{other}"] = Scenario(summary, least, with_faults(one, other))
    for kind in Fault:
        if kind is not Fault.TARGET_RESTART:
            played = with_faults(kind, coordinator=True)
            table[f"{kind}+coordinator"] = Scenario(f"{kind} on the coordinator's host", 2, played)
    table |= {
        "random": Scenario("six faults, of any kinds on any hosts (--seed)", 1, random_faults),
        "fail-over": Scenario("a writer is frozen; another host takes its file", 2, _fail_over),
        "rejoin": Scenario("fail-over, and the frozen host comes back", 2, _rejoin),
        "fill": Scenario("every host writes until the volume is full, twice", 1, _fill),
        "ping-pong": Scenario("hosts write one file, one after the other", 1, _ping_pong),
        "directory": Scenario(
            "every host creates, renames, unlinks and appends in one directory",
            1,
            many_in_one_directory,
        ),
    }
    return table


SCENARIOS: Final[dict[str, Scenario]] = _table()
