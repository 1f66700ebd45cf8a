"""What a starting daemon tells the csvctl that waits for it: lines of JSON through a pipe.

    step      it is about to do something that may take a while
    warning   something that the admin should know, though the mount goes on
    ready     the mount answers: csvctl may detach
    failed    a `csvfs.host.problems.Problem`: nothing is mounted

The pipe is closed after ``ready`` or ``failed``; an end without either means that the daemon died.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from csvfs.host.problems import Kind, Problem


class EventKind(StrEnum):
    """The first word of a line."""

    STEP = "step"
    WARNING = "warning"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One line. ``problem`` only with ``failed``."""

    kind: EventKind
    text: str
    problem: Kind | None = None

    def encode(self) -> bytes:
        fields = {"event": self.kind, "text": self.text}
        if self.problem is not None:
            fields["problem"] = self.problem
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes | str) -> Event:
        """Raises ValueError, KeyError."""
        fields = json.loads(line)
        problem = fields.get("problem")
        return cls(EventKind(fields["event"]), fields["text"], problem and Kind(problem))


class Reporter:
    """The writing end. A parent that is gone, or was never there (fd < 0), does not matter."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def step(self, text: str) -> None:
        self._send(Event(EventKind.STEP, text))

    def warning(self, text: str) -> None:
        self._send(Event(EventKind.WARNING, text))

    def ready(self, text: str) -> None:
        self._send(Event(EventKind.READY, text))
        self.close()

    def failed(self, problem: Problem) -> None:
        self._send(Event(EventKind.FAILED, problem.what, problem.kind))
        self.close()

    def close(self) -> None:
        """Nothing more is told."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def is_open(self) -> bool:
        """Somebody may still be waiting for ``ready`` or ``failed``."""
        return self._fd >= 0

    def _send(self, event: Event) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, event.encode())
        except BrokenPipeError:  # csvctl was interrupted; the mount goes on
            self.close()


def read_events(fd: int) -> Iterator[Event]:
    """Everything that comes through the pipe until its end; closes ``fd``."""
    with open(fd, encoding="utf-8") as pipe:
        for line in pipe:
            yield Event.decode(line)
