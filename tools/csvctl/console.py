"""What csvctl says: rich on a terminal, plain lines in a pipe. rich is loaded when it is needed."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from csvctl.outcomes import OUTCOMES
from csvfs.host.problems import Problem

Progress = Callable[[int, int], None]
"""(done, of how many)."""


def say(text: str) -> None:
    """A line of the result, to stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line beside the result, to stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"{_red('warning', '33')}: {text}")


def complain(command: str, problem: Problem) -> None:
    """What happened, what it means for virtual machines, what to do next."""
    outcome = OUTCOMES[problem.kind]
    note(f"{_red(command, '31')}: {problem.what}")
    for line in (outcome.means, outcome.next_step):
        note(textwrap.indent(textwrap.fill(line, 94, break_on_hyphens=False), "  "))


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values below each other."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        say(f"{name + ':':<{width + 1}} {value}")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be; the same on a terminal and in a pipe."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())


def size_text(size_bytes: int) -> str:
    """In the largest binary unit that leaves a number of at least 1."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift:
            number = f"{size_bytes / (1 << shift):.2f}".rstrip("0").rstrip(".")
            return f"{number} {unit}"
    return f"{size_bytes} bytes"


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing where stderr is piped."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """What is being done now, on a terminal; nothing where stderr is piped."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")


def _red(text: str, color: str) -> str:
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        return f"\x1b[1;{color}m{text}\x1b[0m"
    return text
