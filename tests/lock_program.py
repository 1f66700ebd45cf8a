"""A program that uses the lock manager and nothing else: several of it share a counter in a file.

    python -m tests.lock_program DIRECTORY NAME

There is no LUN and no filesystem. `DirectoryArbiter` is what fences (`lockmgr.cluster.arbiter`) and
what shows who lives; the counter is used within `DirectoryArbiter.using`, so whoever is evicted
cannot change it. It has no journal: whoever departs is replayed at once.

Its credentials come in the first line of standard input, from who supervises it. Then one command a
line, each with one answer a line on standard output:

    take        wait for the lock: "taken", and the value block's number or "not valid"
    add         the counter plus one, and that number as the value block: "is N", or "fenced"
    give        release it: "given"
    foreign     modules of upper layers that are loaded: "none"
    leave       the last one: "left"

``active SLOT.INCARNATION`` is said once at the beginning, ``stopped REASON`` before it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import SystemRandom
from typing import Final

import trio
import trio.lowlevel

from lockmgr.cluster import effects
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.directory_arbiter import DirectoryArbiter, NotRegistered, Unavailable
from lockmgr.cluster.lock_link import LockLink
from lockmgr.cluster.peers import Address
from lockmgr.cluster.service import Cluster, open_cluster
from lockmgr.cluster.view import NodeId
from lockmgr.events import Unresponsive, ViewChanged
from lockmgr.lock import Lock
from lockmgr.manager import LockManager
from lockmgr.mastering import node_number, slot_and_incarnation
from lockmgr.messages import VALUE_BYTES, Resource
from lockmgr.modes import Mode

CLUSTER_ID: Final = bytes(range(16))
COUNTER: Final = Resource(b"counter", b"counter")


def say(*words: object) -> None:
    """One answer."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Program:
    """A member with locks. Concurrency: `run` reads commands; the rest is plain calls."""

    def __init__(self, directory: Path, name: str, credentials: Credentials) -> None:
        self.directory = directory
        self.name = name
        self.credentials = credentials
        self.identity = Identity(
            name,
            hashlib.sha256(name.encode()).digest()[:16],
            bytes(16),
            credentials.fingerprint,
            (),
            credentials.certificate,
        )
        self.arbiter = DirectoryArbiter(directory, self.identity, self._path_lost)
        self.link = LockLink(self._evict)
        self.locks: LockManager | None = None
        self.thawed = trio.Event()
        self.lock: Lock | None = None
        self.cluster: Cluster
        self._nursery: trio.Nursery

    # -- what membership says --------------------------------------------------------------------
    def _path_lost(self, keys: tuple[int, ...]) -> None:
        if self.locks is not None:
            self.locks.stalled(True)
        self.cluster.path_lost(keys)

    def _evict(self, node: NodeId, words: str) -> None:
        self.cluster.evict(node, words)

    def _unresponsive(self, found: Unresponsive) -> None:
        self.cluster.evict(NodeId(*slot_and_incarnation(found.node)), found.words())

    def _thawed(self, epoch: int) -> None:
        self.cluster.locks_thawed(epoch)
        self.thawed.set()

    def _told(self, effect: effects.UpwardEffect) -> None:
        match effect:
            case effects.ViewInstalled():
                self._follow(effect)
            case effects.ReplayWanted(node):
                if self.locks is not None:
                    self.locks.replayed([node_number(*node)])
                self.cluster.replayed(node)
            case effects.DepartedMayBeGranted(node) if self.locks is not None:
                self.locks.cleared([node_number(*node)])
            case effects.PathsReady() if self.locks is not None:
                self.locks.stalled(False)

    def _follow(self, effect: effects.ViewInstalled) -> None:
        view, me = effect.view, self.cluster.me
        assert me is not None
        if self.locks is None:
            self.locks = LockManager(
                self._nursery,
                node=node_number(*me),
                epoch=0,
                members=(),
                send=self.link.send,
                on_thawed=self._thawed,
                on_unresponsive=self._unresponsive,
            )
            self.link.attach(self.locks)
        self.link.view_changed((node for node in view.listed if node != me), view.lock_epoch)
        if me not in view.active:
            return
        self.locks.replayed(node_number(*node) for node in effect.replayed)
        active = tuple(sorted(node_number(*node) for node in view.active))
        coordinator = node_number(*effect.coordinator)
        self.locks.view_changed(
            ViewChanged(
                view.lock_epoch,
                active,
                coordinator if coordinator in active else active[0],
                frozenset(node_number(*node) for node in view.to_replay),
            )
        )
        self.locks.cleared(node_number(*each.node) for each in effect.departed if each.cleared)

    # -- life --------------------------------------------------------------------------------------
    async def run(self, commands: AsyncIterator[str]) -> None:
        """Until it has left, or cannot go on."""
        async with (
            trio.open_nursery() as self._nursery,
            open_cluster(
                self.identity,
                self.arbiter.keys,
                self.arbiter,
                Address("127.0.0.1", 0),
                self.credentials,
                CLUSTER_ID,
                on_effect=self._told,
                on_network=self.link.take,
                rng=SystemRandom(),
                obituary=self.directory / f"{self.name}.obituary",
            ) as self.cluster,
        ):
            self.link.use(self.cluster)
            self._nursery.start_soon(self.link.run)
            self._nursery.start_soon(self._serve, commands)
            stop = await self.cluster.wait_stopped()
            say("stopped", stop.reason.value)
            self._nursery.cancel_scope.cancel()

    async def _serve(self, commands: AsyncIterator[str]) -> None:
        await self.cluster.wait_active()
        await self.thawed.wait()
        assert self.cluster.me is not None
        say("active", self.cluster.me)
        async for command in commands:
            match command.strip():
                case "take":
                    await self._take()
                case "add":
                    await self._add()
                case "give":
                    assert self.lock is not None
                    self.lock.release()
                    say("given")
                case "foreign":
                    say(_foreign_modules() or "none")
                case "leave":
                    assert self.locks is not None
                    await self.locks.aclose()
                    await self.cluster.leave()

    async def _take(self) -> None:
        assert self.locks is not None
        self.lock = await self.locks.acquire(COUNTER, Mode.EX)
        value = self.lock.value
        say("taken", "not valid" if value is None else int.from_bytes(value, "little"))

    async def _add(self) -> None:
        assert self.lock is not None
        try:
            async with self.arbiter.using():
                file = self.directory / "counter"
                number = int(file.read_text()) + 1 if file.exists() else 1
                file.write_text(str(number))
        except (NotRegistered, Unavailable):
            say("fenced")
            return
        self.lock.set_value(number.to_bytes(VALUE_BYTES, "little"))
        await self.cluster.lease.wait_valid()
        say("is", number)


def _foreign_modules() -> str:
    upper = {"csvfs", "redirector", "tools", "csvctl"}
    return " ".join(sorted(name for name in sys.modules if name.partition(".")[0] in upper))


async def main() -> None:
    """The arguments are those of the command line."""
    directory, name = Path(sys.argv[1]), sys.argv[2]
    commands = _lines()
    said = json.loads(await anext(commands))
    credentials = Credentials(bytes.fromhex(said["certificate"]), bytes.fromhex(said["key"]))
    await Program(directory, name, credentials).run(commands)


async def _lines() -> AsyncIterator[str]:
    """Of standard input."""
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for more in stdin:
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                yield line.decode()


if __name__ == "__main__":
    trio.run(main)
