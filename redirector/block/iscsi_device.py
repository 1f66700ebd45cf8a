"""One iSCSI session as a `BlockDevice`: see iscsi.py for how it comes to be.

The tasks behind it, and why a caller cannot be cancelled in the middle, stand in nexus.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import trio
from trio.lowlevel import Task, current_task, wait_task_rescheduled

from redirector.block import scsi
from redirector.block.device import (
    BlockDevice,
    BlockError,
    Buffer,
    IllegalRequest,
    InitiatorPort,
    LunIdentity,
    NoSuchLun,
    OutcomeUnknown,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    TargetRefused,
    UnitAttention,
)
from redirector.native._native import Completion
from redirector.native.nexus import Nexus, hold, milliseconds_until

if TYPE_CHECKING:
    from redirector.native._native import Session, Statistics

TYPE = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY

_MAX_TRANSFER_BYTES = 1 << 20
_MAX_UNMAP_BYTES = 1 << 30
_MAX_UNMAP_EXTENTS = 256
_KEYS_BYTES = 8 + 8 * 256
_INQUIRY_BYTES = 252
_ATTENTIONS = 16
"""So many unit attentions may be pending for one nexus."""
_ASK_LIMIT_S = 10.0

_T = TypeVar("_T")


class IscsiDevice(BlockDevice):
    """One iSCSI session. See nexus.py for the tasks behind it."""

    def __init__(self, url: str, port: InitiatorPort, nexus: Nexus) -> None:
        self.url = url
        self.port = port
        self.portal = nexus.session.portal
        self.identity = LunIdentity(size_bytes=0, logical_block_bytes=512)
        self._nexus = nexus
        nexus.on_lost = self._tell_lost
        self._max_unmap_extents = _MAX_UNMAP_EXTENTS
        self._cache_known = False
        self._attentions: deque[UnitAttention] = deque()
        """Came in answer to what was not asked by its owner, who learns of them by the next
        commands, one each."""

    # -- life -------------------------------------------------------------------------------------
    @property
    def lost(self) -> bool:
        return self._nexus.lost.is_set()

    async def wait_lost(self) -> None:
        await self._nexus.lost.wait()

    def _tell_lost(self) -> None:
        if self.on_lost is not None:
            self.on_lost()

    def abort(self) -> None:
        self._nexus.abort()

    async def aclose(self) -> None:
        await self._nexus.logout()

    def statistics(self) -> Statistics:
        """Counters of the session. Raises `ValueError` after it ended."""
        return self._nexus.session.statistics()

    # -- what others send on it -------------------------------------------------------------------
    @property
    def native_session(self) -> Session[Task] | None:
        """See `BlockDevice.native_session`."""
        return None if self._nexus.lost.is_set() or self._nexus.leaving else self._nexus.session

    def refused_elsewhere(self, what: str, completion: Completion) -> None:
        """See `BlockDevice.refused_elsewhere`."""
        failure = self._failure(what, completion)
        if isinstance(failure, UnitAttention):
            self._attentions.append(failure)

    # -- data -------------------------------------------------------------------------------------
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        self._nexus.session.read(offset_bytes, buffer, await self._ready("READ"))
        completion: Completion | None = await wait_task_rescheduled(hold)
        if completion is not None:
            raise self._failure("READ", completion)

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        self._nexus.session.write(offset_bytes, data, fua, await self._ready("WRITE"))
        completion: Completion | None = await wait_task_rescheduled(hold)
        if completion is not None:
            raise self._failure("WRITE", completion)

    async def flush(self) -> None:
        await self.scsi("SYNCHRONIZE CACHE", scsi.SYNCHRONIZE_CACHE_16)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        if not self.identity.unmap_granularity_bytes:
            words = "the target does not support it"
            raise IllegalRequest("UNMAP", sense_key=5, asc_ascq=0x2000, words=words)
        for extents in self._unmap_batches(ranges):
            data = scsi.unmap_parameters(extents)
            await self.scsi("UNMAP", scsi.unmap_command(len(data)), data_out=data)

    async def write_same(self, offset_bytes: int, length_bytes: int, block: Buffer) -> None:
        size = self.identity.logical_block_bytes
        cdb = scsi.write_same_16(offset_bytes // size, length_bytes // size)
        await self.scsi("WRITE SAME", cdb, data_out=block)

    async def test_unit_ready(self) -> None:
        await self.scsi("TEST UNIT READY", scsi.TEST_UNIT_READY)

    # -- persistent reservations ------------------------------------------------------------------
    async def read_keys(self) -> RegisteredKeys:
        data = await self._reserve_in("READ KEYS", scsi.PR_READ_KEYS, _KEYS_BYTES)
        if len(data) >= 8 and scsi.key_list_bytes(data) > len(data):
            length = min(scsi.key_list_bytes(data) + _KEYS_BYTES, 0xFFF8)
            data = await self._reserve_in("READ KEYS", scsi.PR_READ_KEYS, length)
        return _parsed("READ KEYS", scsi.parse_keys, data)

    async def read_reservation(self) -> Reservation:
        data = await self._reserve_in("READ RESERVATION", scsi.PR_READ_RESERVATION, 64)
        return _parsed("READ RESERVATION", scsi.parse_reservation, data)

    async def report_capabilities(self) -> scsi.ReserveCapabilities:
        """PERSISTENT RESERVE IN, REPORT CAPABILITIES."""
        what = "REPORT CAPABILITIES"
        data = await self._reserve_in(what, scsi.PR_REPORT_CAPABILITIES, 8)
        return _parsed(what, scsi.parse_capabilities, data)

    async def register(self, key: int, *, old_key: int = 0) -> None:
        await self._reserve_out("REGISTER", scsi.PR_REGISTER, old_key, key)
        if key and not self._cache_known:
            # Under a type 6 reservation only a registrant may ask for the write cache.
            try:
                await self._ask_cache(trio.current_time() + _ASK_LIMIT_S, attentions=0)
            except UnitAttention as attention:
                self._attentions.append(attention)

    async def register_ignoring(self, key: int) -> None:
        """REGISTER AND IGNORE EXISTING KEY."""
        action = scsi.PR_REGISTER_AND_IGNORE_EXISTING_KEY
        await self._reserve_out("REGISTER AND IGNORE EXISTING KEY", action, 0, key)

    async def reserve(self, key: int) -> None:
        await self._reserve_out("RESERVE", scsi.PR_RESERVE, key, 0, TYPE)

    async def release(self, key: int) -> None:
        await self._reserve_out("RELEASE", scsi.PR_RELEASE, key, 0, TYPE)

    async def clear(self, key: int) -> None:
        """CLEAR: the reservation and every registration are gone."""
        await self._reserve_out("CLEAR", scsi.PR_CLEAR, key)

    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        if abort:
            what, action = "PREEMPT AND ABORT", scsi.PR_PREEMPT_AND_ABORT
        else:
            what, action = "PREEMPT", scsi.PR_PREEMPT
        await self._reserve_out(what, action, key, victim_key, TYPE)

    # -- any command ------------------------------------------------------------------------------
    async def scsi(
        self,
        what: str,
        cdb: bytes,
        *,
        data_in: bytearray | memoryview | None = None,
        data_out: Buffer | None = None,
        timeout_ms: int = 0,
    ) -> int:
        """Send any command block; how many bytes of the buffer were transferred.

        ``what`` names it in errors. Raises `TargetRefused` and `OutcomeUnknown` as every command.
        """
        task = await self._ready(what)
        self._nexus.session.scsi(
            cdb, task, data_in=data_in, data_out=data_out, timeout_ms=timeout_ms
        )
        completion: Completion | None = await wait_task_rescheduled(hold)
        buffer = data_in if data_in is not None else data_out
        length = 0 if buffer is None else memoryview(buffer).nbytes
        if completion is None:
            return length
        if completion.unknown or completion.status:
            raise self._failure(what, completion)
        return max(length - completion.residual, 0)

    async def _ready(self, what: str) -> Task:
        """A checkpoint if cancelled; raises `OutcomeUnknown` if the nexus is lost, and a unit
        attention that is still to be told."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._nexus.lost.is_set() or self._nexus.leaving:
            raise self._unknown(what)
        if self._attentions:
            raise replace(self._attentions.popleft(), what=what)
        return current_task()

    def _unknown(self, what: str) -> OutcomeUnknown:
        why = self._nexus.why or self._nexus.session.text or "the session is being closed"
        return OutcomeUnknown(f"{what} on {self.url}: {why}")

    def _failure(self, what: str, completion: Completion) -> BlockError:
        if completion.unknown:
            return self._unknown(what)
        if not completion.status:
            words = f"the target transferred {completion.residual} bytes too few"
            return TargetRefused(what, status=0, words=words)
        return scsi.refusal(what, completion.status, completion.sense)

    async def _receive(
        self, what: str, cdb: bytes, length_bytes: int, timeout_ms: int = 0
    ) -> bytes:
        buffer = bytearray(length_bytes)
        data_in = buffer if length_bytes else None
        received = await self.scsi(what, cdb, data_in=data_in, timeout_ms=timeout_ms)
        return bytes(buffer[:received])

    async def _reserve_in(self, what: str, action: int, length_bytes: int) -> bytes:
        cdb = scsi.persistent_reserve_in(action, length_bytes)
        return await self._receive(what, cdb, length_bytes)

    async def _reserve_out(
        self, what: str, action: int, key: int, action_key: int = 0, kind: int = 0
    ) -> None:
        data = scsi.reserve_parameters(key, action_key)
        await self.scsi(what, scsi.persistent_reserve_out(action, kind), data_out=data)

    def _unmap_batches(self, ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """(lba, blocks) pairs, as many a command as the target takes."""
        block = self.identity.logical_block_bytes
        most = self.identity.max_unmap_bytes // block
        batch: list[tuple[int, int]] = []
        room = most
        for offset_bytes, length_bytes in ranges:
            if offset_bytes % block or length_bytes % block:
                raise ValueError(f"UNMAP of {length_bytes} bytes at {offset_bytes}: not blocks")
            lba, blocks = offset_bytes // block, length_bytes // block
            while blocks:
                step = min(blocks, room)
                batch.append((lba, step))
                lba, blocks, room = lba + step, blocks - step, room - step
                if not room or len(batch) == self._max_unmap_extents:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch

    # -- who it is --------------------------------------------------------------------------------
    async def identify(self, deadline: float) -> None:
        """Fetch pending unit attentions and fill `identity`; a part of `IscsiLun.login`.

        Raises `NoSuchLun`, `TargetRefused`, `OutcomeUnknown`, `ValueError` (nonsense answered).
        """
        try:
            await self._ask("TEST UNIT READY", scsi.TEST_UNIT_READY, 0, deadline)
        except ReservationConflict:
            pass  # somebody's legacy RESERVE(6); what it excludes will say so itself
        except IllegalRequest as error:
            raise NoSuchLun(f"{self.url}: the target has no such LUN") from error
        about = scsi.parse_inquiry(
            await self._ask("INQUIRY", scsi.inquiry(_INQUIRY_BYTES), _INQUIRY_BYTES, deadline)
        )
        if about.qualifier or about.device_type:
            raise NoSuchLun(f"{self.url}: this LUN is not a disk (type {about.device_type:02X}h)")
        capacity = scsi.parse_capacity(
            await self._ask("READ CAPACITY", scsi.read_capacity_16(32), 32, deadline)
        )
        self.identity = LunIdentity(
            size_bytes=capacity.blocks * capacity.block_bytes,
            logical_block_bytes=capacity.block_bytes,
            vendor=about.vendor,
            product=about.product,
            revision=about.revision,
            serial=scsi.parse_serial(await self._ask_page(scsi.VPD_SERIAL, deadline)),
            device_id=scsi.parse_device_id(await self._ask_page(scsi.VPD_IDENTIFICATION, deadline)),
            thin=capacity.thin,
        )
        await self._ask_limits(deadline)
        await self._ask_cache(deadline)

    async def _ask_limits(self, deadline: float) -> None:
        limits = scsi.parse_block_limits(await self._ask_page(scsi.VPD_LIMITS, deadline))
        provisioning = await self._ask_page(scsi.VPD_PROVISIONING, deadline)
        block = self.identity.logical_block_bytes
        most = limits.max_transfer_blocks * block or _MAX_TRANSFER_BYTES
        self.identity = replace(self.identity, max_transfer_bytes=min(most, _MAX_TRANSFER_BYTES))
        self._nexus.session.set_geometry(block, self.identity.max_transfer_bytes)
        if not self.identity.thin or not scsi.parse_unmap_supported(provisioning):
            return
        most = limits.max_unmap_blocks * block or _MAX_UNMAP_BYTES
        self.identity = replace(
            self.identity,
            unmap_granularity_bytes=max(limits.unmap_granularity_blocks, 1) * block,
            max_unmap_bytes=min(most, _MAX_UNMAP_BYTES),
        )
        most = limits.max_unmap_extents or _MAX_UNMAP_EXTENTS
        self._max_unmap_extents = min(most, _MAX_UNMAP_EXTENTS)

    async def _ask_cache(self, deadline: float, attentions: int = _ATTENTIONS) -> None:
        """Find out whether the target may lose what was written, as far as it lets us now."""
        extended = await self._ask_page(scsi.VPD_EXTENDED, deadline, attentions)
        enabled: bool | None = None
        if scsi.parse_cache_non_volatile(extended):
            enabled = False
        else:
            try:
                cdb = scsi.mode_sense_caching(192)
                enabled = scsi.parse_write_cache_enabled(
                    await self._ask("MODE SENSE", cdb, 192, deadline, attentions)
                )
            except UnitAttention:
                raise
            except TargetRefused:
                return  # not registered yet, or no such page: volatile it is
        if enabled is not None:
            self._cache_known = True
            self.identity = replace(self.identity, volatile_cache=enabled)

    async def _ask_page(self, page: int, deadline: float, attentions: int = _ATTENTIONS) -> bytes:
        try:
            cdb = scsi.inquiry(_INQUIRY_BYTES, page)
            what = f"INQUIRY page {page:02X}h"
            data = await self._ask(what, cdb, _INQUIRY_BYTES, deadline, attentions)
        except IllegalRequest:
            return b""
        return scsi.vpd_body(data, page)

    async def _ask(
        self,
        what: str,
        cdb: bytes,
        length_bytes: int,
        deadline: float,
        attentions: int = _ATTENTIONS,
    ) -> bytes:
        """A question that changes nothing, asked again when a unit attention comes in between."""
        while True:
            try:
                limit_ms = milliseconds_until(deadline)
                return await self._receive(what, cdb, length_bytes, limit_ms)
            except UnitAttention:
                if not attentions:
                    raise
                attentions -= 1


def _parsed(what: str, parse: Callable[[bytes], _T], data: bytes) -> _T:
    try:
        return parse(data)
    except ValueError as error:
        raise TargetRefused(what, status=0, words=str(error)) from error
