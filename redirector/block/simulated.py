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

import trio

from redirector.block.arbiter import ArbiterState, Op
from redirector.block.device import (
    BlockDevice,
    Buffer,
    IllegalRequest,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
    RegisteredKeys,
    Reservation,
    TargetBusy,
)
from redirector.block.medium import Blocks, Keep, keep_by, load_into
from redirector.block.simulated_faults import TGT, Command, Faults, Hold, Match
from redirector.block.simulated_target import SimulatedTarget

__all__ = ["TGT", "Command", "Faults", "Hold", "Match", "SimulatedDevice", "SimulatedLun"]


class SimulatedLun(SimulatedTarget, Lun):
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
        super().__init__(
            size_bytes,
            seed=seed,
            faults=faults,
            record=record,
            volatile_cache=volatile_cache,
            logical_block_bytes=logical_block_bytes,
            unmap_granularity_bytes=unmap_granularity_bytes,
            blocks=blocks,
            reservations=reservations,
        )
        self.url = f"simulated:{seed}"
        self.yields = yields

    # -- Lun -----------------------------------------------------------------------------------
    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> SimulatedDevice:
        """See `Lun.login`; answered at once, so ``timeout_s`` is of no use."""
        del timeout_s
        await trio.lowlevel.checkpoint()
        self.check_reachable(port)
        if not self.faults.reinstatement_keeps_old:
            for device in [d for d in self.sessions.values() if d.port == port]:
                self.close_session(device)
        nexus = self.nexus_for(port)
        self.arbiter.open(nexus)
        device = self.sessions[nexus] = SimulatedDevice(self, nexus, port)
        return device

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`. Parked commands land now, unless they are to be waited for.

        Of two resets at a time the first is never answered, as on tgt.
        """
        await trio.lowlevel.checkpoint()
        self.check_reachable(None)
        self._drained = drained = trio.Event()
        with trio.move_on_after(timeout_s) as scope:
            if not self.faults.reset_does_not_drain:
                if not self._reset_waits:
                    for command in [c for c in self.parked if not self.unread(c)]:
                        self.drain(command)
                if self.parked:
                    await drained.wait()
            self.settle()
            self.arbiter.reset()
        if scope.cancelled_caught:
            raise TimeoutError(f"LOGICAL UNIT RESET was not answered within {timeout_s} s")

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
        self._in_flight: dict[Command, None] = {}
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

    def set_lost(self) -> None:
        if not self._lost.is_set():
            self._lost.set()
            if self.on_lost is not None:
                self.on_lost()
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
        fault = lun.arrive(command)
        if fault is not None:
            if fault.error == "answer lost":
                lun.land(command)
            lun.close_session(self)
            raise self._unknown(command.op)
        for hold in lun.holds:
            if hold.takes(command):
                return await self.parked(command)
        command.answer = lun.land(command)
        if lun.yields:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if self._lost.is_set():
            raise self._unknown(command.op)
        lun.deliver(command)
        return command.answer

    async def parked(self, command: Command) -> object:
        command.ended = trio.Event()
        self.lun.parked.append(command)
        self._in_flight[command] = None
        with trio.CancelScope(shield=True):
            await command.ended.wait()
        self._in_flight.pop(command, None)
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
            self.lun.check_medium(command)
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
        command.land = lambda: self.lun.write_landed(command, data)
        await self._command(command)

    async def flush(self) -> None:
        command = Command(self.nexus, self.port, Op.SYNCHRONIZE_CACHE, _nothing)
        # It covers what was answered before it came, however long it is on its way.
        number = self.lun.journal.flush_begun() if self.lun.crashed_after is None else 0
        command.land = lambda: number
        await self._command(command)

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
                for command in [c for c in self.lun.parked if c.nexus in victims]:
                    command.error = TargetBusy(command.op.value, status=0x40, words="task aborted")
                    self.lun.forget_parked(command)
                    self.lun.end(command)

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
