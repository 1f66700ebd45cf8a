"""The target behind a simulated LUN: admission, landing, the faults that tests order.

See simulated.py for the way of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from random import Random
from typing import Literal, Protocol

import trio

from redirector.block.arbiter import PR_OUT_OPS, Arbiter, ArbiterState, Op
from redirector.block.device import (
    BlockError,
    InitiatorPort,
    LunIdentity,
    MediumError,
    NoSuchLun,
    OutcomeUnknown,
    SpaceExhausted,
    TargetBusy,
    Unreachable,
)
from redirector.block.medium import (
    Blocks,
    Journal,
    Keep,
    discard,
    is_allocated,
    keep_by,
    store,
)
from redirector.block.simulated_faults import Command, Faults, Hold, Injection, Match


class Session(Protocol):
    """A session as its target sees it."""

    nexus: int
    port: InitiatorPort
    frozen: bool

    @property
    def lost(self) -> bool: ...
    def set_lost(self) -> None: ...


class SimulatedTarget:
    """The target's side of a simulated LUN. All of it is atomic under trio."""

    url = ""

    def __init__(
        self,
        size_bytes: int,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        record: bool = False,
        volatile_cache: bool = True,
        logical_block_bytes: int = 512,
        unmap_granularity_bytes: int = 4096,
        blocks: Blocks | None = None,
        reservations: ArbiterState | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.rng = Random(seed)
        self.identity = LunIdentity(
            size_bytes=size_bytes,
            logical_block_bytes=logical_block_bytes,
            vendor="CSVFS",
            product="SIMULATED",
            revision="1",
            serial=f"sim{seed:08x}",
            device_id=(0x3 << 60 | seed & (1 << 60) - 1).to_bytes(8, "big"),
            thin=unmap_granularity_bytes > 0,
            unmap_granularity_bytes=unmap_granularity_bytes,
            max_unmap_bytes=1 << 30,
            volatile_cache=volatile_cache,
        )
        self.arbiter = Arbiter(self.faults.arbiter)
        if reservations is not None:
            self.arbiter.restore(reservations)
            self.arbiter.attentions.clear()
            self.arbiter.legacy_holder = None
        self.blocks: Blocks = {} if blocks is None else blocks
        self._record = record
        self.journal = Journal(self.blocks, record=record, reservations=reservations)
        self.sessions: dict[int, Session] = {}
        """The sessions that the target takes for open."""
        self.medium_errors: list[range] = []
        """Bytes that reads fail on; a write over a whole range heals it."""
        self.space_exhausted = False
        """A thin array is full: writes where nothing was written yet are refused."""
        self.crashed_after: int | None = None
        self._away: Callable[[InitiatorPort], bool] | None = None
        self._crash_at: int | None = None
        self.holds: list[Hold] = []
        self.parked: list[Command] = []
        self._drained = trio.Event()
        self._reset_waits = False
        self._injections: list[Injection] = []
        self._unanswered: set[int] = set()
        first = max(self.arbiter.registrations, default=0) + 1
        self._numbers = count(first)
        self._ports: dict[InitiatorPort, int] = {}

    # -- faults ----------------------------------------------------------------------------------
    def hold(self, match: Match, *, limit: int | None = None) -> Hold:
        """Park the commands that match, at most ``limit`` of them, until the hold is lifted."""
        hold = Hold(self, match, limit)
        self.holds.append(hold)
        return hold

    def drains_wait(self, wait: bool = True) -> None:
        """Whether a reset waits for parked commands (True) or lets them land itself."""
        self._reset_waits = wait

    def inject(self, match: Match, error: Callable[[str], BlockError], *, times: int = 1) -> None:
        """Refuse the next ``times`` commands that match with ``error(name of the command)``."""
        self._injections.append(Injection(match, error, times))

    def lose_answer(self, match: Match, *, landed: bool, times: int = 1) -> None:
        """Lose the nexus of the next command that matches, after or before it took effect."""
        what: Literal["answer lost", "command lost"] = "answer lost" if landed else "command lost"
        self._injections.append(Injection(match, what, times))

    def crash_after_writes(self, writes: int) -> None:
        """Cut everything off for good right after the ``writes``-th write from now landed."""
        self._crash_at = self.journal.writes + writes

    def disconnect(self, match: Callable[[InitiatorPort], bool] = lambda _: True) -> None:
        """Path loss: sessions of these ports are lost, logins fail, until `reconnect`."""
        self._away = match
        for device in [d for d in self.sessions.values() if match(d.port)]:
            self.close_session(device)

    def reconnect(self) -> None:
        """The path is back: logins work again."""
        self._away = None

    def close_session(self, device: Session) -> None:
        """The target closes a session: unread answers are thrown away, writes may still land."""
        if self.sessions.pop(device.nexus, None) is not None:
            self.arbiter.close(device.nexus)
        for command in [c for c in self.parked if c.nexus == device.nexus and c.op is Op.READ]:
            self.forget_parked(command)
        device.set_lost()

    def restart(self, *, power_lost: bool = False, keep: Keep | None = None) -> None:
        """The target restarts: sessions, registrations and parked commands are gone.

        With ``power_lost`` its cache is gone too, as far as ``keep`` (default: random) says.
        """
        for device in list(self.sessions.values()):
            self.close_session(device)
        for command in list(self.parked):
            self.forget_parked(command)
        self._unanswered.clear()
        self.arbiter.forget()
        if power_lost:
            blocks, _ = self.journal.image_at(self.journal.position, keep or keep_by(self.rng))
            self.blocks.clear()
            self.blocks.update(blocks)
            self.journal = Journal(self.blocks, record=self._record)
        else:
            self._note_reservations()

    def check(self) -> None:
        """Assert the invariants."""
        self.arbiter.check()
        assert all(not device.lost or device.frozen for device in self.sessions.values())
        assert all(command.ended is not None for command in self.parked)

    def nexus_for(self, port: InitiatorPort) -> int:
        """The number of a session that ``port`` is about to have."""
        known = self._ports.get(port)
        if self.faults.registrations_follow_port and known in self.arbiter.registrations:
            assert known is not None
            return known
        nexus = self._ports[port] = next(self._numbers)
        return nexus

    # -- a command's way ---------------------------------------------------------------------------
    def check_reachable(self, port: InitiatorPort | None) -> None:
        if self.crashed_after is not None:
            raise Unreachable(f"{self.url}: the simulated host was cut off")
        if self._away is not None and (port is None or self._away(port)):
            raise Unreachable(f"{self.url}: nobody answers")
        if not self.identity.size_bytes:
            raise NoSuchLun(f"{self.url}: the LUN has no size")

    def arrive(self, command: Command) -> Injection | None:
        """Admission: raises what the target answers, or returns a fault to apply."""
        for injection in self._injections:
            if injection.times and injection.match(command):
                injection.times -= 1
                if callable(injection.error):
                    raise injection.error(command.op.value)
                self.arbiter.admit(command.nexus, command.op)
                return injection
        self.arbiter.admit(command.nexus, command.op)
        return None

    def land(self, command: Command) -> object:
        if self.crashed_after is not None:
            raise OutcomeUnknown(f"{command.op.value}: the simulated host was cut off")
        answer = command.land()
        if command.op in PR_OUT_OPS:
            self._note_reservations()
        if self._crash_at is not None and self.journal.writes >= self._crash_at:
            self.crashed_after = self.journal.writes
            for device in list(self.sessions.values()):
                self.close_session(device)
        return answer

    def land_parked(self, command: Command) -> None:
        """Let a parked command take effect, and be answered if its session is still there."""
        self.forget_parked(command)
        try:
            command.answer = self.land(command)
        except BlockError as error:
            command.error = error
        else:
            if command.nexus in self.sessions:
                self.deliver(command)
        self.end(command)

    def forget_parked(self, command: Command) -> None:
        self.parked.remove(command)
        for hold in self.holds:
            if command in hold.commands:
                hold.commands.remove(command)
        if not self.parked:
            self._drained.set()

    def end(self, command: Command) -> None:
        assert command.ended is not None
        command.ended.set()

    def lose(self, nexus: int) -> None:
        device = self.sessions.get(nexus)
        if device is not None:
            self.close_session(device)

    def settle(self) -> None:
        """After a drain there is nothing between landing and answer any more."""
        for index in sorted(self._unanswered):
            self.journal.answered(index)
        self._unanswered.clear()

    def _note_reservations(self) -> None:
        self.journal.reserved(self.arbiter.state())

    def write_landed(self, command: Command, data: bytes | None) -> int:
        self._check_space(command)
        if data is None:
            discard(self.blocks, command.offset_bytes, command.length_bytes)
        else:
            store(self.blocks, command.offset_bytes, data)
            self._heal(command)
        fua = command.fua or not self.identity.volatile_cache
        index = self.journal.written(command.offset_bytes, command.length_bytes, data, fua)
        self._unanswered.add(index)
        return index

    def deliver(self, command: Command) -> None:
        """The initiator gets the answer: only now FUA binds, and a flush covers what it covers."""
        if command.op is Op.SYNCHRONIZE_CACHE:
            assert isinstance(command.answer, int)
            self.journal.flush_ended(command.answer)
        elif command.answer in self._unanswered:
            assert isinstance(command.answer, int)
            self._unanswered.discard(command.answer)
            self.journal.answered(command.answer)

    def _check_space(self, command: Command) -> None:
        if self.space_exhausted and not is_allocated(
            self.blocks, command.offset_bytes, command.length_bytes
        ):
            raise SpaceExhausted(
                command.op.value, sense_key=7, asc_ascq=0x2707, words="space allocation failed"
            )

    def _heal(self, command: Command) -> None:
        if self.medium_errors:
            end = command.offset_bytes + command.length_bytes
            self.medium_errors = [
                bad
                for bad in self.medium_errors
                if not (command.offset_bytes <= bad.start and bad.stop <= end)
            ]

    def check_medium(self, command: Command) -> None:
        end = command.offset_bytes + command.length_bytes
        for bad in self.medium_errors:
            if bad.start < end and command.offset_bytes < bad.stop:
                raise MediumError(
                    command.op.value, sense_key=3, asc_ascq=0x1100, words="unrecovered read error"
                )

    def drain(self, command: Command) -> None:
        if self.faults.reset_aborts:
            command.error = TargetBusy(command.op.value, status=0x40, words="task aborted")
            self.forget_parked(command)
            self.end(command)
        else:
            self.land_parked(command)

    def unread(self, command: Command) -> bool:
        """A read whose answer waits for a host that does not take it."""
        device = self.sessions.get(command.nexus)
        return command.op is Op.READ and device is not None and device.frozen
