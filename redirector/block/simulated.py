"""A LUN in memory that can do to its users whatever a real one can, on demand and from a seed.

Theory. A command passes three points. It *arrives* (the target admits or refuses it: unit
attention, reservation), it *lands* (its effect is there) and it is *answered*. Without faults all
three follow at once. `SimulatedLun.hold` parks commands after they arrived: their nexus may be
lost, their key preempted, and they still land later, as a real target's do, unless a reset
drained them. `Journal` (medium.py) remembers every write, flush and answer, so a crash test
builds the image of any moment with any subset of the unflushed writes (`crashed`).

There is no real time inside; timeouts run on trio's clock, which may be a `MockClock`.
Two runs are equal if their seeds and the order of their calls are.

invariants:
  1. every command ends once: answered, refused, or `OutcomeUnknown` with its nexus lost
  2. a command that arrived lands at most once, and never after a reset that it preceded
  3. after `crash_after_writes` the journal grows no more

Concurrency: no task of its own; every method but the awaiting ones is atomic under trio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Literal

import trio

from redirector.block.arbiter import PR_OUT_OPS, Arbiter, ArbiterHabits, ArbiterState, Op
from redirector.block.device import (
    BlockDevice,
    BlockError,
    Buffer,
    IllegalRequest,
    InitiatorPort,
    Lun,
    LunIdentity,
    MediumError,
    NoSuchLun,
    OutcomeUnknown,
    RegisteredKeys,
    Reservation,
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
    load_into,
    store,
)


@dataclass(frozen=True, slots=True)
class Faults:
    """How this target departs from a good one, for as long as it exists."""

    arbiter: ArbiterHabits = field(default_factory=ArbiterHabits)
    reinstatement_keeps_old: bool = False
    """A login with the port of a living session leaves that session alive."""
    reset_does_not_drain: bool = False
    """LOGICAL UNIT RESET is answered while earlier commands are still on their way."""
    reset_aborts: bool = False
    """A reset answers TASK ABORTED to commands on their way instead of letting them land."""


TGT = Faults(ArbiterHabits(leaks=frozenset({Op.UNMAP, Op.WRITE_SAME})))
"""tgt 1.0.85, as measured."""


@dataclass(eq=False, slots=True)
class Command:
    """A command on its way; what `hold` and `inject` match on."""

    nexus: int
    port: InitiatorPort
    op: Op
    land: Callable[[], object]
    offset_bytes: int = 0
    length_bytes: int = 0
    data: bytes = b""
    fua: bool = False
    answer: object = None
    error: BlockError | None = None
    ended: trio.Event | None = field(default=None, repr=False)


Match = Callable[[Command], bool]


class Hold:
    """Parks matching commands between arrival and landing, until it is lifted."""

    def __init__(self, lun: SimulatedLun, match: Match, limit: int | None) -> None:
        self._lun = lun
        self._match = match
        self._left = limit
        self._arrived = trio.Event()
        self.commands: list[Command] = []
        """The parked ones, in order of arrival."""

    def takes(self, command: Command) -> bool:
        if self._left == 0 or not self._match(command):
            return False
        if self._left is not None:
            self._left -= 1
        self.commands.append(command)
        self._arrived.set()
        return True

    async def wait_held(self, commands: int = 1) -> None:
        """Return when so many commands are parked."""
        while len(self.commands) < commands:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def land(self, command: Command | None = None) -> None:
        """Let one command (default: the first) take effect, and be answered if its nexus lives."""
        self._lun._land_parked(command or self.commands[0])

    def drop(self, command: Command | None = None) -> None:
        """Lose one command without effect; its nexus is lost with it."""
        command = command or self.commands[0]
        self._lun._forget_parked(command)
        self._lun._lose(command.nexus)

    def lift(self) -> None:
        """Hold no more, and let everything parked land in order of arrival."""
        while self.commands:
            self.land()
        if self in self._lun._holds:
            self._lun._holds.remove(self)


@dataclass(slots=True)
class _Injection:
    match: Match
    error: Callable[[str], BlockError] | Literal["answer lost", "command lost"]
    times: int


class SimulatedLun(Lun):
    """A shared disk in memory.

    ``record`` keeps every event for `crashed`; without it only the present can be crashed.
    ``yields`` makes every command a trio checkpoint, as on a real LUN; False is for speed.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        record: bool = False,
        yields: bool = True,
        volatile_cache: bool = True,
        logical_block_bytes: int = 512,
        unmap_granularity_bytes: int = 4096,
        blocks: Blocks | None = None,
        reservations: ArbiterState | None = None,
    ) -> None:
        self.url = f"simulated:{seed}"
        self.faults = faults or Faults()
        self.rng = Random(seed)
        self.yields = yields
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
        self.sessions: dict[int, SimulatedDevice] = {}
        """The sessions that the target takes for open."""
        self.medium_errors: list[range] = []
        """Bytes that reads fail on; a write over a whole range heals it."""
        self.space_exhausted = False
        """A thin array is full: writes where nothing was written yet are refused."""
        self.crashed_after: int | None = None
        self._away: Callable[[InitiatorPort], bool] | None = None
        self._crash_at: int | None = None
        self._holds: list[Hold] = []
        self._parked: list[Command] = []
        self._drained = trio.Event()
        self._reset_waits = False
        self._injections: list[_Injection] = []
        self._unanswered: set[int] = set()
        first = max(self.arbiter.registrations, default=0) + 1
        self._numbers = count(first)

    # -- Lun -----------------------------------------------------------------------------------
    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> SimulatedDevice:
        """See `Lun.login`; answered at once, so ``timeout_s`` is of no use."""
        del timeout_s
        await trio.lowlevel.checkpoint()
        self._check_reachable(port)
        if not self.faults.reinstatement_keeps_old:
            for device in [d for d in self.sessions.values() if d.port == port]:
                self.close_session(device)
        nexus = next(self._numbers)
        self.arbiter.open(nexus)
        device = self.sessions[nexus] = SimulatedDevice(self, nexus, port)
        return device

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`. Parked commands land now, unless they are to be waited for.

        Of two resets at a time the first is never answered, as on tgt.
        """
        await trio.lowlevel.checkpoint()
        self._check_reachable(None)
        self._drained = drained = trio.Event()
        with trio.move_on_after(timeout_s) as scope:
            if not self.faults.reset_does_not_drain:
                if not self._reset_waits:
                    for command in [c for c in self._parked if not self._unread(c)]:
                        self._drain(command)
                if self._parked:
                    await drained.wait()
            self._settle()
            self.arbiter.reset()
        if scope.cancelled_caught:
            raise TimeoutError(f"LOGICAL UNIT RESET was not answered within {timeout_s} s")

    def _drain(self, command: Command) -> None:
        if self.faults.reset_aborts:
            command.error = TargetBusy(command.op.value, status=0x40, words="task aborted")
            self._forget_parked(command)
            self._end(command)
        else:
            self._land_parked(command)

    def _unread(self, command: Command) -> bool:
        """A read whose answer waits for a host that does not take it."""
        device = self.sessions.get(command.nexus)
        return command.op is Op.READ and device is not None and device.frozen

    # -- faults ----------------------------------------------------------------------------------
    def hold(self, match: Match, *, limit: int | None = None) -> Hold:
        """Park the commands that match, at most ``limit`` of them, until the hold is lifted."""
        hold = Hold(self, match, limit)
        self._holds.append(hold)
        return hold

    def drains_wait(self, wait: bool = True) -> None:
        """Whether a reset waits for parked commands (True) or lets them land itself."""
        self._reset_waits = wait

    def inject(self, match: Match, error: Callable[[str], BlockError], *, times: int = 1) -> None:
        """Refuse the next ``times`` commands that match with ``error(name of the command)``."""
        self._injections.append(_Injection(match, error, times))

    def lose_answer(self, match: Match, *, landed: bool, times: int = 1) -> None:
        """Lose the nexus of the next command that matches, after or before it took effect."""
        what: Literal["answer lost", "command lost"] = "answer lost" if landed else "command lost"
        self._injections.append(_Injection(match, what, times))

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

    def close_session(self, device: SimulatedDevice) -> None:
        """The target closes a session: unread answers are thrown away, writes may still land."""
        if self.sessions.pop(device.nexus, None) is not None:
            self.arbiter.close(device.nexus)
        for command in [c for c in self._parked if c.nexus == device.nexus and c.op is Op.READ]:
            self._forget_parked(command)
        device._set_lost()

    def restart(self, *, power_lost: bool = False, keep: Keep | None = None) -> None:
        """The target restarts: sessions, registrations and parked commands are gone.

        With ``power_lost`` its cache is gone too, as far as ``keep`` (default: random) says.
        """
        for device in list(self.sessions.values()):
            self.close_session(device)
        self._parked.clear()
        self._unanswered.clear()
        self.arbiter.forget()
        if power_lost:
            blocks, _ = self.journal.image_at(self.journal.position, keep or keep_by(self.rng))
            self.blocks.clear()
            self.blocks.update(blocks)
            self.journal = Journal(self.blocks, record=self._record)
        else:
            self._note_reservations()

    def crashed(
        self,
        writes: int | None = None,
        *,
        position: int | None = None,
        keep: Keep | None = None,
        reservations: bool = False,
        record: bool = False,
    ) -> SimulatedLun:
        """A new LUN as power loss left this one just after its ``writes``-th write, or at a
        `Journal.position`, or now.

        ``keep`` (default: random, from this LUN's seed) decides on each unflushed write;
        ``reservations`` keeps the registrations of that moment, all their nexuses being dead.
        """
        if position is None:
            journal = self.journal
            position = journal.position if writes is None else journal.position_after(writes)
        blocks, state = self.journal.image_at(position, keep or keep_by(self.rng))
        lun = SimulatedLun(
            self.identity.size_bytes,
            faults=self.faults,
            record=record,
            yields=self.yields,
            blocks=blocks,
            reservations=state if reservations else None,
        )
        lun.url, lun.identity = self.url, self.identity
        return lun

    def check(self) -> None:
        """Assert the invariants."""
        self.arbiter.check()
        assert all(not device.lost or device.frozen for device in self.sessions.values())
        assert all(command.ended is not None for command in self._parked)

    # -- a command's way ---------------------------------------------------------------------------
    def _check_reachable(self, port: InitiatorPort | None) -> None:
        if self.crashed_after is not None:
            raise Unreachable(f"{self.url}: the simulated host was cut off")
        if self._away is not None and (port is None or self._away(port)):
            raise Unreachable(f"{self.url}: nobody answers")
        if not self.identity.size_bytes:
            raise NoSuchLun(f"{self.url}: the LUN has no size")

    def _arrive(self, command: Command) -> _Injection | None:
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

    def _land(self, command: Command) -> object:
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

    def _land_parked(self, command: Command) -> None:
        self._forget_parked(command)
        try:
            command.answer = self._land(command)
        except BlockError as error:
            command.error = error
        self._end(command)

    def _forget_parked(self, command: Command) -> None:
        self._parked.remove(command)
        for hold in self._holds:
            if command in hold.commands:
                hold.commands.remove(command)
        if not self._parked:
            self._drained.set()

    def _end(self, command: Command) -> None:
        assert command.ended is not None
        command.ended.set()

    def _lose(self, nexus: int) -> None:
        device = self.sessions.get(nexus)
        if device is not None:
            self.close_session(device)

    def _settle(self) -> None:
        """After a drain there is nothing between landing and answer any more."""
        for index in sorted(self._unanswered):
            self.journal.answered(index)
        self._unanswered.clear()

    def _note_reservations(self) -> None:
        self.journal.reserved(self.arbiter.state())

    def _write_landed(self, command: Command, data: bytes | None) -> int:
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

    def _answered(self, index: int) -> None:
        if index in self._unanswered:
            self._unanswered.discard(index)
            self.journal.answered(index)

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

    def _check_medium(self, command: Command) -> None:
        end = command.offset_bytes + command.length_bytes
        for bad in self.medium_errors:
            if bad.start < end and command.offset_bytes < bad.stop:
                raise MediumError(
                    command.op.value, sense_key=3, asc_ascq=0x1100, words="unrecovered read error"
                )


class SimulatedDevice(BlockDevice):
    """One session with a `SimulatedLun`."""

    def __init__(self, lun: SimulatedLun, nexus: int, port: InitiatorPort) -> None:
        self.lun = lun
        self.nexus = nexus
        self.port = port
        self.identity = lun.identity
        self.frozen = False
        """The host stopped reading from its connection; the target does not know."""
        self._lost = trio.Event()
        self._in_flight: set[Command] = set()
        self._idle = trio.Event()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    def freeze(self) -> None:
        """The host hangs: its reads stay unread at the target, which keeps the session open."""
        self.frozen = True

    def thaw(self) -> None:
        """The host goes on where it was."""
        self.frozen = False

    def _set_lost(self) -> None:
        self._lost.set()
        for command in list(self._in_flight):
            if command.ended is not None and not command.ended.is_set():
                command.error = self._unknown(command.op)
                command.ended.set()

    def _unknown(self, op: Op) -> OutcomeUnknown:
        return OutcomeUnknown(f"{op.value} on {self.lun.url}: the session was lost")

    async def _command(self, command: Command) -> object:
        lun = self.lun
        if lun.yields:
            await trio.lowlevel.checkpoint_if_cancelled()
        if self._lost.is_set():
            raise self._unknown(command.op)
        fault = lun._arrive(command)
        if fault is not None:
            if fault.error == "answer lost":
                lun._land(command)
            lun.close_session(self)
            raise self._unknown(command.op)
        for hold in lun._holds:
            if hold.takes(command):
                return await self._parked(command)
        answer = lun._land(command)
        if lun.yields:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if self._lost.is_set():
            raise self._unknown(command.op)
        return answer

    async def _parked(self, command: Command) -> object:
        command.ended = trio.Event()
        self.lun._parked.append(command)
        self._in_flight.add(command)
        with trio.CancelScope(shield=True):
            await command.ended.wait()
        self._in_flight.discard(command)
        if not self._in_flight:
            self._idle.set()
        if command.error is not None:
            raise command.error
        return command.answer

    def _data(self, op: Op, offset_bytes: int, length_bytes: int) -> Command:
        block = self.identity.logical_block_bytes
        if offset_bytes % block or length_bytes % block or offset_bytes < 0:
            raise ValueError(
                f"{op.value}: {length_bytes} bytes at {offset_bytes}: not whole blocks of {block}"
            )
        if offset_bytes + length_bytes > self.identity.size_bytes:
            raise IllegalRequest(
                op.value, sense_key=5, asc_ascq=0x2100, words="logical block address out of range"
            )
        return Command(self.nexus, self.port, op, _nothing, offset_bytes, length_bytes)

    # -- data ----------------------------------------------------------------------------------
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        command = self._data(Op.READ, offset_bytes, len(view))

        def land() -> None:
            self.lun._check_medium(command)
            load_into(self.lun.blocks, offset_bytes, view)

        command.land = land
        await self._command(command)

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        command = self._data(Op.WRITE, offset_bytes, memoryview(data).nbytes)
        command.data, command.fua = bytes(data), fua
        await self._write_like(command, command.data)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        if not self.identity.unmap_granularity_bytes:
            raise IllegalRequest(
                "UNMAP", sense_key=5, asc_ascq=0x2000, words="invalid command operation code"
            )
        commands = [self._data(Op.UNMAP, offset, length) for offset, length in ranges]
        for command in commands:
            if command.length_bytes:
                await self._write_like(command, None)

    async def write_same(self, offset_bytes: int, length_bytes: int, block: Buffer) -> None:
        command = self._data(Op.WRITE_SAME, offset_bytes, length_bytes)
        command.data = bytes(block) * (length_bytes // self.identity.logical_block_bytes)
        await self._write_like(command, command.data)

    async def _write_like(self, command: Command, data: bytes | None) -> None:
        command.land = lambda: self.lun._write_landed(command, data)
        index = await self._command(command)
        assert isinstance(index, int)
        self.lun._answered(index)

    async def flush(self) -> None:
        journal = self.lun.journal
        number = journal.flush_begun() if self.lun.crashed_after is None else 0
        command = Command(self.nexus, self.port, Op.SYNCHRONIZE_CACHE, _nothing)
        await self._command(command)
        if self.lun.crashed_after is None and self.lun.journal is journal:
            journal.flush_ended(number)

    # -- persistent reservations -------------------------------------------------------------------
    async def _reserve(self, op: Op, action: Callable[[], object]) -> object:
        return await self._command(Command(self.nexus, self.port, op, action))

    async def read_keys(self) -> RegisteredKeys:
        answer = await self._reserve(Op.READ_KEYS, self.lun.arbiter.read_keys)
        assert isinstance(answer, RegisteredKeys)
        return answer

    async def read_reservation(self) -> Reservation:
        answer = await self._reserve(Op.READ_RESERVATION, self.lun.arbiter.read_reservation)
        assert isinstance(answer, Reservation)
        return answer

    async def register(self, key: int, *, old_key: int = 0) -> None:
        arbiter = self.lun.arbiter
        await self._reserve(Op.REGISTER, lambda: arbiter.register(self.nexus, key, old_key))

    async def reserve(self, key: int) -> None:
        await self._reserve(Op.RESERVE, lambda: self.lun.arbiter.reserve(self.nexus, key))

    async def release(self, key: int) -> None:
        await self._reserve(Op.RELEASE, lambda: self.lun.arbiter.release(self.nexus, key))

    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        def action() -> None:
            victims = self.lun.arbiter.preempt(self.nexus, key, victim_key, abort=abort)
            if abort:
                for command in [c for c in self.lun._parked if c.nexus in victims]:
                    command.error = TargetBusy(command.op.value, status=0x40, words="task aborted")
                    self.lun._forget_parked(command)
                    self.lun._end(command)

        await self._reserve(Op.PREEMPT, action)

    async def test_unit_ready(self) -> None:
        await self._reserve(Op.TEST_UNIT_READY, _nothing)

    # -- end ---------------------------------------------------------------------------------------
    async def aclose(self) -> None:
        while self._in_flight:
            self._idle = trio.Event()
            with trio.CancelScope(shield=True):
                await self._idle.wait()
        self.lun.close_session(self)
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self.lun.close_session(self)


def _nothing() -> None:
    return None
