"""A little of everything, in one directory of a mount.

    python -m benchmarks.light_work DIR NAME PAUSE_S

Creates a file, writes, fsyncs, renames it over the one before, lists the directory and looks at
every host's file. Ends when its standard input is closed, and prints JSON: rounds, the longest call
and which one it was, errors.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


class Work:
    """Calls, and how long the longest took."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.rounds = 0
        self.longest_s = 0.0
        self.longest = ""
        self.errors: list[str] = []

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """One call; None if it fails."""
        started = time.monotonic()
        try:
            return call()
        except OSError as error:
            self.errors.append(f"{what}: {error}")
            return None
        finally:
            took = time.monotonic() - started
            if took > self.longest_s:
                self.longest_s, self.longest = took, what

    def once(self) -> None:
        """One round."""
        fresh = self.directory / f"{self.name}.{self.rounds}"
        file = self.timed("create", lambda: os.open(fresh, os.O_CREAT | os.O_RDWR))
        if file is not None:
            self.timed("write", lambda: os.pwrite(file, bytes(4096), 0))
            self.timed("fsync", lambda: os.fsync(file))
            self.timed("close", lambda: os.close(file))
            stays = self.directory / self.name
            self.timed("rename", lambda: os.rename(fresh, stays))
        for other in self.timed("list", lambda: os.listdir(self.directory)) or ():
            if "." not in other:  # what is renamed meanwhile may be gone
                self.timed("stat", partial(os.stat, self.directory / other))
        self.rounds += 1


def main() -> None:
    """Until told."""
    directory, name, pause_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    work = Work(directory, name)
    while not select.select([sys.stdin], [], [], pause_s)[0]:
        work.once()
    print(
        json.dumps(
            {
                "rounds": work.rounds,
                "longest_s": work.longest_s,
                "longest": work.longest,
                "errors": work.errors,
            }
        )
    )


if __name__ == "__main__":
    main()
