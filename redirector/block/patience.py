"""How long the next session with a target waits for a sign of life.

A target that blocks for longer than a session waits, in each flush say, must not be left again and
again: what was lost is sent again, and blocks it again. So after a silent loss the next session
waits twice as long, until the target was quick for a while. REDIRECTION.md has the timeline; a
session that lives forgets by the same rule (redirector/native/silence.c).

invariant: ``least_s <= of_next(now) <= max(least_s, most_s)``
"""

from __future__ import annotations


class Patience:
    """Of all sessions with one target. Times are seconds of one monotonic clock."""

    def __init__(self, least_s: float, most_s: float, calm_s: float) -> None:
        self._least_s = least_s
        self._most_s = max(most_s, least_s)
        self._calm_s = calm_s
        self._grown_s = least_s
        self._lost_at: float | None = None

    def of_next(self, now: float) -> float:
        """How long a session that logs in now waits, in seconds."""
        if self._lost_at is None or now - self._lost_at > self._calm_s:
            return self._least_s
        return self._grown_s

    def lost(self, waited_s: float, now: float) -> None:
        """A session was lost after a silence of so long. Of two at once only one counts."""
        grown_s = min(2 * waited_s, self._most_s)
        self._grown_s = max(grown_s, self.of_next(now))
        self._lost_at = now
