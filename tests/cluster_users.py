"""Programs on several nodes that do whatever they like to the same few names, all at once.

Each knows nothing of the others, so what a call answers cannot be foretold; but some things hold
whatever happens, and are asserted:

    a file holds whole records only, each appended once, and those of one program in their order
    what a program appended and synced is there until somebody truncates or removes the file
    a listing has each name once; a name that was found has an inode that fits
    no call hangs, and none fails in a way that its own reading of the tree does not explain
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from random import Random
from struct import Struct
from typing import Any, Final, Protocol, TypeVar

import trio

from csvfs import errors
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import Attributes, SetAttributes
from csvfs.namespace.rename import EXCHANGE, NOREPLACE
from tests.cluster_volumes import Cluster, Node, NodeDied
from tests.simulated_volume import ROOT

T = TypeVar("T")

RECORD: Final = Struct(">QQ")
RECORD_BYTES: Final = 1536
"""Neither a block nor a unit is a multiple of it, so that appends share both."""
NAMES: Final = [b"a", b"b", b"c", b"d"]

EXPECTED: Final = (
    errors.NotFound,
    errors.NameExists,
    errors.NotEmpty,
    errors.IsADirectory,
    errors.NotADirectory,
    errors.StaleInode,
    errors.InvalidArgument,
    errors.NotPermitted,
    errors.NoSpace,
)


def records(content: bytes) -> list[tuple[int, int]]:
    """(program, number) of each record of a file. Raises AssertionError for anything else."""
    assert len(content) % RECORD_BYTES == 0, f"{len(content)} bytes are not whole records"
    found = []
    for start in range(0, len(content), RECORD_BYTES):
        record = content[start : start + RECORD_BYTES]
        found.append(RECORD.unpack_from(record))
        assert record == RECORD.pack(*found[-1]) * (RECORD_BYTES // RECORD.size), (
            f"torn record at {start}: {record[:16].hex()} {record[-16:].hex()}"
        )
    for program in {program for program, _ in found}:
        numbers = [number for by, number in found if by == program]
        assert numbers == sorted(set(numbers)), f"records of {program}: {numbers}"
    return found


Key = tuple[int, int]
"""Number and generation of an inode."""


class Promises:
    """What fsync acknowledged, of files that nobody has truncated."""

    def __init__(self) -> None:
        self.synced: defaultdict[Key, set[tuple[int, int]]] = defaultdict(set)
        self.spoilt: set[Key] = set()
        self.verified = 0

    def verify(self, key: Key, content: bytes) -> None:
        """The file has all that was promised."""
        found = set(records(content))
        if key not in self.spoilt:
            lost = self.synced[key] - found
            assert not lost, f"inode {key}: fsync had acknowledged {sorted(lost)}"
            self.verified += len(self.synced[key])


class Host(Protocol):
    """Where a program runs: a `Node`, or what is like it. ``call`` as there."""

    volume: Any

    async def call(self, method: Callable[..., Awaitable[T]], *args: Any) -> T: ...


class Program:
    """One program on one node; its kernel's lookups are counted as a kernel's would be."""

    patience_s = 60.0
    """A call that takes longer hangs."""
    pauses_s: tuple[float, ...] = (0, 0, 0.001, 0.01)
    """Between two steps."""

    def __init__(
        self, node: Host, number: int, rng: Random, counts: Counter[str], promises: Promises
    ) -> None:
        self.node: Any = node
        self.volume = node.volume
        self.number = number
        self.rng = rng
        self.counts = counts
        self.promises = promises
        self.appended = 0
        self.written: defaultdict[Key, set[tuple[int, int]]] = defaultdict(set)
        self.open: list[Handle] = []
        self.known: Counter[int] = Counter()

    async def run(self, steps: int) -> None:
        """So many steps, then everything is closed; ends early if the node dies."""
        try:
            await self.node.call(self._steps, steps)
        except NodeDied:
            self.counts["died"] += 1

    def goes_on(self) -> bool:
        """Is it to take another step?"""
        return True

    async def _steps(self, steps: int) -> None:
        actions = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        for _ in range(steps):
            if not self.goes_on():
                break
            action = self.rng.choice(actions)
            try:
                with trio.fail_after(self.patience_s):
                    await action()
                self.counts[action.__name__] += 1
            except EXPECTED as error:
                self.counts[f"{action.__name__}: {type(error).__name__}"] += 1
            await trio.sleep(self.rng.choice(self.pauses_s))
        for handle in self.open:
            await self.volume.release(handle)
        for ino, count in self.known.items():
            await self.volume.forget(ino, count)

    # -- a kernel ----------------------------------------------------------------------------
    def _told(self, found: Attributes) -> Attributes:
        self.volume.remember(found.ino, 1)
        self.known[found.ino] += 1
        return found

    async def _directory(self) -> int:
        ino = ROOT
        while self.rng.random() < 0.5:
            found = self._told(await self.volume.lookup(ino, self.rng.choice(NAMES)))
            if not found.is_directory:
                break
            ino = found.ino
        return ino

    def _name(self) -> bytes:
        return self.rng.choice(NAMES)

    def _handle(self) -> Handle:
        if not self.open:
            raise errors.NotFound("nothing is open")
        return self.rng.choice(self.open)

    # -- names -------------------------------------------------------------------------------
    async def do_mkdir(self) -> None:
        self._told(await self.volume.mkdir(await self._directory(), self._name(), 0o755, 0, 0))

    async def do_create(self) -> None:
        parent = await self._directory()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        handle, found = await self.volume.create(parent, self._name(), 0o644, flags, 0, 0)
        self._told(found)
        self.open.append(handle)

    do_create_again = do_create

    async def do_close(self) -> None:
        handle = self._handle()
        self.open.remove(handle)
        await self.volume.release(handle)

    async def do_forget(self) -> None:
        if self.known:
            ino = self.rng.choice(list(self.known))
            await self.volume.forget(ino, self.known.pop(ino))

    do_forget_again = do_forget

    async def do_unlink(self) -> None:
        await self.volume.unlink(await self._directory(), self._name())

    async def do_rmdir(self) -> None:
        await self.volume.rmdir(await self._directory(), self._name())

    async def do_rename(self) -> None:
        old, new = await self._directory(), await self._directory()
        flags = self.rng.choice((0, 0, NOREPLACE, EXCHANGE))
        await self.volume.rename(old, self._name(), new, self._name(), flags)

    do_rename_again = do_rename

    async def do_link(self) -> None:
        ino = self._told(await self.volume.lookup(await self._directory(), self._name())).ino
        self._told(await self.volume.link(ino, await self._directory(), self._name()))

    async def do_list(self) -> None:
        ino, cookie = await self._directory(), 0
        found: list[bytes] = []
        while entries := await self.volume.readdir(ino, cookie, 3):
            for entry in entries:
                if entry.name not in (b".", b".."):
                    self._told(entry.attributes)
            cookie = entries[-1].cookie
            found += [entry.name for entry in entries]
        assert len(found) == len(set(found))

    async def do_stat(self) -> None:
        if self.known:
            await self.volume.getattr(self.rng.choice(list(self.known)))

    async def do_xattr(self) -> None:
        if self.known:
            value = bytes(self.rng.choice((1, 3000)))
            await self.volume.setxattr(self.rng.choice(list(self.known)), b"user.x", value)

    # -- data --------------------------------------------------------------------------------
    async def do_append(self) -> None:
        handle = self._handle()
        count = self.rng.choice((1, 2, 60))
        key = handle.ino, handle.state.generation
        ours = [(self.number, self.appended + i) for i in range(1, count + 1)]
        self.appended += count
        data = b"".join(RECORD.pack(*each) * (RECORD_BYTES // RECORD.size) for each in ours)
        assert await self.volume.write(handle, 0, data) == len(data)
        self.written[key].update(ours)
        if self.rng.random() < 0.3:
            await self.volume.fsync(handle.ino, self.rng.random() < 0.5)
            self.promises.synced[key] |= self.written[key]

    do_append_again = do_append

    async def do_read(self) -> None:
        handle = self._handle()
        records(bytes(await self.volume.read(handle, 0, 1 << 30)))

    async def do_truncate(self) -> None:
        handle = self._handle()
        if self.rng.random() < 0.3:
            self.promises.spoilt.add((handle.ino, handle.state.generation))
            await self.volume.setattr(handle.ino, SetAttributes(size=0))

    async def do_statfs(self) -> None:
        await self.volume.statfs()


async def read_all(node: Host, promises: Promises, ino: int = ROOT) -> None:
    """Walk the tree and read every file: what stands there fits together."""
    volume: Any = node.volume
    cookie = 2
    while entries := await volume.readdir(ino, cookie, 5):
        cookie = entries[-1].cookie
        for entry in entries:
            found = entry.attributes
            if found.is_directory:
                await read_all(node, promises, found.ino)
            else:
                handle = await volume.open(found.ino, os.O_RDONLY, 0)
                content = bytes(await volume.read(handle, 0, 1 << 30))
                assert found.size == len(content)
                promises.verify((found.ino, found.generation), content)
                await volume.release(handle)


async def everybody(
    cluster: Cluster, seed: int, *, programs: int = 2, steps: int = 60, deaths: int = 0
) -> Counter[str]:
    """``programs`` on every node, and so many nodes that die and come back meanwhile."""
    rng = Random(seed)
    counts: Counter[str] = Counter()
    promises = Promises()
    numbers = iter(range(1, 1000))

    async with trio.open_nursery() as nursery:

        def start(node: Node) -> None:
            for _ in range(programs):
                program = Program(node, next(numbers), Random(rng.random()), counts, promises)
                nursery.start_soon(program.run, steps)

        for node in cluster.nodes:
            start(node)
        for _ in range(deaths):
            await trio.sleep(rng.uniform(0, 0.5))
            if rng.random() < 0.3:
                await cluster.kill(rng.choice(cluster.nodes))
            else:
                cluster.strike(rng.choice(cluster.nodes))
            start(await cluster.join())
    for node in cluster.nodes:
        await read_all(node, promises)
    cluster.check()
    counts["promises kept"] = promises.verified
    return counts
