"""Recovery: from one view to the next, in five phases.

    1 freeze      this master grants nothing more, answers nothing; what nodes ask it is kept
    2 purge       departed nodes hold and await nothing; what they may owe is noted
    3 re-assert   every node tells the new masters what it holds and awaits, every master of an
                  earlier epoch what only it knows; each ends with a last message to each member
    4 barrier     who has heard the last of all has rebuilt what it masters, and tells the
                  coordinator; which waits for all
    5 thaw        the coordinator says so: masters grant, and take up what they have kept

Nodes need not freeze: they go on with what they hold, and what they ask for or lower goes to the
new masters behind their re-assertions. Messages of an earlier epoch change nothing, and nothing is
sent again: what they said is in the re-assertions.

A further view restarts at 1 with what every survivor has. For that, and because a member may have
thawed that nobody can ask any more:
- a node's own locks are always what it re-asserts, in whatever phase
- a master keeps what it mastered when it last thawed, and what it has rebuilt since (`_kept`),
  until it thaws anew: each of these may have been the last that granted
- each node keeps the members of its last thawed view and of all since (`_views`). Whatever may
  have been mastered by somebody who is gone, in one of these views of *any* survivor, is orphaned.
  A newcomer does not know the views before its first, and says so (`NO_MEMBERS`, where nobody
  mastered everything); if all survivors are such, everything is orphaned

invariants (`check`):
- no master grants between its freeze and its thaw
- thawed: nothing is kept, and ``_views`` is this view alone
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Final

from lockmgr.debts import Debts
from lockmgr.events import Effect, Send, Thawed, ViewChanged
from lockmgr.mastering import NOBODY, Choose, Mastering
from lockmgr.messages import (
    AnyMessage,
    HeldState,
    Loss,
    MasterBound,
    MasterState,
    NodeBound,
    Reassert,
    Reasserted,
    Recovering,
    Settled,
    Thaw,
)
from lockmgr.modes import JOIN, WRITES_VALUE, Mode
from lockmgr.node import NodeLocks
from lockmgr.rebuild import Said, rebuild
from lockmgr.resource import Master, MasteredResource

NO_MEMBERS: Final = ()
STATES_PER_MESSAGE: Final = 256


class Stage(Enum):
    """How far this member is."""

    NO_VIEW = "no view lists this node: everything waits"
    REASSERTING = "frozen; not every member's last re-assertion is here"
    BARRIER = "frozen; rebuilt, and said so"
    THAWED = "grants"


class Recovery:
    """The recovery of one member, and the coordinator's part of it.

    A member alone (``members`` has only it) begins thawed; all others wait for a `ViewChanged`.
    """

    def __init__(
        self, node: int, epoch: int, members: tuple[int, ...], choose: Choose, locks: NodeLocks
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.members = members
        self.coordinator = min(members, default=node)
        self.debts = Debts(choose)
        self.locks = locks
        self.master = Master(epoch, self.debts)
        self.mastering = Mastering(members, choose)
        self.stage = Stage.THAWED if node in members else Stage.NO_VIEW
        self.granted_in: tuple[tuple[int, ...], ...] = ()
        """Members of the views that may have granted last before the present one; set with the
        barrier."""
        self._choose = choose
        self._views: list[tuple[int, ...]] = [members]
        self._kept: list[dict[bytes, MasteredResource]] = []
        self._said: dict[bytes, Said] = {}
        self._heard: list[Reassert] = []
        """The last messages of this epoch, one for each member so far."""
        self._waiting: list[MasterBound] = []
        """What nodes have asked this master since it froze."""
        self._barrier: set[int] = set()
        self._passed = False
        """As coordinator: all have been told to thaw."""
        self._cleared: frozenset[int] = frozenset()
        self._replayed: frozenset[int] = frozenset()
        self._out: list[Effect] = []
        locks.frozen = self.frozen

    @property
    def frozen(self) -> bool:
        """Masters grant nothing."""
        return self.stage is not Stage.THAWED

    # -- what happens ----------------------------------------------------------------------
    def view_changed(self, view: ViewChanged, now: float) -> list[Effect]:
        """Begin, or begin anew; or, in the same epoch, go on under another coordinator."""
        if view.epoch < self.epoch:
            return []
        successor = view.coordinator != self.coordinator
        self.coordinator = view.coordinator
        if view.epoch == self.epoch:
            self._settle(view.unreplayed)
            if successor:
                self._passed = False
                self._tell_coordinator()
            return self._taken()
        self._freeze(view)
        self._purge(view.unreplayed)
        if self.node in self.members:
            self._reassert(now)
        return self._taken()

    def receive(self, message: Recovering) -> list[Effect]:
        """A message of this epoch."""
        match message:
            case Reassert():
                self._hear(message)
            case Reasserted(node=node, cleared=cleared, replayed=replayed):
                self._barrier.add(node)
                self._learn(cleared, replayed)
                self._pass_barrier()
            case Thaw(cleared=cleared, replayed=replayed):
                self._learn(cleared, replayed)
                self._thaw()
            case Settled(cleared=cleared, replayed=replayed):
                self._learn(cleared, replayed)
        return self._taken()

    def told(self, cleared: frozenset[int], replayed: frozenset[int]) -> list[Effect]:
        """Membership says that these departed owe no more of that kind; the coordinator passes it
        on."""
        self._learn(cleared, replayed)
        if self.coordinator == self.node:
            for member in self.members:
                if member != self.node:
                    self._send(member, Settled(self.epoch, member, cleared, replayed))
        return self._taken()

    def keep(self, message: MasterBound) -> None:
        """A node's message to this master while it is frozen: its turn comes with the thaw."""
        self._waiting.append(message)

    # -- 1 freeze --------------------------------------------------------------------------
    def _freeze(self, view: ViewChanged) -> None:
        if self.stage in (Stage.BARRIER, Stage.THAWED):
            self._kept.append(self.master.resources)
        self.epoch = view.epoch
        self.members = view.members
        self.stage = Stage.REASSERTING if self.node in view.members else Stage.NO_VIEW
        self.mastering = Mastering(view.members, self._choose)
        self.master.epoch = view.epoch
        self.master.resources = {}
        self._views.append(view.members)
        self._said.clear()
        self._heard.clear()
        self._waiting.clear()
        self._barrier.clear()
        self._passed = False

    # -- 2 purge ---------------------------------------------------------------------------
    def _purge(self, unreplayed: frozenset[int]) -> None:
        """What departed nodes awaited is not rebuilt; what they held, they owe (`_known`)."""
        self._cleared &= unreplayed
        self._replayed &= unreplayed
        self._settle(unreplayed)

    def _known(self, mastered: MasteredResource) -> MasterState | None:
        """What only this master knows of a resource that it has granted; None: nothing."""
        writer: int | None = None
        owed = dict(mastered.owed)
        for node, mode in mastered.granted.items():
            if WRITES_VALUE[mode]:
                writer = node
            if node not in self.members:
                owed[node] = JOIN[owed.get(node, Mode.NL)][mode]
        owed = self.debts.unsettled(owed)
        if not owed and writer is None and not mastered.value.sequence:
            return None
        return MasterState(mastered.resource, mastered.value, writer, tuple(owed.items()))

    # -- 3 re-assert -----------------------------------------------------------------------
    def _reassert(self, now: float) -> None:
        held: dict[int, list[HeldState]] = {member: [] for member in self.members}
        mastered: dict[int, list[MasterState]] = {member: [] for member in self.members}
        for state in self.locks.enter(self.epoch, self.mastering.master_of, now):
            held[self.mastering.master_of(state.resource)].append(state)
        for resources in self._kept:
            for resource in resources.values():
                if (known := self._known(resource)) is not None:
                    mastered[self.mastering.master_of(known.resource)].append(known)
        views = tuple(dict.fromkeys(self._views))
        for member in self.members:
            for some, more in _portions(held[member], mastered[member]):
                self._send(member, Reassert(self.epoch, self.node, some, more))
            last = Reassert(self.epoch, self.node, last=True, views=views, losses=self.debts.losses)
            self._send(member, last)
        self._out += self.locks.resume(now)

    def _hear(self, message: Reassert) -> None:
        for state in message.held:
            self._about(state).nodes[message.node] = state
        for known in message.mastered:
            self._about(known).masters.append(known)
        if message.last:
            self._heard.append(message)
            if len(self._heard) == len(self.members):
                self._rebuild()

    def _about(self, state: HeldState | MasterState) -> Said:
        about = self._said.get(state.resource.name)
        if about is None:
            about = self._said[state.resource.name] = Said(state.resource)
        return about

    # -- 4 barrier -------------------------------------------------------------------------
    def _rebuild(self) -> None:
        broken: list[tuple[Mastering, frozenset[int]]] = []
        self.granted_in = self._views_that_granted()
        for view in self.granted_in:
            if gone := frozenset(view or (NOBODY,)).difference(self.members):
                broken.append((Mastering(view, self._choose), gone))
                self.debts.lose(Loss(view, gone, self.debts.owing))
        for last in self._heard:
            for loss in last.losses:
                self.debts.lose(loss)
        orphaned = {
            name
            for mastering, gone in broken
            for name, about in self._said.items()
            if mastering.master_of(about.resource) in gone
        }
        rebuilt = rebuild(self._said.values(), orphaned, self.debts, self.epoch)
        self.master.resources = rebuilt.resources
        self._waiting[:0] = rebuilt.requests
        self._said.clear()
        self.stage = Stage.BARRIER
        self._tell_coordinator()

    def _views_that_granted(self) -> tuple[tuple[int, ...], ...]:
        """Those that may have been thawed last. Whoever has thawed once knows of each since."""
        views = {view for last in self._heard for view in last.views}
        if any(NO_MEMBERS not in last.views for last in self._heard):
            views.discard(NO_MEMBERS)
        return tuple(sorted(views))

    def _tell_coordinator(self) -> None:
        if self.stage in (Stage.BARRIER, Stage.THAWED):
            self._send(
                self.coordinator, Reasserted(self.epoch, self.node, self._cleared, self._replayed)
            )

    def _pass_barrier(self) -> None:
        here = self.coordinator == self.node and not self._passed
        if here and self._barrier.issuperset(self.members):
            self._passed = True
            for member in self.members:
                self._send(member, Thaw(self.epoch, member, self._cleared, self._replayed))

    # -- 5 thaw ----------------------------------------------------------------------------
    def _thaw(self) -> None:
        if self.stage is not Stage.BARRIER:
            return
        self.stage = Stage.THAWED
        self._kept.clear()
        self._views = [self.members]
        self.locks.frozen = False
        self._answer(self.master.resume())
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._answer(self.master.step(message))
        self._out.append(Thawed(self.epoch))

    # -- debts -----------------------------------------------------------------------------
    def _learn(self, cleared: frozenset[int], replayed: frozenset[int]) -> None:
        self._cleared |= cleared
        self._replayed |= replayed
        self._settle(self.debts.owing)

    def _settle(self, listed: frozenset[int]) -> None:
        """``listed``: departed nodes that may still owe something."""
        fewer = self.debts.settle(listed - self._replayed, listed - self._cleared)
        if fewer and not self.frozen:
            self._answer(self.master.resume())

    # -- sending ---------------------------------------------------------------------------
    def _answer(self, messages: list[NodeBound]) -> None:
        self._out += [Send(message.node, message) for message in messages]

    def _send(self, to: int, message: AnyMessage) -> None:
        self._out.append(Send(to, message))

    def _taken(self) -> list[Effect]:
        out, self._out = self._out, []
        return out

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        self.debts.check()
        assert self.locks.frozen == self.frozen
        if not self.frozen:
            assert not self._kept and not self._waiting and self._views == [self.members]


def _portions(
    held: list[HeldState], mastered: list[MasterState]
) -> Iterator[tuple[tuple[HeldState, ...], tuple[MasterState, ...]]]:
    for start in range(0, max(len(held), len(mastered)), STATES_PER_MESSAGE):
        end = start + STATES_PER_MESSAGE
        yield tuple(held[start:end]), tuple(mastered[start:end])
