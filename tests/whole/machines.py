"""What runs on a machine, and can stand still; and the time that all machines share.

Every task knows the machine that it runs on (a context variable, which children inherit). While
a machine is frozen, its tasks are kept from the scheduler: whatever wakes them waits for the thaw,
deadlines included, and time goes on. So nothing of a host happens while it is frozen, and after
that everything at once, in any order: as after SIGSTOP, or a hypervisor's pause.

CLOCK_BOOTTIME and CLOCK_REALTIME are trio's clock in `virtual_time`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final
from unittest.mock import patch

import trio
from trio._core import _run as trio_scheduler

from lockmgr.cluster import lease_watch

EPOCH_NS: Final = 1_800_000_000 * 1_000_000_000
_real_clock = time.clock_gettime


class Machine:
    """Frozen or not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self._waiting: list[Any] = []

    def freeze(self) -> None:
        """From now on nothing of it runs."""
        self.frozen = True
        ready = trio_scheduler.GLOBAL_RUN_CONTEXT.runner.runq
        tasks = list(ready)
        ready.clear()
        for task in tasks:
            ready.append(task)

    def thaw(self) -> None:
        """It goes on where it was."""
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            trio_scheduler.GLOBAL_RUN_CONTEXT.runner.runq.append(task)

    def keep(self, task: Any) -> None:
        """It would run now."""
        self._waiting.append(task)

    async def run(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Do it on this machine; everything that it starts is there, too."""
        _machine.set(self)
        await trio.lowlevel.checkpoint()  # may have been frozen meanwhile
        await work(*args)


_machine: ContextVar[Machine | None] = ContextVar("machine", default=None)


def current_machine() -> Machine | None:
    """Where the task that runs belongs."""
    return _machine.get()


class _Ready(deque[Any]):
    """The tasks that run next: none of a frozen machine."""

    def append(self, task: Any) -> None:
        machine = task.context.get(_machine)
        if machine is not None and machine.frozen:
            machine.keep(task)
        else:
            super().append(task)


def let_machines_freeze() -> None:
    """To be called once in a trio run, before any machine is frozen."""
    runner = trio_scheduler.GLOBAL_RUN_CONTEXT.runner
    runner.runq = _Ready(runner.runq)


def realtime_ns() -> int:
    """CLOCK_REALTIME of every host."""
    return EPOCH_NS + round(trio.current_time() * 1e9)


def _clock(clock: int) -> float:
    return trio.current_time() if clock == time.CLOCK_BOOTTIME else _real_clock(clock)


@contextmanager
def virtual_time() -> Iterator[None]:
    """Within it, the clock that membership and leases go by is trio's."""
    with (
        patch.object(time, "clock_gettime", _clock),
        patch.object(lease_watch, "clock_gettime", _clock),
        patch.object(time, "time_ns", realtime_ns),
    ):
        yield
