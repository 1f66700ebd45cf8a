"""What may be set in a node's lock manager, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What an administrator may want to change."""

    cache_limit: int = 20_000
    """Locks that are cached though no task uses them."""
    shed_at_once: int = 32
    """Demotions for want of room that run at the same time."""
    min_hold_s: float = 0.01
    """How long a granted lock stays with the node though others wait."""
    deadlock_after_s: float | None = 2.0
    """How long a claim waits before the cluster is searched for a deadlock; None: never."""
    evict_after_s: float | None = 6.0
    """A holder that is told that others wait, and has said nothing about it for so long, is
    reported; None: never."""


@dataclass(slots=True)
class Counters:
    """See `lockmgr.snapshot.Statistics`."""

    cached_grants: int = 0
    master_grants: int = 0
    blocking_notifications: int = 0
    demotions: int = 0
    demote_passes: int = 0
    shed: int = 0
    glimpses: int = 0
    timeouts: int = 0
    deadlocks: int = 0
