"""Lock managers of several nodes over real networks on loopback, and what must be true of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from lockmgr.cluster.certificates import Credentials, make_credentials
from lockmgr.cluster.lock_link import LockLink
from lockmgr.cluster.network_events import NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Peer
from lockmgr.cluster.rpc import Network, open_network
from lockmgr.cluster.view import NodeId
from lockmgr.errors import LockTimeout
from lockmgr.events import ViewChanged
from lockmgr.lock import Lock
from lockmgr.manager import LockManager, open_lock_manager
from lockmgr.mastering import node_number
from lockmgr.messages import VALUE_BYTES, Resource
from lockmgr.modes import WRITES_VALUE, Mode, compatible
from lockmgr.settings import Settings
from tests.unit.network_nodes import ID, LOOPBACK, SECRET, until

NL, CR, CW, PR, PW, EX = Mode
QUICK = NetworkSettings(
    redial_first_s=0.005, redial_most_s=0.05, courtesy_s=0.005, greeting_s=2.0, probe_s=0.5
)
"""Connections are made again at once."""
LOCKS = Settings(min_hold_s=0.001, cache_limit=30, deadlock_after_s=0.5)


class Owner:
    """Takes a moment to write back."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        del resource, to_mode
        for _ in range(self._rng.randrange(3)):
            await trio.lowlevel.checkpoint()

    async def glimpse(self, resource: Resource) -> bytes:
        await trio.lowlevel.checkpoint()
        return resource.name


@dataclass(eq=False)
class LockNode:
    """One node: its network, its channels, its locks."""

    name: NodeId
    network: Network
    link: LockLink
    manager: LockManager
    credentials: Credentials
    scope: trio.CancelScope
    thawed: list[int] = field(default_factory=list)
    accused: list[tuple[NodeId, str]] = field(default_factory=list)
    tasks: list[trio.CancelScope] = field(default_factory=list)

    @property
    def number(self) -> int:
        return node_number(*self.name)

    @property
    def peer(self) -> Peer:
        return Peer(self.name, self.credentials.certificate, (self.network.address,))

    def install(
        self, nodes: list[LockNode], epoch: int, unreplayed: frozenset[int] = frozenset()
    ) -> None:
        """Go by the view of these nodes."""
        others = [node.peer for node in nodes if node is not self]
        self.network.install(self.name, epoch, others, SECRET)
        self.link.view_changed([node.name for node in nodes], epoch)
        members = tuple(sorted(node.number for node in nodes))
        self.manager.view_changed(ViewChanged(epoch, members, members[0], unreplayed))

    def die(self) -> None:
        """As a process that is killed: nothing is said to anybody."""
        for scope in (*self.tasks, self.scope):
            scope.cancel()

    def check(self) -> None:
        self.link.check()
        self.manager.core.check()
        self.network.check()


async def run_node(
    slot: int, *, seed: int = 1, task_status: trio.TaskStatus[LockNode] = trio.TASK_STATUS_IGNORED
) -> None:
    """A node until it dies; it starts without a view."""
    credentials = make_credentials()
    thawed: list[int] = []
    accused: list[tuple[NodeId, str]] = []
    link = LockLink(lambda peer, words: accused.append((peer, words)))

    def deliver(event: NetworkEvent) -> None:
        link.take(event)

    name = NodeId(slot, 1)
    rng = random.Random(100 * seed + slot)
    with trio.CancelScope() as scope:
        async with (
            open_network(credentials, ID, LOOPBACK, deliver, rng=rng, settings=QUICK) as network,
            trio.open_nursery() as nursery,
            open_lock_manager(
                node=node_number(*name),
                epoch=0,
                settings=LOCKS,
                members=(),
                send=link.send,
                on_thawed=thawed.append,
            ) as manager,
        ):
            manager.register_owner(b"", Owner(rng))
            link.use(network)
            nursery.start_soon(link.run)
            link.attach(manager)
            node = LockNode(name, network, link, manager, credentials, scope, thawed, accused)
            task_status.started(node)
            await trio.sleep_forever()


async def start_node(nursery: trio.Nursery, slot: int, seed: int = 1) -> LockNode:
    """A node that knows nobody yet."""
    node: LockNode = await nursery.start(partial(run_node, slot, seed=seed))
    return node


async def start_nodes(nursery: trio.Nursery, number: int, seed: int = 1) -> list[LockNode]:
    """Nodes that have thawed the view of all of them."""
    nodes = [await start_node(nursery, slot, seed) for slot in range(number)]
    for node in nodes:
        node.install(nodes, 1)
    await until(lambda: all(node.thawed == [1] for node in nodes))
    return nodes


def cut(node: LockNode, rng: random.Random) -> None:
    """One of the node's connections breaks, without a word."""
    connections = [one for one in node.network._open if one.failure is None and one.number]
    if connections:
        socket = rng.choice(connections)._stream.transport_stream.socket
        with suppress(OSError):  # it was just being closed
            socket.shutdown(trio.socket.SHUT_RDWR)


@dataclass
class Truth:
    """Who holds what, in the whole cluster, and the last value of each resource."""

    rng: random.Random
    holders: dict[bytes, dict[Lock, tuple[LockNode, Mode]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    values: dict[bytes, bytes] = field(default_factory=dict)
    grants: int = 0
    timeouts: int = 0
    valid: int = 0

    @contextmanager
    def holding(self, node: LockNode, lock: Lock) -> Iterator[None]:
        """While a task has the lock. What a dead node held it holds until `bury`."""
        name = lock.resource.name
        holders = self.holders[name]
        for other, mode in holders.values():
            assert other is node or compatible(lock.mode, mode), (node.name, lock, other.name, mode)
        holders[lock] = (node, lock.mode)
        self.grants += 1
        self._look(lock)
        yield
        self._look(lock)
        del holders[lock]

    def _look(self, lock: Lock) -> None:
        if lock.mode not in (PR, PW, EX):
            return
        value = lock.value
        if value is not None:
            assert value == self.values.get(lock.resource.name)
            self.valid += 1
        if WRITES_VALUE[lock.mode]:
            new = self.rng.randbytes(VALUE_BYTES)
            lock.set_value(new)
            self.values[lock.resource.name] = new

    def bury(self, dead: LockNode) -> None:
        """What it held may be granted from now on."""
        for holders in self.holders.values():
            for lock, (node, _mode) in list(holders.items()):
                if node is dead:
                    del holders[lock]

    async def work(self, node: LockNode, resources: list[Resource], times: int) -> None:
        """A task that takes locks, sometimes without the patience to wait for them; until its node
        dies."""
        with trio.CancelScope() as scope:
            node.tasks.append(scope)
            await self._work(node, resources, times)

    async def _work(self, node: LockNode, resources: list[Resource], times: int) -> None:
        rng = self.rng
        for _ in range(times):
            resource = rng.choice(resources)
            mode = rng.choice((CR, CW, PR, PR, PW, EX, EX))
            timeout_s = rng.choice((None, None, None, 0, 0.02))
            if rng.random() < 0.1:
                assert (await node.manager.glimpse_all(resources)).keys() == set(resources)
            try:
                lock = await node.manager.acquire(resource, mode, timeout_s=timeout_s)
            except LockTimeout:
                self.timeouts += 1
                continue
            with self.holding(node, lock):
                for _ in range(rng.randrange(3)):
                    await trio.lowlevel.checkpoint()
            lock.release()
            if rng.random() < 0.3:
                await trio.sleep(rng.random() * 0.005)
