"""What a long run must have reached: every event, effect, message and outcome that there is.

The lists are those of the cores themselves, so what is added there must be reached here too, or be
excused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, get_args

from lockmgr import events as lock_events
from lockmgr import messages as lock_messages
from lockmgr import ranges_events
from lockmgr.cluster import effects, messages
from tests.sim.faults import STEPS

SLOT_CHANGES: Final = (
    "FREE -> JOINING",
    "JOINING -> ACTIVE",
    "JOINING -> NEEDS_REPLAY",
    "ACTIVE -> FREE",
    "ACTIVE -> NEEDS_REPLAY",
    "NEEDS_REPLAY -> FREE",
)

_RANGES: Final = tuple(
    each.__name__
    for each in (
        *get_args(ranges_events.RangeEvent),
        ranges_events.RangeDone,
        ranges_events.RangeFound,
    )
)

EXCUSED: Final[dict[str, str]] = {
    "DropNewcomer -> Unknown": "what it cannot unregister it leaves behind, which is Good",
    "Knock -> Unknown": "it uses no session",
    "send JoinRefused": "no two hosts of a seed have one name",
    "stop: refused": "a seed has a slot for every host",
    "stop: cannot go on": "no counter wraps in a minute",
    "locks: Convert": "the toy filesystem converts nothing",
    **{
        f"locks: {name}": "the toy filesystem has no listings"
        for name in ("GlimpseAll", "AnsweredAll", "deliver Glimpses")
    },
    **{f"locks: {name}": "the toy filesystem locks no byte ranges" for name in _RANGES},
    **{
        f"locks: {each.__name__}": "nobody asks to see all locks"
        for each in (lock_events.GatherLocks, lock_events.StopGathering, lock_events.Gathered)
    },
}

RARE: Final = frozenset(
    (
        "Fence -> Unknown",
        "Reserve -> Lost",
        "Take -> Unknown",
        "Unregister -> Unknown",
        "WriteJoin -> Unknown",
        "WriteView -> Unknown",
    )
)
"""Comes about ten times in 300 seeds, or less: an answer is lost in just that millisecond."""


def _expected() -> Iterator[str]:
    for effect in get_args(effects.Effect):
        if effect is not effects.SendTo:
            yield effect.__name__
    for effect in get_args(effects.AnyIo):
        contest = effect in (effects.Take, effects.Reserve)
        yield from (f"{effect.__name__} -> {end}" for end in ("Won", "Lost") if contest)
        if not contest:
            yield f"{effect.__name__} -> Good"
        if effect is not effects.Reserve:
            yield f"{effect.__name__} -> Unknown"
    yield from (f"send {message.__name__}" for message in get_args(messages.Message))
    yield from (f"slot: {change}" for change in SLOT_CHANGES)
    yield from (f"stop: {reason.value}" for reason in effects.StopReason)
    for event in get_args(lock_events.Event):
        if event is not lock_events.Deliver:
            yield f"locks: {event.__name__}"
    for effect in get_args(lock_events.Effect):
        if effect is not lock_events.Send:
            yield f"locks: {effect.__name__}"
    yield "locks: Deny for a deadlock"
    yield from (f"locks: deliver {each.__name__}" for each in get_args(lock_messages.AnyMessage))
    yield from (f"struck at {step}" for step in STEPS)


EXPECTED: Final = frozenset(_expected()) - EXCUSED.keys()
