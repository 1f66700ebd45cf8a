"""A mounted volume: every call that a kernel, or anybody else, may make of it.

`open_volume` puts the parts together; `Volume` names what they offer. What each call does, and
what it raises, is said where it is done:

    namespace      lookup, readdir, mkdir, mknod, symlink, link, unlink, rmdir, readlink
    rename         rename
    metadata       getattr, setattr, getxattr, setxattr, listxattr, removexattr
    open_files     open, create, release, remember, forget
    data           read, write, fsync
    recovery       recover

Concurrency: any number of tasks may call anything. These background tasks belong to a volume: the
store's (`csvfs.journal.journal`), the reclaimer (`csvfs.data.reclaim`) and what it shows to others
(`csvfs.data.peers`), the reader of free space (`csvfs.engine.space`), the one that waits for
orphans (`csvfs.namespace.orphans`), and the one that claims groups (`csvfs.engine.homes`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from csvfs.allocation.affinity import Affinity
from csvfs.allocation.allocator import Groups
from csvfs.data.device import DataDevice, told
from csvfs.data.path import DataPath
from csvfs.data.peers import PRESENT_S, PeerReclaim
from csvfs.data.reclaim import Reclaimer
from csvfs.data.truncation import Truncation
from csvfs.engine.change import ChangeScope, OrphanQueue, ReclaimSignal
from csvfs.engine.engine import Engine
from csvfs.engine.glance import Glance
from csvfs.engine.homes import claim_homes
from csvfs.engine.lock_owner import LockAdapter, LockOwner
from csvfs.engine.locks import FLUSHED_PREFIXES, TENDED_PREFIX, Resources
from csvfs.engine.recovery import Recovery
from csvfs.engine.space import SpaceReader
from csvfs.errors import VolumeFailed
from csvfs.journal.store import JournalStart, Store, StoreOptions, open_store
from csvfs.membership.slot_start import journal_place
from csvfs.namespace.inode_table import InodeTable
from csvfs.namespace.metadata import Metadata
from csvfs.namespace.names import Namespace
from csvfs.namespace.open_files import OpenFiles
from csvfs.namespace.orphans import Orphans
from csvfs.namespace.rename import Renamer
from csvfs.namespace.second_look import SecondLook
from csvfs.ondisk.block import BLOCK_BYTES, BLOCKS_PER_UNIT
from csvfs.ondisk.geometry import Geometry
from csvfs.ondisk.superblock import Superblock
from lockmgr.manager import LockManager
from redirector.block.device import BlockError, BlockIO


@dataclass(frozen=True, slots=True)
class Space:
    """What statvfs(3) tells. Inodes are made as they are needed: any free block may be one."""

    block_bytes: int
    blocks: int
    free_blocks: int
    available_blocks: int
    files: int
    free_files: int


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """What may be chosen at mount time."""

    store: StoreOptions = field(default_factory=StoreOptions)
    clock: Callable[[], int] = time.time_ns
    """Now, in ns since the epoch (CLOCK_REALTIME)."""


class Volume:
    """Made by `open_volume`."""

    def __init__(self, parts: VolumeParts) -> None:
        store, scope = parts.store, parts.scope
        self.store = store
        self.table = scope.table
        self.engine = Engine(store, parts.locks, scope, self._reclaim_now)
        data_device = DataDevice(parts.device, store)
        truncation = Truncation(self.engine, data_device)
        self.reclaimer = Reclaimer(self.engine, parts.device, unmap=parts.unmap)
        self.peers = PeerReclaim(parts.locks, scope.resources, scope.slot, self.reclaimer)
        self.space = SpaceReader(store, scope.geometry, scope.groups.space)

        glance = Glance(self.engine)
        namespace = Namespace(self.engine, glance)
        self.second_look = SecondLook(namespace.looking_up)
        self.lookup = self.second_look.lookup
        self.gone = self.second_look.gone
        self.used = self.second_look.used
        self.readdir = namespace.readdir
        self.mkdir = namespace.mkdir
        self.mknod = namespace.mknod
        self.symlink = namespace.symlink
        self.readlink = namespace.readlink
        self.link = namespace.link
        self.unlink = namespace.unlink
        self.rmdir = namespace.rmdir
        self.rename = Renamer(self.engine).rename

        metadata = Metadata(self.engine, glance, truncation)
        self.getattr = metadata.getattr
        self.setattr = metadata.setattr
        self.getxattr = metadata.getxattr
        self.setxattr = metadata.setxattr
        self.listxattr = metadata.listxattr
        self.removexattr = metadata.removexattr

        self.orphans = Orphans(self.engine)
        files = OpenFiles(self.engine, truncation, self.orphans)
        self.open = files.open
        self.create = files.create
        self.release = files.release
        self.remember = files.remember
        self.forget = files.forget
        self._forget_all = files.forget_all

        data = DataPath(self.engine, data_device, truncation)
        self.read = data.read
        self.write = data.write
        self.fsync = data.fsync

        self.recover = Recovery(self.engine, truncation, self.reclaimer, self.peers).recover

    async def _reclaim_now(self) -> bool:
        return await self.peers.reclaim()

    async def fsyncdir(self, ino: int, datasync: bool) -> None:
        """The names in a directory are stable on return. Raises `VolumeFailed`."""
        await self.fsync(ino, datasync)

    async def sync(self) -> None:
        """Everything that was done before the call is stable on return. Raises `VolumeFailed`."""
        try:
            await self.table.write_back_now()
        except BlockError as error:
            raise told(error) from error
        await self.store.commit()

    async def statfs(self) -> Space:
        """How much space there is: exact with one node, and a little behind what others do
        (`csvfs.engine.space`). Raises `Damaged`, `VolumeFailed`."""
        totals = await self.space.totals()
        free = totals.free_units * BLOCKS_PER_UNIT + totals.free_metadata_blocks
        available = totals.available_units * BLOCKS_PER_UNIT
        blocks = totals.units * BLOCKS_PER_UNIT
        return Space(BLOCK_BYTES, blocks, free, available, blocks, free)

    @property
    def failure(self) -> VolumeFailed | None:
        """Why every call fails from now on, if so."""
        return self.store.failure

    async def close(self) -> None:
        """The kernel is gone: end what it had open, and free what there is to be freed.

        Called by `open_volume` at the end of its block. Raises `VolumeFailed`.
        """
        await self._forget_all()
        with trio.move_on_after(PRESENT_S):
            await self.reclaimer.lists_are_ours.wait()
        if self.reclaimer.lists_are_ours.is_set():  # else whoever recovers the slot frees it
            await self.reclaimer.drain()

    def check(self) -> None:
        """Assert the invariants of everything that is kept in memory."""
        self.table.check()
        self.store.check()
        self.engine.scope.groups.space.check()


@dataclass(frozen=True, slots=True)
class VolumeParts:
    """What a volume is made of."""

    device: BlockIO
    store: Store
    locks: LockManager
    scope: ChangeScope
    unmap: bool


@asynccontextmanager
async def open_volume(
    device: BlockIO,
    superblock: Superblock,
    slot: int,
    incarnation: int,
    start: JournalStart,
    locks: LockManager,
    *,
    options: VolumeOptions | None = None,
    on_failed: Callable[[VolumeFailed], None] | None = None,
) -> AsyncIterator[Volume]:
    """The volume of a slot whose journal is empty: replayed (`csvfs.journal.replay`), or just made.

    The caller has the right to write to the LUN, and calls `Volume.recover` for each slot that
    was replayed before anything else. Leaving the block closes the volume and the lock manager,
    whose owners need the store, and leaves an empty journal; leaving it with an exception, or
    after a failure, stops as a crash would.
    """
    options = options or VolumeOptions()
    geometry = superblock.geometry
    resources = Resources(geometry)
    adapter = LockAdapter(locks, resources)
    async with open_store(
        device,
        journal_place(superblock, slot),
        incarnation,
        start,
        resource_of=resources.covering,
        locks=adapter,
        holds=adapter.holds,
        options=options.store,
        on_failed=on_failed or (lambda _failure: None),
    ) as store:
        table = InodeTable(store, resources)
        store.add_hook(table)
        owner = LockOwner(locks, store, table)
        for prefix in FLUSHED_PREFIXES:
            locks.register_owner(prefix, owner)
        groups = Groups(geometry, resources)
        scope = ChangeScope(
            geometry,
            resources,
            groups,
            table,
            slot,
            options.clock,
            lambda: len(locks.core.members) > 1,
            _affinity(geometry, resources, locks),
            ReclaimSignal(),
            OrphanQueue(),
        )
        volume = Volume(VolumeParts(device, store, locks, scope, superblock.unmap_allowed))
        locks.register_owner(TENDED_PREFIX, volume.peers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.peers.tend, name="as long as mounted")
            nursery.start_soon(volume.reclaimer.run)
            nursery.start_soon(volume.space.run)
            nursery.start_soon(volume.orphans.run)
            nursery.start_soon(volume.second_look.run)
            nursery.start_soon(claim_homes, scope.affinity, resources, locks)
            yield volume
            if volume.failure is None:
                await volume.close()
            nursery.cancel_scope.cancel()
        if volume.failure is None:
            await _give_up_locks(store, locks)


def _affinity(geometry: Geometry, resources: Resources, locks: LockManager) -> Affinity:
    core = locks.core

    def masters(group: int) -> bool:
        return core.recovery.mastering.master_of(resources.group(group)) == core.node

    return Affinity(geometry, masters, lambda: core.epoch)


async def _give_up_locks(store: Store, locks: LockManager) -> None:
    """While the store still runs: a lock on its way out may have something to write."""
    await store.checkpoint()  # one flush for all of them
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.wait_failed)  # then its owners never finish
        await locks.aclose()
        nursery.cancel_scope.cancel()
