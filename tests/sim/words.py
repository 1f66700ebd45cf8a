"""Events, effects and messages in words, short enough to be read by the thousand."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum

from lockmgr.claim import Claim
from lockmgr.cluster.view import NodeId, SlotState, View
from lockmgr.mastering import slot_and_incarnation
from lockmgr.messages import Resource
from redirector.block.keys import TAG, PathKey

_LIMIT = 320
_STATES = {SlotState.JOINING: "joins", SlotState.ACTIVE: "", SlotState.NEEDS_REPLAY: "dead"}
_LOCK_NODES = frozenset({"node", "members", "coordinator", "unreplayed", "nodes", "views", "asker"})
"""Fields in which the lock manager keeps its numbers of nodes."""


def in_words(what: object) -> str:
    """One line of it."""
    text = _words(what, "")
    return text if len(text) <= _LIMIT else text[:_LIMIT] + " ..."


def _words(what: object, name: str) -> str:
    match what:
        case View():
            return _view(what)
        case NodeId():
            return str(what)
        case Enum():
            return what.name
        case bytes():
            return f"{what[:12]!r}" if len(what) > 12 else repr(what)
        case Resource():
            return what.name.decode()
        case Claim():
            return f"{what.holder}: {what.resource.name.decode()} {what.mode.name}"
        case bool():
            return str(what)
        case int():
            return _number(what, name)
        case float():
            return f"{what:.4f}"
        case tuple() | frozenset() | list():
            return "[" + ", ".join(_words(item, name) for item in what) + "]"
    if is_dataclass(what):
        parts = [
            f"{field.name} {_words(value, field.name)}"
            for field in fields(what)
            if field.name not in ("op", "fingerprint", "machine_id", "boot_id", "certificate")
            and (value := getattr(what, field.name)) not in (None, (), frozenset())
        ]
        return f"{type(what).__name__}({', '.join(parts)})"
    return str(what)


def _number(value: int, name: str) -> str:
    if value >> 48 == TAG:
        path = PathKey.parse(value)
        if path is None:
            return f"newcomer-{value & 0xFFFF:04x}"
        return f"{path.slot}.{path.incarnation}/{path.generation}"
    if name in _LOCK_NODES:
        slot, incarnation = slot_and_incarnation(value)
        return f"{slot}.{incarnation}"
    return str(value)


def _view(view: View) -> str:
    slots = []
    for number, slot in enumerate(view.slots):
        if slot.state is not SlotState.FREE:
            words = f"{number}.{slot.incarnation}"
            state = _STATES[slot.state]
            if slot.state is SlotState.NEEDS_REPLAY:
                state += f" by {slot.replay_by}"
            slots.append(f"{words} {state}".strip())
    holder = _number(view.holder_key, "")
    return f"view {view.epoch} (locks {view.lock_epoch}, {holder} holds: {', '.join(slots)})"
