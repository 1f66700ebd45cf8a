"""Start a supervisor with its daemon, and wait until the mount answers.

csvctl is told of the daemon's progress through a pipe (`csvfs.host.events`) and detaches only when
the mount has answered; what the daemon could not do comes back as the `Problem` that it was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from csvfs.host import logs
from csvfs.host.events import Event, EventKind, read_events
from csvfs.host.problems import Kind, Problem
from csvfs.host.settings import MountSettings


def launch(settings: MountSettings) -> Iterator[Event]:
    """Mount; yields each step and warning, and at last ``ready``. Raises the daemon's `Problem`.

    Closed early (an interrupt), it has the daemon leave again.
    """
    with _supervised(settings) as (supervisor, events):
        done = False
        try:
            for event in events:
                if event.kind is EventKind.FAILED:
                    supervisor.wait()
                    done = True
                    raise Problem(event.problem or Kind.BUG, event.text)
                yield event
                if event.kind is EventKind.READY:
                    done = True
                    return
            done = True
            raise Problem(Kind.ENDED, f"the daemon ended: exit status {supervisor.wait()}")
        finally:
            if not done:
                supervisor.send_signal(signal.SIGTERM)
                supervisor.wait()


def run_in_foreground(settings: MountSettings) -> Iterator[Event]:
    """Mount, and go on until the volume is unmounted; signals are passed on.

    Raises the daemon's `Problem`, or one of kind ENDED.
    """
    with _supervised(settings) as (supervisor, events):
        with _forwarding(supervisor):
            for event in events:
                if event.kind is EventKind.FAILED:
                    supervisor.wait()
                    raise Problem(event.problem or Kind.BUG, event.text)
                yield event
            status = supervisor.wait()
        if status != 0:
            raise Problem(Kind.ENDED, f"the daemon ended: exit status {status}")


@contextmanager
def _supervised(
    settings: MountSettings,
) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[Event]]]:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "csvfs.supervisor", str(writer)]
    command += [settings.directory, settings.url]
    with _last_words(settings.foreground) as stderr:
        supervisor = subprocess.Popen(
            command + ["--foreground"] * settings.foreground,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[writer],
            cwd="/",
            start_new_session=True,
        )
    os.close(writer)
    if supervisor.stdin is None:
        raise AssertionError("stdin is a pipe")
    with supervisor.stdin as pipe:
        pipe.write(settings.encode())
    yield supervisor, read_events(reader)


@contextmanager
def _last_words(foreground: bool) -> Iterator[IO[bytes] | int | None]:
    """Where stderr goes: what a native library says before it takes the process down."""
    where = logs.destination(foreground)
    if foreground:
        yield None
    elif where.startswith("journalctl"):
        yield subprocess.DEVNULL
    else:
        with open(where, "ab") as file:
            yield file


@contextmanager
def _forwarding(supervisor: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        supervisor.send_signal(number)

    before = {each: signal.signal(each, forward) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
