"""What people and the detector of deadlocks between masters see of byte-range locks."""

from __future__ import annotations

from dataclasses import dataclass

from lockmgr.messages import Resource
from lockmgr.ranges_messages import Owner, RangeHold, RangeLock


@dataclass(frozen=True, slots=True)
class RangeWait:
    """One request that waits, for people and for the detector of deadlocks between masters."""

    resource: Resource
    request: RangeLock
    waited_s: float
    behind: tuple[RangeHold, ...]
    """One hold of each owner in the way."""
    held_back_by: tuple[Owner, ...]
    """Owners of earlier requests that fairness lets go first; a `RangeVerdict` may end that."""

    def __str__(self) -> str:
        request = self.request
        wanted = RangeHold(request.owner, request.start_bytes, request.end_bytes, request.access)
        reasons = [f"behind {hold}" for hold in self.behind]
        reasons += [f"after {owner}, who came first" for owner in self.held_back_by]
        return f"{wanted} waits {self.waited_s:.1f} s " + ", ".join(reasons)


@dataclass(frozen=True, slots=True)
class RangeSnapshot:
    """The locks of one file."""

    resource: Resource
    holds: tuple[RangeHold, ...]
    waits: tuple[RangeWait, ...]

    def sentence(self) -> str:
        """One line for logs."""
        return (
            f"{self.resource.name!r}: held by "
            + ("; ".join(map(str, self.holds)) or "nobody")
            + ", awaited by "
            + ("; ".join(map(str, self.waits)) or "nobody")
        )
