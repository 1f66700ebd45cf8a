"""One FUSE mount from its first request to its last, whoever ends it.

    umount(8), csvctl umount, SIGTERM   the kernel ends the session; `Serving.run` returns
    a second SIGTERM, a failed volume   the connection is aborted; every user gets ENOTCONN

After a failure nobody waits for what requests wait for, which may never come (a lock that another
host had granted, had it not evicted this one): they are cancelled. The volume stops as in a crash.

SIGTERM asks: while files are open the directory is only detached (umount2(2) MNT_DETACH), and the
mount serves on until the last is closed, because a guest's disk must not vanish under it. Who sends
a second one insists. (While the volume is being left, `csvfs.daemon` hears what is sent.)

Concurrency. `run` is one task with the session's tasks below it; `unmount`, `stop` and `fail` may
be called from any other task. pyfuse3 keeps its session in globals: one `Serving` a process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

from csvfs.host import mountpoint
from csvfs.host.fuse import Connection, mount_options, prepare, serve
from csvfs.host.problems import Kind, Problem
from csvfs.operations import Operations

_log = logging.getLogger("csvfs.host.serving")

ANSWER_LIMIT_S = 30.0


class Serving:
    """A mount at ``directory`` of whatever ``operations`` answer for."""

    def __init__(
        self, operations: Operations[Any], directory: str, source: str, options: set[str]
    ) -> None:
        self._operations = operations
        self.directory = directory
        self._source = source
        self._options = options
        self._connection: Connection | None = None
        self._stops = 0
        self._session = trio.CancelScope()
        """Around everything that answers requests."""
        self.failure = ""
        """Why the connection was aborted; empty while it was not."""

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Mount, call ``on_ready`` once the mount has answered, return when it is no more.

        Raises `Problem` when the kernel will not mount, or the mount does not answer.
        """
        self._mount()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answers, on_ready)
                with self._session:
                    await serve()
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=True)

    def _mount(self) -> None:
        try:
            pyfuse3.init(
                self._operations, self.directory, mount_options(self._source, self._options)
            )
        except RuntimeError as error:
            raise Problem(
                Kind.SYSTEM, f"the kernel does not mount FUSE at {self.directory}: {error}"
            ) from error
        try:
            self._connection = prepare(self.directory)
        except BaseException:
            pyfuse3.close(unmount=True)
            raise

    async def _answers(self, on_ready: Callable[[], None]) -> None:
        """A stat(2) through the kernel; in a thread, for we are who answers it."""
        with trio.move_on_after(ANSWER_LIMIT_S):
            found = await trio.to_thread.run_sync(os.stat, self.directory, abandon_on_cancel=True)
            if self._connection is not None and found.st_dev != self._connection.number:
                raise Problem(Kind.SYSTEM, f"{self.directory}: something else was mounted there")
            on_ready()
            return
        raise Problem(Kind.NO_ANSWER, f"{self.directory} does not answer after it was mounted")

    @property
    def open_files(self) -> int:
        return self._operations.open_files

    def waiting(self) -> int | None:
        """Requests that the kernel waits for; None where it cannot be known."""
        try:
            return self._connection.waiting() if self._connection is not None else None
        except OSError:  # no fusectl
            return None

    async def unmount(self) -> None:
        """Take the mount away. Raises `mountpoint.InUse`, `NotMounted`, OSError."""
        # In a thread: umount2(2) may send requests that this very loop has to answer.
        await trio.to_thread.run_sync(mountpoint.unmount, self.directory)

    async def stop(self) -> None:
        """What SIGTERM asks for; see the module's text."""
        self._stops += 1
        if self._stops > 1:
            self._abort("a second SIGTERM: files that are open get errors")
            return
        try:
            await self.unmount()
        except mountpoint.InUse:
            await trio.to_thread.run_sync(mountpoint.detach, self.directory)
            _log.warning(
                "%s: files are open: detached, and served until the last is closed. A second "
                "SIGTERM ends it at once.",
                self.directory,
            )
        except mountpoint.NotMounted:  # umount(8) was quicker
            pass

    def fail(self, reason: str) -> None:
        """The volume has failed: nothing is answered any more. `run` returns at once."""
        self._abort(reason)
        self._session.cancel()

    def _abort(self, reason: str) -> None:
        if self.failure:
            return
        self.failure = reason
        _log.error("%s: the mount ends: %s", self.directory, reason)
        try:
            if self._connection is not None:
                self._connection.abort()
        except OSError as error:
            # No fusectl: closing /dev/fuse, which `run` does as it ends, aborts as well.
            _log.warning("%s: cannot abort the connection (%s)", self.directory, error)
            pyfuse3.terminate()
