"""Which mount of this host a command is about, and questions to its daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvfs.host.record import MountRecord

ANSWER_LIMIT_S = 10.0


def the_mount(directory: str) -> MountRecord:
    """The mount at ``directory``; this host's only one if that is empty. Raises `Problem`."""
    from csvfs.host import mountpoint
    from csvfs.host.record import find_record, records

    if directory:
        found = find_record(mountpoint.resolve(directory))
        if found is None:
            raise Problem(Kind.NOT_MOUNTED, f"no csvfs volume is mounted at {directory}")
        return found
    every = list(records())
    if len(every) == 1:
        return every[0]
    if not every:
        raise Problem(Kind.NOT_MOUNTED, "no csvfs volume is mounted on this host")
    named = ", ".join(record.directory for record in every)
    raise Problem(Kind.USAGE, f"this host has several volumes mounted: say which ({named})")


def ask_daemon(
    record: MountRecord, command: str, *, timeout_s: float = ANSWER_LIMIT_S, **fields: Any
) -> dict[str, Any]:
    """The answer of the mount's daemon. Raises `Problem`."""
    from csvfs.host import admin, places

    path = places.socket_path(bytes.fromhex(record.volume_id))
    return admin.ask(path, command, timeout_s=timeout_s, **fields)
