"""Whether, and how, a host may take a volume as its only member: the decision, without any I/O.

Theory. The reservation says who may write, the view who is a member, the slot blocks over which
sessions. A newcomer has read all three (registered, so that what it read was current) and now may

    JoinEmpty       the view is empty and nobody, or a key that nobody can explain, holds the
                    reservation; allowed after a silence only (see `Silence`)
    SucceedParked   the view is empty and names the very key that holds: the last node left it
    RecoverOwnDead  the only members are earlier incarnations of this host, proven dead
    RebuildView     nobody can read who is a member, but nobody who could be one is registered;
                    allowed to a repair only, after a silence (see `_decide_without_view`)
    WaitSilence     look again until nothing has changed for `SILENCE_S`
    Refuse...       and says whom to ask

This host's incarnation is *proven* dead if the view names the same machine id and node name,
and either another boot id, or this process holds the daemon's lock file, which the dead one held.

A claim takes a free slot, or the slot of the dead incarnation itself, under the next incarnation
number, as JOINING. In that state a slot's journal may still hold what the incarnation before left,
so whoever finds it dead replays it like any other: no crash in the middle of a claim loses it.

invariants:
- nothing but an empty view, or one whose members are all proven dead, is ever succeeded; without
  a view, nothing but a LUN where every registered key is this host's, proven dead, or a newcomer's,
  or one that the administrator has named;
- an incarnation number of a slot is used once, whatever became of the claim that took it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from csvfs.format import UNIT_BYTES, SlotBlock, SlotState, Superblock, View
from csvfs.membership.refusals import (
    Refusal,
    RefuseCopy,
    RefuseFeature,
    RefuseForeign,
    RefuseMountedHere,
    RefuseOther,
    RefuseTooSmall,
    RefuseUnexplained,
    RefuseUnfinished,
)
from csvfs.mkfs import stored_device_id
from redirector.block.device import LunIdentity, Reservation, ReservationType
from redirector.block.keys import PathKey, is_foreign, key_words

SILENCE_S: Final = 5.0
"""How long nothing may change before an unexplained holder counts as gone (DESIGN "Leaving")."""
JUDGE_GAP_S: Final = 1.0
"""Silence counts only while it was listened to at least this often."""


@dataclass(frozen=True, slots=True)
class Host:
    """Who claims."""

    node_name: str
    machine_id: bytes
    boot_id: bytes
    initiator_name: str
    addresses: tuple[str, ...] = ()
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a registered newcomer has read, in one sweep."""

    superblock: Superblock
    identity: LunIdentity
    view: View
    reservation: Reservation
    keys: tuple[int, ...]
    slot_blocks: Mapping[int, SlotBlock]
    """Those that are valid."""
    view_trouble: str = ""
    """Not empty: both copies of the view are destroyed in this way, and ``view`` is made of what
    the slots have left (`csvfs.membership.view_rebuild`)."""

    def fingerprint(self) -> Hashable:
        """What must not change while silence is waited for, heartbeats aside.

        Other newcomers come and go; they do not count before they hold the reservation.
        """
        if self.view_trouble:
            return (self.reservation.key, frozenset(path_keys(self.keys)))
        listed = live_slots(self.view)
        parsed = ((key, PathKey.parse(key)) for key in self.keys)
        members = frozenset(key for key, path in parsed if path and path.slot in listed)
        return (self.view.epoch, self.reservation.key, members)


# -- what may be decided, besides a `Refusal` -----------------------------------------------------
@dataclass(frozen=True, slots=True)
class Succession:
    """Take the reservation: PREEMPT ``victim_key``, or RESERVE if it is 0."""

    victim_key: int


class JoinEmpty(Succession):
    """Nobody is a member, and nobody moved for `SILENCE_S`."""


class SucceedParked(Succession):
    """The last node left, and left this key behind."""


@dataclass(frozen=True, slots=True)
class RecoverOwnDead(Succession):
    """Earlier incarnations of this host are the only members."""

    slots: tuple[int, ...]


class RebuildView(RecoverOwnDead):
    """The same without a view: of all who are registered none can be alive. ``slots`` are those
    that this host had last."""


@dataclass(frozen=True, slots=True)
class WaitSilence:
    """Undecidable as yet."""

    reason: str


Decision = Succession | WaitSilence | Refusal


# -- the decision --------------------------------------------------------------------------------
def decide(
    seen: Observation,
    host: Host,
    own_keys: frozenset[int],
    *,
    has_daemon_lock: bool,
    quiet: bool,
    preempt_keys: frozenset[int] = frozenset(),
) -> Decision:
    """What the newcomer may do now.

    ``own_keys``: keys that this very claim has registered. ``quiet``: `Silence` has lasted.
    ``preempt_keys``: whose owners are gone for good, as the administrator says; they count only
    where no view can tell.
    """
    refusal = refuse(seen)
    if refusal is not None:
        return refusal
    if seen.view_trouble:
        return _decide_without_view(
            seen, host, own_keys, preempt_keys, has_daemon_lock=has_daemon_lock, quiet=quiet
        )
    dead: list[int] = []
    for number in live_slots(seen.view):
        verdict = _judge(seen, number, host, has_daemon_lock)
        if verdict is not None:
            return verdict
        dead.append(number)
    holder = seen.reservation.key
    if holder in own_keys:
        # Taken by this claim a moment ago; what was read since then is the truth.
        return RecoverOwnDead(holder, tuple(dead)) if dead else JoinEmpty(holder)
    if dead:
        if holder in (0, seen.view.holder_key) or _is_of(holder, seen.view, dead) or quiet:
            return RecoverOwnDead(holder, tuple(dead))
        return WaitSilence(f"{key_words(holder)} holds the reservation: another host is joining")
    if not seen.view.members and holder and holder == seen.view.holder_key:
        return SucceedParked(holder)
    if quiet:
        return JoinEmpty(holder)
    if holder:
        return WaitSilence(f"{key_words(holder)} holds the reservation, and no view explains it")
    return WaitSilence("nobody holds the reservation: another host may be joining")


def _decide_without_view(
    seen: Observation,
    host: Host,
    own_keys: frozenset[int],
    preempt_keys: frozenset[int],
    *,
    has_daemon_lock: bool,
    quiet: bool,
) -> Decision:
    """Who could be writing? Under a type 6 reservation only who is registered.

    - A registered path key: of a member, of one that is dead, or parked by one that has left. The
      target cannot tell these apart, and a view that could is gone. This host's own is proven dead
      as ever; any other stands for a host whose virtual machines may be running: refused, unless
      the administrator has named it.
    - A newcomer's key: nobody's virtual machines. It is fenced and drained like the rest.
    - Not registered, but alive (the target restarted, or drops keys with their session): it
      registers before it writes, and reads the view on that session. If it does so within the
      silence, its key refuses the rebuild; later, the rebuilt view does not list it.
    - Another repair at the same time: RESERVE and PREEMPT let one win.
    """
    unexplained = []
    for key in path_keys(seen.keys):
        owner = _owner(seen, key)
        if owner is not None and _is_host(owner, host):
            if owner.identity.boot_id == host.boot_id and not has_daemon_lock:
                return RefuseMountedHere()
        elif key not in preempt_keys:
            unexplained.append((key, _name(owner)))
    if unexplained:
        return RefuseUnexplained(tuple(unexplained))
    holder = seen.reservation.key
    if quiet or holder in own_keys:
        own = tuple(n for n, block in seen.slot_blocks.items() if _is_host(block, host))
        return RebuildView(holder, own)
    return WaitSilence("both views are destroyed: another host may come back and be registered")


def path_keys(keys: Iterable[int]) -> tuple[int, ...]:
    """The registered keys of incarnations, each once, ascending."""
    return tuple(sorted({key for key in keys if PathKey.parse(key) is not None}))


def live_slots(view: View) -> tuple[int, ...]:
    """Slots whose node may still be writing, as far as the view knows."""
    states = (SlotState.JOINING, SlotState.ACTIVE)
    return tuple(n for n, slot in enumerate(view.slots) if slot.state in states)


def refuse(seen: Observation) -> Refusal | None:
    """Whether no host may mount it so, whoever is a member."""
    return _refuse_volume(seen) or _refuse_foreign(seen)


def _refuse_volume(seen: Observation) -> Refusal | None:
    superblock = seen.superblock
    found = stored_device_id(seen.identity)
    if superblock.resignature_under_way:
        return RefuseUnfinished(superblock.volume_id, superblock.former_volume_id)
    if superblock.device_id != found:
        return RefuseCopy(superblock.device_id, found)
    if superblock.unknown_incompat or superblock.unknown_ro_compat:
        return RefuseFeature(superblock.unknown_incompat, superblock.unknown_ro_compat)
    needed = superblock.geometry.size_units * UNIT_BYTES
    if seen.identity.size_bytes < needed:
        return RefuseTooSmall(seen.identity.size_bytes, needed)
    return None


def _refuse_foreign(seen: Observation) -> Refusal | None:
    reservation = seen.reservation
    expected = (ReservationType.NONE, ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY)
    if reservation.type not in expected:
        return RefuseForeign(reservation.key, True, int(reservation.type))
    for key in seen.keys:
        if is_foreign(key):
            return RefuseForeign(key, key == reservation.key, int(reservation.type))
    return None


def _judge(seen: Observation, number: int, host: Host, has_daemon_lock: bool) -> Refusal | None:
    """None if the node in the slot is this host's, proven dead."""
    entry = seen.view.slots[number]
    if (entry.machine_id, entry.node_name) != (host.machine_id, host.node_name):
        block = seen.slot_blocks.get(number)
        known = block is not None and block.identity.incarnation == entry.incarnation
        addresses = entry.addresses
        if block is not None and known and not addresses:
            addresses = block.identity.addresses
        return RefuseOther(number, entry.node_name, addresses, entry.since_ns)
    if entry.boot_id == host.boot_id and not has_daemon_lock:
        return RefuseMountedHere()
    return None


def _is_host(block: SlotBlock, host: Host) -> bool:
    """Whether it is of this host, under whatever name: a boot id is no other machine's. (Machine
    ids alone are copied with disk images.)"""
    who = block.identity
    known = who.node_name == host.node_name or who.boot_id == host.boot_id
    return who.machine_id == host.machine_id and known


def _name(block: SlotBlock | None) -> str:
    if block is None:
        return ""
    who = block.identity
    return f"{who.node_name} ({', '.join(who.addresses)})" if who.addresses else who.node_name


def _owner(seen: Observation, key: int) -> SlotBlock | None:
    """The slot block of the incarnation that a path key is of, if one says so."""
    path = PathKey.parse(key)
    block = seen.slot_blocks.get(path.slot) if path is not None else None
    if path is None or block is None or block.identity.incarnation != path.incarnation:
        return None
    return block


def _is_of(key: int, view: View, slots: list[int]) -> bool:
    """True if the key is of a listed incarnation in one of these slots, or of a claim of it."""
    parsed = PathKey.parse(key)
    return (
        parsed is not None
        and parsed.slot in slots
        and parsed.incarnation >= view.slots[parsed.slot].incarnation
    )


# -- silence -------------------------------------------------------------------------------------
class Silence:
    """How long nothing has changed, counted only while it was watched. Times in seconds."""

    def __init__(self) -> None:
        self._state: Hashable = object()
        self._since = 0.0
        self._last = 0.0

    def hear(self, state: Hashable, now: float) -> bool:
        """Take one observation; True once `SILENCE_S` of unbroken silence are over."""
        if state != self._state or now - self._last > JUDGE_GAP_S:
            self._state, self._since = state, now
        self._last = now
        return now - self._since >= SILENCE_S
