"""``file:///path``: a LUN in a file, shared by the daemons of one machine.

Reservations have the semantics of a target's (side_file.py), so everything above works as on
iSCSI, with nothing installed. What differs from a target: a process that is *stopped* (not dead)
in the middle of an I/O keeps a reset waiting until it runs on or is killed.

Theory. A data command shares TRAFFIC from before it is admitted until its last byte is written;
PREEMPT changes the state at once; a reset takes TRAFFIC exclusively. So after PREEMPT and reset no
byte of the victim can land any more, and PREEMPT alone, as on a real target, does not drain.

invariants:
  1. no read, write or unmap runs unless its session shares TRAFFIC and was admitted under it
  2. descriptors are closed only when nothing is in flight

Concurrency: page-cached bytes are moved inline when the kernel says that it need not wait
(RWF_NOWAIT); all else runs in threads, at most `_THREADS` of a session at a time. Locks are
polled, never waited for, so cancelling works and no thread hangs behind a stopped process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from redirector.block.arbiter import DATA_OPS, Op
from redirector.block.device import (
    BlockDevice,
    BlockError,
    Buffer,
    IllegalRequest,
    InitiatorPort,
    Lun,
    NoSuchLun,
    OutcomeUnknown,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    Unreachable,
)
from redirector.block.file_data import (
    SECTOR_BYTES,
    identify,
    open_data,
    punch,
    side_path,
    translate,
)
from redirector.block.side_file import STATE, TRAFFIC, TURNSTILE, SideFile, TargetState

_T = TypeVar("_T")

_THREADS = 16
_INLINE_BYTES = 128 << 10
_POLL_S = 0.002
_LOST_POLL_S = 0.05


async def _lock(side: SideFile, byte: int, *, exclusive: bool = True) -> None:
    while not side.try_lock(byte, exclusive=exclusive):  # noqa: ASYNC110 (another process's lock)
        await trio.sleep(_POLL_S)


class FileLun(Lun):
    """A regular file as a LUN. It must exist; its size is the size of the LUN."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.url = f"file://{self.path}"

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> FileDevice:
        """See `Lun.login`."""
        with trio.move_on_after(timeout_s):
            return await FileDevice.open(self, port)
        raise Unreachable(f"{self.url}: its side file stayed locked for {timeout_s} s")

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`."""
        await trio.lowlevel.checkpoint()
        side = self._open_side()
        try:
            with trio.move_on_after(timeout_s):
                await self._drain(side)
                return
        finally:
            side.close()
        raise TimeoutError(f"LOGICAL UNIT RESET of {self.url} waited {timeout_s} s for I/O to end")

    async def _drain(self, side: SideFile) -> None:
        await _lock(side, TURNSTILE)
        side.reset_pending = True
        try:
            await _lock(side, TRAFFIC)
            await _lock(side, STATE)
            with side.changing() as state:
                state.arbiter.reset()
        finally:
            side.reset_pending = False

    def _open_side(self) -> SideFile:
        try:
            os.stat(self.path)
            return SideFile(side_path(self.path))
        except FileNotFoundError as error:
            raise NoSuchLun(f"{self.url}: there is no such file") from error
        except OSError as error:
            raise Unreachable(f"{self.url}: {error}") from error


class FileDevice(BlockDevice):
    """One session with a `FileLun`, of this process."""

    def __init__(self, lun: FileLun, port: InitiatorPort, fd: int, side: SideFile) -> None:
        self.lun = lun
        self.port = port
        self._fd = fd
        self._side = side
        self.identity = identify(fd, side.fd)
        self.nexus = 0
        self._lost = trio.Event()
        self._in_flight = 0
        self._traffic = 0
        """Data commands that share TRAFFIC, or are about to."""
        self._idle = trio.Event()
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._nowait_flags = {Op.READ: os.RWF_NOWAIT, Op.WRITE: os.RWF_NOWAIT}
        self._seen_version = -1
        self._refused: frozenset[Op] = frozenset()

    @classmethod
    async def open(cls, lun: FileLun, port: InitiatorPort) -> FileDevice:
        """Log in; see `Lun.login`."""
        await trio.lowlevel.checkpoint()
        side = lun._open_side()
        fd = -1
        try:
            fd = open_data(lun.path, lun.url)
            device = cls(lun, port, fd, side)
            await _lock(side, STATE)
            try:
                device._establish()
            finally:
                side.unlock(STATE)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            side.close()
            raise
        return device

    def _establish(self) -> None:
        side = self._side
        with side.changing() as state:
            for nexus, (name, isid) in list(state.sessions.items()):
                if (name, isid) == (self.port.name, self.port.isid) or not side.is_alive(nexus):
                    state.close_session(nexus)
            self.nexus = side.new_nexus()
            side.claim_liveness(self.nexus)
            state.sessions[self.nexus] = (self.port.name, self.port.isid)
            state.arbiter.open(self.nexus)

    # -- life ----------------------------------------------------------------------------------
    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        while not self._lost.is_set():
            changed = self._side.version != self._seen_version
            if changed and self._side.try_lock(STATE, exclusive=True):
                with contextlib.suppress(OutcomeUnknown), self._state():
                    pass
            with trio.move_on_after(_LOST_POLL_S):
                await self._lost.wait()

    def _set_lost(self) -> None:
        if not self._lost.is_set():
            self._lost.set()
            if self.on_lost is not None:
                self.on_lost()

    def abort(self) -> None:
        self._set_lost()
        if not self._in_flight:
            self._close()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            while self._in_flight:
                self._idle = trio.Event()
                await self._idle.wait()
            if self._fd >= 0:
                await _lock(self._side, STATE)
                with self._side.changing() as state:
                    state.close_session(self.nexus)
                self._set_lost()
                self._close()  # and with it, STATE
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._side.close()

    def _unknown(self, op: Op) -> OutcomeUnknown:
        return OutcomeUnknown(f"{op.value} on {self.lun.url}: the session was lost")

    # -- admission -----------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def _command(self, op: Op) -> AsyncIterator[None]:
        """Counts a command in flight; nothing closes the descriptors under it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._lost.is_set():
            raise self._unknown(op)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                if self._lost.is_set():
                    self._close()
                self._idle.set()
        if self._lost.is_set():
            raise self._unknown(op)

    @contextlib.asynccontextmanager
    async def _data_command(self, op: Op) -> AsyncIterator[None]:
        """Share TRAFFIC, then ask the arbiter; in this order (see the module's theory)."""
        async with self._command(op):
            if self._side.reset_pending:
                await _lock(self._side, TURNSTILE, exclusive=False)
                self._side.unlock(TURNSTILE)
            self._traffic += 1
            try:
                await _lock(self._side, TRAFFIC, exclusive=False)
                await self._admit(op)
                yield
                await self._confirm()
            finally:
                self._traffic -= 1
                if not self._traffic:
                    self._side.unlock(TRAFFIC)

    async def _admit(self, op: Op) -> None:
        if self._side.version != self._seen_version:
            await _lock(self._side, STATE)
            with self._state() as state:
                state.arbiter.admit(self.nexus, op)
        if self._lost.is_set():
            raise self._unknown(op)
        if op in self._refused:
            raise ReservationConflict(op.value, status=0x18, words="reservation conflict")

    async def _confirm(self) -> None:
        """A session that was closed meanwhile gets no answer, as from a target."""
        if self._side.version != self._seen_version:
            with trio.CancelScope(shield=True):
                await _lock(self._side, STATE)
            with self._state():
                pass

    @contextlib.contextmanager
    def _state(self) -> Iterator[TargetState]:
        """The target's state, for which STATE was taken; what is changed in it is saved."""
        try:
            with self._side.changing() as state:
                if self.nexus not in state.sessions:
                    self._set_lost()
                    raise OutcomeUnknown(f"{self.lun.url}: the target closed the session")
                yield state
            arbiter = state.arbiter
            barred = arbiter.holder is not None and self.nexus not in arbiter.registrations
            self._refused = DATA_OPS if barred else frozenset()
            # A pending attention keeps the version unseen, so that the next command fetches it.
            if not arbiter.attentions[self.nexus]:
                self._seen_version = self._side.version
        finally:
            self._side.unlock(STATE)

    # -- data ----------------------------------------------------------------------------------
    def _check_range(self, op: Op, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes % SECTOR_BYTES or length_bytes % SECTOR_BYTES or offset_bytes < 0:
            raise ValueError(
                f"{op.value}: {length_bytes} bytes at {offset_bytes}: not whole blocks of 512"
            )
        if offset_bytes + length_bytes > self.identity.size_bytes:
            raise IllegalRequest(
                op.value, sense_key=5, asc_ascq=0x2100, words="logical block address out of range"
            )

    async def _run(self, op: Op, work: Callable[[], _T]) -> _T:
        """Run a system call in a thread, whatever becomes of the caller."""
        with trio.CancelScope(shield=True):
            try:
                answer = await trio.to_thread.run_sync(work, limiter=self._limiter)
            except OSError as error:
                raise translate(op, error) from error
        return answer

    async def _transfer(
        self, op: Op, move: Callable[[int, int], int], length_bytes: int, flags: int = 0
    ) -> None:
        """Move all bytes: ``move(done, flags)`` moves some from ``done`` on, 0 at end of file."""

        def rest(done: int) -> int:
            while done < length_bytes:
                moved = move(done, flags)
                if not moved:
                    raise OSError(errno.EIO, "the file is shorter than it was at login")
                done += moved
            return done

        done = 0
        nowait = self._nowait_flags[op]
        if nowait and not flags and length_bytes <= _INLINE_BYTES:
            try:
                done = move(0, nowait)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise translate(op, error) from error
                self._nowait_flags[op] = 0
        if done < length_bytes:
            await self._run(op, lambda: rest(done))

    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(Op.READ, offset_bytes, len(view))
        async with self._data_command(Op.READ):
            await self._transfer(
                Op.READ,
                lambda done, flags: os.preadv(self._fd, [view[done:]], offset_bytes + done, flags),
                len(view),
            )

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self._write(Op.WRITE, offset_bytes, memoryview(data).cast("B"), fua)

    async def _write(self, op: Op, offset_bytes: int, view: memoryview, fua: bool) -> None:
        self._check_range(op, offset_bytes, len(view))
        async with self._data_command(op):
            await self._transfer(
                Op.WRITE,
                lambda done, flags: os.pwritev(self._fd, [view[done:]], offset_bytes + done, flags),
                len(view),
                os.RWF_DSYNC if fua else 0,
            )

    async def write_same(self, offset_bytes: int, length_bytes: int, block: Buffer) -> None:
        whole = bytes(block) * (length_bytes // SECTOR_BYTES)
        await self._write(Op.WRITE_SAME, offset_bytes, memoryview(whole), False)

    async def flush(self) -> None:
        async with self._data_command(Op.SYNCHRONIZE_CACHE):
            try:
                await self._run(Op.SYNCHRONIZE_CACHE, lambda: os.fdatasync(self._fd))
            except BlockError as error:
                # The kernel reports a failed write-back once and then forgets it: a second flush
                # would lie. Only a new session may go on, and its user writes everything again.
                self._set_lost()
                raise OutcomeUnknown(f"{error}; what was not flushed yet may be gone") from error

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        if not self.identity.unmap_granularity_bytes:
            raise IllegalRequest(
                "UNMAP", sense_key=5, asc_ascq=0x2000, words="invalid command operation code"
            )
        for offset, length in ranges:
            self._check_range(Op.UNMAP, offset, length)
        async with self._data_command(Op.UNMAP):
            await self._run(Op.UNMAP, lambda: self.punch_all(ranges))

    def punch_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, length in ranges:
            if length:
                punch(self._fd, offset, length)

    # -- persistent reservations -------------------------------------------------------------------
    async def _reserve(self, op: Op, action: Callable[[TargetState], _T]) -> _T:
        async with self._command(op):
            await _lock(self._side, STATE)
            with self._state() as state:
                state.arbiter.admit(self.nexus, op)
                answer = action(state)
        return answer

    async def read_keys(self) -> RegisteredKeys:
        return await self._reserve(Op.READ_KEYS, lambda state: state.arbiter.read_keys())

    async def read_reservation(self) -> Reservation:
        return await self._reserve(
            Op.READ_RESERVATION, lambda state: state.arbiter.read_reservation()
        )

    async def register(self, key: int, *, old_key: int = 0) -> None:
        await self._reserve(
            Op.REGISTER, lambda state: state.arbiter.register(self.nexus, key, old_key)
        )

    async def reserve(self, key: int) -> None:
        await self._reserve(Op.RESERVE, lambda state: state.arbiter.reserve(self.nexus, key))

    async def release(self, key: int) -> None:
        await self._reserve(Op.RELEASE, lambda state: state.arbiter.release(self.nexus, key))

    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        await self._reserve(
            Op.PREEMPT,
            lambda state: state.arbiter.preempt(self.nexus, key, victim_key, abort=abort),
        )

    async def test_unit_ready(self) -> None:
        await self._reserve(Op.TEST_UNIT_READY, lambda _: None)
