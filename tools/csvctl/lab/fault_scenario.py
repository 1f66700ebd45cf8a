"""Programs on every host, faults on some of them, and everybody going on: one fault, two, or what a
seed chooses.

Each host writes a file of its own that its neighbour reads (a `_Seat`). What may happen to whom:

struck    its programs wait, or are lost with their mount; the others may evict it.
sound     its programs see no error. Except: of sets of hosts that do not hear each other the
          largest stays, and of equal ones only one can. So where a cluster link is cut, and one
          host is left that is not struck, that one may be evicted, too. (Who has no SAN leaves it
          alone: it is evicted if others want what it holds.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from csvctl.lab.faults import FAULTS, Fault
from csvctl.lab.stage import File, Running, Stage

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
_HARMLESS: Final = (Fault.SLOW_SAN, Fault.TARGET_RESTART)
"""Nobody is evicted for one of these."""
_ROUNDS: Final = 3
_FAULTS_A_ROUND: Final = 2
_MAX_GAP_S: Final = 3.0
_MAX_HOLD_S: Final = 12.0


@dataclass
class Seat:
    """A host, its file, and who uses that."""

    host: str
    file: File
    writer: Running
    reader: Running | None = None


def begin(stage: Stage) -> list[Seat]:
    """On each host a writer of a file of its own, and on the next one a reader of it."""
    seats = []
    for host in stage.hosts():
        file = stage.new_file()
        seats.append(Seat(host.name, file, stage.write(host.name, file, pause_s=0.002)))
    stage.tell("writing")
    _settle(stage, seats)
    return seats


def _settle(stage: Stage, seats: list[Seat]) -> None:
    """Every writer at home, and every reader there."""
    for number, seat in enumerate(seats):
        if seat.writer.host != seat.host:
            stage.stop(seat.writer)
            seat.writer = stage.write(seat.host, seat.file, pause_s=0.002, rewrite=True)
        stage.wait_progress(seat.writer)
        if seat.reader is None or seat.reader.ended:
            seat.reader = stage.read(seats[(number + 1) % len(seats)].host, seat.file)
        stage.wait_progress(seat.reader)


def with_faults(*kinds: Fault, coordinator: bool = False) -> Callable[[Stage], None]:
    """A scenario of faults on one host after the other, beginning with the coordinator or not."""

    def played(stage: Stage) -> None:
        seats = begin(stage)
        # The coordinator first, or last, when it takes over what others leave.
        office = stage.hosts()[0].status()["coordinator"]
        order = sorted(seats, key=lambda seat: (seat.host == office) != coordinator)
        stage.details["coordinator"] = office
        struck = [(kind, order[number % len(order)]) for number, kind in enumerate(kinds)]
        begun_ns = time.monotonic_ns()
        for kind, seat in struck:
            _strike(stage, kind, seat)
        sound = sound_ones(seats, struck)
        if len(struck) == 1 and FAULTS[kinds[0]].ends_daemon and sound:
            # Nothing else is broken: the others need not wait for anybody.
            stage.wait_ended(struck[0][1].writer)
            take_over(stage, struck[0][1], sound[0].host, begun_ns)
        stage.tell("waiting")
        _sleep_until(begun_ns, max(_HOLD_S[kind] for kind in kinds))
        _recover_all(stage, seats, struck, begun_ns)

    return played


def random_faults(stage: Stage) -> None:
    """Faults of any kinds, on any hosts, so long after each other and for so long as it happens."""
    chooser = random.Random(stage.seed)
    seats = begin(stage)
    told: list[str] = stage.details.setdefault("faults", [])
    for _ in range(_ROUNDS):
        struck: list[tuple[Fault, Seat]] = []
        begun_ns = time.monotonic_ns()
        gap_s, hold_s = chooser.uniform(0, _MAX_GAP_S), chooser.uniform(0, _MAX_HOLD_S)
        for number in range(_FAULTS_A_ROUND):
            kind, seat = chooser.choice(list(Fault)), chooser.choice(seats)
            _sleep_until(begun_ns, gap_s * number)
            if kind in stage.host(seat.host).state.faults:
                continue
            told.append(f"{kind} on {seat.host} at {(time.monotonic_ns() - begun_ns) / 1e9:.1f} s")
            if _strike(stage, kind, seat):
                struck.append((kind, seat))
        told.append(f"all healed after {hold_s:.1f} s")
        stage.tell("waiting")
        time.sleep(hold_s)
        _recover_all(stage, seats, struck, begun_ns)
        _settle(stage, seats)


def _sleep_until(begun_ns: int, after_s: float) -> None:
    time.sleep(max(0.0, after_s - (time.monotonic_ns() - begun_ns) / 1e9))


def _strike(stage: Stage, kind: Fault, seat: Seat) -> bool:
    if FAULTS[kind].needs_daemon and stage.host(seat.host).daemon() is None:
        stage.details["skipped"] = f"{kind}: no daemon lived on {seat.host} any more"
        return False
    stage.strike(kind, seat.host)
    return True


def sound_ones(seats: list[Seat], struck: list[tuple[Fault, Seat]]) -> list[Seat]:
    """Who has nothing that a host is evicted for.

    A slow SAN is nothing of that kind, but everybody has to log in again to a target that has
    restarted, and where that takes long the others may not wait.
    """
    restarted = Fault.TARGET_RESTART in dict(struck)
    harmless = (Fault.TARGET_RESTART,) if restarted else _HARMLESS
    victims = {id(seat) for kind, seat in struck if kind not in harmless}
    return [seat for seat in seats if id(seat) not in victims]


def may_be_evicted(seats: list[Seat], struck: list[tuple[Fault, Seat]]) -> list[Seat]:
    """Who may be evicted though it is not struck: in the end it and another may hear nobody."""
    sound = sound_ones(seats, struck)
    return sound if len(sound) == 1 and Fault.NET_CUT in dict(struck) else []


def _recover_all(
    stage: Stage, seats: list[Seat], struck: list[tuple[Fault, Seat]], begun_ns: int
) -> None:
    """Mend, and have every file written again; who was evicted comes back."""
    # All before anybody is waited for: who has no SAN may hold what the others want.
    for host in dict.fromkeys(seat.host for _, seat in struck):
        if host not in stage.down:
            stage.mend(host)
    sound = sound_ones(seats, struck)
    may_go = may_be_evicted(seats, struck)
    for seat in seats:
        if (seat not in sound or seat in may_go) and seat.host not in stage.down:
            _go_on(stage, seat, begun_ns)
    for seat in seats:
        if seat.host in stage.down:
            _bring_back(stage, seat, sound, begun_ns)
    for seat in seats:
        stage.wait_progress(seat.writer)


def _go_on(stage: Stage, seat: Seat, begun_ns: int) -> None:
    """The same writer goes on, if its host was not evicted."""
    if stage.wait_progress(seat.writer):
        return
    # Its peers have gone on without it: it was evicted, and says so in its log.
    stage.details.setdefault("evicted", []).append(seat.host)
    stage.mount_again(seat.host)
    take_over(stage, seat, seat.host, begun_ns)


def _bring_back(stage: Stage, seat: Seat, sound: list[Seat], begun_ns: int) -> None:
    """Another host has the file, or the same one when it is back."""
    # A writer on a host without power was killed with it; else it has had an error.
    if seat.writer.host == seat.host:
        stage.wait_ended(seat.writer)
        if sound:
            take_over(stage, seat, sound[0].host, begun_ns)
    stage.mend(seat.host)
    stage.mount_again(seat.host)
    if not sound:
        take_over(stage, seat, seat.host, begun_ns)


def take_over(stage: Stage, seat: Seat, name: str, begun_ns: int) -> None:
    """Another writer looks at the file, and writes it; how long that took since ``begun_ns``."""
    stage.tell(f"{name} takes over the file of {seat.host}")
    seat.writer = stage.write(name, seat.file, rewrite=True)
    stage.wait_progress(seat.writer, 1)
    stage.details[f"{seat.host}_fail_over_s"] = round((time.monotonic_ns() - begun_ns) / 1e9, 2)
