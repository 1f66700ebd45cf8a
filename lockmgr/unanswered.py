"""Holders that do not answer: others wait for what they have, and they say nothing about it.

Theory. A master that has told a holder `Blocking` is owed an answer: a `Lower`, in the end. Until
then the holder says `Working`, three times within ``evict_after_s``, whatever it is that takes its
time: an owner that writes back to a slow LUN, a task that uses the lock for an hour. It does not
say so while it is *stalled*, which its shell tells: it waits for a path to the LUN, say, and cannot
tell for how long. A holder that has said nothing for ``evict_after_s`` is `Unresponsive`, and again
after as long; what becomes of it membership decides.

The judge judges itself, too: it may be the one who holds. Of others it says nothing while it is
stalled itself (perhaps the LUN is away for everybody), nor of the time in which it slept: it looks
once in a second, and begins afresh if it comes a second too late.

With another view both sides begin anew: after the thaw masters tell all holders again.

invariants (`check`):
- there is a time to look if and only if somebody was told, a time to speak if and only if this node
  was
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from lockmgr.claim import NodeLock
from lockmgr.events import Effect, Send, Unresponsive
from lockmgr.messages import Resource, Working
from lockmgr.modes import COMPATIBLE
from lockmgr.resource import MasteredResource

LOOK_S: Final = 1.0
SLEPT_S: Final = 1.0
SAY_IT_TIMES: Final = 3


class Unanswered:
    """Both sides of one node. ``evict_after_s`` None: nobody says anything."""

    def __init__(
        self, node: int, evict_after_s: float | None, master_of: Callable[[Resource], int]
    ) -> None:
        self.node = node
        self._evict_after_s = evict_after_s
        self._master_of = master_of
        self._stalled = False
        self._told: dict[tuple[int, bytes], float] = {}
        """As a master: whom this node has told of what, and since when it has heard nothing."""
        self._look_at: float | None = None
        self._wanted: dict[bytes, None] = {}
        """As a node: what others want of it."""
        self._say_at: float | None = None

    # -- what happens --------------------------------------------------------------------------
    def told(self, holder: int, resource: Resource, now: float) -> None:
        """This master tells a holder that others wait."""
        if self._evict_after_s is not None:
            self._told[holder, resource.name] = now
            if self._look_at is None:
                self._look_at = now + LOOK_S

    def heard(self, holder: int, resource: Resource, now: float) -> None:
        """The holder has said something about it."""
        if (holder, resource.name) in self._told:
            self._told[holder, resource.name] = now

    def wanted(self, resource: Resource, now: float) -> None:
        """This node is told that others wait for what it has."""
        if self._evict_after_s is not None:
            self._wanted[resource.name] = None
            if self._say_at is None:
                self._say_at = now + self._evict_after_s / SAY_IT_TIMES

    def stalled(self, stalled: bool, now: float) -> None:
        """This node makes no progress, and cannot tell for how long; or it does again, and says so
        at once."""
        if self._stalled and not stalled:
            self._begin_afresh(now)
            self._say_at = None if self._say_at is None else now
        self._stalled = stalled

    def view_changed(self, master_of: Callable[[Resource], int]) -> None:
        """Other masters, which tell everybody anew."""
        self._master_of = master_of
        self._told.clear()
        self._wanted.clear()
        self._look_at = self._say_at = None

    def _begin_afresh(self, now: float) -> None:
        for key in self._told:
            self._told[key] = now

    # -- time ----------------------------------------------------------------------------------
    def next_timer(self) -> float | None:
        """When `time_passed` is due; None: nothing is unanswered."""
        if self._look_at is None or self._say_at is None:
            return self._say_at if self._look_at is None else self._look_at
        return min(self._look_at, self._say_at)

    def time_passed(
        self,
        now: float,
        epoch: int,
        locks: dict[bytes, NodeLock],
        mastered: dict[bytes, MasteredResource],
    ) -> list[Effect]:
        """Say what is to be said, look at what is to be looked at."""
        out: list[Effect] = []
        if self._say_at is not None and now >= self._say_at:
            out += self._say(epoch, locks)
            assert self._evict_after_s is not None
            pause_s = self._evict_after_s / SAY_IT_TIMES
            self._say_at = now + pause_s if self._wanted else None
        if self._look_at is not None and now >= self._look_at:
            if now - self._look_at > SLEPT_S:
                self._begin_afresh(now)
            out += self._look(now, mastered)
            self._look_at = now + LOOK_S if self._told else None
        return out

    def _say(self, epoch: int, locks: dict[bytes, NodeLock]) -> list[Effect]:
        out: list[Effect] = []
        for name in list(self._wanted):
            lock = locks.get(name)
            if lock is None or lock.held is None or COMPATIBLE[lock.held][lock.wanted]:
                del self._wanted[name]
            elif not self._stalled:
                resource = lock.resource
                out.append(Send(self._master_of(resource), Working(resource, epoch, self.node)))
        return out

    def _look(self, now: float, mastered: dict[bytes, MasteredResource]) -> list[Effect]:
        assert self._evict_after_s is not None
        late: dict[int, bytes] = {}
        for (holder, name), since in list(self._told.items()):
            resource = mastered.get(name)
            if resource is None or not resource.waits_for(holder):
                del self._told[holder, name]
            elif now - since >= self._evict_after_s and (holder == self.node or not self._stalled):
                self._told[holder, name] = now
                late.setdefault(holder, name)
        return [
            Unresponsive(holder, name, mastered[name].granted[holder], self._evict_after_s)
            for holder, name in late.items()
        ]

    def check(self) -> None:
        """Assert the invariants."""
        assert (self._look_at is None) == (not self._told)
        assert (self._say_at is None) == (not self._wanted)
