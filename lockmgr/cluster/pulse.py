"""The heartbeats of this node, both kinds: what sends them, and how late they were.

A member decides when and what (`Beat`, `WriteHeartbeat`); everything that carries a heartbeat out
is here, so that another sender can take its place. From Python a heartbeat is as late as the event
loop is busy: `PulseStatistics` shows it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.effects import Beat, WriteHeartbeat
from lockmgr.cluster.outcomes import Good, Outcome


@dataclass(slots=True)
class PulseStatistics:
    """Since the start; times in seconds."""

    ticks: int = 0
    late_s: float = 0.0
    """How long after its time the last tick came."""
    late_most_s: float = 0.0
    sent: int = 0
    gap_s: float = 0.0
    """Between the last two heartbeats over the network."""
    gap_most_s: float = 0.0
    written: int = 0
    failed: int = 0
    write_s: float = 0.0
    """From the wish to write the last heartbeat to its answer."""
    write_most_s: float = 0.0


class Pulse:
    """Sends heartbeats. ``send``: a datagram to every peer; ``write``: into the own block."""

    def __init__(
        self,
        send: Callable[[Heartbeat], None],
        write: Callable[[WriteHeartbeat], Awaitable[Outcome]],
    ) -> None:
        self.last: Heartbeat | None = None
        """The one sent last."""
        self._send = send
        self._write = write
        self._counts = PulseStatistics()
        self._sent_at = 0.0

    def statistics(self) -> PulseStatistics:
        """A copy."""
        return replace(self._counts)

    def ticked(self, late_s: float) -> None:
        """A tick comes so long after its time."""
        counts = self._counts
        counts.ticks += 1
        counts.late_s = late_s
        counts.late_most_s = max(counts.late_most_s, late_s)

    def beat(self, effect: Beat) -> None:
        """Over the network."""
        counts, now = self._counts, boottime()
        if counts.sent:
            counts.gap_s = now - self._sent_at
            counts.gap_most_s = max(counts.gap_most_s, counts.gap_s)
        counts.sent += 1
        self._sent_at = now
        self.last = effect.heartbeat
        self._send(effect.heartbeat)

    async def write(self, effect: WriteHeartbeat) -> Outcome:
        """On shared storage."""
        counts, began = self._counts, boottime()
        outcome = await self._write(effect)
        counts.write_s = boottime() - began
        counts.write_most_s = max(counts.write_most_s, counts.write_s)
        if isinstance(outcome, Good):
            counts.written += 1
        else:
            counts.failed += 1
        return outcome
