"""What stands on the simulated LUN: what membership keeps there, and a toy filesystem.

The toy has one block a resource, and one journal a slot. A write goes into the journal of the
writer's slot, and is acknowledged then; the block's home is written before the lock is lowered,
and only after that the journal's record goes. So what is acknowledged may be in a journal alone,
and whoever is granted the lock before that journal is replayed reads the past.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lockmgr.cluster.view import View
from redirector.block.device import InitiatorPort


class Stamp(NamedTuple):
    """The content of a block: which write it comes from."""

    version: int
    """One more than what its writer had read."""
    value: int
    """Names the write; two writes may have one version if the first was lost unacknowledged."""


NOTHING_WRITTEN = Stamp(0, 0)


@dataclass
class Content:
    """All of it. Changed only by commands that land."""

    views: list[View]
    """Two copies; the one with the higher epoch is the view."""
    heartbeats: dict[int, Any] = field(default_factory=dict)
    joins: dict[int, Any] = field(default_factory=dict)
    ports: dict[int, InitiatorPort] = field(default_factory=dict)
    """The slot blocks: by key, the port of its session, written before that logs in."""
    home: dict[bytes, Stamp] = field(default_factory=dict)
    journals: dict[int, dict[bytes, Stamp]] = field(default_factory=dict)

    @property
    def view(self) -> View:
        """What somebody reads who reads both copies."""
        return max(self.views, key=lambda view: view.epoch)

    def home_of(self, name: bytes) -> Stamp:
        """The block where it belongs."""
        return self.home.get(name, NOTHING_WRITTEN)

    def log(self, slot: int, name: bytes, stamp: Stamp) -> None:
        """A record in the journal of a slot."""
        self.journals.setdefault(slot, {})[name] = stamp

    def forget(self, slot: int, name: bytes) -> None:
        """The tail of the journal moves beyond that record."""
        self.journals.get(slot, {}).pop(name, None)

    def forget_if(self, slot: int, name: bytes, stamp: Stamp) -> None:
        """The same, unless the record is a younger one."""
        journal = self.journals.get(slot, {})
        if journal.get(name) == stamp:
            del journal[name]

    def empty(self, slot: int) -> None:
        """It has been replayed."""
        self.journals.pop(slot, None)

    def write_home(self, name: bytes, stamp: Stamp) -> None:
        """The block itself."""
        self.home[name] = stamp
