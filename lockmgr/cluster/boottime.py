"""The clock of membership: CLOCK_BOOTTIME, which goes on while the host is suspended.

trio's deadlines are of CLOCK_MONOTONIC, which does not: a deadline is late by as long as the host
slept meanwhile, and whoever acts on it looks at this clock first.
"""

from __future__ import annotations

import time

import trio


def boottime() -> float:
    """CLOCK_BOOTTIME now, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def deadline_at(when_s: float) -> float:
    """trio's time of that time of CLOCK_BOOTTIME, unless the host sleeps until then."""
    return trio.current_time() + (when_s - boottime())


def wall_offset_ns() -> int:
    """CLOCK_REALTIME - CLOCK_BOOTTIME, for `Identity.wall_offset_ns`."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
