"""Was anything lost, stale, or late? The judgement over a history and what stands there at the end.

Each place of a file has one writer at a time (a *term*), so its writes are in order. For each:

lost      what was acknowledged before somebody looked, with nothing newer there: looked at by a new
          writer when it came, and at the end.
stale     a read that began after a write had returned, or after another read had shown it, and
          shows an older one. (A write that was never acknowledged may be undone by a crash; then a
          read of it proves nothing.)
late      ("zombie") a write of an earlier term that changed what a later term's writer had found or
          written: it came from a host that had been fenced.
foreign   torn, of another place, or never issued. It counts as lost where it stands at the end or
          before a new writer, else as stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from csvctl.lab.block import NEVER, Version
from csvctl.lab.history import Found, History, Place, Read


@dataclass
class Verdict:
    """What is wrong, in words; nothing, if all is well."""

    lost: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    zombies: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.stale or self.zombies)


def judge(history: History, final: dict[Place, Version], foreign: dict[Place, str]) -> Verdict:
    """Judge.

    ``final`` is what stood in each place when everything was over, ``foreign`` why what stood there
    was no block. A place in neither is not looked at.
    """
    verdict = Verdict()
    for place, words in foreign.items():
        verdict.lost.append(f"{_name(place)}: {words}")
    for place, words in history.foreign:
        verdict.stale.append(f"{_name(place)}: read: {words}")
    for place in sorted(history.places() | set(final)):
        found = sorted(history.found.get(place, ()), key=lambda each: each.at_ns)
        for each in found:
            _judge_looked(history, place, each.version, each.at_ns, found, verdict)
        if place in final:
            _judge_looked(history, place, final[place], None, found, verdict)
        _judge_reads(history, place, found, verdict)
    return verdict


def _judge_looked(
    history: History,
    place: Place,
    seen: Version,
    at_ns: int | None,
    found: list[Found],
    verdict: Verdict,
) -> None:
    """What stood in a place when it was looked at for good."""
    if _never_issued(history, place, seen):
        verdict.lost.append(f"{_name(place)}: holds {seen}, which nobody wrote")
        return
    acked = [a.version for a in history.acked.get(place, ()) if at_ns is None or a.acked_ns < at_ns]
    last = max(acked, default=NEVER)
    if _is_late(seen, at_ns, found):
        verdict.zombies.append(f"{_name(place)}: holds {seen}, of a term that was over")
    elif seen < last:
        verdict.lost.append(f"{_name(place)}: holds {seen}, {last} was acknowledged")


def _is_late(seen: Version, at_ns: int | None, found: list[Found]) -> bool:
    """Is it of a term that another had followed, and not what that one had found?"""
    before = [each for each in found if at_ns is None or each.at_ns < at_ns]
    return bool(before) and NEVER != seen != before[-1].version and seen[0] < before[-1].by


def _judge_reads(history: History, place: Place, found: list[Found], verdict: Verdict) -> None:
    """Every read of a place, against the writes and reads that were over when it began."""
    acks = history.acked.get(place, ())
    stable = {ack.version for ack in acks}
    reads = history.reads.get(place, ())
    known = [(ack.written_ns, ack.version) for ack in acks]
    known += [(read.to_ns, read.version) for read in reads if read.version in stable]
    known.sort()
    position, floor = 0, NEVER
    for read in sorted(reads, key=lambda each: each.from_ns):
        while position < len(known) and known[position][0] < read.from_ns:
            floor = max(floor, known[position][1])
            position += 1
        if _never_issued(history, place, read.version):
            verdict.stale.append(f"{_name(place)}: read {read.version}, which nobody wrote")
        elif _is_late_read(read, found):
            verdict.zombies.append(f"{_name(place)}: read {read.version}, of a term that was over")
        elif read.version < floor:
            verdict.stale.append(f"{_name(place)}: read {read.version}, {floor} was there before")


def _is_late_read(read: Read, found: list[Found]) -> bool:
    before = [each for each in found if each.at_ns < read.from_ns]
    # Older than what was found is stale; newer, and still of an earlier term, came late.
    return bool(before) and before[-1].version < read.version and read.version[0] < before[-1].by


def _never_issued(history: History, place: Place, version: Version) -> bool:
    return version != NEVER and version not in history.issued.get(place, ())


def _name(place: Place) -> str:
    file, offset = place
    return f"file {file} offset {offset}"
