"""The heartbeats of this node, both kinds: what sends them, and how late they were.

Theory. A member says with each tick what a heartbeat is to show, and on which control session it
may be written (`Beat`); whoever carries that out is a `Pulse`. It tells, of each write that is on
the LUN, when it was sent (`HeartbeatWritten`). There are two kinds:

- `PythonPulse`, here: one heartbeat for each `Beat`. It is as late as the event loop is busy, which
  `PulseStatistics` shows.
- one that a layer above brings along, with a thread of its own: it goes on showing what it was told
  last while the event loop is busy, but only as long as that has passed within the last second. A
  daemon that hangs falls silent. It may renew the lease by itself (`lease_until_s`).

invariants, of every pulse (tests/pulse_conformance.py):
- the sequence numbers of what it sends only grow, over both kinds;
- at most one write is on its way; each is told of once, with a time before it was sent;
- nothing is written on another session than the one named last (`follow`), nor anything sent, nor
  the lease renewed, after `stop`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.effects import Beat, WriteHeartbeat
from lockmgr.cluster.events import HeartbeatFailed, HeartbeatWritten
from lockmgr.cluster.outcomes import Good, Outcome
from lockmgr.cluster.peers import Address
from lockmgr.cluster.settings import Settings

Told = Callable[[HeartbeatWritten | HeartbeatFailed], None]


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


@dataclass(frozen=True, slots=True)
class PulseWiring:
    """What the cluster's service gives a pulse."""

    cluster_id: bytes
    socket_fd: int
    """The heartbeat socket, open as long as the pulse runs."""
    settings: Settings
    send: Callable[[Heartbeat], None]
    """A datagram to every peer, from Python."""
    write: Callable[[WriteHeartbeat], Awaitable[Outcome]]
    """The arbiter's."""


class Pulse(Protocol):
    """Made and used by `lockmgr.cluster.service`. Nothing here waits but `run`."""

    last: Heartbeat | None
    """What is shown now; its sequence may not be the one that was sent last."""

    @property
    def lease_until_s(self) -> float:
        """Until when confirmed writes keep the lease, of CLOCK_BOOTTIME, as far as the pulse knows
        more of that than its member; else -inf."""
        ...

    def statistics(self) -> PulseStatistics:
        """A copy."""
        ...

    def ticked(self, late_s: float) -> None:
        """The member ticks, so long after its time."""
        ...

    def install(self, secret: bytes, targets: Iterable[Address]) -> None:
        """From now on datagrams are made with this secret, and sent to these addresses."""
        ...

    def beat(self, effect: Beat) -> None:
        """Show this, now and, it may be, again."""
        ...

    def follow(self, key: int) -> None:
        """The key of the session that may be written on now; 0: none."""
        ...

    def stop(self) -> None:
        """For good: this incarnation is over."""
        ...

    async def run(self, told: Told) -> None:
        """Do it, until cancelled; ``told`` is called for each write that has ended."""
        ...


class HeartbeatWriter:
    """Writes heartbeats from Python, one at a time: what comes while one is written is dropped,
    since the next one is due soon."""

    def __init__(self, write: Callable[[WriteHeartbeat], Awaitable[Outcome]]) -> None:
        self._write = write
        self._wanted: tuple[Heartbeat, int, float] | None = None
        self._wish = trio.Event()
        self._busy = False
        self.counts = PulseStatistics()

    @property
    def is_idle(self) -> bool:
        """The next wish will be heard."""
        return not self._busy

    def wish(self, heartbeat: Heartbeat, key: int) -> None:
        """Write it on the session with that key, unless one is being written."""
        if not self._busy:
            self._busy = True
            self._wanted = (heartbeat, key, boottime())
            self._wish.set()

    def follow(self, key: int) -> None:
        """What is not begun yet, and is of another session, is not written."""
        if self._wanted is not None and self._wanted[1] != key:
            self._wanted = None
            self._busy = False
            self._wish = trio.Event()

    async def run(self, told: Told) -> None:
        """Write, until cancelled."""
        while True:
            await self._wish.wait()
            self._wish = trio.Event()
            if self._wanted is None:
                continue
            (heartbeat, key, sent_at), self._wanted = self._wanted, None
            outcome = await self._write(WriteHeartbeat(0, heartbeat))
            self._busy = False
            self._count(isinstance(outcome, Good), boottime() - sent_at)
            if isinstance(outcome, Good):
                told(HeartbeatWritten(key, sent_at))
            else:
                told(HeartbeatFailed(key))

    def _count(self, good: bool, took_s: float) -> None:
        counts = self.counts
        counts.write_s = took_s
        counts.write_most_s = max(counts.write_most_s, took_s)
        counts.written += good
        counts.failed += not good


class PythonPulse:
    """A heartbeat of each kind for each `Beat`, from the event loop."""

    lease_until_s = float("-inf")

    def __init__(self, wiring: PulseWiring) -> None:
        self.last: Heartbeat | None = None
        self._send = wiring.send
        self._writer = HeartbeatWriter(wiring.write)
        self._counts = self._writer.counts
        self._sent_at = 0.0
        self._stopped = False

    def statistics(self) -> PulseStatistics:
        """See `Pulse`."""
        return replace(self._counts)

    def ticked(self, late_s: float) -> None:
        """See `Pulse`."""
        counts = self._counts
        counts.ticks += 1
        counts.late_s = late_s
        counts.late_most_s = max(counts.late_most_s, late_s)

    def install(self, secret: bytes, targets: Iterable[Address]) -> None:
        """The network knows them."""

    def beat(self, effect: Beat) -> None:
        """See `Pulse`."""
        if self._stopped:
            return
        counts, now = self._counts, boottime()
        if counts.sent:
            counts.gap_s = now - self._sent_at
            counts.gap_most_s = max(counts.gap_most_s, counts.gap_s)
        counts.sent += 1
        self._sent_at = now
        self.last = effect.heartbeat
        self._send(effect.heartbeat)
        if effect.key:
            self._writer.wish(effect.heartbeat, effect.key)

    def follow(self, key: int) -> None:
        """See `Pulse`."""
        self._writer.follow(key)

    def stop(self) -> None:
        """See `Pulse`."""
        self._stopped = True
        self._writer.follow(0)

    async def run(self, told: Told) -> None:
        """See `Pulse`."""
        await self._writer.run(told)
