"""Which slot a claim takes, under which number, and the views that it writes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Final

from csvfs.format import (
    NOBODY,
    Identity,
    Session,
    SessionKind,
    SlotBlock,
    SlotState,
    View,
    ViewSlot,
    ViewSlotFlag,
)
from csvfs.membership.decision import Host, Observation, RecoverOwnDead, Succession
from redirector.block.keys import MAX_INCARNATION, PathKey, choose_port


@dataclass(frozen=True, slots=True)
class Seat:
    """The slot a claim takes, and under which number."""

    slot: int
    incarnation: int
    replays: tuple[int, ...]
    """Slots whose journals are to be replayed; the own one among them if it was not free."""


def choose_seat(seen: Observation, decision: Succession, host: Host) -> Seat | None:
    """The slot of the dead incarnation; else the one this host had last; else the first free.

    None if no slot has an incarnation number left. With no slot free, one that needs replay is
    taken over like the dead incarnation's own.
    """
    view = seen.view
    dead = decision.slots if isinstance(decision, RecoverOwnDead) else ()
    waiting = tuple(n for n, s in enumerate(view.slots) if s.state == SlotState.NEEDS_REPLAY)
    free = [n for n, s in enumerate(view.slots) if s.state == SlotState.FREE]
    free.sort(key=lambda n: (view.slots[n].node_name != host.node_name, n))
    for slot in (*dead, *free, *waiting):
        incarnation = _next_incarnation(seen, slot)
        if incarnation <= MAX_INCARNATION:
            return Seat(slot, incarnation, tuple(sorted({*dead, *waiting})))
    return None


def _next_incarnation(seen: Observation, slot: int) -> int:
    """One that neither a member nor a claim that failed has ever had in this slot."""
    used = seen.view.slots[slot].incarnation
    block = seen.slot_blocks.get(slot)
    if block is not None:
        used = max(used, block.identity.incarnation)
    for key in seen.keys:
        parsed = PathKey.parse(key)
        if parsed is not None and parsed.slot == slot:
            used = max(used, parsed.incarnation)
    return used + 1


def joining_view(
    view: View, seat: Seat, host: Host, fingerprint: bytes, holder_key: int, now_ns: int
) -> View:
    """The next view: this host joins, everybody else who is listed needs replay by it."""
    slots = {
        number: replace(view.slots[number], state=SlotState.NEEDS_REPLAY, replay_by=seat.slot)
        for number in seat.replays
    }
    slots[seat.slot] = ViewSlot(
        incarnation=seat.incarnation,
        state=SlotState.JOINING,
        fingerprint=fingerprint,
        node_name=host.node_name,
        flags=view.slots[seat.slot].flags,
        machine_id=host.machine_id,
        boot_id=host.boot_id,
        addresses=host.addresses,
    )
    return view.next(holder_key, slots, now_ns)


def active_view(view: View, seat: Seat, holder_key: int, now_ns: int) -> View:
    """The next view: every journal is replayed, the host serves."""
    slots = {
        number: replace(view.slots[number], state=SlotState.FREE, replay_by=NOBODY)
        for number in seat.replays
    }
    entry = view.slots[seat.slot]
    slots[seat.slot] = replace(
        entry, state=SlotState.ACTIVE, flags=entry.flags | ViewSlotFlag.JOURNAL_USED
    )
    return view.next(holder_key, slots, now_ns)


def left_view(view: View, slot: int, holder_key: int, now_ns: int) -> View:
    """The next view: the host has left, its journal empty, and ``holder_key`` stays parked."""
    entry = replace(view.slots[slot], state=SlotState.FREE, replay_by=NOBODY)
    return view.next(holder_key, {slot: entry}, now_ns)


# -- the slot block ------------------------------------------------------------------------------
DATA_GENERATION: Final = 1
CONTROL_GENERATION: Final = 2


def new_sessions(seat: Seat, initiator_name: str, rng: Random) -> tuple[Session, Session]:
    """The data and the control session of a fresh incarnation: a key and a random ISID each."""

    def session(kind: SessionKind, generation: int) -> Session:
        port = choose_port(initiator_name, rng)
        key = PathKey(seat.slot, seat.incarnation, generation).pack()
        return Session(kind, generation, key, port.name, port.isid)

    return (
        session(SessionKind.DATA, DATA_GENERATION),
        session(SessionKind.CONTROL, CONTROL_GENERATION),
    )


def seat_block(seat: Seat, host: Host, sessions: tuple[Session, ...], now_ns: int) -> SlotBlock:
    """Who is in the slot from now on."""
    identity = Identity(
        incarnation=seat.incarnation,
        generation=max(session.generation for session in sessions),
        key=0,
        since_ns=now_ns,
        machine_id=host.machine_id,
        boot_id=host.boot_id,
        node_name=host.node_name,
        addresses=host.addresses,
        certificate=host.certificate,
    )
    return SlotBlock(seat.slot, identity, sessions)


# -- the journals --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class JournalTask:
    """A journal to bring in order before the node serves."""

    slot: int
    incarnation: int
    """Under which the journal goes on: the new one of the own slot, else the dead one's."""
    used: bool
    """False: the slot was never active; journal, orphan and reclaim root are to be written."""
    own: bool


def journal_tasks(view: View, seat: Seat) -> list[JournalTask]:
    """What is to be brought in order: other slots first, the own one last."""
    tasks = [
        JournalTask(n, view.slots[n].incarnation, used=True, own=False)
        for n in seat.replays
        if n != seat.slot and view.slots[n].flags & ViewSlotFlag.JOURNAL_USED
    ]
    used = bool(view.slots[seat.slot].flags & ViewSlotFlag.JOURNAL_USED)
    return [*tasks, JournalTask(seat.slot, seat.incarnation, used, own=True)]
