"""Can this target be the arbiter? Found out at format, from two initiators.

Theory. The standard lets targets differ, and some do not keep to it. What csvfs rests on is
therefore tried, on a scratch range, by a *holder* and a *victim* with a session each; what the
target does is believed, not what it says of itself. A target whose arbiter does not hold is
refused with the reason; what merely leaks past the fence (tgt: UNMAP and WRITE SAME) is noted, and
the rules that keep it harmless apply.

That a reset drains cannot be proved, only disproved: writes of the victim are sent, the victim is
fenced while they are on their way, and then nothing may change any more.

The probe puts the bytes of the scratch range back and leaves no registration or reservation of
its own behind, whatever happens, as long as the LUN can be reached.

Concurrency: one task, but for the writes in flight of the drain test.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random, SystemRandom

import trio

from redirector.block.device import (
    BlockDevice,
    BlockError,
    IllegalRequest,
    InitiatorPort,
    LoginFailed,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
    ReservationType,
    TargetRefused,
)
from redirector.block.keys import choose_port, newcomer_key
from redirector.block.probe_result import Findings, ProbeFlag, ProbeResult
from redirector.block.reservations import FenceFailed, Registration, drain, patiently, survey

__all__ = ["ProbeFailed", "ProbeFlag", "ProbeResult", "probe"]

log = logging.getLogger(__name__)

_WRITES_IN_FLIGHT = 32
_QUIET_S = 0.3
"""How long nothing may change after a fence."""
_RESETS = 3
_CLOSE_LIMIT_S = 5.0
"""How long a reinstated session may take to close."""


class ProbeFailed(BlockError):
    """The probe could not be carried out: what was found so far says nothing."""


_USE_ANOTHER = "with it the volume would be destroyed sooner or later. Use another target"
_NO_UNMAP = "space that is freed on the volume stays taken on a thin array. Nothing to do"
_NO_WRITE_SAME = "csvfs does without. Nothing to do"


async def probe(
    lun: Lun,
    initiators: tuple[str, str],
    scratch: tuple[int, int],
    *,
    rng: Random | None = None,
) -> ProbeResult:
    """Try the target of ``lun`` as an arbiter.

    ``initiators`` are the InitiatorNames of holder and victim (they may be equal; the ISIDs
    differ). ``scratch`` is offset and length in bytes, at least 8 blocks of 4 KiB. Nobody else may
    be registered on the LUN, and no reservation exist. Raises `ProbeFailed`, `LoginFailed`.
    """
    offset_bytes, length_bytes = scratch
    if length_bytes < 8 * 4096 or offset_bytes % 4096 or length_bytes % 4096:
        raise ValueError("the scratch range needs 8 whole blocks of 4 KiB or more")
    run = _Probe(lun, initiators, offset_bytes, length_bytes, rng or SystemRandom())
    try:
        async with run.prepared():
            await run.try_all()
    except (ProbeFailed, LoginFailed):
        raise
    except BlockError as error:
        raise ProbeFailed(f"{lun.url}: the target could not be probed: {error}") from error
    return run.findings.result()


class _Probe:
    def __init__(
        self, lun: Lun, initiators: tuple[str, str], offset: int, length: int, rng: Random
    ) -> None:
        self.lun = lun
        self.findings = Findings()
        self._offset, self._length = offset, length
        self._rng = rng
        self._holder_port = choose_port(initiators[0], rng)
        self._victim_port = choose_port(initiators[1], rng)
        self._original = b""
        self._keys: set[int] = set()
        self._devices: list[BlockDevice] = []
        self._holder: Registration
        self._victim: Registration

    # -- before and after --------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def prepared(self) -> AsyncIterator[None]:
        """Two registered sessions, one holding; everything as it was afterwards."""
        async with await self.lun.login(self._holder_port) as first:
            await self._expect_nobody(first)
            self._original = bytes(await patiently(self._read(first)))
        try:
            yield
        finally:
            with trio.move_on_after(30) as scope:
                scope.shield = True
                await self._clean_up()
            if scope.cancelled_caught:
                log.error("%s: the target did not let the probe clean up", self.lun.url)

    async def _expect_nobody(self, device: BlockDevice) -> None:
        standing = await survey(device)
        if standing.keys.keys or standing.reservation.type != ReservationType.NONE:
            raise ProbeFailed(f"{self.lun.url}: somebody is registered on this LUN")

    async def _register(self, port: InitiatorPort) -> Registration:
        device = await self.lun.login(port)
        self._devices.append(device)
        return await self._reregister(device)

    async def _reregister(self, device: BlockDevice) -> Registration:
        key = newcomer_key(self._rng)
        self._keys.add(key)
        return await Registration.register(device, key)

    async def _clean_up(self) -> None:
        """On a session of its own: take, restore, release. Good whatever was left undone."""
        for device in self._devices:
            device.abort()
            await device.aclose()
        janitor = await self._register(choose_port(self._holder_port.name, self._rng))
        async with janitor.device as device:
            standing = await survey(device)
            if standing.holder_key in self._keys:
                await janitor.take(standing.holder_key)
            for key in (self._keys - {janitor.key}) & set(standing.keys.keys):
                await janitor.preempt(key)
            await drain(self.lun, janitor)
            await janitor.ask(lambda: device.write(self._offset, self._original, fua=True))
            if await janitor.holder() == janitor.key:
                await janitor.ask(lambda: device.release(janitor.key))
            await janitor.unregister()

    # -- the properties ------------------------------------------------------------------------
    async def try_all(self) -> None:
        """Each property in turn; the later ones rest on the earlier ones."""
        self._holder = await self._register(self._holder_port)
        self._victim = await self._register(self._victim_port)
        if not await self._try_reservation():
            return
        await self._try_preempt_unregistered()
        await self._try_what_works()
        if await self._try_fence() and await self._try_succession():
            await self._try_drain()
            await self._try_reinstatement()

    async def _try_reservation(self) -> bool:
        holder = self._holder
        try:
            await holder.reserve()
            held = await holder.ask(holder.device.read_reservation)
            passed = held.type == ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
        except IllegalRequest:
            passed = False
        return self.findings.note(
            "persistent reservations of type 6 (Exclusive Access, Registrants Only)",
            passed,
            needed=True,
            meaning="the target has no way to keep a host out; " + _USE_ANOTHER,
        )

    async def _try_preempt_unregistered(self) -> None:
        holder = self._holder
        refused = await self._refused(
            holder, lambda: holder.device.preempt(holder.key, newcomer_key(self._rng))
        )
        self.findings.note(
            "PREEMPT of a key that nobody registered conflicts",
            refused,
            needed=True,
            meaning="the target lets two hosts win one election; " + _USE_ANOTHER,
            flag=ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS,
        )

    async def _try_what_works(self) -> None:
        """Which optional commands the holder may send at all."""
        device = self._holder.device
        for name, flag, command, meaning in (
            ("UNMAP", ProbeFlag.UNMAP_WORKS, self._unmap(device), _NO_UNMAP),
            ("WRITE SAME", ProbeFlag.WRITE_SAME_WORKS, self._write_same(device), _NO_WRITE_SAME),
        ):
            try:
                await self._holder.ask(command)
                works = True
            except IllegalRequest:
                works = False
            self.findings.note(
                f"{name} is supported", works, needed=False, meaning=meaning, flag=flag
            )

    async def _try_fence(self) -> bool:
        holder, victim = self._holder, self._victim
        pattern = self._rng.randbytes(self._length)
        await holder.ask(lambda: holder.device.write(self._offset, pattern))
        await self._preempt_victim()
        for name, flag, command in (
            ("READ", ProbeFlag.FENCE_STOPS_READ, self._read(victim.device)),
            ("WRITE", ProbeFlag.FENCE_STOPS_WRITE, self._write(victim.device)),
            ("UNMAP", ProbeFlag.FENCE_STOPS_UNMAP, self._unmap(victim.device)),
            ("WRITE SAME", ProbeFlag.FENCE_STOPS_WRITE_SAME, self._write_same(victim.device)),
        ):
            await self._try_fenced(name, flag, command, pattern)
        refused = await self._refused(
            None, lambda: victim.device.preempt(victim.key, holder.key)
        ) and await self._refused(None, lambda: victim.device.reserve(victim.key))
        return self.findings.note(
            "who is not registered takes no reservation",
            refused and (await survey(victim.device)).holder_key == holder.key,
            needed=True,
            meaning="an evicted host could take the volume over; " + _USE_ANOTHER,
        )

    async def _preempt_victim(self) -> None:
        holder = self._holder
        if ProbeFlag.PREEMPT_ABORT_WORKS not in self.findings.flags:
            try:
                await holder.preempt(self._victim.key, abort=True)
            except IllegalRequest:
                await holder.preempt(self._victim.key)
            else:
                self.findings.flags |= ProbeFlag.PREEMPT_ABORT_WORKS
        else:
            await holder.preempt(self._victim.key)

    async def _try_fenced(
        self, name: str, flag: ProbeFlag, command: Callable[[], Awaitable[object]], pattern: bytes
    ) -> None:
        needed = name in ("READ", "WRITE")
        try:
            refused = await self._refused(None, command)
        except IllegalRequest:
            return  # not supported: nothing to stop, and no flag
        device = self._holder.device
        # It says no and does it nevertheless, or the other way round: what counts is the medium.
        intact = bytes(await self._holder.ask(self._read(device))) == pattern
        if not intact:
            await self._holder.ask(lambda: device.write(self._offset, pattern))
        self.findings.note(
            f"the fence stops {name}",
            refused and intact,
            needed=needed,
            meaning="a host that was evicted can still touch the volume; " + _USE_ANOTHER
            if needed
            else f"{name} of an evicted host gets through; csvfs sends none unless closing that "
            "host's session stops it. Nothing to do",
            flag=flag,
        )

    async def _try_succession(self) -> bool:
        """The victim comes back with a new key and takes over, the holder returns the same way."""
        deposed = self._holder
        try:
            heir = await self._reregister(self._victim.device)
            await heir.take(deposed.key)
            stopped = await self._refused(None, self._write(deposed.device))
            self._holder = await self._reregister(deposed.device)
            await self._holder.take(heir.key)
            again = await self._refused(
                self._holder, lambda: self._holder.device.preempt(self._holder.key, heir.key)
            )
            passed = stopped and again
        except OutcomeUnknown:
            raise
        except BlockError as error:
            log.info("%s: succession: %s", self.lun.url, error)
            passed = False
        return self.findings.note(
            "PREEMPT of the holder's key takes the reservation, once",
            passed,
            needed=True,
            meaning="nobody could take over from a dead host; " + _USE_ANOTHER,
        )

    async def _try_drain(self) -> None:
        self._victim = await self._reregister(self._victim.device)
        holder, victim = self._holder, self._victim
        async with trio.open_nursery() as nursery:
            for number in range(_WRITES_IN_FLIGHT):
                nursery.start_soon(self._one_write, victim, number)
            for _ in range(3):  # so that each of them was sent, in whatever order tasks run
                await trio.lowlevel.checkpoint()
            await holder.preempt(victim.key)
            try:
                await drain(self.lun, holder, resets=_RESETS)
                answered = True
            except FenceFailed as error:
                log.info("%s: %s", self.lun.url, error)
                answered = False
            before = bytes(await holder.ask(self._read(holder.device)))
            await trio.sleep(_QUIET_S)
        after = bytes(await holder.ask(self._read(holder.device)))
        self.findings.note(
            "LOGICAL UNIT RESET is answered, and nothing lands after it",
            answered and before == after,
            needed=True,
            meaning="a write of a dead host could destroy data much later; " + _USE_ANOTHER,
            flag=ProbeFlag.RESET_DRAINS,
        )

    async def _one_write(self, victim: Registration, number: int) -> None:
        at = self._offset + number * 4096 % self._length
        data = self._rng.randbytes(4096)
        with contextlib.suppress(TargetRefused, OutcomeUnknown):
            await victim.device.write(at, data)

    async def _try_reinstatement(self) -> None:
        old = self._victim = await self._reregister(self._victim.device)
        async with await self.lun.login(old.device.port):
            with trio.move_on_after(_CLOSE_LIMIT_S):
                await old.device.wait_lost()
            closed = old.device.lost
            if closed:
                with contextlib.suppress(OutcomeUnknown):
                    await patiently(old.device.test_unit_ready)
                    closed = False
        self.findings.note(
            "a new login closes the old session of the same initiator port",
            closed,
            needed=False,
            meaning="a frozen host can delay the take-over of its VMs until its connection times "
            "out; UNMAP is used only if the fence stops it. Nothing to do",
            flag=ProbeFlag.REINSTATEMENT_CLOSES,
        )
        kept = old.key in (await self._holder.ask(self._holder.device.read_keys)).keys
        self.findings.note(
            "a registration outlives its session",
            kept,
            needed=True,
            meaning="the reservation would be gone with the connection of its holder, and an "
            "evicted host could write; " + _USE_ANOTHER,
        )

    # -- commands --------------------------------------------------------------------------------
    async def _refused(
        self, session: Registration | None, command: Callable[[], Awaitable[object]]
    ) -> bool:
        """Whether the answer is RESERVATION CONFLICT; unit attentions are fetched before."""
        try:
            await (patiently(command) if session is None else session.ask(command))
        except ReservationConflict:
            return True
        return False

    def _read(self, device: BlockDevice) -> Callable[[], Awaitable[bytearray]]:
        return lambda: device.read(self._offset, self._length)

    def _write(self, device: BlockDevice) -> Callable[[], Awaitable[None]]:
        data = self._rng.randbytes(self._length)
        return lambda: device.write(self._offset, data)

    def _unmap(self, device: BlockDevice) -> Callable[[], Awaitable[None]]:
        return lambda: device.unmap([(self._offset, self._length)])

    def _write_same(self, device: BlockDevice) -> Callable[[], Awaitable[None]]:
        block = self._rng.randbytes(device.identity.logical_block_bytes)
        return lambda: device.write_same(self._offset, self._length, block)
