"""The heartbeats of a host from C: they go on while the event loop is busy, and end when it hangs.

Theory. `redirector.native` has a thread that sends datagrams, writes the heartbeat block on the
control session, and renews the lease of each write that the target confirmed. Here it is told what
to show, and what it did is told to the member. The event loop stamps whenever it comes round
(before and after it waits): a single task that computes for longer than a second is a hang.

What the target refuses (a unit attention, a conflict, "busy") is for Python to judge: the thread
writes no more, and the next heartbeats are written by the arbiter, as everything else is, until one
is on the LUN. So are all of them where the LUN has no native session (``file://``).

invariants: those of `lockmgr.cluster.pulse`; and
- the thread writes, or Python does, never both at a time;
- the thread writes only on the session that the member named last, if it is the arbiter's control
  session.

Concurrency: `run` has two tasks, one that waits for the thread, one that writes; everything else
is a plain call. The thread never waits for Python.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import trio

from csvfs.format import Superblock, byte_offset, encode_heartbeat
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.effects import Beat
from lockmgr.cluster.events import HeartbeatFailed, HeartbeatWritten
from lockmgr.cluster.peers import Address
from lockmgr.cluster.pulse import HeartbeatWriter, PulseStatistics, PulseWiring, Told
from redirector.block.device import BlockError, OutcomeUnknown
from redirector.block.reservations import Registration
from redirector.native._native import Completion, Pulse

_log = logging.getLogger(__name__)

ALIVE_S: Final = 1.0
"""A daemon whose event loop has not come round for so long is silent."""


class ControlSession(Protocol):
    """What is needed of the arbiter."""

    @property
    def control(self) -> Registration | None:
        """The control session of this moment."""
        ...

    def lose(self, registration: Registration, why: BlockError) -> None:
        """It is closed; to be told as the loss of the paths."""
        ...


class NativePulse:
    """A `lockmgr.cluster.pulse.Pulse`. Raises OSError when there is no thread or descriptor."""

    def __init__(
        self, arbiter: ControlSession, superblock: Superblock, wiring: PulseWiring
    ) -> None:
        self.last: Heartbeat | None = None
        settings = wiring.settings
        self._arbiter = arbiter
        self._superblock = superblock
        self._native = Pulse(
            wiring.socket_fd,
            wiring.cluster_id,
            interval_ms=round(settings.heartbeat_s * 1000),
            alive_ms=round(ALIVE_S * 1000),
            lease_ms=int(settings.lease_s * 1000),
        )
        self._writer = HeartbeatWriter(wiring.write)
        self._hurry_s = settings.heartbeat_s * 0.75
        self._shown_at = float("-inf")
        self._attached: Registration | None = None
        """The control session that the thread writes on."""
        self._refused = False
        """What was written last from C: until a heartbeat is written from Python."""
        self._stopped = False
        self._ticks = PulseStatistics()

    @property
    def lease_until_s(self) -> float:
        """See `Pulse`."""
        return self._native.lease_until_s

    def statistics(self) -> PulseStatistics:
        """See `Pulse`."""
        native, python = self._native.statistics(), self._writer.counts
        return replace(
            self._ticks,
            sent=native["sent"],
            gap_s=native["gap_s"],
            gap_most_s=native["gap_most_s"],
            written=native["written"] + python.written,
            failed=native["failed"] + python.failed,
            write_s=native["write_s"] or python.write_s,
            write_most_s=max(native["write_most_s"], python.write_most_s),
        )

    def ticked(self, late_s: float) -> None:
        """See `Pulse`."""
        ticks = self._ticks
        ticks.ticks += 1
        ticks.late_s = late_s
        ticks.late_most_s = max(ticks.late_most_s, late_s)

    def install(self, secret: bytes, targets: Iterable[Address]) -> None:
        """See `Pulse`."""
        self._native.address(secret, [(each.host, each.port) for each in targets])

    # -- what the member says ------------------------------------------------------------------
    def beat(self, effect: Beat) -> None:
        """See `Pulse`. What is new is shown at once, and so is every one of a member in a hurry."""
        if self._stopped:
            return
        heartbeat, now = effect.heartbeat, boottime()
        before, self.last = self.last, heartbeat
        new = before is None or replace(before, sequence=heartbeat.sequence) != heartbeat
        self._show(heartbeat, now=new or now - self._shown_at < self._hurry_s)
        self._shown_at = now
        self.follow(effect.key)
        if effect.key:
            self._write_on(effect.key, heartbeat)

    def _show(self, heartbeat: Heartbeat, *, now: bool) -> None:
        self._native.show(
            slot=heartbeat.slot,
            incarnation=heartbeat.incarnation,
            flags=heartbeat.flags,
            epoch=heartbeat.epoch,
            hears=heartbeat.hears,
            block=bytes(self._encoded(heartbeat)),
            now=now,
        )

    def _encoded(self, heartbeat: Heartbeat) -> bytearray:
        address = self._superblock.geometry.heartbeat(heartbeat.slot)
        return encode_heartbeat(heartbeat, self._superblock.volume_id, address)

    def _write_on(self, key: int, heartbeat: Heartbeat) -> None:
        control = self._arbiter.control
        if self._attached is not None or control is None or control.key != key:
            return
        session = None if self._refused else control.device.native_session
        if session is None or not self._writer.is_idle:
            if not self._native.writing:
                sequence = self._native.next_sequence()
                self._writer.wish(replace(heartbeat, sequence=sequence), key)
            return
        offset_bytes = byte_offset(self._superblock.geometry.heartbeat(heartbeat.slot))
        if self._native.attach(session, key, offset_bytes):
            self._attached = control

    def follow(self, key: int) -> None:
        """See `Pulse`."""
        attached = self._attached
        if attached is not None and (attached.key != key or attached is not self._arbiter.control):
            self._attached = None
            self._native.detach()
        self._writer.follow(key)

    def stop(self) -> None:
        """See `Pulse`."""
        self._stopped = True
        self._native.stop()
        self.follow(0)

    # -- what it does --------------------------------------------------------------------------
    async def run(self, told: Told) -> None:
        """See `Pulse`."""
        stamps = _Stamps(self._native)
        trio.lowlevel.add_instrument(stamps)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._writer.run, partial(self._written_here, told))
                await self._listen(told)
        finally:
            trio.lowlevel.remove_instrument(stamps)
            self._native.stop()

    def _written_here(self, told: Told, event: HeartbeatWritten | HeartbeatFailed) -> None:
        if isinstance(event, HeartbeatWritten):
            self._refused = False
        told(event)

    async def _listen(self, told: Told) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._native.fileno())
            key, sent_at, failure = self._native.reap()
            if sent_at is not None:
                told(HeartbeatWritten(key, sent_at))
            if failure is not None:
                self._failed(key, failure, told)

    def _failed(self, key: int, failure: Completion, told: Told) -> None:
        """The thread has given that session up."""
        registration, self._attached = self._attached, None
        if registration is None or registration.key != key:
            return  # and so has this node
        what = "WRITE of a heartbeat"
        if failure.unknown:
            # Its loss is told before, as that of every path is.
            self._arbiter.lose(registration, OutcomeUnknown(f"{what}: no answer"))
            told(HeartbeatFailed(key))
            return
        _log.info("%s on the control session was refused (status %#x)", what, failure.status)
        registration.device.refused_elsewhere(what, failure)
        self._refused = True
        if self.last is not None and not self._stopped:
            self._write_on(key, self.last)


class _Stamps(trio.abc.Instrument):
    """The event loop comes round."""

    def __init__(self, native: Pulse) -> None:
        self._stamp = native.stamp

    def before_io_wait(self, timeout: float) -> None:
        del timeout
        self._stamp()

    def after_io_wait(self, timeout: float) -> None:
        del timeout
        self._stamp()
