"""A cluster whose view changes: nodes die at any step, others learn of it in their own time.

Beside what `tests.unit.lockmgr_cluster` asserts, after every step:
- whatever a node gains in a view without a departed one, that one is not in its way: its journal
  is replayed if it held a writing mode, and it is cleared if the modes are incompatible
- a node that was evicted and does not know it (a zombie) holds nothing incompatible with what the
  others hold, until it is cleared
- a value block that is read is the last one written, or not valid; never an older one
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lockmgr.claim import Claim
from lockmgr.core import LockCore
from lockmgr.events import (
    Cleared,
    Demote,
    Effect,
    EpochRefused,
    JournalsReplayed,
    Thawed,
    ViewChanged,
)
from lockmgr.mastering import Choose
from lockmgr.messages import Resource
from lockmgr.modes import COMPATIBLE, COVERS, WRITES, Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_cluster import Cluster, by_first_byte


@dataclass
class Dead:
    """A node that died: what it held then, and in which epoch the others go on without it."""

    node: int
    held: dict[Resource, Mode]
    gone_in: int | None = None
    replayed: bool = False
    cleared: bool = False


@dataclass
class Gains:
    """What each node held when it was looked at last."""

    held: dict[tuple[int, Resource], Mode] = field(default_factory=dict)


class ChangingCluster(Cluster):
    """Adds `kill`, `evict`, `change_view`, `install`, `replay`, `clear` and `join`."""

    def __init__(
        self,
        nodes: int,
        settings: Settings | None = None,
        choose: Choose = by_first_byte,
    ) -> None:
        super().__init__(nodes, settings, choose)
        self.members = list(range(nodes))
        """Of the newest view, wherever it is known so far."""
        self.epoch = 3
        self.coordinator = 0
        self.dead: dict[int, Dead] = {}
        self.zombies: set[int] = set()
        """Not in the newest view, and still running on their leases."""
        self.views: dict[int, deque[ViewChanged]] = {node: deque() for node in range(nodes)}
        """Views that a node has yet to learn of; it may skip all but the last."""
        self.thawed: dict[int, int] = dict.fromkeys(range(nodes), 3)
        self.refused = 0
        self.changed = False
        self._gains = Gains()

    # -- what befalls the cluster ------------------------------------------------------------
    def kill(self, node: int, keep: int = 0) -> None:
        """``node`` is dead. Of what it had sent, ``keep`` messages of each channel arrive."""
        if node not in self.zombies:
            self.dead[node] = self._as_dead(node)
        self.alive.remove(node)
        self.zombies.discard(node)
        self.changed = True
        for (source, to), channel in self.channels.items():
            if to == node:
                channel.clear()
            while source == node and len(channel) > keep:
                channel.pop()
        for claims in (self.held, self.waiting):
            for claim in [claim for claim, where in claims.items() if where == node]:
                del claims[claim]
        for place in [place for place in self.demoting if place[0] == node]:
            del self.demoting[place]
            self.draining.discard(place)
            self._closed.discard(place)
        self.answering = [(where, answer) for where, answer in self.answering if where != node]
        for ticket, asker in list(self.asked_glimpses.items()):
            if asker == node:
                self.glimpsed.setdefault(ticket, None)
        for used in [used for used in self._last_use if used[0] == node]:
            del self._last_use[used]
        self.views[node].clear()

    def _as_dead(self, node: int) -> Dead:
        locks = self.cores[node].locks.locks.values()
        return Dead(node, {lock.resource: lock.held for lock in locks if lock.held is not None})

    def evict(self, node: int) -> None:
        """``node`` is fenced, but goes on until it is cleared. Only its owners do not: they cannot
        write back what they had changed.
        """
        self.dead[node] = self._as_dead(node)
        self.zombies.add(node)
        self.views[node].clear()
        for place in self.demoting:
            if self._cannot_write_back(*place):
                self.draining.add(place)

    def _cannot_write_back(self, node: int, resource: Resource) -> bool:
        return node in self.zombies and WRITES[self.dead[node].held.get(resource, Mode.NL)]

    def demoted(self, node: int, resource: Resource) -> None:
        if self._cannot_write_back(node, resource):
            self.draining.add((node, resource))
        else:
            super().demoted(node, resource)

    @property
    def present(self) -> set[int]:
        """Those that are, or are to be, in the view."""
        return self.alive - self.zombies

    def change_view(self) -> ViewChanged:
        """Membership agrees on a view of those present; everybody has yet to learn of it."""
        self.members = sorted(self.present)
        self.epoch += 1
        self.coordinator = min(self.present)
        self.changed = True
        for dead in self.dead.values():
            if dead.gone_in is None:
                dead.gone_in = self.epoch
        view = ViewChanged(self.epoch, tuple(self.members), self.coordinator, self.unreplayed)
        for node in self.members:
            self.views[node].append(view)
        return view

    def hand_over(self, coordinator: int) -> None:
        """Another coordinator, in the same lock epoch."""
        self.coordinator = coordinator
        view = ViewChanged(self.epoch, tuple(self.members), coordinator, self.unreplayed)
        for node in set(self.members) & self.present:
            self.views[node].append(view)

    @property
    def unreplayed(self) -> frozenset[int]:
        """Departed nodes that the view lists as to be replayed."""
        return frozenset(
            dead.node
            for dead in self.dead.values()
            if dead.gone_in is not None and not (dead.replayed and dead.cleared)
        )

    def install(self, node: int, skip: bool = False) -> None:
        """``node`` learns of the next view, or of the newest at once."""
        view = self.views[node].pop() if skip else self.views[node].popleft()
        if skip:
            self.views[node].clear()
        self.step(node, view)

    def replay(self, node: int) -> None:
        """The journal of the departed ``node`` is replayed; the coordinator is told."""
        self.dead[node].replayed = True
        self.step(self.coordinator, JournalsReplayed(frozenset({node})))

    def clear(self, node: int) -> None:
        """The lease of the departed ``node`` is over; the coordinator is told."""
        self.dead[node].cleared = True
        if node in self.zombies:
            self.kill(node)
        self.step(self.coordinator, Cleared(frozenset({node})))

    def retell(self) -> None:
        """A coordinator that was not told tells everybody by its next view of the same members."""
        for node in sorted(self.present):
            core = self.cores[node]
            if core.epoch == self.epoch:
                self.step(
                    node,
                    ViewChanged(self.epoch, core.members, self.coordinator, self.unreplayed),
                )

    def may_join(self, with_debts: bool = False) -> bool:
        """Newcomers wait for the thaw, and until every departed journal is replayed; but nothing
        is to go wrong if membership should let them in earlier."""
        coordinator = self.cores[self.coordinator]
        all_thawed = (
            coordinator.epoch == self.epoch
            and not coordinator.recovery.frozen
            and self.present == set(self.members)
        )
        return all_thawed and (with_debts or not self.unreplayed)

    def join(self) -> int:
        """A newcomer is in the next view."""
        node = len(self.cores)
        self.cores.append(LockCore(node, 0, self.settings, (), self.choose))
        self.alive.add(node)
        self.views[node] = deque()
        self.thawed[node] = 0
        self.changed = True
        self.change_view()
        return node

    def recover(self) -> None:
        """Everybody learns of the newest view, and of whatever is settled; all comes to rest."""
        for node in sorted(self.alive):
            if self.views[node]:
                self.install(node, skip=True)
        self.settle()

    def recover_all(self) -> None:
        """No more failures: agree, replay, clear; the locks must thaw."""
        if set(self.members) != self.present:
            self.change_view()
        self.recover()
        for dead in list(self.dead.values()):
            if not dead.replayed:
                self.replay(dead.node)
            if not dead.cleared:
                self.clear(dead.node)
        self.retell()
        self.settle()
        assert all(self.thawed[node] == self.epoch for node in self.present), self.thawed
        for _, core in self.living:
            assert not core.recovery.debts.owing and not core.recovery.debts.losses

    # -- what must be true -------------------------------------------------------------------
    def _carry_out(self, node: int, effect: Effect) -> None:
        super()._carry_out(node, effect)
        if isinstance(effect, Demote) and self._cannot_write_back(node, effect.resource):
            self.draining.add((node, effect.resource))

    def _carry_out_change(self, node: int, effect: Effect) -> None:
        match effect:
            case EpochRefused():
                self.refused += 1
            case Thawed(epoch):
                assert self.thawed[node] < epoch
                self.thawed[node] = epoch
            case _:
                raise AssertionError(effect)

    def _after(self, node: int) -> None:
        super()._after(node)
        core = self.cores[node]
        before = self._gains.held
        now = {
            (node, lock.resource): lock.held
            for lock in core.locks.locks.values()
            if lock.held is not None
        }
        for (_, resource), mode in now.items():
            had = before.get((node, resource), Mode.NL)
            if not COVERS[had][mode]:
                self._check_gain(core, resource, mode)
        for place in [place for place in before if place[0] == node]:
            del before[place]
        before.update(now)

    def _check_gain(self, core: LockCore, resource: Resource, mode: Mode) -> None:
        for dead in self.dead.values():
            if dead.gone_in is None or dead.gone_in > core.epoch:
                continue
            had = dead.held.get(resource, Mode.NL)
            words = f"node {core.node} gains {mode} of {resource.name!r}, {dead} had {had}"
            assert dead.replayed or not WRITES[had], words
            lives = dead.node in self.zombies  # then what it holds *now* counts
            assert dead.cleared or lives or COMPATIBLE[had][mode], words

    def _check_value(self, claim: Claim, seen: bytes | None) -> None:
        if not (self.changed and seen is None):
            super()._check_value(claim, seen)
