"""csvctl umount: leave the volume and take the mount away."""

from __future__ import annotations

from typing import Annotated

import typer

from csvctl import console
from csvctl.lun_argument import require_root

LEAVE_LIMIT_S = 600.0
"""A leave writes what the journal holds, and waits for a LUN that is away."""


def umount(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where the volume is mounted.")],
) -> None:
    """Unmount DIR, and return when the volume is left: another host may mount it then.

    Plain umount(8) leaves as cleanly, but does not wait for it.

    Example: csvctl umount /srv/vms
    """
    require_root()
    from csvfs.host import admin, mountpoint, places
    from csvfs.host.daemon_lock import wait_daemon_ended
    from csvfs.host.dead_mount import detach_dead_mount
    from csvfs.host.problems import Kind, Problem
    from csvfs.host.record import MountState, find_record

    if detach_dead_mount(directory):
        console.say(f"{directory}: its daemon was gone; the dead mount is detached")
        return
    mounted = mountpoint.find(directory)
    if mounted is None or mounted.kind != mountpoint.FILESYSTEM_TYPE:
        record = find_record(mountpoint.resolve(directory))
        if record is not None and record.state is MountState.LEAVING:
            console.say(f"{directory} is not mounted any more; waiting until the volume is left")
            if wait_daemon_ended(bytes.fromhex(record.volume_id), timeout_s=LEAVE_LIMIT_S):
                return
            raise Problem(Kind.NO_ANSWER, f"the volume is not left after {LEAVE_LIMIT_S:.0f} s")
        raise Problem(Kind.NOT_MOUNTED, f"no csvfs volume is mounted at {directory}")
    record = find_record(mounted.path)
    if record is None:
        mountpoint.unmount(mounted.path)
        return
    volume_id = bytes.fromhex(record.volume_id)
    try:
        admin.ask(places.socket_path(volume_id), "umount", timeout_s=LEAVE_LIMIT_S)
    except Problem as problem:
        if problem.kind is Kind.FILES_OPEN:
            raise Problem(problem.kind, problem.what + _by_whom(mounted.path)) from None
        raise
    wait_daemon_ended(volume_id, timeout_s=10)


def _by_whom(path: str) -> str:
    from csvfs.host import mountpoint

    found = mountpoint.users(path)
    named = ", ".join(f"{command} (pid {pid})" for pid, command in found[:8])
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f" by {named}{more}" if found else ""
