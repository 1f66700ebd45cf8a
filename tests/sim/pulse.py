"""Heartbeats from a thread of their own, as `csvfs.membership.native_pulse` has them, simulated.

The thread is a `Process` beside the daemon's: it stops and dies with it, but goes on for a second
while the event loop hangs (`Daemon.hang`). What it writes is answered to it; what is refused there
is for the event loop to judge, which writes until that works again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lockmgr.cluster import effects, events
from lockmgr.cluster.blocks import Heartbeat
from redirector.block.arbiter import Op
from redirector.block.device import OutcomeUnknown, UnitAttention
from redirector.block.reservations import Registration
from tests.sim.world import Process

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon

ALIVE_S: Final = 1.0


class ThreadPulse:
    """See the module's docstring."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._world = daemon.world
        self._settings = daemon.cluster.settings
        self.thread = Process(daemon.world, f"{daemon.name} pulse")
        self.sequence = 0
        self._effect: effects.Beat | None = None
        self._beaten_at = float("-inf")
        self._stamped_at = float("-inf")
        self._silent = True
        self._serial = 0
        self._key = 0
        self._writing = False
        self._refused = False
        self._stopped = False

    # -- what the daemon says ----------------------------------------------------------------------
    def stamp(self) -> None:
        """The event loop comes round."""
        self._stamped_at = self._daemon.now
        if self._silent and self._effect is not None:
            self._silent = False
            self._schedule(0.0)

    def beat(self, effect: effects.Beat) -> None:
        """Show this. What is new, or from a member in a hurry, at once."""
        before, self._effect = self._effect, effect
        now = self._daemon.now
        shown = None if before is None else replace(before.heartbeat, sequence=0)
        hurries = now - self._beaten_at < 0.75 * self._settings.heartbeat_s
        self._beaten_at = now
        if shown != replace(effect.heartbeat, sequence=0) or hurries:
            self._schedule(0.0)
        self.follow(effect.key)
        if self._refused:
            self._write_from_loop()

    def follow(self, key: int) -> None:
        """The member names this session."""
        self._key = key

    def written_by_python(self) -> None:
        """The target takes them again."""
        self._refused = False

    def stop(self) -> None:
        """For good."""
        self._stopped = True

    # -- the thread ------------------------------------------------------------------------------
    def _schedule(self, delay_s: float) -> None:
        self._serial += 1
        self._world.after(delay_s, self.thread.deliver, self._due, self._serial)

    def _due(self, serial: int) -> None:
        if serial != self._serial or self._stopped or self._effect is None:
            return
        if self._daemon.now - self._stamped_at >= ALIVE_S:
            self._silent = True
            return
        self._schedule(self._settings.heartbeat_s)
        self.sequence += 1
        heartbeat = replace(self._effect.heartbeat, sequence=self.sequence)
        self._daemon.cluster.oracle.beats(self._daemon)
        self._daemon.send_beat(heartbeat)
        control = self._daemon.paths.control
        if control is not None and control.key == self._key and self._effect.key == self._key:
            self._write(control, heartbeat)

    def _write(self, control: Registration, heartbeat: Heartbeat) -> None:
        daemon = self._daemon
        session, content = daemon.paths.session_of(control), daemon.paths.content
        if self._writing or self._refused or daemon.is_writing or not session.here:
            return
        self._writing = True
        sent_at = daemon.now

        def apply() -> None:
            content.heartbeats[heartbeat.slot] = heartbeat

        def answered(result: object) -> None:
            self._writing = False
            if self._stopped or control.key != self._key:
                return
            if isinstance(result, Exception):
                self._refused = True  # and so the thread writes on it no more
                daemon.process.deliver(self._failed, control, result)
                return
            daemon.renewed_by_pulse(sent_at + self._settings.lease_s)
            written = events.HeartbeatWritten(control.key, sent_at)
            daemon.process.deliver(daemon.step, written)

        session.submit(Op.WRITE, apply, answered, "a heartbeat", process=self.thread)

    def _failed(self, control: Registration, failure: Exception) -> None:
        """In the event loop."""
        daemon = self._daemon
        if control.key != self._key or isinstance(failure, OutcomeUnknown):
            self._refused = False  # the next session is another matter
        if control.key != self._key:
            return
        if isinstance(failure, OutcomeUnknown):
            daemon.paths.path_lost(control)
            daemon.step(events.HeartbeatFailed(control.key))
            return
        if isinstance(failure, UnitAttention):
            daemon.paths.session_of(control).told_elsewhere.append(failure)
        self._write_from_loop()

    def _write_from_loop(self) -> None:
        effect = self._effect
        if effect is not None and effect.key and not self._writing and not self._stopped:
            self.sequence += 1
            self._daemon.write_beat(replace(effect.heartbeat, sequence=self.sequence))
