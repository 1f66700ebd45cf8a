"""The fixed area of a volume as a member reads and writes it, each time on a given session.

Every command heeds unit attentions, waits while the target is busy, and goes again after a
RESERVE(6) of a stranger was reset away; nothing else is sent again. Functions raise what
`Registration.ask` raises.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

from csvfs.format import Identity as DiskIdentity
from csvfs.format import (
    NoView,
    Session,
    SlotBlock,
    Superblock,
    View,
    byte_offset,
    certificate_fingerprint,
    encode_heartbeat,
    encode_join,
    encode_view,
    view_address,
)
from csvfs.membership.fixed_area import read_life, read_slot_block, read_view
from lockmgr.cluster.blocks import Heartbeat, Identity, JoinRequest
from lockmgr.cluster.outcomes import Blocks
from lockmgr.cluster.view import NodeId
from redirector.block.device import BlockError, Lun, OutcomeUnknown, ReservationConflict
from redirector.block.reservations import RESET_TIMEOUT_S, PathClosed, Registration

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_MAX_CERTIFICATES: Final = 256
_STRANGER_RESETS: Final = 3
_VIEW_READS: Final = 3


class ViewUnreadable(BlockError):
    """Neither copy of the view can be read: who is a member cannot be known now."""


class VolumeIO:
    """See the module's docstring. ``identity`` is who this node is, ``began_ns`` since when. Raises
    ValueError if that does not fit into a slot block, or a join block.
    """

    def __init__(self, lun: Lun, superblock: Superblock, identity: Identity, began_ns: int) -> None:
        self.superblock = superblock
        self.certificates: dict[bytes, bytes] = {}
        """By fingerprint, DER: those that were seen last, and the own one."""
        self._lun = lun
        self._identity = identity
        self._began_ns = began_ns
        if identity.fingerprint != certificate_fingerprint(identity.certificate):
            raise ValueError("the fingerprint is not that of the certificate")
        sample = self._slot_block(NodeId(0, 1), (), began_ns, identity.addresses)
        sample.encode(superblock.volume_id, 1, 1)
        self._know(identity.certificate)

    # -- asking ----------------------------------------------------------------------------------
    async def ask(
        self, registration: Registration, command: Callable[[], Awaitable[_Answer]]
    ) -> _Answer:
        """A read, write or flush. A conflict though the own key is registered is a stranger's
        RESERVE(6): a reset ends it, whoever orders it."""
        for _ in range(_STRANGER_RESETS):
            try:
                return await registration.ask(command)
            except ReservationConflict as conflict:
                await self.reset_stranger(conflict)
        return await registration.ask(command)

    async def reset_stranger(self, conflict: object) -> None:
        """End the RESERVE(6) that nobody of this cluster made."""
        _log.warning(
            "%s: %s though this node is registered: another system has reserved the LUN, and is"
            " reset. Find it",
            self._lun.url,
            conflict,
        )
        try:
            await self._lun.reset(timeout_s=RESET_TIMEOUT_S)
        except TimeoutError as error:
            raise OutcomeUnknown(str(error)) from error

    # -- the view --------------------------------------------------------------------------------
    async def read_view(self, registration: Registration) -> View:
        """Raises `ViewUnreadable`."""
        device, volume_id = registration.device, self.superblock.volume_id
        for _ in range(_VIEW_READS):
            try:
                return await self.ask(registration, lambda: read_view(device, volume_id))
            except NoView as error:  # perhaps both copies were being written, one after the other
                trouble = error
        raise ViewUnreadable(f"the view cannot be read: {trouble}") from trouble

    async def write_view(self, registration: Registration, view: View) -> None:
        """Stable on return."""
        device, address = registration.device, view_address(view.epoch)
        block = encode_view(view, self.superblock.volume_id)
        await self.ask(registration, lambda: device.write(byte_offset(address), block, fua=True))
        try:
            await self.ask(registration, device.flush)
        except (PathClosed, ReservationConflict) as error:
            raise OutcomeUnknown(f"the view is written, but perhaps not stable: {error}") from error

    # -- heartbeat and join blocks ---------------------------------------------------------------
    async def read_blocks(self, registration: Registration) -> Blocks:
        """All that are valid."""
        device = registration.device
        beats, joins = await self.ask(registration, lambda: read_life(device, self.superblock))
        for request in joins:
            self._know(request.certificate)
        return Blocks(beats, joins)

    async def write_heartbeat(self, registration: Registration, beat: Heartbeat) -> None:
        """Others read it from now on; it need not be stable."""
        address = self.superblock.geometry.heartbeat(beat.slot)
        block = encode_heartbeat(beat, self.superblock.volume_id, address)
        await self._write(registration, address, block)

    async def write_join(self, registration: Registration, request: JoinRequest) -> None:
        """As a heartbeat."""
        address = self.superblock.geometry.join_block(request.slot)
        block = encode_join(request, self.superblock.volume_id, address)
        await self._write(registration, address, block)

    async def _write(self, registration: Registration, address: int, block: bytearray) -> None:
        device = registration.device
        await self.ask(registration, lambda: device.write(byte_offset(address), block))

    # -- slot blocks -----------------------------------------------------------------------------
    async def write_slot_block(
        self, registration: Registration, node: NodeId, sessions: Sequence[Session], view: View
    ) -> None:
        """Over which sessions this node's I/O may come. Stable on return."""
        device, superblock = registration.device, self.superblock
        address = superblock.geometry.slot_block(node.slot)
        before = await self._read_slot_block(registration, node.slot)
        since_ns, version = self._began_ns, node.incarnation
        if before is not None:
            version = before[1]
            if before[0].identity.incarnation == node.incarnation:
                since_ns = before[0].identity.since_ns
        addresses = view.slots[node.slot].addresses or self._identity.addresses
        block = self._slot_block(node, sessions, since_ns, addresses)
        data = block.encode(superblock.volume_id, address, version + 1)
        await self.ask(registration, lambda: device.write(byte_offset(address), data, fua=True))

    def _slot_block(
        self, node: NodeId, sessions: Sequence[Session], since_ns: int, addresses: tuple[str, ...]
    ) -> SlotBlock:
        me = self._identity
        identity = DiskIdentity(
            incarnation=node.incarnation,
            generation=max((session.generation for session in sessions), default=0),
            key=0,
            since_ns=since_ns,
            machine_id=me.machine_id,
            boot_id=me.boot_id,
            node_name=me.node_name,
            addresses=addresses,
            certificate=me.certificate,
        )
        return SlotBlock(node.slot, identity, tuple(sessions))

    async def _read_slot_block(
        self, registration: Registration, slot: int
    ) -> tuple[SlotBlock, int] | None:
        device = registration.device
        return await self.ask(registration, lambda: read_slot_block(device, self.superblock, slot))

    async def slot_blocks_of(
        self, registration: Registration, nodes: Iterable[NodeId]
    ) -> list[SlotBlock]:
        """Those that these incarnations have written; one of another tells nothing of them."""
        found = []
        for node in dict.fromkeys(nodes):
            if not 0 <= node.slot < self.superblock.geometry.slots:
                continue
            read = await self._read_slot_block(registration, node.slot)
            if read is not None and read[0].identity.incarnation == node.incarnation:
                found.append(read[0])
                self._know(read[0].identity.certificate)
        return found

    # -- certificates ----------------------------------------------------------------------------
    def _know(self, certificate: bytes) -> None:
        if not certificate:
            return
        fingerprint = certificate_fingerprint(certificate)
        self.certificates.pop(fingerprint, None)
        self.certificates[fingerprint] = certificate
        if len(self.certificates) > _MAX_CERTIFICATES:
            own = self._identity.fingerprint
            del self.certificates[next(each for each in self.certificates if each != own)]
