"""The log that a program of the workload keeps outside the volume, a line an event.

    ISSUED FILE OFFSET TERM SEQUENCE              before a write
    ACKED FILE OFFSET TERM SEQUENCE WRITTEN ACKED  when fsync had returned
    FOUND FILE OFFSET TERM SEQUENCE BY AT          what a writer of term BY found when it came
    READ FILE OFFSET TERM SEQUENCE FROM TO         what a reader found
    FOREIGN FILE OFFSET AT WORDS                   a block that nobody wrote to this place
    ERROR WHAT ERRNO AT                            an error of the filesystem
    ENDED AT                                       the program ended as it was told to

Times are nanoseconds of CLOCK_MONOTONIC, which is one for all hosts of a lab. A line that a killed
program has not finished counts as not written.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from csvctl.lab.block import Version

Place = tuple[int, int]
"""(file, offset in bytes)."""


@dataclass(frozen=True, slots=True)
class Ack:
    """A write that fsync has acknowledged."""

    version: Version
    written_ns: int
    """pwrite had returned: everybody sees it."""
    acked_ns: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a new writer found before it wrote."""

    version: Version
    by: int
    """Its term."""
    at_ns: int


@dataclass(frozen=True, slots=True)
class Read:
    """What a reader found."""

    version: Version
    from_ns: int
    to_ns: int


@dataclass
class History:
    """Every event of one scenario."""

    issued: dict[Place, set[Version]] = field(default_factory=lambda: defaultdict(set))
    acked: dict[Place, list[Ack]] = field(default_factory=lambda: defaultdict(list))
    found: dict[Place, list[Found]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[Place, list[Read]] = field(default_factory=lambda: defaultdict(list))
    foreign: list[tuple[Place, str]] = field(default_factory=list)

    def places(self) -> set[Place]:
        """Everywhere where anything was written or looked at."""
        return {*self.issued, *self.acked, *self.found, *self.reads}


@dataclass
class Diary:
    """What one program met with."""

    done_ns: list[int] = field(default_factory=list)
    """When each write was acknowledged or each read came back."""
    errors: list[str] = field(default_factory=list)
    ended_ns: int | None = None

    @property
    def max_pause_s(self) -> float:
        """The longest time between two completions, the last and the end included."""
        times = sorted(self.done_ns) + ([self.ended_ns] if self.ended_ns is not None else [])
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return max(gaps, default=0) / 1e9


def read_log(path: Path, history: History) -> Diary:
    """Add a program's log to a history; its own part comes back. Raises ValueError, OSError."""
    text = path.read_text() if path.exists() else ""
    whole, _, _unfinished = text.rpartition("\n")
    return add_lines(whole.splitlines(), history)


def add_lines(lines: Iterable[str], history: History) -> Diary:
    """The same for lines. Raises ValueError for one that is none of these."""
    diary = Diary()
    for line in lines:
        kind, *words = line.split(" ")
        if kind == "ENDED":
            diary.ended_ns = int(words[0])
        elif kind == "ERROR":
            diary.errors.append(" ".join(words))
        elif kind == "FOREIGN":
            place = int(words[0]), int(words[1])
            history.foreign.append((place, " ".join(words[3:])))
            diary.done_ns.append(int(words[2]))
        else:
            _add(kind, list(map(int, words)), history, diary)
    return diary


def _add(kind: str, numbers: list[int], history: History, diary: Diary) -> None:
    file, offset, term, sequence, *times = numbers
    place, version = (file, offset), (term, sequence)
    if kind == "ISSUED":
        history.issued[place].add(version)
    elif kind == "ACKED":
        history.acked[place].append(Ack(version, *times))
        diary.done_ns.append(times[1])
    elif kind == "FOUND":
        history.found[place].append(Found(version, *times))
    elif kind == "READ":
        history.reads[place].append(Read(version, *times))
        diary.done_ns.append(times[1])
    else:
        raise ValueError(f"no event is called {kind!r}")
