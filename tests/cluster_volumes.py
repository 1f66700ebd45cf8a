"""Many nodes that share one volume, in one process: each with its slot, journal, lock manager.

    async with cluster_volumes(nodes=3, seed=7) as cluster:
        one, two, three = cluster.nodes
        await one.call(one.volume.mkdir, ROOT, b"d", 0o755, 0, 0)
        await cluster.kill(two)             the others replay its journal and recover its lists
        await cluster.leave(three)
        two = await cluster.join()

Lock messages go from node to node through queues: in order per pair, each a random while on its
way. A view reaches each node at a moment of its own. What a cluster's membership decides is decided
here by `Cluster`: the lowest slot coordinates, one survivor replays, all by dice from ``seed``.

At the end every node leaves, and `csvfs.check` must find nothing wrong, and nothing left over.

Concurrency: a task per pair of nodes that carries messages, one per node that holds its volume
open, one per death for what follows from it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import wraps
from random import Random
from typing import Any, Final, ParamSpec, TypeVar

import trio

from csvfs.check import Damage, check_volume
from csvfs.errors import FilesystemError
from csvfs.format import NOBODY, SlotState, Superblock, View, ViewSlot, ViewSlotFlag
from csvfs.journal.store import JournalStart
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.volume import Volume, VolumeOptions, open_volume
from lockmgr.carried import Carried
from lockmgr.events import ViewChanged
from lockmgr.manager import LockManager, open_lock_manager
from lockmgr.mastering import node_number
from lockmgr.settings import Settings
from redirector.block.device import BlockDevice, BlockError, InitiatorPort
from redirector.block.simulated import SimulatedDevice, SimulatedLun
from tests.crash import deterministic_run
from tests.simulated_volume import LUN_BYTES, PORT, formatted

T = TypeVar("T")
P = ParamSpec("P")

DELAYS_S: Final = (0.0, 0.0, 0.0001, 0.0005, 0.002)
"""How long a message or a view may be on its way."""


def in_virtual_time(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """A test that takes no time, and goes the same way whenever it runs."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        deterministic_run(lambda: test(*args, **kwargs), 0)

    return run


class NodeDied(Exception):
    """The node was killed while the call was on its way: nobody knows how far it came."""


@dataclass(eq=False)
class Node:
    """One life of a node."""

    slot: int
    incarnation: int
    device: SimulatedDevice
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Everything that the host does."""
    leaving: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    dead: bool = False
    volume: Volume = field(init=False)
    locks: LockManager = field(init=False)
    ready: trio.Event = field(default_factory=trio.Event)
    """The lock manager is there: messages may be delivered."""
    news: deque[Callable[[LockManager], None]] = field(default_factory=deque)
    """What the membership tells it, in order."""
    _calls: set[trio.CancelScope] = field(default_factory=set)

    @property
    def number(self) -> int:
        """What the lock manager calls it."""
        return node_number(self.slot, self.incarnation)

    async def call(self, method: Callable[..., Awaitable[T]], *args: Any) -> T:
        """``await method(*args)`` as a program on this host. Raises `NodeDied` if it is killed."""
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            if self.dead:
                scope.cancel()
            try:
                return await method(*args)
            except (FilesystemError, BlockError):
                if not self.dead:
                    raise
            finally:
                self._calls.discard(scope)
        if self.dead:
            raise NodeDied(f"node {self.slot}")
        raise AssertionError("a call was cancelled, and its node lives")

    def kill(self) -> None:
        """The host is gone in this instant; nothing of it reaches the LUN any more."""
        self.dead = True
        self.device.lun.close_session(self.device)
        self.scope.cancel()
        for scope in list(self._calls):
            scope.cancel()


class Cluster:
    """The nodes, the network between them, and what a membership would decide."""

    def __init__(
        self,
        nursery: trio.Nursery,
        lun: SimulatedLun,
        superblock: Superblock,
        rng: Random,
        options: VolumeOptions | None,
        settings: Settings | None,
    ) -> None:
        self.lun = lun
        self.superblock = superblock
        self.nodes: list[Node] = []
        """Who lives, in the order of their joining."""
        self.sent: Counter[str] = Counter()
        """Lock messages from node to node so far, by type."""
        self.trace: list[tuple[int, int, Carried]] | None = None
        """(from, to, message) of each, if somebody put a list here."""
        self._nursery = nursery
        self._rng = rng
        self._options = options
        self._settings = settings
        self._epoch = 0
        self._incarnations: dict[int, int] = {}
        self._links: dict[tuple[int, int], deque[Carried]] = {}
        self._unreplayed: dict[int, Node] = {}
        """Departed nodes by their numbers."""
        self._change = trio.Lock()
        """Held by who changes the view: a join waits until all that died is replayed."""
        self._recoveries = 0
        self._recovered = trio.Event()

    # -- the network -----------------------------------------------------------------------
    def _send(self, sender: Node, to: int, message: Carried) -> None:
        if sender.dead:
            return
        self.sent[type(message).__name__] += 1
        if self.trace is not None:
            self.trace.append((sender.slot, to, message))
        queue = self._links.get((sender.number, to))
        if queue is None:
            queue = self._links[sender.number, to] = deque()
        queue.append(message)
        if len(queue) == 1:
            self._nursery.start_soon(self._carry, to, queue)

    async def _carry(self, to: int, queue: deque[Carried]) -> None:
        """Deliver what one node has for another, in order."""
        while queue:
            await trio.sleep(self._rng.choice(DELAYS_S))
            node = self._living(to)
            if node is None:
                queue.clear()
                return
            await node.ready.wait()
            if not node.dead:
                node.locks.deliver(queue[0])
            queue.popleft()

    def _living(self, number: int) -> Node | None:
        return next((node for node in self.nodes if node.number == number), None)

    # -- views -----------------------------------------------------------------------------
    def _install(self) -> None:
        """Another set of members: all of them learn it, each when it does."""
        self._epoch += 1
        self._announce()

    def _announce(self) -> None:
        members = tuple(sorted(node.number for node in self.nodes))
        view = ViewChanged(self._epoch, members, members[0], frozenset(self._unreplayed))
        self._say(lambda locks: locks.view_changed(view))

    def _say(self, what: Callable[[LockManager], None]) -> None:
        """To every node, behind what it was told before; each hears it when it does."""
        for node in self.nodes:
            node.news.append(what)
            if len(node.news) == 1:
                self._nursery.start_soon(self._tell, node)

    async def _tell(self, node: Node) -> None:
        while node.news:
            await trio.sleep(self._rng.choice(DELAYS_S))
            await node.ready.wait()
            if node.dead:
                return
            node.news[0](node.locks)
            node.news.popleft()

    @property
    def coordinator(self) -> Node:
        return min(self.nodes, key=lambda node: node.number)

    # -- joining ---------------------------------------------------------------------------
    async def join(self, slot: int | None = None) -> Node:
        """A further node, in the lowest slot that is free unless told otherwise."""
        while self._unreplayed:
            await self._recovered.wait()
        async with self._change:
            if slot is None:
                used = {node.slot for node in self.nodes}
                slot = min(set(range(self.superblock.geometry.slots)) - used)
            incarnation = self._incarnations.get(slot, 0) + 1
            self._incarnations[slot] = incarnation
            device = await self.lun.login(InitiatorPort(f"iqn.2026-11.test:host{slot}", 1))
            if incarnation == 1:
                start = await begin_slot(device, self.superblock, slot, incarnation)
            else:
                start = (await replay_slot(device, self.superblock, slot, incarnation)).start
            node = Node(slot, incarnation, device)
            started = trio.Event()
            self._nursery.start_soon(self._live, node, start, started)
            await started.wait()
            self.nodes.append(node)
            self._install()
        if incarnation > 1:
            await node.call(node.volume.recover, slot)
        return node

    async def _live(self, node: Node, start: JournalStart, started: trio.Event) -> None:
        """One life of a node, to its end."""

        def send(to: int, message: Carried) -> None:
            self._send(node, to, message)

        try:
            with node.scope:
                await self._serve(node, start, send, started)
        except* (FilesystemError, BlockError):
            if not node.dead:
                raise
        finally:
            node.ready.set()
            node.ended.set()

    async def _serve(
        self,
        node: Node,
        start: JournalStart,
        send: Callable[[int, Carried], None],
        started: trio.Event,
    ) -> None:
        async with (
            open_lock_manager(
                node=node.number, epoch=0, members=(), send=send, settings=self._settings
            ) as locks,
            open_volume(
                node.device,
                self.superblock,
                node.slot,
                node.incarnation,
                start,
                locks,
                options=self._options,
            ) as volume,
        ):
            node.locks, node.volume = locks, volume
            node.ready.set()
            started.set()
            await node.leaving.wait()

    # -- leaving ---------------------------------------------------------------------------
    async def leave(self, node: Node) -> None:
        """The node unmounts; one of those that stay looks after what others still have open."""
        await self.settled()
        async with self._change:
            node.volume.check()
            node.locks.core.check()
            node.leaving.set()
            await node.ended.wait()
            self.nodes.remove(node)
            await node.device.aclose()
            if self.nodes:
                self._install()
        if self.nodes and not node.dead:
            heir = self._rng.choice(self.nodes)
            await heir.call(heir.volume.recover, node.slot)

    # -- dying -----------------------------------------------------------------------------
    async def kill(self, node: Node) -> None:
        """The host dies; returns when everything of it is recovered."""
        self.strike(node)
        await self.settled()

    def strike(self, node: Node) -> None:
        """The host dies, and the others begin to do something about it."""
        node.kill()
        self.nodes.remove(node)
        self._unreplayed[node.number] = node
        self._recoveries += 1
        self._install()
        self._nursery.start_soon(self._bury, node)

    async def settled(self) -> None:
        """Nothing of anybody who died is left to be recovered."""
        while self._recoveries:
            await self._recovered.wait()

    async def _bury(self, victim: Node) -> None:
        await victim.ended.wait()
        await trio.sleep(self._rng.choice((0.0, 0.01)))
        steps = [self._clear, self._replay]
        self._rng.shuffle(steps)
        for step in steps:
            await self._by_somebody(step, victim)
        self._unreplayed.pop(victim.number)
        self._progress()
        await self._by_somebody(self._recover, victim)
        self._recoveries -= 1
        self._progress()

    async def _by_somebody(
        self, step: Callable[[Node, Node], Awaitable[None]], victim: Node
    ) -> None:
        """By one survivor; by another one if that dies, too."""
        while self.nodes:
            survivor = self._rng.choice(self.nodes)
            try:
                await step(survivor, victim)
                return
            except NodeDied:
                continue

    def _progress(self) -> None:
        self._recovered.set()
        self._recovered = trio.Event()

    async def _clear(self, _survivor: Node, victim: Node) -> None:
        """Its lease is over."""
        await trio.sleep(self._rng.choice(DELAYS_S))
        self._say(lambda locks: locks.cleared([victim.number]))

    async def _replay(self, survivor: Node, victim: Node) -> None:
        await survivor.call(
            replay_slot, survivor.device, self.superblock, victim.slot, victim.incarnation
        )
        self._say(lambda locks: locks.replayed([victim.number]))

    async def _recover(self, survivor: Node, victim: Node) -> None:
        await survivor.call(survivor.volume.recover, victim.slot)

    # -- what there is ---------------------------------------------------------------------
    def check(self) -> None:
        """Assert what must hold between any two steps of anybody."""
        for node in self.nodes:
            if node.ready.is_set() and not node.leaving.is_set():
                node.volume.check()
                node.locks.core.check()

    async def assert_clean(self) -> None:
        """All have left: `csvfs.check` finds nothing wrong, and nothing is left over."""
        assert not self.nodes
        async with await self.lun.login(PORT) as device:
            await assert_clean(device, self.superblock, self._incarnations)


async def assert_clean(
    device: BlockDevice, superblock: Superblock, incarnations: dict[int, int]
) -> None:
    """As above; ``incarnations``: the slots that were used."""
    slots = [ViewSlot()] * superblock.geometry.slots
    for slot, incarnation in incarnations.items():
        slots[slot] = ViewSlot(
            incarnation, SlotState.ACTIVE, NOBODY, flags=ViewSlotFlag.JOURNAL_USED
        )
    view = View(9, 0, tuple(slots))
    report = await check_volume(device, superblock, now_ns=9, own_view=view)
    wrong = [f for f in report.findings if f.damage is not Damage.SLOT_BLOCK]
    assert not wrong, "\n".join(map(str, wrong))
    assert not report.totals.orphans and not report.totals.reclaim_entries, report.totals


@asynccontextmanager
async def cluster_volumes(
    nodes: int = 2,
    *,
    seed: int = 0,
    size_bytes: int = LUN_BYTES,
    slots: int = 8,
    options: VolumeOptions | None = None,
    settings: Settings | None = None,
    lun: SimulatedLun | None = None,
) -> AsyncIterator[Cluster]:
    """A fresh volume and so many nodes that have it mounted. A group begins each 1.64 GiB."""
    lun = lun or SimulatedLun(size_bytes)
    superblock = await formatted(lun, slots=slots)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, lun, superblock, Random(seed), options, settings)
        for _ in range(nodes):
            await cluster.join()
        yield cluster
        await cluster.settled()
        for node in list(cluster.nodes):
            await cluster.leave(node)
        await cluster.assert_clean()
        nursery.cancel_scope.cancel()
