"""What a claimed volume tells, and is told by, the path that carries its I/O.

The path (`redirector.path`) opens sessions again when they are lost. It asks on each new one
whether the view still lists this incarnation, and says when it has moved: the slot block then
names the new sessions, and a view with the new key of the reserving session follows, so that the
next claim finds, and can fence, whoever is really there.

Concurrency: called by the path's keeper only, one call at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from csvfs.format import (
    BLOCK_BYTES,
    BadBlock,
    Identity,
    NoView,
    Session,
    SessionKind,
    SlotBlock,
    View,
    byte_offset,
)
from csvfs.membership.claim import Claim
from csvfs.membership.fixed_area import read_view, write_view
from redirector.block.device import BlockError
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration


class ViewUnreadable(BlockError):
    """Neither copy of the view can be read: whether this node is a member cannot be known now."""


@dataclass(slots=True)
class ClaimMembership:
    """Satisfies `redirector.path.Membership` for a `Claim`, which it keeps up to date."""

    claim: Claim
    now_ns: Callable[[], int] = time.time_ns

    async def lists_us(self, path: Registration) -> bool:
        """Read the view on exactly this session."""
        view = await self._view(path)
        return view.lists(self.claim.slot, self.claim.incarnation)

    async def moved(self, control: Registration, data: Registration) -> None:
        """Write down the new sessions: slot block first, then the view. Idempotent."""
        claim = self.claim
        await self._write_slot_block(control, data)
        view = await self._view(control)
        if view.holder_key != control.key:
            view = view.next(control.key, {}, self.now_ns())
            await write_view(control, view, claim.superblock.volume_id)
        claim.view, claim.control, claim.data = view, control, data
        claim.check()

    async def _view(self, path: Registration) -> View:
        try:
            return await path.ask(lambda: read_view(path.device, self.claim.superblock.volume_id))
        except NoView as error:
            raise ViewUnreadable(str(error)) from error

    async def _write_slot_block(self, control: Registration, data: Registration) -> None:
        claim, device = self.claim, control.device
        superblock = claim.superblock
        address = superblock.geometry.slot_block(claim.slot)
        raw = await control.ask(lambda: device.read(byte_offset(address), BLOCK_BYTES))
        try:
            old, version = SlotBlock.decode(raw, address, superblock.volume_id, claim.slot)
            since_ns = old.identity.since_ns
        except BadBlock:
            version, since_ns = claim.incarnation, self.now_ns()
        sessions = (_session(SessionKind.DATA, data), _session(SessionKind.CONTROL, control))
        identity = Identity(
            incarnation=claim.incarnation,
            generation=max(session.generation for session in sessions),
            key=0,
            since_ns=since_ns,
            machine_id=claim.host.machine_id,
            boot_id=claim.host.boot_id,
            node_name=claim.host.node_name,
            addresses=claim.host.addresses,
            certificate=claim.host.certificate,
        )
        block = SlotBlock(claim.slot, identity, sessions).encode(
            superblock.volume_id, address, version + 1
        )
        await control.ask(lambda: device.write(byte_offset(address), block, fua=True))


def _session(kind: SessionKind, path: Registration) -> Session:
    key = PathKey.parse(path.key)
    assert key is not None, f"{path.key:#x} is no key of a path"
    port = path.device.port
    return Session(kind, key.generation, path.key, port.name, port.isid, path.device.portal)
