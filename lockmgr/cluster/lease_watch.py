"""The lease of this node, for whoever answers from caches.

    if not lease.valid():
        await lease.wait_valid()

Looked at after data has arrived and before any answer is given; a host that was suspended in
between finds its lease over, because CLOCK_BOOTTIME went on.
"""

from __future__ import annotations

from time import CLOCK_BOOTTIME, clock_gettime
from typing import Protocol

import trio

from lockmgr.cluster.effects import Stop
from lockmgr.cluster.errors import ClusterStopped


class Renewer(Protocol):
    """What may know of renewals before the service does."""

    @property
    def lease_until_s(self) -> float:
        """CLOCK_BOOTTIME; -inf: it knows of none."""
        ...


class LeaseWatch:
    """Told by the cluster's service, asked by everybody else. ``renewer`` (a pulse that confirms
    its own writes) is asked as well, until the lease is over for good."""

    def __init__(self, renewer: Renewer | None = None) -> None:
        self._until_s = float("-inf")
        self._renewer = renewer
        self._stop: Stop | None = None
        self._changed = trio.Event()
        self.least_left_s = float("inf")
        """What was left of it when a renewal was heard of, at least; the event loop may have heard
        later than the renewal came. Negative: it had been over."""
        self.lost = 0
        """How often it had been over when it was renewed."""

    def valid(self) -> bool:
        """Whether it runs now."""
        now = clock_gettime(CLOCK_BOOTTIME)
        return now < self._until_s or (
            self._renewer is not None and now < self._renewer.lease_until_s
        )

    @property
    def until_s(self) -> float:
        """CLOCK_BOOTTIME."""
        if self._renewer is None:
            return self._until_s
        return max(self._until_s, self._renewer.lease_until_s)

    async def wait_valid(self) -> None:
        """Return when it runs again. Raises `ClusterStopped` when that will never be."""
        while not self.valid():
            if self._stop is not None:
                raise ClusterStopped(self._stop)
            await self._changed.wait()

    @property
    def left_s(self) -> float:
        """Seconds; not more than 0: it is over."""
        return self.until_s - clock_gettime(CLOCK_BOOTTIME)

    # -- what the service says -------------------------------------------------------------------
    def renewed(self, until_s: float) -> None:
        """It runs until then."""
        left_s = self._until_s - clock_gettime(CLOCK_BOOTTIME)
        if left_s != float("-inf"):  # not the first
            self.least_left_s = min(self.least_left_s, left_s)
            self.lost += left_s < 0
        self._until_s = max(self._until_s, until_s)
        self._wake()

    def stopped(self, stop: Stop) -> None:
        """It is over for good."""
        self._until_s = float("-inf")
        self._renewer = None
        self._stop = stop
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
