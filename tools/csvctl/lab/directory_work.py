"""What a host does in the directory that it shares: a process, told by lines of JSON on stdin.

    python -m csvctl.lab.directory_work DIRECTORY

Each line is a list of calls, [[KIND, ARGUMENT...], ...]; the answer is a line with a list of
[KIND, ARGUMENTS, RESULT, BEGUN_NS, ENDED_NS], as `csvctl.lab.directory_model.Call` has them.
`append NAME RECORD` is an open, and a write if that succeeded. `list` gives what stands in the
directory: {NAME: [INODE, [RECORD, ...]]}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_Answer = list[list[Any]]


def look(directory: Path) -> dict[str, tuple[int, list[str]]]:
    """What stands there, while nobody changes it. Raises OSError."""
    found = {}
    for name in sorted(os.listdir(directory)):
        path = directory / name
        found[name] = (os.stat(path).st_ino, path.read_text().split())
    return found


def timed(answer: _Answer, kind: str, arguments: list[str], act: Callable[[], int]) -> int:
    """Make a call and note it; its result."""
    begun = time.monotonic_ns()
    try:
        result = act()
    except OSError as error:
        result = -(error.errno or 5)
    answer.append([kind, arguments, result, begun, time.monotonic_ns()])
    return result


def do(directory: Path, kind: str, arguments: list[str], answer: _Answer) -> None:
    """One call; `append` is two."""
    paths = [directory / name for name in arguments]
    if kind == "create":
        timed(answer, kind, arguments, lambda: _create(paths[0]))
    elif kind == "unlink":
        timed(answer, kind, arguments, lambda: _unlink(paths[0]))
    elif kind == "rename":
        timed(answer, kind, arguments, lambda: _rename(paths[0], paths[1]))
    else:
        _append(paths[0], arguments, answer)


def _create(path: Path) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        return os.fstat(handle).st_ino
    finally:
        os.close(handle)


def _unlink(path: Path) -> int:
    os.unlink(path)
    return 0


def _rename(source: Path, target: Path) -> int:
    os.rename(source, target)
    return 0


def _append(path: Path, arguments: list[str], answer: _Answer) -> None:
    opened = []

    def open_it() -> int:
        opened.append(os.open(path, os.O_WRONLY | os.O_APPEND))
        return os.fstat(opened[0]).st_ino

    def write_it() -> int:
        record = arguments[1].encode() + b"\n"
        return len(record) - os.write(opened[0], record)

    try:
        if timed(answer, "open", arguments[:1], open_it) > 0:
            timed(answer, "write", arguments[1:], write_it)
    finally:
        for handle in opened:
            os.close(handle)


def main(directory: Path) -> None:
    """Until stdin ends."""
    for line in sys.stdin:
        answer: _Answer = []
        for kind, *arguments in json.loads(line):
            if kind == "list":
                answer.append([kind, look(directory)])
            else:
                do(directory, kind, arguments, answer)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
