"""One host of a volume's cluster: what membership says becomes locks, replays, and data that flows.

    membership says         this node
    ViewInstalled           its lock manager follows; the first one that lists the node makes it
    DepartedMayBeGranted    its lock manager may grant over that incarnation
    ReplayWanted            a task replays that journal, then says so; what the dead had promised
                            (orphans, reclaim list) is seen to as soon as the volume is open. A
                            journal that cannot be replayed is tried again and again: it costs what
                            its node had under its locks, not the nodes that live
    PathsReady              data flows
    LeaseUntil              what comes back may be answered
    Stop                    data ends, and with it the volume: `wait_failed`

Order that keeps data safe: a journal is replayed only when its node is fenced, which is what a view
without it says; the lock manager is told of a replay only when that is stable; data flows only when
nothing of this node's lost paths can come any more. Who decides all that is `lockmgr.cluster`.

Who leaves in order, or dies before it has seen to another's promises, leaves lists behind that no
replay says are there: the lowest active node looks at those of every slot that is free.

Concurrency: everything here but the replays is called from the membership's steps, and never waits.
Each replay is a task of the nursery. An exception in one ends the node, as a crash would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from csvfs.engine.locks import in_words
from csvfs.errors import FilesystemError, VolumeFailed
from csvfs.format import BadBlock, Superblock
from csvfs.journal.replay import JournalDamaged
from csvfs.journal.store import JournalStart
from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.volume import Volume
from lockmgr.cluster.effects import (
    DepartedMayBeGranted,
    LeaseUntil,
    PathsReady,
    ReplayWanted,
    Stop,
    StopReason,
    UpwardEffect,
    ViewInstalled,
)
from lockmgr.cluster.lock_link import LockLink
from lockmgr.cluster.service import Cluster
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlotFlag
from lockmgr.events import Unresponsive, ViewChanged
from lockmgr.manager import LockManager
from lockmgr.mastering import node_number, slot_and_incarnation
from lockmgr.settings import Settings as LockSettings
from redirector.block.device import BlockError
from redirector.block.reservations import Registration
from redirector.data_path import DataPath, Evicted

_log = logging.getLogger("csvfs.host.node")

REPLAY_AGAIN_S: Final = 30.0
"""A journal that cannot be replayed is tried again after so long: its medium may recover."""


def number_of(node: NodeId) -> int:
    """What the lock manager calls an incarnation."""
    return node_number(node.slot, node.incarnation)


class ClusterNode:
    """See the module's docstring. ``told`` is given words about each step that may take a while.

    `use` and `begin` give it its parts before anything is said to it.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        superblock: Superblock,
        told: Callable[[str], None],
        evict_after_s: float = 6.0,
    ) -> None:
        self._nursery = nursery
        self._superblock = superblock
        self._told = told
        self._lock_settings = LockSettings(evict_after_s=evict_after_s)
        self._arbiter: LunArbiter
        self._path: DataPath
        self._cluster: Cluster
        self.link = LockLink(self._on_unresponsive)
        self.view: View | None = None
        """The installed one."""
        self.locks: LockManager | None = None
        self._data: Registration | None = None
        self._replaying: set[NodeId] = set()
        self._own_start: JournalStart | None = None
        self._to_recover: list[int] = []
        """Slots whose journals were replayed here, and whose lists are still to be looked at."""
        self._tended: set[NodeId] = set()
        """Who left a slot free, and lists in it that this node has looked at since."""
        self._leaving = trio.Event()
        self._replay_ended = trio.Event()
        self._recover_kick = trio.Event()
        self._view_changed = trio.Event()
        self._started = trio.Event()
        """Locks are there to be had, or never will be."""
        self.failure: VolumeFailed | None = None
        self._failed = trio.Event()

    def use(self, arbiter: LunArbiter, path: DataPath) -> None:
        """These carry its I/O."""
        self._arbiter, self._path = arbiter, path

    def begin(self, cluster: Cluster) -> None:
        """This is its place among the others."""
        self._cluster = cluster
        self.link.use(cluster)
        self._nursery.start_soon(self.link.run, name="lock link")

    # -- what the mount waits for ----------------------------------------------------------------
    async def wait_serving(self) -> tuple[LockManager, JournalStart]:
        """Return when this node is an active member and its locks are there to be had.

        Raises `VolumeFailed` when that will never be.
        """
        await self._started.wait()
        if self.failure is not None:
            raise self.failure
        assert self.locks is not None
        assert self._own_start is not None, "who is active has its journal in order"
        return self.locks, self._own_start

    async def wait_failed(self) -> VolumeFailed:
        """Return why this node cannot go on, once it cannot."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    async def wait_view(self) -> None:
        """Return when the next view is installed, or this node cannot go on."""
        await self._view_changed.wait()

    async def recover_for_ever(
        self,
        volume: Volume,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Finish what the nodes whose journals were replayed here left undone, also later ones;
        "started" when nothing of what was replayed before is left."""
        started = False
        while True:
            self._recover_kick = trio.Event()
            while self._to_recover:
                await self._recover(volume, self._to_recover.pop(0))
            if not started:
                started = True
                task_status.started()
            if (left := self._left_lists()) is not None:
                await self._recover(volume, left.slot)
                self._tended.add(left)
            elif not self._to_recover:
                await self._recover_kick.wait()

    async def _recover(self, volume: Volume, slot: int) -> None:
        self._told(f"finishing what slot {slot} left undone")
        assert self._cluster.me is not None
        try:
            await volume.recover(slot)
        except VolumeFailed:
            raise
        except FilesystemError as error:
            if slot == self._cluster.me.slot:
                raise
            # Costs space until it is mended; this node's own users have nothing to do with it.
            _log.error("the lists of slot %d stay as they are: %s", slot, error)

    def _left_lists(self) -> NodeId | None:
        """A slot that is free, with lists that it is this node's turn to look at."""
        view = self.view
        if view is None or not view.active or self._cluster.me != min(view.active):
            return None
        for number, entry in enumerate(view.slots):
            node = NodeId(number, entry.incarnation)
            used = entry.flags & ViewSlotFlag.JOURNAL_USED
            if entry.state is SlotState.FREE and used and node not in self._tended:
                return node
        return None

    async def end_replays(self) -> None:
        """This node is about to leave: what it replays is finished, nothing else is begun. Who
        departs later is replayed by those that stay, or by the next mount."""
        self._leaving.set()
        while self._replaying:
            self._replay_ended = trio.Event()
            await self._replay_ended.wait()

    # -- what the arbiter says -------------------------------------------------------------------
    def on_opened(self, control: Registration, data: Registration) -> None:
        """There are new paths, over which nothing may flow yet."""
        del control
        self._data = data
        self._path.use(data, restarted=self._arbiter.restarted)

    def on_lost(self, keys: tuple[int, ...]) -> None:
        """Paths with these keys are gone."""
        if self._data is not None and self._data.key in keys:
            data, self._data = self._data, None
            self._path.lost(data, "the session is lost")
            if self.locks is not None:
                self.locks.stalled(True)
        self._cluster.path_lost(keys)

    # -- what membership says --------------------------------------------------------------------
    def on_effect(self, effect: UpwardEffect) -> None:
        """Do what the module's table says. Must not wait."""
        match effect:
            case ViewInstalled():
                self._view_installed(effect)
            case DepartedMayBeGranted(node):
                if self.locks is not None:
                    self.locks.cleared([number_of(node)])
            case ReplayWanted(node, used):
                if node not in self._replaying and not self._leaving.is_set():
                    self._replaying.add(node)
                    self._nursery.start_soon(self._replay, node, used)
            case PathsReady(key):
                control = self._arbiter.control
                if self._data is not None and control is not None and control.key == key:
                    self._path.ready(self._data)
                    if self.locks is not None:
                        self.locks.stalled(False)
            case LeaseUntil(until_s):
                self._path.lease_until(until_s)
            case Stop(reason, words):
                if reason is not StopReason.LEFT:
                    self._path.evict(words)
                    self._arbiter.abort()
                    self.fail(VolumeFailed(words))
            case _:
                pass  # sessions are the arbiter's business

    def _view_installed(self, effect: ViewInstalled) -> None:
        view, me = effect.view, self._cluster.me
        assert me is not None
        self.view = view
        self._recover_kick.set()
        self._view_changed.set()
        self._view_changed = trio.Event()
        if self.locks is None:
            self.locks = LockManager(
                self._nursery,
                node=number_of(me),
                epoch=0,
                members=(),
                settings=self._lock_settings,
                send=self.link.send,
                on_thawed=self._on_thawed,
                on_unresponsive=self._on_silent_holder,
            )
            self.link.attach(self.locks)
        self.link.view_changed((node for node in view.listed if node != me), view.lock_epoch)
        if me in view.active:
            self._follow(self.locks, effect)

    def _follow(self, locks: LockManager, effect: ViewInstalled) -> None:
        view = effect.view
        if effect.replayed:
            locks.replayed(number_of(node) for node in effect.replayed)
        active = tuple(sorted(number_of(node) for node in view.active))
        coordinator = number_of(effect.coordinator)
        locks.view_changed(
            ViewChanged(
                view.lock_epoch,
                active,
                coordinator if coordinator in active else active[0],
                frozenset(number_of(node) for node in view.to_replay),
            )
        )
        cleared = [number_of(each.node) for each in effect.departed if each.cleared]
        if cleared:
            locks.cleared(cleared)

    def _on_thawed(self, epoch: int) -> None:
        self._cluster.locks_thawed(epoch)
        self._started.set()

    def _on_silent_holder(self, found: Unresponsive) -> None:
        """Said again as long as it is so. Of two that do not hear each other either may be the
        one that is cut off: that is for the judge, who sees all of them."""
        node, cluster = NodeId(*slot_and_incarnation(found.node)), self._cluster
        if cluster.lease.valid() if node == cluster.me else cluster.hears(node):
            self._on_unresponsive(node, found.words(in_words(found.resource)))

    def _on_unresponsive(self, node: NodeId, words: str) -> None:
        _log.warning("%s is to be evicted: %s", self._name_of(node), words)
        self._cluster.evict(node, words)

    def _name_of(self, node: NodeId) -> str:
        name = self.view.slots[node.slot].node_name if self.view is not None else ""
        return f"{name} ({node})" if name else f"node {node}"

    def fail(self, failure: VolumeFailed) -> None:
        """This node cannot go on."""
        self.failure = self.failure or failure
        self._failed.set()
        self._started.set()
        self._view_changed.set()

    # -- journals --------------------------------------------------------------------------------
    async def _replay(self, node: NodeId, used: bool) -> None:
        own = node == self._cluster.me
        if own:
            await self._begin(node, used)
        # Else, if not used, it was never active, and has changed nothing.
        elif used and not await self._replay_other(node):
            self._replay_over(node)
            return
        if not own and self.locks is not None:
            self.locks.replayed([number_of(node)])
        self._cluster.replayed(node)
        self._replay_over(node)

    def _replay_over(self, node: NodeId) -> None:
        self._replaying.discard(node)
        self._replay_ended.set()
        self._recover_kick.set()

    async def _begin(self, me: NodeId, used: bool) -> None:
        """The own journal, in order."""
        path, superblock = self._path, self._superblock
        if used:
            self._told(f"replaying the journal of slot {me.slot}")
            self._own_start = (await replay_slot(path, superblock, *me)).start
            self._recover_soon(me.slot)
        else:
            self._own_start = await begin_slot(path, superblock, *me)

    async def _replay_other(self, node: NodeId) -> bool:
        """False: it could not be replayed, and this node leaves. Who has nothing to lose yet, a
        node that is joining, raises what is in the way instead: its mount says it."""
        path, said = self._path, ""
        while not self._leaving.is_set():
            self._told(f"replaying the journal of slot {node.slot}")
            try:
                await replay_slot(path, self._superblock, *node)
                # Nothing of it may be written again (REDIRECTION.md, rule 8): the slot, and what
                # its node had locked, are others' from now on.
                await path.flush()
            except Evicted:
                raise
            except (BadBlock, JournalDamaged, BlockError) as error:
                if self.view is None or self._cluster.me not in self.view.active:
                    raise
                if str(error) != said:
                    said = str(error)
                    _log.error(
                        "the journal of slot %d (node %s) cannot be replayed: %s. What that node "
                        "had locked stays locked, and nobody can join, until it is: look after "
                        "the LUN, or unmount the volume everywhere and run `csvctl check --repair`",
                        *(node.slot, node, said),
                    )
                with trio.move_on_after(REPLAY_AGAIN_S):
                    await self._leaving.wait()
            else:
                self._recover_soon(node.slot)
                return True
        return False

    def _recover_soon(self, slot: int) -> None:
        if slot not in self._to_recover:
            self._to_recover.append(slot)
