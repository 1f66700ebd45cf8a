"""The lease of this node, for whoever answers from caches.

    if not lease.valid():
        await lease.wait_valid()

Looked at after data has arrived and before any answer is given; a host that was suspended in
between finds its lease over, because CLOCK_BOOTTIME went on.
"""

from __future__ import annotations

from time import CLOCK_BOOTTIME, clock_gettime

import trio

from lockmgr.cluster.effects import Stop
from lockmgr.cluster.errors import ClusterStopped


class LeaseWatch:
    """Told by the cluster's service, asked by everybody else."""

    def __init__(self) -> None:
        self.until_s = float("-inf")
        """CLOCK_BOOTTIME."""
        self._stop: Stop | None = None
        self._changed = trio.Event()

    def valid(self) -> bool:
        """Whether it runs now."""
        return clock_gettime(CLOCK_BOOTTIME) < self.until_s

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
        self.until_s = max(self.until_s, until_s)
        self._wake()

    def stopped(self, stop: Stop) -> None:
        """It is over for good."""
        self.until_s = float("-inf")
        self._stop = stop
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
