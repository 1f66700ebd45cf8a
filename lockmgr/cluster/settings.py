"""The times of membership, in seconds of the node's own clock, and why they fit together.

    sending of a renewal                                      0
    the lease of who sent it ends              lease_s        4
    what it held may be granted                lease_over_s   5 (+ drift), after its last change
    it is evicted                              evict_after_s  6 (after its last sign of life)

invariants (`__post_init__`):
- a lease ends before anybody grants what it protects, whatever two clocks drift within that time;
- a lease that a coordinator gives ends, counted from its own last write, within the bound that a
  successor assumes: ``answer_within_s`` later than that write;
- a judge that is awake is heard more often than a gap is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What an administrator may want to change is ``evict_after_s``; tests change the rest."""

    heartbeat_s: float = 0.5
    """How often a node shows life, and looks at the others."""
    hears_s: float = 1.5
    """A node says that it hears another if a heartbeat of it came within this time."""
    lease_s: float = 4.0
    """How long after the *sending* of a confirmed renewal caches may be used."""
    answer_within_s: float = 1.0
    """A coordinator renews leases only so long after the sending of a confirmed write of its own
    on the reserving session."""
    lease_over_s: float = 5.0
    """How long after the last sign of a renewal a lease surely is over, drift aside."""
    drift: float = 0.001
    """How much faster one clock may run than another."""
    evict_after_s: float = 6.0
    """Who is not mutually connected for so long does not stay; and how long a loser backs off."""
    judge_gap_s: float = 1.0
    """Who was not awake for so long has observed nothing, and starts afresh."""
    path_loss_s: float = 2.0
    """An answer that takes longer is none: a block read that old counts as failed."""
    silence_s: float = 5.0
    """A newcomer succeeds when nothing has changed for so long."""
    restart_grace_s: float = 5.0
    """After a restart of the target: how long the coordinator that the view names goes first."""
    claimed_dead_s: float = 2.0
    """A newcomer says that it replaces a dead incarnation of its own host: how long that one must
    be silent, after the request was seen, to be believed dead."""
    reopen_s: float = 1.0
    """How often a lost path is tried again."""
    reconnect_s: float = 2.0
    """How long a node whose connection was lost counts as heard without one."""
    leave_within_s: float = 15.0
    """Who cannot leave within this time stops all the same, and is evicted."""
    hurry_s: float = 0.05
    """How often instead of ``heartbeat_s`` while somebody joins,"""
    hurry_for_s: float = 1.0
    """for so long after it was first seen; and how often a newcomer asks and looks."""
    join_renewals: int = 1
    """How often a newcomer's request must have changed before it is believed to be alive."""

    def __post_init__(self) -> None:
        if not self.lease_s * (1 + self.drift) < self.lease_over_s:
            raise ValueError("a lease must be over before what it protects is granted")
        if not self.heartbeat_s < min(self.judge_gap_s, self.answer_within_s, self.hears_s):
            raise ValueError("heartbeats must come more often than gaps are noticed")
        if not self.spread_s < self.evict_after_s:
            raise ValueError("evict_after_s must be longer than a few heartbeats")
        if not self.path_loss_s < self.evict_after_s:
            raise ValueError("a path must be lost before its node is judged")

    @property
    def spread_s(self) -> float:
        """How much later than to the first one a cut may show to the last observer."""
        return self.hears_s + 2 * self.heartbeat_s

    @property
    def lease_over_bound_s(self) -> float:
        """`lease_over_s` as the slowest clock's lease may seem to the fastest."""
        return self.lease_over_s * (1 + self.drift)
