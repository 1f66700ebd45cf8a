"""Nodes in one process with trio shells of their own; what they say to each other takes a while.

For tests in virtual time. A node that dies takes its programs with it; the others learn of each
view in their own time.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from lockmgr.carried import Carried
from lockmgr.events import ViewChanged
from lockmgr.manager import LockManager
from lockmgr.messages import Resource
from lockmgr.ranges_manager import RangeLocks
from lockmgr.ranges_messages import Kind, Owner

FILES = [Resource(b"file %d" % number, bytes([number])) for number in range(6)]


class Host:
    """One node: its managers, and a nursery for its programs."""

    def __init__(self, manager: LockManager, nursery: trio.Nursery) -> None:
        self.manager = manager
        self.ranges = RangeLocks(manager)
        self.nursery = nursery
        self.thawed: set[int] = set()


class Hosts:
    """``await hosts.start(3)`` first; then `kill`, `change_view`, `clear`, `join`."""

    def __init__(self, nursery: trio.Nursery, seed: int = 0, slowest_s: float = 0.01) -> None:
        self.rng = random.Random(seed)
        self.hosts: dict[int, Host] = {}
        self.epoch = 1
        self.uncleared: set[int] = set()
        self._dead: set[int] = set()
        self._nursery = nursery
        self._slowest_s = slowest_s
        self._lines: dict[object, trio.MemorySendChannel[Callable[[], None]]] = {}
        self._ever = 0

    @property
    def members(self) -> tuple[int, ...]:
        """Who is alive."""
        return tuple(sorted(self.hosts))

    async def start(self, nodes: int) -> None:
        """The first ``nodes`` nodes, all in the first view."""
        for node in range(nodes):
            await self._nursery.start(self._run, node, 1, range(nodes))

    async def _run(
        self,
        node: int,
        epoch: int,
        members: range,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._ever += 1
        async with trio.open_nursery() as nursery:

            def thawed(epoch: int) -> None:
                host.thawed.add(epoch)

            def send(to: int, message: Carried) -> None:
                self._carry((node, to), to, lambda host: host.manager.deliver(message))

            manager = LockManager(
                nursery, node=node, epoch=epoch, members=members, send=send, on_thawed=thawed
            )
            self.hosts[node] = host = Host(manager, nursery)
            task_status.started()
            await trio.sleep_forever()

    def _carry(self, line: object, to: int, act: Callable[[Host], None]) -> None:
        def arrived() -> None:
            if to in self.hosts:
                act(self.hosts[to])

        if line not in self._lines:
            send, receive = trio.open_memory_channel[Callable[[], None]](math.inf)
            self._lines[line] = send
            self._nursery.start_soon(self._take_along, receive)
        self._lines[line].send_nowait(arrived)

    async def _take_along(self, receive: trio.MemoryReceiveChannel[Callable[[], None]]) -> None:
        async for arrived in receive:
            await trio.sleep(self.rng.random() * self._slowest_s)
            arrived()

    # -- what befalls them -------------------------------------------------------------------
    def kill(self, node: int) -> None:
        """Its programs, its manager and what is on its way to it are gone."""
        self.hosts.pop(node).nursery.cancel_scope.cancel()
        self.uncleared.add(node)

    def change_view(self) -> None:
        """Those alive are members; each learns of it in its own time."""
        self.epoch += 1
        view = ViewChanged(self.epoch, self.members, self.members[0], frozenset(self.uncleared))
        for node in self.members:
            self._carry(("view", node), node, lambda host: host.manager.view_changed(view))

    def clear(self) -> None:
        """The leases of all that departed are over, their journals are replayed."""
        nodes, self.uncleared = frozenset(self.uncleared), set()
        for node in self.members:
            self._carry(("view", node), node, lambda host: host.manager.cleared(nodes))
            self._carry(("view", node), node, lambda host: host.manager.replayed(nodes))

    async def join(self) -> int:
        """A newcomer is in the next view."""
        node = self._ever
        await self._nursery.start(self._run, node, 0, range(0))
        self.change_view()
        return node

    async def thaw(self) -> None:
        """Wait until all are in the newest view, and grant again."""
        waited: dict[int, float] = defaultdict(float)
        while not all(self.epoch in host.thawed for host in self.hosts.values()):
            waited[self.epoch] += 0.01
            assert waited[self.epoch] < 60, "the locks do not thaw"
            await trio.sleep(0.01)


@asynccontextmanager
async def three(seed: int = 0, slowest_s: float = 0.01) -> AsyncIterator[Hosts]:
    async with trio.open_nursery() as nursery:
        hosts = Hosts(nursery, seed, slowest_s)
        await hosts.start(3)
        yield hosts
        nursery.cancel_scope.cancel()


def of(
    hosts: Hosts, node: int, kind: Kind = Kind.POSIX, number: int = 1
) -> tuple[RangeLocks, Owner]:
    ranges = hosts.hosts[node].ranges
    return ranges, ranges.owner(kind, number, pid=100 * node + number)
