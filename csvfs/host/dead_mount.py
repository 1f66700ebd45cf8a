"""A mount whose daemon is gone: found without hanging, and taken away.

Asking the mount itself (`mountpoint.is_dead`) is safe only when no daemon can hold the request:
a daemon that lives but hangs would hang the asker for good. So the lock is asked first.
"""

from __future__ import annotations

from csvfs.host import mountpoint
from csvfs.host.daemon_lock import daemon_lives
from csvfs.host.record import MountRecord, MountState, find_record


def is_dead_mount(directory: str) -> bool:
    """True if a csvfs mount without a daemon stands at ``directory``. Raises OSError."""
    mounted = mountpoint.find(directory)
    if mounted is None or mounted.kind != mountpoint.FILESYSTEM_TYPE:
        return False
    record = find_record(mounted.path)
    if record is not None and daemon_lives(bytes.fromhex(record.volume_id)):
        return False
    return mountpoint.is_dead(mounted.path)


def detach_dead_mount(directory: str) -> bool:
    """Take a dead mount away; False if there is none. Raises OSError."""
    if not is_dead_mount(directory):
        return False
    mountpoint.detach(directory)
    return True


def bury(record: MountRecord, how: str) -> MountRecord:
    """Write down that a daemon ended without leaving; what it wrote itself stays."""
    if record.state is not MountState.FAILED:
        record = record.failed(f"the daemon (pid {record.pid}) ended: {how}")
        record.write()
    return record
