"""What departed nodes have left behind: journals not replayed, leases not over, masters lost.

A departed node *owes* until two things are said of it: its journal is replayed (`unreplayed` no
longer has it), and it may be granted over, because its lease has run out or its death is proven
(`uncleared` no longer has it). Until then a resource that it may have had is guarded:

    it may have had     journal not replayed            lease not over
    CW, PW, EX          nothing new is granted          nothing incompatible with that mode
    CR, PR              -                               nothing incompatible with that mode

Who had a resource is known by its master. Where the master departed too, everything that the
others' re-asserted modes leave room for is possible (`possible`): so one PR that was re-asserted
proves that nobody wrote, and one EX that nobody had anything. A resource that nobody re-asserted
may have been held in EX; such are not known by name, a `Loss` stands for all of them.

invariants (`check`):
- a loss names somebody who still owes
"""

from __future__ import annotations

from collections.abc import Iterable

from lockmgr.mastering import Choose, Mastering, rendezvous
from lockmgr.messages import Loss, Resource
from lockmgr.modes import COMPATIBLE, JOIN, WRITES, Mode, yielded


def possible(reasserted: Iterable[Mode]) -> Mode:
    """The strongest mode that a node may have had beside others that held ``reasserted``."""
    together = Mode.NL
    for mode in reasserted:
        together = JOIN[together][mode]
    return yielded(Mode.EX, together)


class Debts:
    """Who owes, and what was lost with masters."""

    __slots__ = ("_choose", "_losses", "uncleared", "unreplayed")

    def __init__(self, choose: Choose = rendezvous) -> None:
        self.unreplayed: frozenset[int] = frozenset()
        self.uncleared: frozenset[int] = frozenset()
        self._choose = choose
        self._losses: dict[tuple[tuple[int, ...], frozenset[int]], tuple[Loss, Mastering]] = {}

    @property
    def owing(self) -> frozenset[int]:
        """Departed nodes of which something is still to be said."""
        return self.unreplayed | self.uncleared

    @property
    def losses(self) -> tuple[Loss, ...]:
        """What is lost, in so far as somebody still owes."""
        return tuple(loss for loss, _ in self._losses.values())

    def lose(self, loss: Loss) -> None:
        """Take in that masters departed with what they knew."""
        owed = loss.owed & self.owing
        if not owed:
            return
        key = (loss.members, loss.gone)
        known = self._losses.get(key)
        mastering = Mastering(loss.members, self._choose) if known is None else known[1]
        if known is not None:
            owed |= known[0].owed
        self._losses[key] = (Loss(loss.members, loss.gone, owed), mastering)

    def settle(self, unreplayed: frozenset[int], uncleared: frozenset[int]) -> bool:
        """Take in who owes from now on. True: somebody no longer does all of what it did."""
        fewer = bool(self.unreplayed - unreplayed) or bool(self.uncleared - uncleared)
        self.unreplayed = unreplayed
        self.uncleared = uncleared
        self._losses = {
            key: (Loss(loss.members, loss.gone, loss.owed & self.owing), mastering)
            for key, (loss, mastering) in self._losses.items()
            if loss.owed & self.owing
        }
        return fewer

    def let(self, mode: Mode, owed: dict[int, Mode]) -> bool:
        """May ``mode`` be granted over what is ``owed``?"""
        for node, had in owed.items():
            if WRITES[had] and node in self.unreplayed and mode is not Mode.NL:
                return False
            if node in self.uncleared and not COMPATIBLE[had][mode]:
                return False
        return True

    def unsettled(self, owed: dict[int, Mode]) -> dict[int, Mode]:
        """What of ``owed`` still guards something."""
        if not owed:
            return owed
        return {
            node: had
            for node, had in owed.items()
            if (WRITES[had] and node in self.unreplayed)
            or (had is not Mode.NL and node in self.uncleared)
        }

    def of_unknown(self, resource: Resource, had: Mode = Mode.EX) -> dict[int, Mode]:
        """What is owed on a resource of which no master has told: up to ``had`` by each."""
        if not self._losses:
            return {}
        owed: dict[int, Mode] = {}
        for loss, mastering in self._losses.values():
            if mastering.master_of(resource) in loss.gone:
                owed.update(dict.fromkeys(loss.owed, had))
        return self.unsettled(owed)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        assert all(loss.owed & self.owing for loss in self.losses)
