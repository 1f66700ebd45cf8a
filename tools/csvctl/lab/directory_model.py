"""Is there an order in which all this could have happened? One directory, several hosts.

Pure. Hosts work on the names of one directory at the same time and note for each call when it began
and ended and what came of it. The calls are right if they can be put into an order, each between
its begin and its end, in which a plain dictionary gives the same results and is left as the
directory was found (Herlihy and Wing, linearizability; the search of Wing and Gong, with memory).

One call is two: the kernel looks up the names of a rename one after the other, and if both lead to
one file it succeeds and does nothing (rename(3p); Linux, `vfs_rename`), without having asked the
filesystem for a rename. So two hosts that rename *a* to *b* at the same moment may both succeed:
the second finds the file at *a*, and then, moved by the first, at *b*.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

FileId = tuple[int, int]
"""(inode number, number of its creation): inode numbers come again."""

_SEEK: Final = "seek"
_CREATE: Final = "create"
_UNLINK: Final = "unlink"
_RENAME: Final = "rename"
_OPEN: Final = "open"
_WRITE: Final = "write"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a host.

    ``create NAME`` and ``open NAME`` result in the inode number, ``unlink NAME``, ``rename A B`` in
    0, each of them else in minus the errno. ``write RECORD`` appends to what the host opened last.
    """

    host: int
    kind: str
    arguments: tuple[str, ...]
    result: int
    begun_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Directory:
    """The dictionary: names, the records in each file, and what each host has open or has found
    at the old name of its rename."""

    names: frozenset[tuple[str, FileId]] = frozenset()
    records: frozenset[tuple[FileId, tuple[str, ...]]] = frozenset()
    opened: tuple[FileId | None, ...] = ()
    sought: tuple[FileId | None, ...] = ()
    created: int = 0

    def content(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """name -> (inode number, its records), as a host finds it."""
        records = dict(self.records)
        return {name: (file[0], records.get(file, ())) for name, file in self.names}


def directory(content: dict[str, tuple[int, tuple[str, ...]]], hosts: int) -> Directory:
    """What `Directory.content` told of, with nothing open."""
    numbered = [
        (name, (inode, -1 - number), records)
        for number, (name, (inode, records)) in enumerate(sorted(content.items()))
    ]
    return Directory(
        frozenset((name, file) for name, file, _ in numbered),
        frozenset((file, records) for _, file, records in numbered),
        (None,) * hosts,
        (None,) * hosts,
    )


def steps(before: Directory, call: Call) -> list[Directory]:
    """Each directory that there may be after the call; none if it cannot have had this result."""
    if call.kind == _SEEK:
        return [replace(before, sought=_put(before.sought, call, dict(before.names)))]
    found = []
    if call.kind == _RENAME and call.result == 0:
        sought, names = before.sought[call.host], dict(before.names)
        before = replace(before, sought=_put(before.sought, call, {}))
        if sought is not None and names.get(call.arguments[1]) == sought:
            found.append(before)
    following = _step(before, call)
    return found if following is None else [*found, following]


def _put(
    where: tuple[FileId | None, ...], call: Call, names: dict[str, FileId]
) -> tuple[FileId | None, ...]:
    return (*where[: call.host], names.get(call.arguments[0]), *where[call.host + 1 :])


def _step(before: Directory, call: Call) -> Directory | None:
    names = dict(before.names)
    if call.kind == _WRITE:
        return _append(before, call)
    name = call.arguments[0]
    there = names.get(name)
    if call.kind == _CREATE:
        if there is not None:
            return before if call.result == -errno.EEXIST else None
        if call.result <= 0:
            return None
        names[name] = (call.result, before.created)
        return replace(before, names=frozenset(names.items()), created=before.created + 1)
    if there is None:
        return before if call.result == -errno.ENOENT else None
    if call.kind == _OPEN:
        if call.result != there[0]:
            return None
        return replace(before, opened=_put(before.opened, call, names))
    if call.result != 0:
        return None
    del names[name]
    if call.kind == _RENAME:
        names[call.arguments[1]] = there
    return replace(before, names=frozenset(names.items()))


def _append(before: Directory, call: Call) -> Directory | None:
    file = before.opened[call.host]
    if file is None or call.result != 0:
        return None
    records = dict(before.records)
    records[file] = (*records.get(file, ()), call.arguments[0])
    return replace(before, records=frozenset(records.items()))


def is_possible(
    before: Directory, calls: Sequence[Call], after: dict[str, tuple[int, tuple[str, ...]]]
) -> bool:
    """Can the calls have led from ``before`` to ``after``? Each host's calls follow each other."""
    hosts = sorted({call.host for call in calls})
    rows = [
        _parts(sorted((c for c in calls if c.host == host), key=lambda c: c.begun_ns))
        for host in hosts
    ]
    stack = [((0,) * len(rows), before)]
    seen = set(stack)
    while stack:
        position, now = stack.pop()
        pending = [
            (number, row[at])
            for number, (row, at) in enumerate(zip(rows, position, strict=True))
            if at < len(row)
        ]
        if not pending and now.content() == after:
            return True
        first_end = min((call.ended_ns for _, call in pending), default=0)
        for number, call in pending:
            if call.begun_ns > first_end:
                continue  # one that had ended before it began has not had its turn yet
            moved = tuple(at + (each == number) for each, at in enumerate(position))
            for following in steps(now, call):
                if (moved, following) not in seen:
                    seen.add((moved, following))
                    stack.append((moved, following))
    return False


def _parts(row: list[Call]) -> list[Call]:
    """The same with what the kernel does before it renames."""
    found: list[Call] = []
    for call in row:
        if call.kind == _RENAME and call.result == 0:
            found.append(replace(call, kind=_SEEK))
        found.append(call)
    return found
