"""The mount record: what is mounted where on this host, and how it ended.

One JSON file a volume in /run/csvfs, replaced atomically. The daemon writes it when it mounts and
removes it after a clean leave; the supervisor writes how a daemon ended that did not leave, so that
`csvctl status` can say it, until the next mount of that volume. Nothing secret is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from csvfs.host.places import make_run_directory, record_path, run_directory


class MountState(StrEnum):
    """Where a mount stands."""

    MOUNTED = "mounted"
    LEAVING = "leaving"
    FAILED = "failed"
    """The daemon ended, or gave the connection up, without leaving the volume."""


@dataclass(frozen=True, slots=True)
class MountRecord:
    """One mount of this host."""

    volume_id: str
    """32 hexadecimal digits."""
    label: str
    directory: str
    url: str
    node: str
    pid: int
    """Of the daemon."""
    state: MountState
    since_ns: int
    """CLOCK_REALTIME."""
    log: str
    """Where the daemon's log goes, in words."""
    reason: str = ""
    """Why it failed."""

    def write(self) -> None:
        """Put it in its place. Raises OSError."""
        make_run_directory()
        path = record_path(bytes.fromhex(self.volume_id))
        fresh = path.with_suffix(f".new{os.getpid()}")
        fresh.write_text(json.dumps(asdict(self)))
        fresh.replace(path)

    def remove(self) -> None:
        """Forget the mount; a record that is gone already is none. Raises OSError."""
        record_path(bytes.fromhex(self.volume_id)).unlink(missing_ok=True)

    def leaving(self) -> Self:
        """The same mount, unmounted, its volume being left."""
        return replace(self, state=MountState.LEAVING)

    def failed(self, reason: str) -> Self:
        """The same mount, ended for ``reason``."""
        return replace(self, state=MountState.FAILED, reason=reason)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Raises ValueError, TypeError."""
        fields = json.loads(text)
        fields["state"] = MountState(fields["state"])
        return cls(**fields)


def records() -> Iterator[MountRecord]:
    """Every mount known to this host; a record that cannot be read is left out."""
    directory = run_directory()
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        found = _read(path)
        if found is not None:
            yield found


def find_record(directory: str) -> MountRecord | None:
    """The record of the volume that is, or was last, mounted at ``directory``."""
    found = [each for each in records() if each.directory == directory]
    return max(found, key=lambda each: each.since_ns, default=None)


def _read(path: Path) -> MountRecord | None:
    try:
        return MountRecord.decode(path.read_text())
    except (OSError, ValueError, TypeError):  # removed meanwhile, or of another version
        return None
