"""Who is registered on a LUN, who holds the reservation, and which keys are stale. Pure.

A key is *stale* if its incarnation is no member, or if its owner's slot block names other sessions
by now. Some are for a moment, while a host changes its path, leaves or is evicted: the owner, or
whoever holds, removes them at once. One that stays was left by a fence that was cut short; who
has it can still write until the next holder fences it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from csvfs.format import SlotBlock, SlotState, View
from csvfs.host.validate_facts import (
    Facts,
    KeyState,
    KeyUse,
    Property,
    failed,
    not_tested,
    noted,
    passed,
    warned,
)
from csvfs.membership.decision import live_slots
from redirector.block.keys import PathKey, is_foreign, key_words

_AGAIN = "Run this again after 10 s"


def key_uses(facts: Facts) -> tuple[KeyUse, ...]:
    """Every registered key and the holder's, but for the own one, each once."""
    holder = facts.standing.holder_key
    keys = {*facts.standing.keys.keys, holder} - {0, facts.own_key}
    return tuple(_use(key, key == holder, facts.view, facts.slot_blocks) for key in sorted(keys))


def _use(key: int, holds: bool, view: View | None, blocks: Mapping[int, SlotBlock]) -> KeyUse:
    path = PathKey.parse(key)
    if view is not None and not view.members and key == view.holder_key:
        return KeyUse(key, KeyState.PARKED, holds)
    if path is None:
        foreign = is_foreign(key)
        return KeyUse(key, KeyState.FOREIGN if foreign else KeyState.NEWCOMER, holds)
    if view is None:
        return KeyUse(key, KeyState.UNKNOWN, holds)
    if not view.lists(path.slot, path.incarnation):
        return KeyUse(key, KeyState.STALE, holds, _last_owner(path, view))
    owner = view.slots[path.slot].node_name
    block = blocks.get(path.slot)
    if block is None or block.identity.incarnation != path.incarnation:
        return KeyUse(key, KeyState.MEMBER, holds, owner)
    for session in block.sessions:
        if session.key == key:
            return KeyUse(key, KeyState.MEMBER, holds, owner, session.kind.name.lower())
    return KeyUse(key, KeyState.STALE, holds, owner)


def _last_owner(path: PathKey, view: View) -> str:
    known = path.slot < len(view.slots) and view.slots[path.slot].incarnation == path.incarnation
    return view.slots[path.slot].node_name if known else ""


def judge_members(facts: Facts, keys: Sequence[KeyUse]) -> Iterator[Property]:
    """Reservation, registrations, members."""
    yield _reservation(facts, keys)
    yield from _strangers(keys)
    if facts.superblock is None:
        return
    view = facts.view
    if view is None:
        yield not_tested("members", "both copies of the view are damaged")
        return
    yield _stale(keys)
    yield _members(view, keys)
    yield from _journals(view)


# -- who holds -----------------------------------------------------------------------------------
def _reservation(facts: Facts, keys: Sequence[KeyUse]) -> Property:
    name = "reservation"
    strange = facts.standing.strange_reservation()
    holder = next((use for use in keys if use.holds), None)
    if strange or (holder is not None and holder.state is KeyState.FOREIGN):
        return failed(
            name,
            strange or f"held by {key_words(facts.standing.holder_key)}",
            "another system uses this LUN: together they destroy each other's data",
            "Find it and stop it there; then unmap the LUN from it",
        )
    if not facts.readable:
        return failed(
            name,
            "reads conflict although nobody holds a persistent reservation: a RESERVE(6) of a"
            " system of the old kind",
            "no host can use the volume while it lasts",
            "Find that system (backup software, a cluster of the old kind) and stop it there",
        )
    if facts.superblock is None:
        return _of_no_volume(name, facts, holder)
    view = facts.view
    if view is None:
        return not_tested(name, "both copies of the view are damaged: nobody knows who should hold")
    return _of_volume(name, view, holder)


def _of_no_volume(name: str, facts: Facts, holder: KeyUse | None) -> Property:
    if holder is None:
        return passed(name, "nobody holds it, and there is no volume")
    return warned(
        name,
        f"held by {key_words(facts.standing.holder_key)}, but there is no volume",
        "somebody formats the LUN just now, or died while doing so",
        f"{_AGAIN}; if it is the same then, `csvctl format --preempt-key` removes the key",
    )


def _of_volume(name: str, view: View, holder: KeyUse | None) -> Property:
    mounted = bool(live_slots(view))
    if holder is None and not mounted:
        return noted(
            name,
            "nobody holds it (the target has restarted since the last unmount): the next mount"
            " waits 5 s and takes it",
        )
    if holder is None:
        return failed(
            name,
            "nobody holds it, though the volume is mounted: the target forgot its reservations",
            "whoever can log in to the LUN may write meanwhile. Hosts that live take it again"
            " within seconds",
            f"{_AGAIN}; if nobody holds it then, no host of the volume is alive: mount it again"
            " on each",
        )
    if holder.state is KeyState.PARKED:
        return passed(name, "parked by the last host that left, for the next one")
    if holder.state is KeyState.MEMBER:
        return passed(name, f"held by {holder.owner}")
    return warned(
        name,
        f"held by {key_words(holder.key)}: {_state_words(holder)}",
        "a host is joining or taking over just now, or died while doing so",
        f"{_AGAIN}; if it is the same then, `csvctl mount` takes the reservation over",
    )


def _state_words(use: KeyUse) -> str:
    if use.state is KeyState.NEWCOMER:
        return "not yet a member"
    return f"a path that {use.owner} has given up" if use.owner else "of a host that is no member"


# -- who is registered -----------------------------------------------------------------------
def _strangers(keys: Sequence[KeyUse]) -> Iterator[Property]:
    foreign = [key_words(use.key) for use in keys if use.state is KeyState.FOREIGN]
    if foreign:
        yield failed(
            "foreign keys",
            f"registered: {', '.join(foreign)}",
            "another system uses this LUN and can write to it. csvfs does not mount the volume"
            " beside it",
            "Find it and stop it there. A key whose owner is gone for good: unregister it with"
            " sg_persist",
        )
    else:
        yield passed("foreign keys", "none")
    newcomers = [key_words(use.key) for use in keys if use.state is KeyState.NEWCOMER]
    if newcomers:
        yield noted(
            "newcomers",
            f"{', '.join(newcomers)}: a host that joins, or a tool such as this one. One that"
            " was killed leaves its key until the next mount or fence",
        )


def _stale(keys: Sequence[KeyUse]) -> Property:
    stale = [use for use in keys if use.state is KeyState.STALE]
    if not stale:
        return passed("stale keys", "none")
    words = ", ".join(
        f"{key_words(use.key)} of {use.owner or 'a host that is no member'}" for use in stale
    )
    return warned(
        "stale keys",
        words,
        "a path change or an eviction is under way; else who has such a key and lives could"
        " still write",
        f"{_AGAIN}; keys that stay are fenced by the next host that mounts the volume or takes"
        " the reservation over",
    )


def _members(view: View, keys: Sequence[KeyUse]) -> Property:
    live = live_slots(view)
    if not live:
        return passed("members", "none: the volume is mounted nowhere")
    with_path = {
        path.slot
        for use in keys
        if use.state is KeyState.MEMBER and (path := PathKey.parse(use.key)) is not None
    }
    names = ", ".join(f"{view.slots[slot].node_name} (slot {slot})" for slot in live)
    without = [view.slots[slot].node_name for slot in live if slot not in with_path]
    if not without:
        return passed("members", names)
    return warned(
        "members",
        f"{names}; without a registered path: {', '.join(without)}",
        "either that host has lost its way to the LUN and its virtual machines wait, or it died"
        " and still counts as a member",
        "Look at `csvctl status` there. If the host or its daemon is dead, mount the volume there"
        " again: its journal is replayed",
    )


def _journals(view: View) -> Iterator[Property]:
    waiting = [
        f"{slot.node_name or 'unknown'} (slot {number})"
        for number, slot in enumerate(view.slots)
        if slot.state is SlotState.NEEDS_REPLAY
    ]
    if waiting:
        yield warned(
            "journals",
            f"still to be replayed: {', '.join(waiting)}",
            "what these hosts did last is in their journals and not yet in place; nothing is lost",
            f"{_AGAIN}. A journal that stays is replayed by the next mount; if that fails, by"
            " `csvctl check --repair`",
        )
    else:
        yield passed("journals", "none is left to be replayed")
