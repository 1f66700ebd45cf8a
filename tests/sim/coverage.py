"""What a run has reached: transitions, outcomes, and pairs of faults."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lockmgr.cluster import effects
from lockmgr.cluster.outcomes import Good


class Coverage:
    """Counts. `merge` sums up those of many seeds."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.pairs: Counter[str] = Counter()

    def effect(self, effect: effects.Effect) -> None:
        """A member wants something done."""
        name = type(effect).__name__
        if isinstance(effect, effects.SendTo):
            name = f"send {type(effect.message).__name__}"
        self.reached[name] += 1

    def outcome(self, effect: effects.AnyIo, outcome: Any) -> None:
        """An I/O has ended."""
        what = type(outcome).__name__
        if isinstance(outcome, Good) and type(outcome.value).__name__ in _CONTESTS:
            what = type(outcome.value).__name__
        self.reached[f"{type(effect).__name__} -> {what}"] += 1

    def lock_event(self, event: Any) -> None:
        """Something reached a lock core."""
        name = type(event).__name__
        if name == "Deliver":
            name = f"deliver {type(event.message).__name__}"
        self.reached[f"locks: {name}"] += 1

    def lock_effect(self, effect: Any) -> None:
        """A lock core wants something done."""
        name = type(effect).__name__
        if name == "Deny":
            name = "Deny for a deadlock" if effect.deadlock else "Deny"
        if name != "Send":
            self.reached[f"locks: {name}"] += 1

    def stop(self, effect: effects.Stop) -> None:
        """A daemon has ended by itself."""
        self.reached[f"stop: {effect.reason.value}"] += 1

    def state(self, before: str, after: str, count: int) -> None:
        """Views have moved slots between states."""
        self.reached[f"slot: {before} -> {after}"] += count

    def fault(self, kind: str) -> None:
        """A fault was injected."""
        self.reached[f"fault: {kind}"] += 1

    def pair(self, one: str, other: str) -> None:
        """Two faults stood at one time, or followed each other closely."""
        first, second = sorted((one, other))
        self.pairs[f"{first} + {second}"] += 1

    def merge(self, other: Coverage) -> None:
        """Add what another seed has reached."""
        self.reached.update(other.reached)
        self.pairs.update(other.pairs)


_CONTESTS = ("Won", "Lost", "NobodyHolds")
