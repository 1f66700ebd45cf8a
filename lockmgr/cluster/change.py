"""The next view: what a coordinator changes, as one pure function of the view before.

invariants:
- a departed incarnation's slot needs replay, unless it has left with its journal empty;
- each slot that needs replay is assigned to exactly one listed node, if there is a fit one, and
  to another one when that departs;
- an incarnation is one more than any that the slot ever had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.errors import IncarnationsExhausted
from lockmgr.cluster.view import (
    MAX_INCARNATION,
    NOBODY,
    Keys,
    NodeId,
    SlotState,
    View,
    ViewSlot,
    ViewSlotFlag,
)


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be different."""

    evict: frozenset[NodeId] = frozenset()
    left: frozenset[NodeId] = frozenset()
    """Drained, journal empty, own keys unregistered."""
    freed: frozenset[NodeId] = frozenset()
    """Replayed, fenced, and their leases over."""
    activate: frozenset[NodeId] = frozenset()
    admit: tuple[tuple[JoinRequest, int], ...] = ()
    """With the incarnation each gets."""
    reassign: bool = False
    """A journal is assigned to nobody that is there."""

    def __bool__(self) -> bool:
        return bool(
            self.evict or self.left or self.freed or self.activate or self.admit or self.reassign
        )


def next_incarnation(view: View, slot: int, keys: Iterable[int], owner: Keys) -> int:
    """One that was never used in the slot. Raises `IncarnationsExhausted` instead of wrapping."""
    used = view.slots[slot].incarnation
    for key in keys:
        node = owner.owner(key)
        if node is not None and node.slot == slot:
            used = max(used, node.incarnation)
    if used >= MAX_INCARNATION:
        raise IncarnationsExhausted(f"slot {slot} has had {MAX_INCARNATION} incarnations")
    return used + 1


def joining_slot(request: JoinRequest, incarnation: int, before: ViewSlot) -> ViewSlot:
    """The entry of a newcomer."""
    return ViewSlot(
        incarnation=incarnation,
        state=SlotState.JOINING,
        fingerprint=request.fingerprint,
        node_name=request.node_name,
        flags=before.flags,
        machine_id=request.machine_id,
        boot_id=request.boot_id,
        addresses=request.addresses,
    )


def needs_replayer(view: View, replayers: Sequence[int]) -> bool:
    """Whether a journal waits for nobody, though somebody could replay it."""
    return bool(replayers) and any(
        not _can_replay(view.slots, view.slots[node.slot].replay_by) for node in view.to_replay
    )


def next_view(
    view: View, holder_key: int, changes: Changes, replayers: Sequence[int], wall_ns: int
) -> View:
    """``view`` with these changes. ``replayers``: slots fit to replay, the best first."""
    slots: dict[int, ViewSlot] = {}
    for node in changes.evict:
        entry = view.slots[node.slot]
        slots[node.slot] = replace(entry, state=SlotState.NEEDS_REPLAY, replay_by=NOBODY)
    for node in changes.left | changes.freed:
        entry = view.slots[node.slot]
        slots[node.slot] = replace(entry, state=SlotState.FREE, replay_by=NOBODY)
    for node in changes.activate:
        entry = view.slots[node.slot]
        slots[node.slot] = replace(
            entry, state=SlotState.ACTIVE, flags=entry.flags | ViewSlotFlag.JOURNAL_USED
        )
    for request, incarnation in changes.admit:
        slots[request.slot] = joining_slot(request, incarnation, view.slots[request.slot])
    after = view.next(holder_key, slots, wall_ns)
    return after.with_replayers(assign(after, replayers))


def assign(view: View, replayers: Sequence[int]) -> dict[int, int]:
    """Who replays which slot, where that changes: those with the fewest journals first."""
    load = dict.fromkeys((slot for slot in replayers if view.slots[slot].is_listed), 0)
    idle: list[int] = []
    for node in view.to_replay:
        by = view.slots[node.slot].replay_by
        if not _can_replay(view.slots, by):
            idle.append(node.slot)
        elif by in load:
            load[by] += 1
    assigned: dict[int, int] = {}
    for slot in idle:
        by = min(load, key=lambda candidate: load[candidate], default=NOBODY)
        if by != NOBODY:
            load[by] += 1
        assigned[slot] = by
    return assigned


def _can_replay(slots: Sequence[ViewSlot], by: int) -> bool:
    return by < len(slots) and slots[by].is_listed
