"""What a read may return: files of blocks, each of which is a register.

Theory. Every write has a version of its own. A read that returned version v is wrong if there is a
write w of which all of this holds:

    w began after v was over, so w is later than v
    w was over before the read began, or some earlier read has returned it
    w cannot have been lost: it was synced, or somebody on another host has seen it, or its host
    lived on

A write without an answer is over, as far as others are concerned, when its host is: once a view
without that host is installed somewhere, nothing of it can come any more. What only the target's
cache had may be lost with both the target's power and the host.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count
from random import Random
from struct import Struct
from typing import Any, Final

import trio

from csvfs.namespace.handle import Handle
from tests.cluster_volumes import NodeDied
from tests.simulated_volume import ROOT
from tests.whole.hosts import Life, World

BLOCK_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
NAMES: Final = (b"r0", b"r1", b"r2")
ATTRIBUTE: Final = -1
"""Not a block: an extended attribute."""
PLACES: Final = (0, 1, 40, ATTRIBUTE)
"""Blocks of a file that are used; the last of them is in another unit."""
_XATTR: Final = b"user.version"
_VERSION: Final = Struct(">Q")
NEVER: Final = float("inf")

Register = tuple[bytes, int]


@dataclass(eq=False, slots=True)
class Write:
    """One write, as its program saw it."""

    version: int
    life: Life | None
    """None: what was there before anybody."""
    began: float
    over: float = NEVER
    synced: float = NEVER
    seen: float = NEVER
    """When somebody elsewhere first had it."""
    returned: float = NEVER
    """When anybody first had it."""


class Registers:
    """All of them, and what happened to them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.writes: dict[Register, dict[int, Write]] = {
            (name, place): {0: Write(0, None, -1.0, -1.0, -1.0, -1.0)}
            for name in NAMES
            for place in PLACES
        }
        self.reads = 0
        self._versions = count(1)

    def begin(self, register: Register, life: Life) -> Write:
        """A write is about to be issued."""
        write = Write(next(self._versions), life, trio.current_time())
        self.writes[register][write.version] = write
        return write

    def read(self, register: Register, life: Life, began: float, data: bytes) -> None:
        """A read has returned that. Raises AssertionError if it must not."""
        now, known = trio.current_time(), self.writes[register]
        versions = {_VERSION.unpack_from(data, at)[0] for at in range(0, len(data), SECTOR_BYTES)}
        dead = any(each.life is not None and each.life.dead for each in known.values())
        assert len(versions) == 1 or (dead and self.world.power_losses), (
            f"{register} is torn: {sorted(versions)}"
        )
        self.reads += 1
        for version in versions:
            found = known.get(version)
            assert found is not None, f"{register} has {version}, which nobody wrote there"
            for other in known.values():
                self._compare(register, life, found, other, began)
            found.returned = min(found.returned, now)
            if found.life is not life:
                found.seen = min(found.seen, now)

    def _compare(
        self, register: Register, life: Life, found: Write, other: Write, began: float
    ) -> None:
        if other.began <= self._over(found):
            return
        if min(other.over, other.returned) >= began or self._may_be_lost(other):
            return
        raise AssertionError(
            f"{life} reads {register}: {found.version} (of {found.life}, {found.began:.4f} to"
            f" {found.over:.4f}), read since {began:.4f}; but {other.version} of {other.life} came"
            f" later: {other.began:.4f} to {other.over:.4f}, synced {other.synced:.4f}, seen"
            f" {other.seen:.4f}"
        )

    def _over(self, write: Write) -> float:
        life = write.life
        if write.over < NEVER or life is None:
            return write.over
        return NEVER if life.node is None else self.world.departed.get(life.node, NEVER)

    def _may_be_lost(self, write: Write) -> bool:
        life = write.life
        if write.synced < NEVER or life is None:
            return False
        if not life.dead and life.node not in self.world.departed:
            return False
        lost_power = any(at >= write.began for at in self.world.power_losses)
        return write.seen == NEVER or lost_power

    def promised(self) -> int:
        """How many writes were synced."""
        return sum(
            write.synced < NEVER and write.version > 0
            for known in self.writes.values()
            for write in known.values()
        )


def block_of(version: int) -> bytes:
    return (_VERSION.pack(version) * (SECTOR_BYTES // _VERSION.size)) * (
        BLOCK_BYTES // SECTOR_BYTES
    )


async def make_registers(life: Life) -> frozenset[tuple[int, int]]:
    """The files, all zero, and synced; their numbers and generations."""
    volume: Any = life.volume
    made = []
    for name in NAMES:
        handle, found = await volume.create(ROOT, name, 0o644, os.O_RDWR | os.O_CREAT, 0, 0)
        volume.remember(found.ino, 1)
        for place in PLACES:
            if place != ATTRIBUTE:
                await volume.write(handle, place * BLOCK_BYTES, block_of(0))
        await volume.setxattr(handle.ino, _XATTR, block_of(0)[:SECTOR_BYTES])
        await volume.fsync(handle.ino, False)
        await volume.release(handle)
        await volume.forget(found.ino, 1)
        made.append((found.ino, found.generation))
    return frozenset(made)


class RegisterProgram:
    """Writes, syncs and reads as it likes."""

    def __init__(self, life: Life, registers: Registers, rng: Random) -> None:
        self.life = life
        self.volume: Any = life.volume
        self.registers = registers
        self.rng = rng
        self.open: dict[bytes, Handle] = {}
        self.unsynced: dict[bytes, list[Write]] = {name: [] for name in NAMES}

    async def run(self, steps: int) -> None:
        """So many steps; ends early if the daemon does."""
        try:
            await self.life.call(self._steps, steps)
        except NodeDied:
            pass

    async def read_all(self) -> None:
        """Each register once."""
        await self.life.call(self._read_all)

    async def look(self, name: bytes, steps: int) -> None:
        """Read again and again what the host may have in its cache: whoever is cut off from
        everything goes on with it until its lease ends, and not longer."""
        try:
            await self.life.call(self._look, name, steps)
        except NodeDied:
            pass

    async def _look(self, name: bytes, steps: int) -> None:
        await self._open(name)
        for _ in range(steps):
            if self.life.stopping:
                break
            await self._read((name, ATTRIBUTE))
            await trio.sleep(self.rng.choice((0.1, 0.3, 0.5)))
        await self.volume.release(self.open[name])

    async def _steps(self, steps: int) -> None:
        await self._open_all()
        for _ in range(steps):
            if self.life.stopping:
                break
            name, place = self.rng.choice(NAMES), self.rng.choice(PLACES)
            kind = self.rng.random()
            if kind < 0.35:
                await self._write((name, place))
            elif kind < 0.85:
                await self._read((name, place))
            else:
                await self._sync(name)
            await trio.sleep(self.rng.choice((0, 0.001, 0.02, 0.2, 0.5)))
        for handle in self.open.values():
            await self.volume.release(handle)

    async def _read_all(self) -> None:
        await self._open_all()
        for register in self.registers.writes:
            await self._read(register)
        for handle in self.open.values():
            await self.volume.release(handle)

    async def _open_all(self) -> None:
        for name in NAMES:
            await self._open(name)

    async def _open(self, name: bytes) -> None:
        found = await self.volume.lookup(ROOT, name)
        self.volume.remember(found.ino, 1)
        self.open[name] = await self.volume.open(found.ino, os.O_RDWR, 0)
        await self.volume.forget(found.ino, 1)

    async def _write(self, register: Register) -> None:
        name, place = register
        write = self.registers.begin(register, self.life)
        data = block_of(write.version)
        if place == ATTRIBUTE:
            await self.volume.setxattr(self.open[name].ino, _XATTR, data[:SECTOR_BYTES])
        else:
            await self.volume.write(self.open[name], place * BLOCK_BYTES, data)
        write.over = trio.current_time()
        self.unsynced[name].append(write)

    async def _sync(self, name: bytes) -> None:
        written, self.unsynced[name] = self.unsynced[name], []
        await self.volume.fsync(self.open[name].ino, False)
        for write in written:
            write.synced = trio.current_time()

    async def _read(self, register: Register) -> None:
        name, place = register
        began = trio.current_time()
        if place == ATTRIBUTE:
            data = await self.volume.getxattr(self.open[name].ino, _XATTR)
        else:
            data = await self.volume.read(self.open[name], place * BLOCK_BYTES, BLOCK_BYTES)
        assert data, f"{register} is empty"
        self.registers.read(register, self.life, began, bytes(data))
