"""What the lock manager tells people: who holds what, who waits for it, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from lockmgr.modes import Mode


@dataclass(frozen=True, slots=True)
class ClaimSnapshot:
    """One task's claim. ``age_s``: since it was granted, or since it began to wait."""

    holder: str
    mode: Mode
    """The mode held, or for a new request the mode it waits for."""
    converting_to: Mode | None
    shared_here: bool
    age_s: float

    def __str__(self) -> str:
        mode = (
            f"{self.mode}" if self.converting_to is None else f"{self.mode}->{self.converting_to}"
        )
        shared = " shared" if self.shared_here else ""
        return f"{self.holder} {mode}{shared} {self.age_s:.1f} s"


@dataclass(frozen=True, slots=True)
class LockSnapshot:
    """This node's lock on one resource and the tasks that use or await it."""

    name: bytes
    placement: bytes
    held: Mode | None
    """What the master has granted this node; None: nothing yet."""
    asked: Mode | None
    """What this node has asked its master for, without an answer so far."""
    wanted: Mode
    """What other nodes wait for (NL: nothing)."""
    demoting_to: Mode | None
    age_s: float
    """Since the master's last grant; 0 if there was none."""
    holders: tuple[ClaimSnapshot, ...]
    waiters: tuple[ClaimSnapshot, ...]
    """Conversions first, each group in the order of arrival."""

    def sentence(self) -> str:
        """One line for error messages and logs."""
        parts = [
            f"the node holds {self.held}" if self.held is not None else "the node holds nothing"
        ]
        if self.asked is not None:
            parts.append(f"has asked for {self.asked}")
        if self.wanted is not Mode.NL:
            parts.append(f"other nodes want {self.wanted}")
        if self.demoting_to is not None:
            parts.append(f"is being lowered to {self.demoting_to}")
        parts.append("held by " + ("; ".join(map(str, self.holders)) or "no task"))
        parts.append("awaited by " + ("; ".join(map(str, self.waiters)) or "no task"))
        return f"{self.name!r}: " + ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters since the start, and gauges of this moment."""

    cached_grants: int
    """Claims granted at once under the mode the node had."""
    master_grants: int
    """Grants and conversions that a master was asked for."""
    blocking_notifications: int
    demotions: int
    """Modes given up, for others or for want of room."""
    demote_passes: int
    """Runs of an owner's `demote`; more than `demotions` where the lock was in use meanwhile."""
    shed: int
    """Demotions begun because the cache was full."""
    glimpses: int
    timeouts: int
    deadlocks: int
    """Claims of this node that were denied to break a cycle."""
    locks: int
    """Gauge: resources on which this node holds or awaits a lock."""
    idle: int
    """Gauge: of these, cached and used by no task."""
    mastered: int
    """Gauge: resources whose master this node is."""
