"""The trio shell of byte-range locks: processes of this node lock, wait and are interrupted.

    ranges = RangeLocks(manager)
    owner = ranges.owner(Kind.POSIX, number, pid)
    await ranges.lock(file, owner, 0, END, Access.WRITE, wait=True)
    ...
    ranges.died(owner)

What is decided, and why, is in `lockmgr.ranges_client` and `lockmgr.ranges_master`; views, timers
and the network are the lock manager's. Concurrency: all state belongs to the core; each call makes
one step and sleeps until its answer. No tasks of its own.

Cancellation. A task in `lock` that is cancelled has the request called back, and goes on when that
is answered: either `trio.Cancelled` is raised and nothing was changed (flock: the old lock may be
lost), or the lock was granted before, and the call returns as if nothing had been; never both. The
answer comes from another node, so it may take as long as a recovery. `unlock` and `close` end at
once when cancelled, but happen all the same; a cancelled `test` is forgotten. `abandon` ends all
waits, for a node that stops; so does the end of the lock manager.
"""

from __future__ import annotations

import trio

from lockmgr.errors import ManagerClosed, RangeRefused
from lockmgr.manager import LockManager
from lockmgr.messages import Resource
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeEvent,
    RangeFound,
    SetRange,
)
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner, RangeHold

__all__ = ["RangeLocks"]

Answer = RangeDone | RangeFound


class _Call:
    """An operation, and the task that waits for its answer."""

    __slots__ = ("answer", "interrupt", "task")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.task: trio.lowlevel.Task | None = None
        self.interrupt: trio.lowlevel.RaiseCancelT | None = None
        """Raises Cancelled; None: the task was not cancelled."""

    def wake(self) -> None:
        """Let the task go on, if it sleeps."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


class RangeLocks:
    """The byte-range locks of the processes of ``manager``'s node. One for each manager."""

    def __init__(self, manager: LockManager) -> None:
        self._manager = manager
        self._calls: dict[int, _Call] = {}
        self._ticket = 0
        self._abandoned: str | None = None
        manager.wait_for_ranges(self)

    def owner(self, kind: Kind, number: int, pid: int = 0) -> Owner:
        """An owner on this node: the kernel's number of a process or of an open file."""
        return Owner(kind, self._manager.node, number, pid)

    # -- what processes do -----------------------------------------------------------------
    async def lock(
        self,
        resource: Resource,
        owner: Owner,
        start_bytes: int,
        end_bytes: int,
        access: Access,
        wait: bool,
    ) -> None:
        """``owner`` has ``access`` to the bytes from now on, and no other beside it there.

        fcntl(2) F_SETLK and F_SETLKW (``wait``), F_OFD_SETLK, flock(2). ``end_bytes``: the first
        byte behind the range; `END`: to the end of the file, however far it grows. ``access`` NONE
        unlocks. Raises `RangeRefused` with the outcome, which has the errno (EAGAIN, EDEADLK,
        ENOLCK; EINTR if the owner died meanwhile); `ValueError` for what is no range;
        `ManagerClosed`.
        """
        if access is Access.NONE:
            await self.unlock(resource, owner, start_bytes, end_bytes)
            return
        ticket = self._next()
        done = await self._call(
            SetRange(ticket, resource, owner, start_bytes, end_bytes, access, wait),
            ticket,
            waits=True,
        )
        _done(done, f"{access.name} of {start_bytes}..{end_bytes} for {owner}")

    async def unlock(
        self, resource: Resource, owner: Owner, start_bytes: int = 0, end_bytes: int = END
    ) -> None:
        """``owner`` gives up what it has of the bytes. Raises `RangeRefused` (ENOLCK: to split one
        of very many ranges), `ValueError`, `ManagerClosed`."""
        ticket = self._next()
        event = SetRange(ticket, resource, owner, start_bytes, end_bytes, Access.NONE, False)
        _done(await self._call(event, ticket), f"unlock of {start_bytes}..{end_bytes} for {owner}")

    async def test(
        self,
        resource: Resource,
        owner: Owner,
        start_bytes: int,
        end_bytes: int,
        access: Access,
    ) -> RangeHold | None:
        """F_GETLK: the first lock in the way; None: there is none at this moment.

        Raises `ValueError`, `ManagerClosed`.
        """
        ticket = self._next()
        event = FindConflict(ticket, resource, owner, start_bytes, end_bytes, access)
        found = await self._call(event, ticket)
        assert isinstance(found, RangeFound)
        return found.conflict

    async def close(self, resource: Resource, owner: Owner) -> None:
        """``owner`` has closed the file: POSIX, any of its descriptors; else, the open file.

        It holds nothing there when this returns. What another thread awaits goes on waiting.
        """
        ticket = self._next()
        _done(await self._call(ForgetFile(ticket, resource, owner), ticket), f"close for {owner}")

    def died(self, owner: Owner) -> None:
        """``owner`` is gone with all that it holds and awaits in any file. Does not wait."""
        self._manager._step(OwnerDied(owner))

    def abandon(self, why: str) -> None:
        """Nobody waits for an answer any more: each call, now and later, raises `ManagerClosed`.

        For a node that stops. What its processes hold is given up with its membership.
        """
        self._abandoned = why
        for call in self._calls.values():
            call.wake()

    # -- waiting ---------------------------------------------------------------------------
    def _next(self) -> int:
        self._ticket += 1
        return self._ticket

    async def _call(self, event: RangeEvent, ticket: int, waits: bool = False) -> Answer:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._abandoned is not None:
            raise ManagerClosed(self._abandoned)
        call = self._calls[ticket] = _Call()
        try:
            self._manager._step(event)
            if call.answer is None:
                await self._sleep(call, ticket, waits)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            del self._calls[ticket]
        answer = call.answer
        called_back = isinstance(answer, RangeDone) and answer.outcome is Outcome.CANCELLED
        if call.interrupt is not None and (called_back or answer is None):
            call.interrupt()
        if answer is None:
            raise ManagerClosed(self._abandoned)
        return answer

    async def _sleep(self, call: _Call, ticket: int, waits: bool) -> None:
        def cancelled(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            if not waits:
                call.task = None
                self._manager._step(CancelRange(ticket))
                return trio.lowlevel.Abort.SUCCEEDED
            call.interrupt = raise_cancel
            self._manager._step(CancelRange(ticket))
            return trio.lowlevel.Abort.FAILED

        call.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(cancelled)

    def answered(self, answer: Answer) -> None:
        """For the lock manager: how an operation has ended."""
        call = self._calls.get(answer.ticket)
        if call is not None:  # otherwise its task was cancelled
            call.answer = answer
            call.wake()


def _done(answer: Answer, what: str) -> None:
    assert isinstance(answer, RangeDone)
    if answer.outcome is not Outcome.DONE:
        raise RangeRefused(what, answer.outcome)
