"""The daemon: one volume, mounted on this host, from its claim to its leave.

    start   harden; log in; lock file; claim; replay; volume; FUSE; the mount answers: ready
    serve   FUSE requests, the admin socket, signals
    end     the kernel has ended the session: volume closed, claim released, record removed. What
            that waits for may never come (a LUN that is gone): a signal that insists ends the wait
    fail    the volume cannot be written any more, or a bug: the connection is aborted with the
            reason in log and record; nothing is released, the next mount recovers

    python -m csvfs.daemon EVENTS_FD WILL_FD DIRECTORY URL < settings

started by `csvfs.supervisor`. DIRECTORY and URL are there for ps. Exit status 0 if the volume was
left cleanly or never taken, 1 otherwise.

Concurrency. One nursery: the main task attaches, serves and leaves; beside it run the signals, the
admin socket, the watches over volume and memory, cancelled when the main task is done.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import Any

import trio

from csvfs.host import logs, places
from csvfs.host.admin import serve_admin
from csvfs.host.attach import Attached, Starting, attach
from csvfs.host.events import Reporter
from csvfs.host.hardening import collect_seldom, give_memory_back, harden, resident_bytes
from csvfs.host.notify import notify_manager
from csvfs.host.problems import Kind, Problem, problem_of
from csvfs.host.record import MountRecord, MountState
from csvfs.host.serving import Serving
from csvfs.host.settings import MountSettings
from csvfs.operations import Operations

_log = logging.getLogger("csvfs.daemon")

_NOT_MOUNTED = "stopped by a signal before it was mounted"
_TRIM_EVERY_S = 5.0
_TRIM_BYTES = 8 << 20
_SMALL_BYTES = 40 << 20
"""About what a daemon holds that has just mounted."""


class Daemon:
    """One life of the daemon."""

    def __init__(self, settings: MountSettings, reporter: Reporter, will_fd: int) -> None:
        self._settings = settings
        self._will_fd = will_fd
        self._reporter = reporter
        self._starting = Starting()
        self._serving: Serving | None = None
        self._attached: Attached | None = None
        """That is being left."""
        self._signals = 0
        """That asked to end."""
        self._leaving = trio.CancelScope()
        self._ended = trio.Event()
        """The volume was left, or could not be."""
        self._trouble: Problem | None = None
        """Why the mount ended otherwise than by a clean leave."""
        self.told = False
        """The log has it already."""

    async def run(self) -> None:
        """From start to end. Raises what kept it from starting, or from leaving cleanly."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals)
            await self._mount(nursery)
            nursery.cancel_scope.cancel()
        if self._trouble is not None:
            raise self._trouble

    # -- serving -----------------------------------------------------------------------------
    async def _mount(self, nursery: trio.Nursery) -> None:
        """Attach, serve, leave. What goes wrong is in ``_trouble``, and in the record."""
        record: MountRecord | None = None
        try:
            with self._leaving:
                async with attach(
                    self._settings, self._reporter, self._starting, self._will_fd
                ) as attached:
                    if self._signals:
                        self._trouble = Problem(Kind.INTERRUPTED, _NOT_MOUNTED)
                    else:
                        record = self._record(attached)
                        await self._serve(attached, record, nursery)
                        notify_manager("STOPPING=1")
                        record = record.leaving()
                        record.write()
                    self._attached = attached
        except Exception as error:
            self._trouble = self._trouble or problem_of(error)
            if problem_of(error).kind is Kind.BUG:
                _log.exception("the mount ends by a bug")
        finally:
            self._ended.set()
        if record is None:
            return
        if self._trouble is None:
            _log.info("%s: the volume is left", record.directory)
        if self._trouble is None or self._reporter.is_open:
            record.remove()
        else:
            record.failed(self._trouble.what).write()

    async def _serve(self, attached: Attached, record: MountRecord, nursery: trio.Nursery) -> None:
        """Serve the volume until the kernel ends the session. Only a bug escapes."""
        settings = self._settings
        serving = Serving(
            Operations(attached.volume, attached.cluster.lease),
            settings.directory,
            settings.source,
            set(settings.options),
        )
        self._serving = serving
        record.write()
        await nursery.start(
            serve_admin,
            places.socket_path(attached.volume_id),
            {
                "status": lambda _: self._status(attached, serving, record),
                "umount": lambda _: self._umount(serving),
                "nodes": lambda _: _at_once(attached.nodes()),
                "locks": lambda wanted: attached.locks(cached=bool(wanted["all"])),
                "evict": lambda wanted: attached.evict(str(wanted["node"]), str(wanted["why"])),
            },
        )
        nursery.start_soon(self._watch, attached, serving)
        nursery.start_soon(self._stay_small, serving)
        try:
            await serving.run(lambda: self._ready(record))
        except Exception as error:
            # The volume is sound: it is left, and then this is told.
            self._trouble = problem_of(error)
            if self._trouble.kind is Kind.BUG:
                _log.exception("the FUSE session ends by a bug")
        if serving.failure and self._trouble is None:
            self._trouble, self.told = Problem(Kind.LUN_LOST, serving.failure), True

    def _record(self, attached: Attached) -> MountRecord:
        settings = self._settings
        return MountRecord(
            volume_id=attached.volume_id.hex(),
            label=attached.label,
            directory=settings.directory,
            url=settings.url,
            node=settings.node,
            pid=os.getpid(),
            state=MountState.MOUNTED,
            since_ns=time.time_ns(),
            log=logs.destination(settings.foreground),
        )

    def _ready(self, record: MountRecord) -> None:
        text = f"{record.label} is mounted at {record.directory} (pid {record.pid})"
        _log.info("%s, from %s; log: %s", text, record.url, record.log)
        self._reporter.ready(text)
        notify_manager("READY=1", f"STATUS={text}")

    async def _watch(self, attached: Attached, serving: Serving) -> None:
        serving.fail(str(await attached.wait_failed()))

    async def _stay_small(self, serving: Serving) -> None:
        """What a burst of I/O made the process hold is given back once the burst is over."""
        held = 0
        while True:
            await trio.sleep(_TRIM_EVERY_S)
            if resident_bytes() > max(held, _SMALL_BYTES) + _TRIM_BYTES and not serving.waiting():
                await trio.to_thread.run_sync(give_memory_back)
                held = resident_bytes()

    # -- beside it ---------------------------------------------------------------------------
    async def _heed_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGHUP:
                    continue  # a terminal went away: nothing to a daemon
                _log.info("%s", signal.Signals(number).name)
                self._signals += 1
                if self._attached is not None:
                    self._insist(self._attached)
                elif self._serving is not None:
                    await self._serving.stop()
                else:
                    self._starting.cancel()
                    if self._signals > 1:  # what replays and locks wait for may never come
                        self._trouble = Problem(Kind.INTERRUPTED, _NOT_MOUNTED)
                        self._leaving.cancel()

    def _insist(self, attached: Attached) -> None:
        """A signal while the volume is being left: the second one ends a wait for the LUN, the
        third one any. Then this host ends as in a crash, and the others replay its journal."""
        trouble = attached.path.status().trouble
        if self._signals < (2 if trouble else 3):
            _log.warning("the volume is being left%s", f", and waits: {trouble}" if trouble else "")
            return
        words = f"ended by a signal before the volume was left{trouble and f' ({trouble})'}"
        self._trouble = self._trouble or Problem(Kind.INTERRUPTED, words)
        attached.path.evict(words)
        self._leaving.cancel()

    async def _umount(self, serving: Serving) -> dict[str, Any]:
        await serving.unmount()
        await self._ended.wait()
        if self._trouble is not None:
            raise self._trouble
        return {}

    async def _status(
        self, attached: Attached, serving: Serving, record: MountRecord
    ) -> dict[str, Any]:
        return {
            "state": str(record.state if self._attached is None else MountState.LEAVING),
            "mounted_since_ns": record.since_ns,
            **attached.status(),
            "requests_waiting": serving.waiting(),
            "open_files": serving.open_files,
            "memory_bytes": resident_bytes(),
        }


async def _at_once(answer: dict[str, Any]) -> dict[str, Any]:
    return answer


def main() -> int:
    """Entry point of the daemon's process."""
    reporter = Reporter(int(sys.argv[1]))
    settings = MountSettings.decode(sys.stdin.buffer.read())
    with logs.logging_to(logs.destination(settings.foreground), settings.password):
        harden()
        collect_seldom()
        daemon = Daemon(settings, reporter, int(sys.argv[2]))
        try:
            trio.run(daemon.run)
        except BaseException as error:
            problem = problem_of(error)
            if problem.kind is Kind.BUG:
                _log.exception("the daemon ends by a bug")
            elif not daemon.told:
                _log.error("%s: %s", settings.directory, problem)
            reporter.failed(problem)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
