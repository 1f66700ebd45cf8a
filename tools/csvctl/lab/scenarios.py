"""What `csvctl lab run` plays: one table. Each fault, pairs of faults, and what several hosts do.

With one host everything that one host can do is played: it writes, is broken, goes on, and all is
compared. With more, another host takes over what a lost host wrote, and others read meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from csvctl.lab.directory_scenario import many_in_one_directory
from csvctl.lab.faults import FAULTS, Fault
from csvctl.lab.stage import File, Running, Stage, require_idle
from csvfs.host.problems import Kind, Problem

_HOLD_S: Final = {
    Fault.SAN_CUT: 4.0,
    Fault.SAN_RESET: 4.0,
    Fault.SLOW_SAN: 4.0,
    Fault.TARGET_RESTART: 1.0,
    # Beyond --evict-after: with peers, they evict the host.
    Fault.NET_CUT: 10.0,
    Fault.FREEZE: 10.0,
    Fault.KILL: 1.0,
    Fault.POWER_OFF: 10.0,
}
_NEEDS_DAEMON: Final = (Fault.FREEZE, Fault.KILL)
_PING_PONG_ROUNDS: Final = 20
_FILL_BLOCK_BYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    summary: str
    least_hosts: int
    play: Callable[[Stage], None]
    """Raises TimeoutError, `Problem`, OSError: then it has failed."""


def play(directory: Path, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Play a scenario; its result. Raises `Problem` if it cannot be played here."""
    if name not in SCENARIOS:
        raise Problem(Kind.USAGE, f"there is no scenario {name!r}: see `csvctl lab run`")
    chosen = SCENARIOS[name]
    require_idle(directory, chosen.least_hosts, name)
    stage = Stage(directory, name, tell)
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


# -- faults ------------------------------------------------------------------------------------
@dataclass
class _Seat:
    """A host, its file, and who uses that."""

    host: str
    file: File
    writer: Running


def _with_faults(*kinds: Fault, coordinator: bool = False) -> Callable[[Stage], None]:
    def played(stage: Stage) -> None:
        seats = _begin(stage)
        # The coordinator first, or last, when it takes over what others leave.
        office = stage.hosts()[0].status()["coordinator"]
        order = sorted(seats, key=lambda seat: (seat.host == office) != coordinator)
        stage.details["coordinator"] = office
        struck = [(kind, order[number % len(order)]) for number, kind in enumerate(kinds)]
        begun = time.monotonic_ns()
        for kind, seat in struck:
            if kind in _NEEDS_DAEMON and stage.host(seat.host).daemon() is None:
                stage.details["skipped"] = f"{kind}: no daemon lived on {seat.host} any more"
            else:
                stage.strike(kind, seat.host)
        stage.tell("waiting")
        time.sleep(max(_HOLD_S[kind] for kind in kinds))
        victims = list(dict.fromkeys(id(seat) for _, seat in struck))
        sound = [seat for seat in seats if id(seat) not in victims]
        # All before anybody is waited for: who has no SAN may hold what the others want.
        for host in dict.fromkeys(seat.host for _, seat in struck):
            if host not in stage.lost:
                stage.mend(host)
        for seat in seats:
            if id(seat) in victims:
                _recover(stage, seat, sound, begun)
        for seat in seats:
            stage.wait_progress(seat.writer)

    return played


def _begin(stage: Stage) -> list[_Seat]:
    """On each host a writer of a file of its own, and on the next one a reader of it."""
    names = [host.name for host in stage.hosts()]
    seats = []
    for name in names:
        file = stage.new_file()
        seats.append(_Seat(name, file, stage.write(name, file, pause_s=0.002)))
    stage.tell("writing")
    for number, seat in enumerate(seats):
        stage.wait_progress(seat.writer)
        stage.wait_progress(stage.read(names[(number + 1) % len(names)], seat.file))
    return seats


def _recover(stage: Stage, seat: _Seat, sound: list[_Seat], begun_ns: int) -> None:
    """Have the file written again: by the same writer, if its host lives, else by another."""
    if seat.host in stage.lost:
        # A writer on a host without power was killed with it; else it has had an error.
        stage.wait_ended(seat.writer)
        if sound:
            _take_over(stage, seat, sound[0].host, begun_ns)
        stage.mend(seat.host)
        stage.mount_again(seat.host)
        if not sound:
            _take_over(stage, seat, seat.host, begun_ns)
        return
    if not stage.wait_progress(seat.writer):
        # Its peers have gone on without it: it was evicted, and says so in its log.
        stage.details.setdefault("evicted", []).append(seat.host)
        stage.mount_again(seat.host)
        _take_over(stage, seat, seat.host, begun_ns)


def _take_over(stage: Stage, seat: _Seat, name: str, begun_ns: int) -> None:
    stage.tell(f"{name} takes over the file of {seat.host}")
    seat.writer = stage.write(name, seat.file, rewrite=True)
    stage.wait_progress(seat.writer, 1)
    stage.details[f"{seat.host}_fail_over_s"] = round((time.monotonic_ns() - begun_ns) / 1e9, 2)


# -- several hosts -------------------------------------------------------------------------------
def _quiet(stage: Stage) -> None:
    for seat in _begin(stage):
        stage.wait_progress(seat.writer, 500)


def _fail_over(stage: Stage, *, rejoin: bool = False) -> None:
    """The writer is frozen while it writes; another host takes its file; it is thawed."""
    first, second = (host.name for host in stage.hosts()[:2])
    file = stage.new_file()
    writer = stage.write(second, file)
    stage.wait_progress(writer, 200)
    begun = time.monotonic_ns()
    stage.strike(Fault.FREEZE, second)
    seat = _Seat(second, file, writer)
    _take_over(stage, seat, first, begun)
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
            writers.append(stage.write(host.name, file, rewrite=True, once=True, until_full=True))
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
        table[kind] = Scenario(FAULTS[kind].means, 1, _with_faults(kind))
    for one, other in itertools.combinations_with_replacement(Fault, 2):
        least = 2 if one is other else 1
        summary = f"{one} on one host, {other} on another"
        table[f"{one}+{other}"] = Scenario(summary, least, _with_faults(one, other))
    for kind in Fault:
        if kind is not Fault.TARGET_RESTART:
            played = _with_faults(kind, coordinator=True)
            table[f"{kind}+coordinator"] = Scenario(f"{kind} on the coordinator's host", 2, played)
    table |= {
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
