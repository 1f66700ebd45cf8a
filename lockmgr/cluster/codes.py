"""Every message there is, its code and its limits. Codes are never used again for something else.

1 to 15      the connection itself
16 to 63     locks: requests and grants, recovery, channels, deadlocks
64 to 95     byte ranges
96 to 127    membership
128 on       layers above, which register with a registry of their own making (`new_registry`)
"""

from __future__ import annotations

from typing import Final

from lockmgr import channel, glimpses
from lockmgr import messages as locks
from lockmgr import ranges_messages as ranges
from lockmgr import snapshot_messages as snapshots
from lockmgr.cluster import messages as members
from lockmgr.cluster.codec import Registry
from lockmgr.cluster.view import MAX_SLOTS
from lockmgr.cluster.wire import GOODBYE_CODE, HELLO_CODE, Goodbye, Hello

STATES: Final = 256
"""States in one `Reassert`."""
DEPARTED: Final = 1024
"""Departed incarnations in one message."""
WAITS: Final = 4096
"""Waits of one kind in one `Waits`."""

_SMALL: Final[dict[int, type]] = {
    HELLO_CODE: Hello,
    GOODBYE_CODE: Goodbye,
    16: locks.Request,
    17: locks.Cancel,
    18: locks.Lower,
    19: locks.AskGlimpse,
    20: locks.Granted,
    21: locks.Refused,
    22: locks.Blocking,
    23: locks.Unblocking,
    24: locks.Probe,
    26: locks.Working,
    40: channel.Resume,
    41: channel.Confirmed,
    42: channel.Skipped,
    48: locks.Suspicion,
    49: locks.AskWaits,
    52: snapshots.AskLocks,
    64: ranges.RangeLock,
    65: ranges.RangeLower,
    66: ranges.RangeForget,
    67: ranges.RangeTest,
    68: ranges.RangeCancel,
    70: ranges.RangeAnswer,
    71: ranges.RangeTested,
    72: ranges.RangeLost,
    80: ranges.RangeSuspicion,
    81: ranges.AskRangeWaits,
    83: ranges.RangeVerdict,
    97: members.TakeOver,
    98: members.YouHold,
    99: members.AskLease,
    100: members.LeaseGiven,
    101: members.Leave,
    102: members.Ready,
    103: members.ReplayDone,
    104: members.EvictAsked,
    105: members.DeathReported,
    106: members.JoinRefused,
    107: members.Thawed,
    108: members.FenceAsked,
    109: members.Fenced,
}
"""Those for which the usual limits do: 4 KiB, 64 items in an array."""


def new_registry() -> Registry:
    """All messages of this package."""
    registry = Registry()
    for code, kind in _SMALL.items():
        registry.register(kind, code)
    # A glimpse's answer is as long as the owner makes it.
    registry.register(locks.GlimpseAnswer, 25, limit_bytes=1 << 16)
    registry.register(locks.Glimpses, 27, limit_bytes=1 << 17, max_items=glimpses.PER_MESSAGE)
    registry.register(locks.Reassert, 32, limit_bytes=1 << 19, max_items=STATES)
    for code, kind in ((33, locks.Reasserted), (34, locks.Thaw), (35, locks.Settled)):
        registry.register(kind, code, limit_bytes=1 << 15, max_items=DEPARTED)
    registry.register(locks.Waits, 50, limit_bytes=1 << 20, max_items=WAITS)
    registry.register(locks.Victim, 51, limit_bytes=1 << 16)
    registry.register(snapshots.LocksPart, 53, limit_bytes=1 << 21, max_items=WAITS)
    registry.register(
        ranges.RangeReassert, 69, limit_bytes=1 << 16, max_items=ranges.HOLDS_PER_MESSAGE
    )
    registry.register(ranges.RangeWaits, 82, limit_bytes=1 << 20, max_items=ranges.EDGES_PER_WAIT)
    registry.register(members.Announce, 96, limit_bytes=1 << 17, max_items=MAX_SLOTS)
    return registry


REGISTRY: Final = new_registry()
