"""What the user of the lock manager does for what it locks."""

from __future__ import annotations

from typing import Protocol

from lockmgr.messages import Resource
from lockmgr.modes import Mode


class ResourceOwner(Protocol):
    """What the user of the lock manager does for one kind of resource."""

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        """Make it true that the node may go on with ``to_mode`` only (NL: with nothing).

        Write back what a stronger mode allowed to change, forget what a stronger mode allowed to
        cache. The lock is still held until this returns, and claims are still granted; if one
        above ``to_mode`` was, this is called once more, with such claims waiting for its end. An
        owner that would harm a claim in use by forgetting, or wants to spare the second call,
        awaits `LockManager.drain` first. When this has returned, the lock may yet stay, because it
        was used or granted anew meanwhile. An exception is fatal to the lock manager.
        """

    async def glimpse(self, resource: Resource) -> bytes:
        """What another node wants to know of a resource that this one holds in PW or EX."""
