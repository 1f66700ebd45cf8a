"""May this LUN be formatted, and the whole of formatting it: look, clear, probe, reserve, write.

Theory. What is on the LUN is somebody's data, and who is registered may be writing. So nothing is
changed before everything was looked at; what stands in the way is named, and only what the
administrator has named in return is overridden:

    ``force``          any signature, and the key that an empty csvfs view calls parked
    ``preempt_keys``   exactly these keys, whose owners are gone for good

    1  look: survey; register (not beside strangers); view and signatures; refuse, or know victims
    2  clear: take the reservation, preempt the victims, drain; release and unregister again,
       because the probe needs a LUN that nobody has reserved
    3  probe the target; refuse one whose arbiter does not hold
    4  register and RESERVE: from here on nobody else writes; who has come meanwhile is refused
    5  `make_filesystem`; the empty view names this key, and the session logs out: parked

Whoever comes between 2 and 4 loses to 4, or is found there: RESERVE decides.

Concurrency: one task. Cancelled, or cut off, it leaves no volume, at most a parked newcomer's key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.format import (
    BLOCK_BYTES,
    SCRATCH_ADDRESS,
    SCRATCH_BLOCKS,
    NoView,
    ProbeFlag,
    SlotBlock,
    Superblock,
    View,
    WriteCache,
    byte_offset,
)
from csvfs.membership.fixed_area import NoVolume, read_slot_blocks, read_superblock, read_view
from csvfs.membership.path_keys import victims_of_sessions
from csvfs.mkfs import FormatOptions, Progress, make_filesystem, plan_superblock, read_signatures
from csvfs.signatures import Signature
from redirector.block.device import (
    BlockDevice,
    BlockError,
    Lun,
    LunIdentity,
    ReservationConflict,
)
from redirector.block.keys import PathKey, choose_port, is_foreign, key_words, newcomer_key
from redirector.block.probe import probe
from redirector.block.probe_result import ProbeResult
from redirector.block.reservations import Registration, Standing, fence, survey, victims_of

_SYSTEM_RANDOM: Final = SystemRandom()
_CLEAN_UP_LIMIT_S: Final = 5.0


class FormatRefused(Exception):
    """The LUN is left as it was."""


class LunOccupied(FormatRefused):
    """There is something on the LUN."""

    def __init__(self, signatures: tuple[Signature, ...]) -> None:
        found = "; ".join(str(signature) for signature in signatures)
        super().__init__(f"the LUN is not empty: {found}")
        self.signatures = signatures


class KeysInTheWay(FormatRefused):
    """Somebody is registered on the LUN, or was and has left the key behind."""

    def __init__(self, keys: tuple[KeyInTheWay, ...]) -> None:
        super().__init__("the LUN is in use: " + "; ".join(str(key) for key in keys))
        self.keys = keys


class UnfitTarget(FormatRefused):
    """The target does not keep the promises that a shared volume rests on."""

    def __init__(self, result: ProbeResult) -> None:
        found = "; ".join(f"{each.name}: {each.meaning}" for each in result.refusals)
        super().__init__(f"the target must not be used: {found}")
        self.result = result


@dataclass(frozen=True, slots=True)
class KeyInTheWay:
    """A registered key, and what is known of it."""

    key: int
    holds: bool
    parked: bool
    """An empty csvfs view names it: ``force`` overrides it, as it does the volume."""
    words: str

    def __str__(self) -> str:
        what = "holds the reservation" if self.holds else "is registered"
        return f"key {key_words(self.key)} {what}: {self.words}"


# -- the decision, without I/O -------------------------------------------------------------------
def keys_in_the_way(
    standing: Standing, view: View | None, *, force: bool, preempt_keys: Collection[int]
) -> tuple[tuple[KeyInTheWay, ...], tuple[int, ...]]:
    """(keys that forbid formatting, keys to be removed for it), given the volume's view if any."""
    in_the_way: list[KeyInTheWay] = []
    victims: list[int] = []
    for key in sorted({*standing.keys.keys, standing.holder_key} - {0}):
        parked = view is not None and not view.members and key == view.holder_key
        if key in preempt_keys or (parked and force):
            victims.append(key)
        else:
            holds = key == standing.holder_key
            in_the_way.append(KeyInTheWay(key, holds, parked, _whose(key, view, parked)))
    return tuple(in_the_way), tuple(victims)


def _whose(key: int, view: View | None, parked: bool) -> str:
    if parked:
        return "the last host to leave the volume left it; --force overrides it"
    path = PathKey.parse(key)
    if path is not None and view is not None and view.lists(path.slot, path.incarnation):
        name = view.slots[path.slot].node_name
        return f"{name} has the volume mounted, or died with it mounted"
    if is_foreign(key):
        return "another system uses this LUN, or did and left the key behind"
    return "some csvfs is at this LUN, or was and left the key behind"


# -- formatting ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Formatter:
    """Formats one LUN; ``show`` is told whose LUN it is, ``report`` what the probe found."""

    lun: Lun
    initiator_name: str
    options: FormatOptions
    force: bool = False
    preempt_keys: frozenset[int] = frozenset()
    now_ns: int = 0
    rng: Random = _SYSTEM_RANDOM
    show: Callable[[LunIdentity], None] = lambda _identity: None
    report: Callable[[ProbeResult], None] = lambda _result: None
    progress: Progress | None = None

    async def run(self) -> Superblock:
        """All of it. Raises `FormatRefused` and its kinds, `BadGeometry`, ValueError (label),
        `ProbeFailed`, `LoginFailed`, `BlockError`.
        """
        result = await self.try_target()
        self.report(result)
        if result.refusals:
            raise UnfitTarget(result)
        async with self._session() as device:
            return await self._write(device, result)

    async def try_target(self) -> ProbeResult:
        """Only steps 1 to 3: afterwards the LUN is as it was, but for victims. Raises as `run`."""
        async with self._session() as device:
            self.show(device.identity)
            plan_superblock(device.identity, self.options, volume_id=bytes(16), now_ns=self.now_ns)
            await self._clear(device)
        scratch = (byte_offset(SCRATCH_ADDRESS), SCRATCH_BLOCKS * BLOCK_BYTES)
        names = (self.initiator_name, self.initiator_name)
        return await probe(self.lun, names, scratch, rng=self.rng)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[BlockDevice]:
        device = await self.lun.login(choose_port(self.initiator_name, self.rng))
        try:
            yield device
        except BaseException:
            device.abort()
            raise
        await device.aclose()

    # -- looking and clearing --------------------------------------------------------------------
    async def _clear(self, device: BlockDevice) -> None:
        standing = await survey(device)
        strangers, _ = self._judge(_only_foreign(standing), None)
        if strangers:
            raise KeysInTheWay(strangers)
        me = await Registration.register(device, newcomer_key(self.rng))
        try:
            view, blocks = await self._read_volume(me)
            in_the_way, victims = self._judge(standing, view)
            if not all(key.parked for key in in_the_way):
                raise KeysInTheWay(in_the_way)
            readable = await self._refuse_signatures(me)
            if in_the_way:
                raise KeysInTheWay(in_the_way)
            if victims:
                await self._remove(me, standing, victims, blocks)
            if not readable:
                await self._refuse_signatures(me)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(_CLEAN_UP_LIMIT_S):
                await _withdraw(me)

    def _judge(
        self, standing: Standing, view: View | None
    ) -> tuple[tuple[KeyInTheWay, ...], tuple[int, ...]]:
        return keys_in_the_way(standing, view, force=self.force, preempt_keys=self.preempt_keys)

    async def _read_volume(self, me: Registration) -> tuple[View | None, dict[int, SlotBlock]]:
        """View and slot blocks of the volume that is on the LUN, if one is and can be read."""
        device = me.device
        try:
            superblock, _ = await me.ask(lambda: read_superblock(device))
            view = await me.ask(lambda: read_view(device, superblock.volume_id))
            blocks = await me.ask(lambda: read_slot_blocks(device, superblock))
        except (NoVolume, NoView, ReservationConflict):
            return None, {}
        return view, blocks

    async def _refuse_signatures(self, me: Registration) -> bool:
        """False if another kind of reservation keeps them from being read."""
        if self.force:
            return True
        try:
            found = await me.ask(lambda: read_signatures(me.device))
        except ReservationConflict:
            return False
        if found:
            raise LunOccupied(found)
        return True

    async def _remove(
        self,
        me: Registration,
        standing: Standing,
        victims: tuple[int, ...],
        blocks: dict[int, SlotBlock],
    ) -> None:
        """Fence the victims: whatever they sent has landed before anything is written."""
        if standing.holder_key:
            await me.take(standing.holder_key)
        else:
            await me.reserve()
        sessions = victims_of_sessions(
            session
            for block in blocks.values()
            for session in block.sessions
            if session.key in victims
        )
        others = victims_of((key for key in victims if key != standing.holder_key), ())
        await fence(self.lun, me, (*others, *sessions))

    # -- writing -------------------------------------------------------------------------------
    async def _write(self, device: BlockDevice, result: ProbeResult) -> Superblock:
        me = await Registration.register(device, newcomer_key(self.rng))
        try:
            await me.reserve()
            standing = await survey(device)
            others = {*standing.keys.keys} - {me.key}
            if others:
                in_the_way, _ = keys_in_the_way(standing, None, force=False, preempt_keys={me.key})
                raise KeysInTheWay(in_the_way)
            await me.confirm()
            options = replace(
                self.options,
                probe=ProbeFlag(int(result.flags)),
                write_cache=_write_cache(self.options, device.identity),
                holder_key=me.key,
            )
            return await make_filesystem(
                device, options, now_ns=self.now_ns, rng=self.rng, progress=self.progress
            )
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(_CLEAN_UP_LIMIT_S):
                await _withdraw(me)
            raise


def _only_foreign(standing: Standing) -> Standing:
    """What is to be judged before even a registration is made: strangers."""
    keys = tuple(key for key in standing.keys.keys if is_foreign(key))
    holder = standing.reservation
    if not is_foreign(holder.key) and not standing.strange_reservation():
        holder = replace(holder, key=0)
    return Standing(replace(standing.keys, keys=keys), holder)


def _write_cache(options: FormatOptions, identity: LunIdentity) -> WriteCache:
    if options.write_cache is not WriteCache.VOLATILE or identity.volatile_cache:
        return options.write_cache
    return WriteCache.TARGET_SAYS_STABLE


async def _withdraw(me: Registration) -> None:
    """Leave no reservation and no key behind; a session that is lost cannot be helped."""
    try:
        if await me.holder() == me.key:
            await me.ask(lambda: me.device.release(me.key))
        await me.unregister()
    except BlockError:
        me.device.abort()
