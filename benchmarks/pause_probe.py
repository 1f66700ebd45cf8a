"""What one host's users notice: `python -m benchmarks.pause_probe OWN FRESH FIRST`.

Two threads, each one call after the other, a short pause between (OWN, FRESH: directories):

own      on files that the host uses all the time: write, stat, create a new one in OWN
fresh    open, fstat and close of the next file in FRESH, from number FIRST on, that no host has
         touched since it has mounted: each needs a lock that the host does not have

Ends when its standard input is closed, and prints JSON: for each thread how many calls, and every
gap between the ends of two calls that was longer than 20 ms, as (end, seconds), CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

PAUSE_S = 0.01
NOTED_S = 0.02


class Calls:
    """One thread's."""

    def __init__(self, calls: Iterator[Callable[[], Any]], over: threading.Event) -> None:
        self.count = 0
        self.gaps: list[tuple[float, float]] = []
        self.error = ""
        self._calls = calls
        self._over = over
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        before = time.monotonic()
        try:
            for call in self._calls:
                if self._over.wait(PAUSE_S):
                    return
                call()
                now = time.monotonic()
                if now - before > NOTED_S:
                    self.gaps.append((now, now - before))
                before = now
                self.count += 1
        except OSError as error:
            self.error = str(error)

    def told(self) -> dict[str, Any]:
        """For the parent."""
        return {"count": self.count, "gaps": self.gaps, "error": self.error}


def own(directory: Path) -> Iterator[Callable[[], Any]]:
    """See the module's docstring."""
    file = os.open(directory / "image", os.O_CREAT | os.O_RDWR)
    os.pwrite(file, bytes(1 << 20), 0)
    base = str(directory / f"new{time.time_ns()}")

    def create(path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))

    for number in count():
        yield partial(os.pwrite, file, bytes(4096), number % 256 * 4096)
        yield partial(os.stat, directory / "image")
        yield partial(create, f"{base}.{number}")


def fresh(directory: Path, first: int) -> Iterator[Callable[[], Any]]:
    """See the module's docstring."""

    def look(path: str) -> None:
        file = os.open(path, os.O_RDONLY)
        os.fstat(file)
        os.close(file)

    for number in count(first):
        yield partial(look, str(directory / f"file{number}"))


def main() -> None:
    """Until told."""
    over = threading.Event()
    each = {
        "own": Calls(own(Path(sys.argv[1])), over),
        "fresh": Calls(fresh(Path(sys.argv[2]), int(sys.argv[3])), over),
    }
    for calls in each.values():
        calls.thread.start()
    print("probing", flush=True)
    sys.stdin.read()
    over.set()
    for calls in each.values():
        calls.thread.join()
    print(json.dumps({name: calls.told() for name, calls in each.items()}))


if __name__ == "__main__":
    main()
