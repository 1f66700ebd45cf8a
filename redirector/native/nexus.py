"""One iSCSI session under trio: tasks wait, a reaper wakes them.

Concurrency. `Nexus.open` starts one system task, the reaper. It alone reaps and closes the native
session; it sleeps on the session's eventfd and reschedules the tasks whose commands ended, a batch
at a time. A task that waits for a command cannot be cancelled (the target may still use its
buffer): a cancellation takes effect at the task's next checkpoint. When the session is lost the
reaper wakes every task with an unknown outcome, frees the session and ends.

invariants:
  1. a task waits in `wait` exactly while the native session holds it as a token
  2. after `ended`, nothing is outstanding, and thread and descriptors are gone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from outcome import Value
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from redirector.native._native import Completion, Session

LOGOUT_LIMIT_MS = 5000
"""A target that takes longer to say goodbye is left without."""


def hold(_: Any) -> Abort:
    """Abort function of every command: it cannot be called back."""
    return Abort.FAILED


async def wait() -> Completion | None:
    """Wait for the command that was submitted with this task as its token; None is success."""
    completion: Completion | None = await wait_task_rescheduled(hold)
    return completion


def milliseconds_until(deadline: float) -> int:
    """What is left until a trio deadline; at least 1."""
    return max(int((deadline - trio.current_time()) * 1000), 1)


class Nexus:
    """A native session and its reaper."""

    def __init__(
        self, session: Session[Task], on_silence: Callable[[float], None] | None = None
    ) -> None:
        self.session = session
        self._on_silence = on_silence
        self.lost = trio.Event()
        self.on_lost: Callable[[], None] | None = None
        """Called when ``lost`` is set, before any task wakes with an unknown outcome."""
        self.ended = trio.Event()
        self.why = ""
        """Why it was lost, in words."""
        self.leaving = False
        """It is about to log out: no command may follow."""

    @classmethod
    async def open(
        cls, on_silence: Callable[[float], None] | None = None, **config: Any
    ) -> tuple[Nexus, Completion | None]:
        """Log in, with the keyword arguments of `Session`.

        The completion says why it failed; the nexus has ended then. A cancelled login is dropped.
        ``on_silence`` is called, with how many seconds were waited, when the session is lost
        because the target was silent.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        session: Session[Task] = Session(current_task(), **config)
        nexus = cls(session, on_silence)
        trio.lowlevel.spawn_system_task(nexus._reap, name=f"iscsi {config['portal']}")

        def drop(_: Any) -> Abort:
            session.abort()
            return Abort.FAILED

        completion: Completion | None = await wait_task_rescheduled(drop)
        if completion is not None:
            with trio.CancelScope(shield=True):
                await nexus.ended.wait()
        await nexus._leave_if_cancelled()
        return nexus, completion

    async def _leave_if_cancelled(self) -> None:
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            await self.drop()
            raise

    async def _reap(self) -> None:
        session = self.session
        fd = session.fileno()
        try:
            while not session.lost:
                await trio.lowlevel.wait_readable(fd)
                for task, completion in session.reap():
                    if completion is not None and completion.unknown:
                        self._set_lost()
                    reschedule(task, Value(completion))
        finally:
            if self._on_silence is not None and session.silent_ms:
                self._on_silence(session.silent_ms / 1000)
            self._set_lost()
            for task, completion in session.close():
                reschedule(task, Value(completion))
            self.ended.set()

    def _set_lost(self) -> None:
        if not self.lost.is_set():
            self.why = self.why or self.session.text or "the session was closed"
            self.lost.set()
            if self.on_lost is not None:
                self.on_lost()

    async def logout(self) -> None:
        """Let the commands in flight end, log out, end. Cancelled, it drops the connection."""
        if not self.lost.is_set() and not self.leaving:
            self.leaving = True
            self.session.logout(current_task(), timeout_ms=LOGOUT_LIMIT_MS)

            def hurry(_: Any) -> Abort:
                self.session.abort()
                return Abort.FAILED

            await wait_task_rescheduled(hurry)
            await self.drop()
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self.ended.wait()

    def abort(self) -> None:
        """Drop the connection; commands in flight are about to end as unknown."""
        if not self.lost.is_set():
            self.why = "the session was dropped"
            self._set_lost()
        self.session.abort()

    async def drop(self) -> None:
        """Close the connection now, and wait until that is done: microseconds."""
        self.abort()
        with trio.CancelScope(shield=True):
            await self.ended.wait()
