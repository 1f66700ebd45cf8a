"""May this copy be resignatured, and the whole of it: look, try the target, take the LUN, write.

Theory. The copy has reservations of its own: what stands in its views and slot blocks is of the
original's hosts, who are registered there and not here. Since mounting a copy is refused, nobody is
a member of this volume either. So under a type 6 reservation only who is *registered on this LUN*
could be writing to it:

    a foreign key       another system uses the LUN: refused
    a path key          of somebody who has the LUN mounted, so it would be no copy to that host (a
                        path that shows another device id?), or copied along by the array: refused,
                        unless the administrator has named it as of an owner that is gone for good
    a newcomer's key    of an offline tool, or of a resignature that was cut off: fenced, as by a
                        claim. Two resignatures at a time: the later one fences the earlier one and
                        goes on under the ids that the superblock names

    1  look: register, read; refuse; take the reservation, fence, and let go of it again, because
       the probe needs a LUN that nobody has reserved
    2  probe the target, which may be another than the original's; refuse one that does not hold
    3  register, take the reservation, fence; read the superblock again: this is what counts
    4  `resign_volume`; the empty view names this key, and the session logs out: parked

A fence here never reinstates a session: those of the copied slot blocks are the original's, perhaps
on the very same target.

Concurrency: one task. Cancelled, or cut off, it leaves a LUN that is refused by everybody but the
next resignature, at most with a parked newcomer's key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.format import (
    BLOCK_BYTES,
    SCRATCH_ADDRESS,
    SCRATCH_BLOCKS,
    UNIT_BYTES,
    ProbeFlag,
    Superblock,
    WriteCache,
    byte_offset,
)
from csvfs.membership.claim import ClaimRefused
from csvfs.membership.fixed_area import read_superblock
from csvfs.membership.newcomer import Newcomer, open_newcomer
from csvfs.membership.predecessors import succeed
from csvfs.membership.refusals import RefuseFeature, RefuseForeign, RefuseTooSmall
from csvfs.mkfs_claim import UnfitTarget
from csvfs.resignature import Resigned, Wish, is_copy, resign_volume
from redirector.block.device import BlockError, BlockIO, Buffer, Lun, LunIdentity
from redirector.block.keys import is_foreign, is_newcomer, key_words
from redirector.block.probe import probe
from redirector.block.probe_result import ProbeResult
from redirector.block.reservations import Registration, Standing, fence, victims_of

_SYSTEM_RANDOM: Final = SystemRandom()
_CLEAN_UP_LIMIT_S: Final = 5.0


class NotACopy(Exception):
    """The volume lies on the LUN that it was made for."""

    def __init__(self, superblock: Superblock) -> None:
        device = superblock.device_id.hex()
        super().__init__(
            f"the volume {superblock.label!r} ({superblock.volume_id.hex()}) is no copy: it lies on"
            f" the LUN that it was formatted on, {f'device {device}' if device else 'one without'}"
            f"{'' if device else ' a device id, by which a copy could be told'}"
        )


class CopyInUse(Exception):
    """Somebody is registered on the copy who may be writing to it."""

    def __init__(self, keys: Sequence[int]) -> None:
        found = ", ".join(key_words(key) for key in keys)
        super().__init__(
            f"registered on this LUN is {found}: a host may have it mounted. A key whose owner is"
            " gone for good, or that the array has copied with the LUN, is removed by"
            " `csvctl resignature --preempt-key KEY`"
        )
        self.keys = tuple(keys)


# -- the decision, without I/O -------------------------------------------------------------------
def refuse_volume(superblock: Superblock, identity: LunIdentity) -> None:
    """Raises `NotACopy`, and `ClaimRefused` for what no csvfs may touch."""
    if not is_copy(superblock, identity):
        raise NotACopy(superblock)
    if superblock.unknown_incompat or superblock.unknown_ro_compat:
        unknown = RefuseFeature(superblock.unknown_incompat, superblock.unknown_ro_compat)
        raise ClaimRefused(unknown)
    needed = superblock.geometry.size_units * UNIT_BYTES
    if identity.size_bytes < needed:
        raise ClaimRefused(RefuseTooSmall(identity.size_bytes, needed))


def refuse_users(standing: Standing, own_key: int, preempt_keys: frozenset[int]) -> None:
    """Raises `ClaimRefused` for another system's key, `CopyInUse` for one of a host."""
    kind = int(standing.reservation.type)
    others = sorted({*standing.keys.keys, standing.holder_key} - {0, own_key} - preempt_keys)
    for key in others:
        if is_foreign(key):
            raise ClaimRefused(RefuseForeign(key, key == standing.holder_key, kind))
    if standing.strange_reservation():
        raise ClaimRefused(RefuseForeign(standing.holder_key, True, kind))
    hosts = [key for key in others if not is_newcomer(key)]
    if hosts:
        raise CopyInUse(hosts)


# -- the whole of it -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Resigner:
    """Makes the copy on one LUN a volume of its own; ``show`` is told whose LUN it is."""

    lun: Lun
    initiator_name: str
    label: str | None = None
    preempt_keys: frozenset[int] = frozenset()
    now_ns: int = 0
    rng: Random = _SYSTEM_RANDOM
    show: Callable[[LunIdentity, Superblock], None] = lambda _identity, _superblock: None
    report: Callable[[ProbeResult], None] = lambda _result: None
    progress: Callable[[int, int], None] = lambda _done, _total: None

    async def run(self) -> Resigned:
        """All of it. Raises `NotACopy`, `CopyInUse`, `ClaimRefused`, `CopyDamaged`, `UnfitTarget`,
        ValueError (label), and what taking a LUN raises: `NoVolume`, `ForeignReservation`,
        `ProbeFailed`, `LoginFailed`, `BlockError`.
        """
        async with self._taken() as (me, _):
            await _withdraw(me)
        scratch = (byte_offset(SCRATCH_ADDRESS), SCRATCH_BLOCKS * BLOCK_BYTES)
        names = (self.initiator_name, self.initiator_name)
        result = await probe(self.lun, names, scratch, rng=self.rng)
        self.report(result)
        if result.refusals:
            raise UnfitTarget(result)
        async with self._taken() as (me, superblock):
            volatile = me.device.identity.volatile_cache
            wish = Wish(
                label=self.label,
                probe=ProbeFlag(int(result.flags)),
                write_cache=WriteCache.VOLATILE if volatile else WriteCache.TARGET_SAYS_STABLE,
                holder_key=me.key,
            )
            return await resign_volume(
                _Path(me),
                superblock,
                wish,
                now_ns=self.now_ns,
                rng=self.rng,
                progress=self.progress,
            )

    @asynccontextmanager
    async def _taken(self) -> AsyncIterator[tuple[Registration, Superblock]]:
        """The LUN, reserved and fenced, and what is on it then. After an error it is let go."""
        async with await open_newcomer(self.lun, self.initiator_name, self.rng) as newcomer:
            me = newcomer.registration
            self.show(me.device.identity, newcomer.superblock)
            await self._refuse(newcomer)
            try:
                await self._take(me)
                superblock, _ = await me.ask(lambda: read_superblock(me.device))
                refuse_volume(superblock, me.device.identity)
                yield me, superblock
            except BaseException:
                with trio.CancelScope(shield=True), trio.move_on_after(_CLEAN_UP_LIMIT_S):
                    await _withdraw(me)
                raise

    async def _refuse(self, newcomer: Newcomer) -> None:
        """Before anything is changed, but for the newcomer's own registration."""
        refuse_volume(newcomer.superblock, newcomer.device.identity)
        refuse_users(await newcomer.registration.survey(), newcomer.key, self.preempt_keys)

    async def _take(self, me: Registration) -> None:
        await succeed(me, await me.holder())
        standing = await me.survey()
        refuse_users(standing, me.key, self.preempt_keys)
        others = set(standing.keys.keys) - {me.key}
        # Also with nobody registered: what the last one sent may still be on its way.
        await fence(self.lun, me, victims_of(sorted(others), ()))
        await me.confirm()


async def _withdraw(me: Registration) -> None:
    """Leave no reservation and no key behind; a session that is lost cannot be helped."""
    try:
        if await me.holder() == me.key:
            await me.ask(lambda: me.device.release(me.key))
        await me.unregister()
    except BlockError:
        me.device.abort()


class _Path(BlockIO):
    """The reserving session: past unit attentions and a busy target."""

    def __init__(self, registration: Registration) -> None:
        self._me = registration
        self.identity = registration.device.identity

    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        await self._me.ask(lambda: self._me.device.read_into(offset_bytes, buffer))

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self._me.ask(lambda: self._me.device.write(offset_bytes, data, fua=fua))

    async def flush(self) -> None:
        await self._me.ask(self._me.device.flush)

    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        await self._me.ask(lambda: self._me.device.unmap(ranges))
