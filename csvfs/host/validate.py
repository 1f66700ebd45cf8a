"""Find out everything that `csvctl validate` judges, without changing a byte of a live volume.

Theory. Validation may run at any time beside hosts that do I/O. So it

- reads, and never writes; the one command that changes anything at the target is REGISTER of a
  key of slot 255 (and its removal), and only where a reservation keeps it from reading otherwise;
- sends no LOGICAL UNIT RESET, no PREEMPT, no RESERVE;
- believes a copy to be damaged, and a key to be stale, only when it has seen it so twice.

Whether the reservation keeps strangers out is seen in passing: it reads *before* it registers. The
logins that should be refused (no password, a strange initiator name) come last, each once.

A writing probe (`try_target`) is `csvctl format`'s own, behind its checks: nobody registered, no
reservation, nothing on the LUN. It puts back the bytes that it wrote.

Concurrency: one task. Cancelled, it unregisters its key; killed, it leaves it, which harms nothing:
it belongs to nobody, and the next host that mounts fences it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from random import Random, SystemRandom
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import trio

from csvfs.format import (
    BLOCK_BYTES,
    SUPERBLOCK_ADDRESS,
    UNIT_BYTES,
    VIEW_ADDRESSES,
    VIEW_BYTES,
    BadBlock,
    SlotBlock,
    Superblock,
    View,
    byte_offset,
    decode_view,
)
from csvfs.host.validate_facts import Copy, Door, Facts, Property, Refused, Report
from csvfs.host.validate_lun import judge_lun
from csvfs.host.validate_members import judge_members, key_uses
from csvfs.host.validate_target import judge_target
from csvfs.membership.fixed_area import (
    NoVolume,
    SuperblocksDestroyed,
    read_slot_blocks,
    read_superblock,
)
from csvfs.mkfs import FormatOptions, read_signatures
from csvfs.mkfs_claim import Formatter
from redirector.block.device import (
    AuthenticationFailed,
    BlockDevice,
    BlockError,
    IllegalRequest,
    LoginFailed,
    Lun,
    MediumError,
    NoSuchLun,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    TargetRefused,
)
from redirector.block.keys import choose_port, is_foreign, newcomer_key
from redirector.block.probe_result import ProbeResult
from redirector.block.reservations import PathClosed, Registration, Standing, patiently, survey
from redirector.block.scsi import ReserveCapabilities

T = TypeVar("T")

READS: Final = 32
"""For the latency, spread over the LUN."""
STRANGER_NAME: Final = "iqn.2026-11.org.csvfs:validate-stranger"
"""An initiator name that nobody has a reason to allow."""
_LOOKS: Final = 4
_PAUSE_S: Final = 0.25
"""Between two looks at something that may just be being written."""
_ATTEMPTS: Final = 3
_CLOSE_LIMIT_S: Final = 2.0
_LOGIN_LIMIT_S: Final = 5.0
_CLEAN_UP_LIMIT_S: Final = 5.0
_NOBODY: Final = Standing(RegisteredKeys(0, ()), Reservation(0, 0, ReservationType.NONE))
_SYSTEM_RANDOM: Final = SystemRandom()


class _Ask(Protocol):
    """Sends a command of a nexus past unit attentions: `patiently`, or `Registration.ask`."""

    async def __call__(self, ask: Callable[[], Awaitable[T]], /) -> T: ...


@runtime_checkable
class _SaysCapabilities(Protocol):
    async def report_capabilities(self) -> ReserveCapabilities: ...


@dataclass(frozen=True, slots=True)
class Validator:
    """Validates one LUN."""

    lun: Lun
    initiator_name: str
    anonymous: Lun | None = None
    """The same LUN without user and password (``lun`` itself if it has none); None: a kind of LUN
    that has no login."""
    rng: Random = field(default=_SYSTEM_RANDOM)

    async def run(self, *, destructive: bool = False) -> Report:
        """Find out and judge; with ``destructive`` try the target by writing first.

        Raises `LoginFailed`, `BlockError`, and for ``destructive``, before anything is written,
        `FormatRefused` and its kinds and `BadGeometry`.
        """
        probed = await self.try_target() if destructive else None
        return judge(replace(await self.gather(), probed=probed))

    async def try_target(self) -> ProbeResult:
        """The writing probe of a LUN that carries nothing. Raises as `Formatter.try_target`."""
        formatter = Formatter(
            self.lun, self.initiator_name, FormatOptions(), now_ns=time.time_ns(), rng=self.rng
        )
        return await formatter.try_target()

    async def gather(self) -> Facts:
        """Only read. Raises `LoginFailed`, `BlockError`."""
        for _ in range(_ATTEMPTS - 1):
            try:
                facts = await self._look()
                break
            except PathClosed:
                continue  # a host that mounted the volume has fenced the newcomer's key
        else:
            facts = await self._look()
        return replace(
            facts,
            closes_old_session=await self._closes_old_session(),
            no_password=await self._no_password(),
            stranger=await self._stranger(),
        )

    # -- on one session --------------------------------------------------------------------------
    async def _look(self) -> Facts:
        device = await self.lun.login(choose_port(self.initiator_name, self.rng))
        try:
            facts = await self._look_with(device)
        except BaseException:
            device.abort()
            raise
        await device.aclose()
        return facts

    async def _look_with(self, device: BlockDevice) -> Facts:
        """Unregistered as long as that goes, else registered, unless a stranger reserved it."""
        capabilities = await _capabilities(device)
        standing = await _standing(device)
        facts = Facts(
            identity=device.identity,
            standing=standing or _NOBODY,
            outsider_read=await _outsider_read(device),
            reservable=standing is not None,
            capabilities=capabilities,
        )
        if facts.outsider_read is Refused.NO:
            try:
                return await _read_all(device, patiently, facts)
            except ReservationConflict:
                pass  # a host has mounted it meanwhile
        standing = await _standing(device) or _NOBODY
        facts = replace(facts, standing=standing, outsider_read=Refused.YES)
        if not standing.holder_key or _strange(standing):
            return replace(facts, readable=False)
        me = await Registration.register(device, newcomer_key(self.rng))
        try:
            facts = replace(facts, own_key=me.key, identity=device.identity)
            return await _read_all(device, me.ask, facts)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(_CLEAN_UP_LIMIT_S):
                await _unregister(me)

    # -- on sessions of their own ------------------------------------------------------------------
    async def _closes_old_session(self) -> bool | None:
        port = choose_port(self.initiator_name, self.rng)
        try:
            async with await self.lun.login(port) as old, await self.lun.login(port):
                with trio.move_on_after(_CLOSE_LIMIT_S):
                    await old.wait_lost()
                return old.lost
        except BlockError:
            return None

    async def _no_password(self) -> Door:
        if self.anonymous is None:
            return Door.NONE
        if self.anonymous is self.lun:
            return Door.OPEN  # that is how all this was read
        return await self._try_door(self.anonymous, self.initiator_name)

    async def _stranger(self) -> Door:
        if self.anonymous is None:
            return Door.NONE
        return await self._try_door(self.lun, STRANGER_NAME)

    async def _try_door(self, lun: Lun, initiator_name: str) -> Door:
        port = choose_port(initiator_name, self.rng)
        try:
            device = await lun.login(port, timeout_s=_LOGIN_LIMIT_S)
        except (AuthenticationFailed, NoSuchLun):
            return Door.SHUT
        except LoginFailed:
            return Door.UNKNOWN
        await device.aclose()
        return Door.OPEN


def judge(facts: Facts) -> Report:
    """Pure: the properties, in the order in which they are shown."""
    keys = key_uses(facts)
    properties: list[Property] = []
    properties += judge_lun(facts)
    properties += judge_target(facts)
    properties += judge_members(facts, keys)
    return Report(facts, tuple(properties), keys)


# -- the parts -----------------------------------------------------------------------------------
def _strange(standing: Standing) -> bool:
    return bool(standing.strange_reservation()) or is_foreign(standing.holder_key)


async def _standing(device: BlockDevice) -> Standing | None:
    """None: the target knows no persistent reservations."""
    try:
        return await survey(device)
    except IllegalRequest:
        return None


async def _unregister(me: Registration) -> None:
    try:
        await me.unregister()
    except BlockError:
        me.device.abort()


async def _capabilities(device: BlockDevice) -> ReserveCapabilities | None:
    if not isinstance(device, _SaysCapabilities):
        return None
    try:
        return await patiently(device.report_capabilities)
    except TargetRefused:
        return None  # many targets do not know it


async def _outsider_read(device: BlockDevice) -> Refused:
    try:
        await patiently(lambda: device.read(0, BLOCK_BYTES))
    except ReservationConflict:
        return Refused.YES
    except MediumError:
        return Refused.NO
    return Refused.NO


async def _read_all(device: BlockDevice, ask: _Ask, facts: Facts) -> Facts:
    superblocks, destroyed = await _superblocks(device, ask)
    facts = replace(facts, superblocks=superblocks, destroyed=destroyed)
    superblock = facts.superblock
    if superblock is not None:
        facts = await _members(device, ask, facts, superblock)
    elif not destroyed:
        facts = replace(facts, signatures=await ask(lambda: read_signatures(device)))
    return await _latency(device, ask, facts)


async def _superblocks(device: BlockDevice, ask: _Ask) -> tuple[tuple[Copy[Superblock], ...], str]:
    """Both copies; the backup where the first says that it is. And whether there was a volume."""
    first = await _superblock(device, ask, SUPERBLOCK_ADDRESS)
    size_units = device.identity.size_bytes // UNIT_BYTES
    backup_address = max(size_units - 1, 0) * (UNIT_BYTES // BLOCK_BYTES)
    if first.content is not None:
        backup_address = first.content.geometry.backup_superblock
    backup = await _superblock(device, ask, backup_address)
    destroyed = ""
    if first.content is None and backup.content is None:
        try:
            await ask(lambda: read_superblock(device))
        except SuperblocksDestroyed as error:
            destroyed = str(error)
        except NoVolume:
            pass
    return (first, backup), destroyed


async def _superblock(device: BlockDevice, ask: _Ask, address: int) -> Copy[Superblock]:
    if byte_offset(address) + BLOCK_BYTES > device.identity.size_bytes:
        return Copy(None, "it lies beyond the end of the LUN")
    block = await _block(device, ask, byte_offset(address), BLOCK_BYTES)
    if isinstance(block, MediumError):
        return Copy(None, str(block))
    try:
        return Copy(Superblock.decode(block, address))
    except BadBlock as error:
        return Copy(None, str(error))


async def _block(
    device: BlockDevice, ask: _Ask, offset_bytes: int, length_bytes: int
) -> bytearray | MediumError:
    try:
        return await ask(lambda: device.read(offset_bytes, length_bytes))
    except MediumError as error:
        return error


async def _members(device: BlockDevice, ask: _Ask, facts: Facts, superblock: Superblock) -> Facts:
    """View, slot blocks and keys of one moment: looked at again while they change."""
    before: Any = None
    for look in range(_LOOKS):
        if look:
            await trio.sleep(_PAUSE_S)
        views = [await _view(device, ask, address, superblock) for address in VIEW_ADDRESSES]
        blocks: dict[int, SlotBlock] = {}
        unreadable: tuple[str, ...] = ()
        try:
            blocks = await ask(lambda: read_slot_blocks(device, superblock))
        except MediumError as error:
            unreadable = (f"slot blocks ({error})",)
        standing = await _standing(device) or _NOBODY
        facts = replace(
            facts,
            views=tuple(views),
            slot_blocks=blocks,
            standing=standing,
            unreadable=unreadable,
        )
        seen = (views, blocks, key_uses(facts))
        if seen == before:
            break
        before = seen
    return facts


async def _view(device: BlockDevice, ask: _Ask, address: int, superblock: Superblock) -> Copy[View]:
    block = await _block(device, ask, byte_offset(address), VIEW_BYTES)
    if isinstance(block, MediumError):
        return Copy(None, str(block))
    try:
        return Copy(decode_view(block, address, superblock.volume_id))
    except BadBlock as error:
        return Copy(None, str(error))


async def _latency(device: BlockDevice, ask: _Ask, facts: Facts) -> Facts:
    """One read after the other, at places spread over the LUN."""
    took_s: list[float] = []
    unreadable: list[str] = []
    step = device.identity.size_bytes // READS // BLOCK_BYTES * BLOCK_BYTES
    for number in range(READS):
        started = trio.current_time()
        block = await _block(device, ask, number * step, BLOCK_BYTES)
        if isinstance(block, MediumError):
            unreadable.append(f"byte {number * step}")
        else:
            took_s.append(trio.current_time() - started)
    return replace(facts, reads_s=tuple(took_s), unreadable=(*facts.unreadable, *unreadable))
