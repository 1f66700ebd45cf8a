"""Lock messages of hosts that mind their own business: `python -m benchmarks.own_directories`.

Two hosts of a lab create files, each in a directory of its own, at the same time. Once each has
created some, it has all locks it needs, and masters those of the new files itself: it sends nothing
for a file more. What is counted is everything that the two lock managers say to each other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from benchmarks.lab_hosts import Hosts, open_lab

BOUND = 0.01
"""Messages a file: now and then a group is full, and another is looked for."""
WARM_FILES, FILES = 200, 1_000


@dataclass(frozen=True, slots=True)
class Said:
    """By both hosts together."""

    messages: int
    files: int

    @property
    def each(self) -> float:
        """Messages a file."""
        return self.messages / self.files


def measure() -> Said:
    """Warm up, then count."""
    with open_lab(2) as lab:
        for name in lab.names:
            (lab.place(name) / f"of-{name}").mkdir()
        lab.each(lambda name: _create(lab, name, 0, WARM_FILES))
        before = _sent(lab)
        lab.each(lambda name: _create(lab, name, WARM_FILES, WARM_FILES + FILES))
        return Said(_sent(lab) - before, FILES * len(lab.names))


def _create(lab: Hosts, name: str, first: int, end: int) -> None:
    directory = lab.place(name) / f"of-{name}"
    for number in range(first, end):
        os.close(os.open(directory / f"file{number}", os.O_CREAT | os.O_EXCL))


def _sent(lab: Hosts) -> int:
    return sum(int(lab.ask(name, "status")["lock_messages_sent"]) for name in lab.names)


def main() -> None:
    """Print; exit 1 if there are any."""
    said = measure()
    print(f"{said.messages} lock messages for {said.files} files: {said.each:.4f} a file")
    if said.each > BOUND:
        raise SystemExit(f"more than {BOUND:g} a file")


if __name__ == "__main__":
    main()
