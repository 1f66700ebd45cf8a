"""Take a volume as its only member, and leave it again. What may be done, `claim_decision` says.

    claim    1  log in, register as a newcomer, read everything, decide (perhaps after a silence)
             2  take the reservation: RESERVE, or PREEMPT of the key that holds; READ RESERVATION
             3  fence: reinstate the dead sessions, PREEMPT every other key, reset until drained
             4  read everything again and decide again: this is the truth that counts
             5  slot block of the new incarnation, sessions and keys in it, stable
             6  view: joining, predecessors need replay; stable
             7  data and control session: log in, REGISTER, read the view on each
             8  control session PREEMPTs the newcomer's key; the newcomer logs out
             9  replay, or a first journal (callback)
            10  view: active, predecessors free; stable

    release  1  data session: unregister, log out (or fence it, if it was lost)
             2  view: nobody, holder key parked; stable
             3  control session: log out, still registered

Wherever this stops, the next claim finds a view that is empty, or lists an incarnation of this
host, and begins again at 1. (The slot block that 5 overwrites may then be torn; the sessions that
it named were closed and drained in 3.) Nothing of an earlier life can land after 3.

A *repair* may go on where both copies of the view, or of the superblock, are destroyed. It works on
a view made of what the slots have left, under which nobody is a member (`view_rebuild`), decides
once more between 2 and 3, and its first view, written at 6, is the volume's view again. A crash
before that leaves the next repair the same to do; after it, any claim of this host finds its own
dead. A derived superblock stays in memory: who has the claim writes it.

Concurrency: one task per claim. A claim or release that is cancelled drops its sessions; it may
leave its newcomer's key registered, holding or not, for the next claim to fence.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.format import (
    Session,
    Superblock,
    View,
    byte_offset,
    certificate_fingerprint,
)
from csvfs.membership.decision import (
    Host,
    Observation,
    RebuildView,
    Silence,
    Succession,
    WaitSilence,
    decide,
    live_slots,
)
from csvfs.membership.fixed_area import read_heartbeats, read_view, write_view
from csvfs.membership.newcomer import Newcomer, observe, open_newcomer
from csvfs.membership.predecessors import fence_predecessors, succeed
from csvfs.membership.refusals import Refusal, RefuseExhausted, RefuseMountedHere
from csvfs.membership.seat import (
    JournalTask,
    Seat,
    active_view,
    choose_seat,
    joining_view,
    journal_tasks,
    left_view,
    new_sessions,
    seat_block,
)
from csvfs.membership.view_rebuild import Rebuild
from redirector.block.device import (
    BlockDevice,
    BlockError,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
)
from redirector.block.reservations import (
    FenceFailed,
    KeyInUse,
    NobodyHolds,
    PathClosed,
    Registration,
    TakeoverLost,
    Victim,
    fence,
)

POLL_S: Final = 0.5
PATIENCE_S: Final = 60.0
"""How long to wait for other hosts to come to rest before saying so."""
ATTEMPTS: Final = 4
"""A claim that loses its session, or a race, begins again so often."""

_SYSTEM_RANDOM: Final = SystemRandom()


class ClaimRefused(Exception):
    """The volume cannot be taken; ``refusal`` says why, in a form to act on."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.words)
        self.refusal = refusal


class ClaimFailed(Exception):
    """The volume could have been taken, but the target, or another host, did not let it happen."""


class LeaveIncomplete(Exception):
    """The volume was not left cleanly. Nothing is lost: the next mount here recovers it."""


class _ViewChanged(BlockError):
    """The view is not the one that this claim has written: somebody succeeded it."""


_BEGIN_AGAIN = (OutcomeUnknown, PathClosed, KeyInUse, TakeoverLost, NobodyHolds, _ViewChanged)


PrepareJournal = Callable[[BlockDevice, Superblock, JournalTask], Awaitable[None]]
"""Replay the journal, or write a first one; stable on return; idempotent."""


@dataclass(slots=True)
class Claim:
    """A volume that this host has taken.

    invariants (`check`):
    - the view lists this incarnation as its only member, and names the control key as holder.
    """

    lun: Lun
    superblock: Superblock
    view: View
    seat: Seat
    host: Host
    data: Registration
    """The session for data, metadata and journal."""
    control: Registration
    """The reserving session: view and, later, heartbeats."""
    superblock_trouble: str = ""
    """Not empty: the superblock is damaged in this way, and its backup was used."""
    superblock_rebuilt: str = ""
    """Not empty: both copies are destroyed; `superblock` was derived in this way."""
    view_rebuilt: str = ""
    """Not empty: both copies of the view were destroyed in this way; `view` was made anew."""

    @property
    def slot(self) -> int:
        return self.seat.slot

    @property
    def incarnation(self) -> int:
        return self.seat.incarnation

    def check(self) -> None:
        """Assert the invariants."""
        assert self.view.lists(self.slot, self.incarnation)
        assert live_slots(self.view) == (self.slot,)
        assert self.view.holder_key == self.control.key

    def abort(self) -> None:
        """Drop both sessions, as if the host had died. The next claim recovers."""
        self.data.device.abort()
        self.control.device.abort()


async def claim_volume(
    lun: Lun,
    host: Host,
    *,
    prepare: PrepareJournal,
    take_lock: Callable[[bytes], bool],
    now_ns: Callable[[], int] = time.time_ns,
    rng: Random = _SYSTEM_RANDOM,
    on_wait: Callable[[str], None] = lambda _reason: None,
    rebuild: Rebuild | None = None,
) -> Claim:
    """Become the volume's only member.

    ``take_lock(volume id)`` obtains the daemon's lock file, or says False if another process has
    it; called at each attempt. ``prepare`` brings the journals in order. ``on_wait`` is told what
    is waited for. With ``rebuild`` a view or superblock that is destroyed is made anew.

    Raises `ClaimRefused`, `ClaimFailed`, `NoVolume`, `NoView`, `ForeignReservation`,
    `LoginFailed`, `BlockError`, and what ``prepare`` raises.
    """
    claimer = _Claimer(lun, host, prepare, take_lock, now_ns, rng, on_wait, rebuild)
    trouble: BlockError | None = None
    for _ in range(ATTEMPTS):
        try:
            return await claimer.attempt()
        except _BEGIN_AGAIN as error:
            trouble = error
        except FenceFailed as error:
            raise ClaimFailed(
                f"the target does not confirm that nothing of the volume's last owner is on its way"
                f" any more ({error}). Look at the target; it may have to be restarted"
            ) from error
    raise ClaimFailed(
        f"the volume could not be taken in {ATTEMPTS} attempts ({trouble}). Either another host"
        " takes it at the same time, or the path to the target is not stable"
    ) from trouble


@dataclass(slots=True)
class _Claimer:
    """One `claim_volume`, over its attempts."""

    lun: Lun
    host: Host
    prepare: PrepareJournal
    take_lock: Callable[[bytes], bool]
    now_ns: Callable[[], int]
    rng: Random
    on_wait: Callable[[str], None]
    rebuild: Rebuild | None
    own_keys: set[int] = field(default_factory=set)
    """Newcomer's keys of all attempts: one of an earlier attempt that holds is dead."""
    view_trouble: str = ""
    """Why an attempt made the view anew; the next one may find the view of this one."""

    async def attempt(self) -> Claim:
        derive = self.rebuild is not None
        async with await open_newcomer(
            self.lun, self.host.initiator_name, self.rng, derive=derive
        ) as newcomer:
            self.own_keys.add(newcomer.key)
            if not self.take_lock(newcomer.superblock.volume_id):
                raise ClaimRefused(RefuseMountedHere())
            succession = await self._wait_for_succession(newcomer)
            await succeed(newcomer.registration, succession.victim_key)
            if isinstance(succession, RebuildView):
                await self._look_again(newcomer, succession)
            await fence_predecessors(self.lun, newcomer, without_view=derive)
            seen, seat = await self._choose_seat(newcomer)
            data, control = await self._write_slot_block(newcomer, seat)
            digest = certificate_fingerprint(self.host.certificate)
            view = joining_view(seen.view, seat, self.host, digest, newcomer.key, self.now_ns())
            await write_view(newcomer.registration, view, newcomer.superblock.volume_id)
            return await self._move_in(newcomer, view, seat, data, control)

    # -- deciding ----------------------------------------------------------------------------
    def _decide(self, seen: Observation, *, quiet: bool) -> Succession | WaitSilence:
        # The lock file is held: `attempt` refuses without it.
        decision = decide(
            seen,
            self.host,
            frozenset(self.own_keys),
            has_daemon_lock=True,
            quiet=quiet,
            preempt_keys=self.rebuild.preempt_keys if self.rebuild else frozenset(),
        )
        if isinstance(decision, Refusal):
            raise ClaimRefused(decision)
        return decision

    async def _wait_for_succession(self, newcomer: Newcomer) -> Succession:
        """Observe until there is a decision. Raises `ClaimRefused`, `ClaimFailed`."""
        silence = Silence()
        quiet = False
        deadline = trio.current_time() + PATIENCE_S
        while True:
            seen = await observe(newcomer, self.rebuild)
            decision = self._decide(seen, quiet=quiet)
            if isinstance(decision, Succession):
                return decision
            if trio.current_time() > deadline:
                raise ClaimFailed(
                    f"after {PATIENCE_S:.0f} s the volume is still changing hands:"
                    f" {decision.reason}. Wait until the other host is done, or stop it"
                )
            self.on_wait(decision.reason)
            heartbeats = await newcomer.registration.ask(lambda: read_heartbeats(newcomer.device))
            quiet = silence.hear((seen.fingerprint(), heartbeats), trio.current_time())
            if not quiet:
                await trio.sleep(POLL_S)

    async def _choose_seat(self, newcomer: Newcomer) -> tuple[Observation, Seat]:
        """Decide again, as the holder after a fence: what is read now, nobody changes any more."""
        seen = await observe(newcomer, self.rebuild)
        decision = self._decide(seen, quiet=True)
        self.view_trouble = self.view_trouble or seen.view_trouble
        if not isinstance(decision, Succession) or seen.reservation.key != newcomer.key:
            raise TakeoverLost(seen.reservation.key)
        seat = choose_seat(seen, decision, self.host)
        if seat is None:
            raise ClaimRefused(RefuseExhausted())
        return seen, seat

    # -- taking ------------------------------------------------------------------------------
    async def _look_again(self, newcomer: Newcomer, succession: Succession) -> None:
        """A host that came back in the last moment is found before it is fenced, not after."""
        try:
            self._decide(await observe(newcomer, self.rebuild), quiet=True)
        except ClaimRefused:
            if succession.victim_key == 0:  # as it was: nobody held
                holder = newcomer.registration
                await holder.ask(lambda: newcomer.device.release(holder.key))
            raise

    # -- moving in ---------------------------------------------------------------------------
    async def _write_slot_block(self, newcomer: Newcomer, seat: Seat) -> tuple[Session, Session]:
        """Say who will be in the slot and over which sessions, before either exists."""
        superblock, device = newcomer.superblock, newcomer.device
        data, control = new_sessions(seat, self.host.initiator_name, self.rng)
        address = superblock.geometry.slot_block(seat.slot)
        block = seat_block(seat, self.host, (data, control), self.now_ns()).encode(
            superblock.volume_id, address, version=seat.incarnation
        )
        await newcomer.registration.ask(lambda: device.write(byte_offset(address), block, fua=True))
        return data, control

    async def _move_in(
        self, newcomer: Newcomer, view: View, seat: Seat, data: Session, control: Session
    ) -> Claim:
        superblock = newcomer.superblock
        opened: list[Registration] = []
        try:
            for session in (data, control):
                opened.append(await self._open(session, superblock, view))  # noqa: PERF401
            data_path, control_path = opened
            await control_path.take(newcomer.key)
            for task in journal_tasks(view, seat):
                await self.prepare(data_path.device, superblock, task)
            view = active_view(view, seat, control_path.key, self.now_ns())
            await write_view(control_path, view, superblock.volume_id)
        except BaseException:
            for path in opened:
                path.device.abort()
            raise
        trouble = newcomer.superblock_trouble
        claim = Claim(
            self.lun,
            superblock,
            view,
            seat,
            self.host,
            data_path,
            control_path,
            str(trouble) if trouble else "",
            newcomer.superblock_rebuilt,
            self.view_trouble,
        )
        claim.check()
        return claim

    async def _open(self, session: Session, superblock: Superblock, view: View) -> Registration:
        """Log in, REGISTER, and only then read the view on that very session."""
        device = await self.lun.login(InitiatorPort(session.initiator_name, session.isid))
        try:
            path = await Registration.register(device, session.key)
            current = await path.ask(lambda: read_view(device, superblock.volume_id))
            if current != view:
                raise _ViewChanged(
                    f"the view has epoch {current.epoch}, not {view.epoch} as written"
                )
        except BaseException:
            device.abort()
            raise
        return path


# -- leaving -------------------------------------------------------------------------------------
async def release_volume(claim: Claim, *, now_ns: Callable[[], int] = time.time_ns) -> None:
    """Leave. The caller has drained all I/O, and its journal is empty.

    Raises `LeaveIncomplete`; whatever happens, both sessions are gone afterwards.
    """
    claim.check()
    try:
        await _close_data(claim)
        view = left_view(claim.view, claim.slot, claim.control.key, now_ns())
        await write_view(claim.control, view, claim.superblock.volume_id)
        await claim.control.device.aclose()
    except BlockError as error:
        raise LeaveIncomplete(
            f"the volume was not left cleanly ({error}). No data is lost; mounting it on this"
            " host again recovers it, and no other host can mount it before that"
        ) from error
    finally:
        claim.abort()


async def _close_data(claim: Claim) -> None:
    """Nothing of the data session may land after the view says that the host has left."""
    data = claim.data
    try:
        await data.unregister()
        await data.device.aclose()
    except BlockError:
        data.device.abort()
        await fence(claim.lun, claim.control, [Victim(data.key, data.device.port)])
