"""What a task has in its hands: a lock, and one that is on its way."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

from lockmgr import events
from lockmgr.claim import Claim
from lockmgr.events import Patience
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from lockmgr.snapshot import LockSnapshot

if TYPE_CHECKING:
    from lockmgr.manager import LockManager


class Lock(Claim):
    """A claim that `LockManager.acquire` granted. It may outlive the scope that acquired it.

    ``with`` and ``async with`` release it at the end, unless it has been released before.
    """

    __slots__ = ("_deadlock", "_manager", "_snapshot", "_task")

    def __init__(
        self,
        manager: LockManager,
        resource: Resource,
        mode: Mode,
        shared_here: bool,
        owner: Hashable | None = None,
    ) -> None:
        super().__init__(resource, mode, shared_here, owner=owner)
        self._manager = manager
        self._task: trio.lowlevel.Task | None = None
        self._snapshot: LockSnapshot | None = None
        self._deadlock: str | None = None

    @property
    def held(self) -> bool:
        """True from grant to release."""
        return self.lock is not None

    @property
    def value(self) -> bytes | None:
        """The 64-byte lock value block; None while it is not valid.

        In PR and above it is the current one, below it is as old as the node's last grant. Raises
        `ValueError` if the lock is not held.
        """
        if self.lock is None:
            raise ValueError(f"{self} is not held")
        return self.lock.value.data

    def set_value(self, value: bytes | None) -> None:
        """Change the value block; None makes it not valid. The other tasks of this node see it at
        once, other nodes with their next grant.

        Raises `ValueError` unless the lock is held in PW or EX and ``value`` has 64 bytes.
        """
        self._manager.core.locks.set_value(self, value)

    async def convert(self, mode: Mode, *, timeout_s: float | None = None) -> None:
        """Have ``mode`` instead; until then, and if it fails, keep the present one.

        Conversions go before new claims. Of two holders that both convert to a stronger mode one
        is denied, after a while: convert where the order of locks excludes that. Raises
        `LockTimeout`, `LockDeadlock`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        patience = Patience.NO_QUEUE if timeout_s == 0 else Patience.QUEUE
        await self._manager._wait(
            self, events.Convert(self, mode, patience, timeout_s), f"{mode} instead of {self.mode}"
        )

    def try_convert(self, mode: Mode) -> bool:
        """Convert within this instant; False: it would have to wait, and nothing was changed."""
        self._manager._step(events.Convert(self, mode, Patience.NONE))
        return self.mode is mode

    def release(self) -> None:
        """Give the claim back. The node keeps the lock cached until others want it."""
        if not self._manager.core.locks.drop(self):
            self._manager._step(events.Release(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.lock is not None:
            self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.lock is not None:
            self.release()


class Acquisition:
    """What `LockManager.acquire` returns: await it for a `Lock`, or ``async with`` it."""

    __slots__ = ("_lock", "_manager", "_timeout_s")

    def __init__(self, manager: LockManager, lock: Lock, timeout_s: float | None) -> None:
        self._manager = manager
        self._lock = lock
        self._timeout_s = timeout_s

    def __await__(self) -> Generator[Any, Any, Lock]:
        return self._manager._acquire(self._lock, self._timeout_s).__await__()

    async def __aenter__(self) -> Lock:
        return await self._manager._acquire(self._lock, self._timeout_s)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock.held:
            self._lock.release()
