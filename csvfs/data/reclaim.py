"""The background task that makes free what transactions gave up.

Theory. A unit or block that an inode gave up must not be allocated again before the transaction
that gave it up is stable: a crash would bring the old owner back, over somebody else's data. So
such a transaction only notes it on the slot's reclaim list; the bits in the maps are cleared here,
later, by transactions that take items off the list at the same time. An item is in one of two
states, and survives any number of crashes in either: on the list and allocated, or neither.

A round
    1. take apart dead inodes on the list: their units and blocks become items of their own,
       a transaction's worth at a time, and at last their own block does
    2. wait until what the list says is stable, and home writes of freed blocks have ended; bring
       home what other nodes may still look at (`csvfs.engine.change.Change.free_inode`)
    3. UNMAP the data units, where the target's probe allows it: a hint, and harmless now
    4. clear the bits and remove the items, in order of address: one group after the other

In the background step 2 waits for the commit that comes by itself. When space has run out, or the
volume is left (`drain`), it asks for one.

An item that cannot be carried out (its inode's tree is damaged, the map contradicts it) is logged
and passed over until the next mount; `csvctl check` deals with it.

invariants:
  1. what is cleared was on the list in a stable state of the volume
  2. only this task removes items from this slot's list, once nobody recovers it any more; other
     slots' lists are touched only by recovery, when their nodes are gone

Concurrency: one round runs at a time (`_turn`), in the task of `run` or of whoever drains.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

import trio

from csvfs.btree.tree import Tree, TreeRoot
from csvfs.data.device import told
from csvfs.engine.change import Change
from csvfs.engine.engine import Engine
from csvfs.errors import Damaged, NoSpace, VolumeFailed
from csvfs.journal.transaction import BlockReader
from csvfs.ondisk.block import BLOCK_BYTES, BLOCKS_PER_UNIT, UNIT_BYTES, BadBlock
from csvfs.ondisk.inode import RECLAIM_VALUE, ReclaimKind
from lockmgr.modes import Mode
from redirector.block.device import BlockError, BlockIO, LunIdentity, TargetRefused

_log: Final = logging.getLogger("csvfs.data.reclaim")

BATCH_ITEMS: Final = 512
FREE_ITEMS: Final = 64
"""In one transaction: a body must not hold up all other tasks for long."""
UNMAP_RANGES: Final = 64
"""In one command."""
FREE_BLOCKS: Final = 12
"""Images that freeing one more item may take: a group's header and map, and the nodes of the list
that its removal joins."""

_FREEABLE: Final = frozenset((ReclaimKind.DATA, ReclaimKind.BLOCK))


class Item(NamedTuple):
    """An entry of the list: ``units`` from block ``address`` on, or the one block there."""

    address: int
    kind: ReclaimKind
    units: int


class Reclaimer:
    """Empties reclaim lists."""

    def __init__(self, engine: Engine, device: BlockIO, *, unmap: bool) -> None:
        self._engine = engine
        self._device = device
        identity = device.identity
        self._unmap = unmap and identity.unmap_granularity_bytes > 0
        self._turn = trio.Lock()
        self._hurried = 0
        """Who waits for a round to end."""
        self._patience = trio.CancelScope()
        """Cancelled when somebody begins to wait."""
        self.lists_are_ours = trio.Event()
        """Nobody else works on this slot's lists (`csvfs.data.peers`)."""
        self._passed_over: set[Item] = set()
        self._starved = False
        """A dead inode could not be taken apart in this round for want of a block."""
        self.units_freed = 0
        self.blocks_freed = 0

    async def run(self) -> None:
        """Empty this slot's list whenever there is something on it, until the volume fails."""
        try:
            while True:
                await self._engine.scope.reclaim.wait()
                await self._empty(self._engine.scope.slot)
        except VolumeFailed:
            return  # whoever uses the volume is told
        except Damaged as error:
            _log.error("nothing more is reclaimed, the list itself is damaged: %s", error)

    async def drain(self, slot: int | None = None) -> bool:
        """Empty the list of a slot (this node's by default) now; True if something was freed.

        Raises `Damaged`, `VolumeFailed`.
        """
        if self.in_round:
            return False  # it is a round itself that finds no space
        before = self.freed
        self._hurried += 1
        self._patience.cancel()
        try:
            await self._empty(self._engine.scope.slot if slot is None else slot)
        finally:
            self._hurried -= 1
        return self.freed > before

    @property
    def in_round(self) -> bool:
        """Is the calling task carrying out a round?"""
        return self._turn.statistics().owner is trio.lowlevel.current_task()

    @property
    def freed(self) -> int:
        """Units and blocks, so far."""
        return self.units_freed + self.blocks_freed

    async def _empty(self, slot: int) -> None:
        if slot == self._engine.scope.slot:
            await self.lists_are_ours.wait()
        async with self._turn:
            self._starved, before = True, -1
            # What a round frees may have nodes of the list itself follow, for the next one.
            while (self._starved or self._hurried) and self.freed > before:
                self._starved, before = False, self.freed
                await self._round(slot)

    async def _round(self, slot: int) -> None:
        position = 0
        while items := await self._items(slot, position):
            position = items[-1].address + 1
            for item in items:
                if item.kind is ReclaimKind.INODE:
                    await self._carry_out(item, self._take_apart, slot)
        position = 0
        while items := await self._items(slot, position):
            position = items[-1].address + 1
            freeable = [item for item in items if item.kind in _FREEABLE]
            if freeable:
                await self._free(slot, freeable)

    async def _items(self, slot: int, first: int) -> list[Item]:
        """Some items from address ``first`` on, without those that were passed over."""
        engine = self._engine
        root = TreeRoot.of_reclaim(engine.scope.geometry.reclaim_root(slot), slot)

        def body(reader: BlockReader) -> list[Item]:
            items = (_item(root, *entry) for entry in Tree(reader, root).items(first))
            return list(islice((i for i in items if i not in self._passed_over), BATCH_ITEMS))

        async with engine.locks.acquire(engine.resources.reclaim(slot), Mode.PR):
            return await engine.look(body)

    async def _carry_out(
        self, item: Item, what: Callable[[int, Item], Awaitable[None]], slot: int
    ) -> None:
        """Do ``what`` for one item; if that finds damage, pass the item over from now on."""
        try:
            await what(slot, item)
        except Damaged as error:
            self._passed_over.add(item)
            _log.error("%s %d stays unreclaimed: %s", item.kind.name, item.address, error)
        except NoSpace:
            # The list itself has to grow and cannot: what is on it already is freed first.
            self._starved = True

    # -- dead inodes ---------------------------------------------------------------------------
    async def _take_apart(self, slot: int, item: Item) -> None:
        """What an inode owns, and then its block, become items of their own."""
        engine, ino = self._engine, item.address
        async with engine.locks.acquire(engine.resources.inode(ino), Mode.EX):
            while not await engine.change(lambda c: _take_apart(c, slot, ino), privileged=True):
                await trio.lowlevel.checkpoint()

    # -- units and blocks ----------------------------------------------------------------------
    async def _free(self, slot: int, items: list[Item]) -> None:
        store = self._engine.store
        if not self._hurried:
            with trio.CancelScope() as self._patience:
                await store.wait_stable()
        if self._hurried:
            await store.commit()
        await store.settle()
        await store.put_to_rest({item.address for item in items if item.kind is ReclaimKind.BLOCK})
        await self._discard(items)
        left = items
        while left:
            try:
                left = left[await self._free_some(slot, left) :]
                await trio.lowlevel.checkpoint()
            except Damaged:
                # One of them contradicts the maps: find out which.
                for item in left:
                    await self._carry_out(item, self._free_one, slot)
                return

    async def _free_one(self, slot: int, item: Item) -> None:
        await self._free_some(slot, [item])

    async def _free_some(self, slot: int, items: list[Item]) -> int:
        """Free as many of ``items``, from the first on, as one transaction takes."""
        done = await self._engine.change(lambda c: _free(c, slot, items), privileged=True)
        for item in items[:done]:
            if item.kind is ReclaimKind.DATA:
                self.units_freed += item.units
            else:
                self._engine.store.forget_block(item.address)
                self.blocks_freed += 1
        return done

    async def _discard(self, items: list[Item]) -> None:
        """UNMAP: tell a thin array that nobody needs these units any more."""
        if not self._unmap:
            return
        ranges = list(_unmap_ranges(items, self._device.identity))
        try:
            for start in range(0, len(ranges), UNMAP_RANGES):
                await self._device.unmap(ranges[start : start + UNMAP_RANGES])
        except TargetRefused as error:
            _log.warning("the target takes no UNMAP, none is sent any more: %s", error)
            self._unmap = False
        except BlockError as error:
            raise told(error) from error


# -- bodies ----------------------------------------------------------------------------------------
def _take_apart(change: Change, slot: int, ino: int) -> bool:
    inode = change.inode(ino)
    if inode.nlink or inode.entries:
        raise Damaged(f"inode {ino} has {inode.nlink} names and {inode.entries} entries")
    if inode.is_regular and not change.cut(inode, 0):
        return False
    if change.tx.blocks_left < FREE_BLOCKS:
        return False
    if inode.xattr_block:
        change.drop_block(inode, inode.xattr_block)
        inode.xattr_block = 0
    if inode.symlink_tail:
        change.drop_block(inode, inode.symlink_tail)
        inode.symlink_tail = 0
    change.free_inode(inode, slot)
    return True


def _free(change: Change, slot: int, items: list[Item]) -> int:
    reclaim, groups = change.reclaim_list(slot), change.scope.groups
    for done, (address, kind, units) in enumerate(items):
        if done == FREE_ITEMS or (done and change.tx.blocks_left < FREE_BLOCKS):
            return done
        reclaim.remove(address)
        if kind is ReclaimKind.DATA:
            groups.free_units(change.tx, address // BLOCKS_PER_UNIT, units)
        else:
            groups.free_block(change.tx, address)
    return len(items)


def _item(root: TreeRoot, key: int, value: bytes) -> Item:
    kind, count, _ = RECLAIM_VALUE.unpack(value)
    try:
        return Item(key, ReclaimKind(kind), count)
    except ValueError:
        raise BadBlock(
            root.address, root.block_type, f"block {key} is to be reclaimed as {kind}"
        ) from None


def _unmap_ranges(items: list[Item], identity: LunIdentity) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the data units, aligned inward, neighbours joined."""
    granularity = identity.unmap_granularity_bytes
    most = max(granularity, identity.max_unmap_bytes // granularity * granularity)
    joined: list[tuple[int, int]] = []
    for address, kind, units in items:
        if kind is ReclaimKind.DATA:
            start, end = address * BLOCK_BYTES, address * BLOCK_BYTES + units * UNIT_BYTES
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, end))
    for start, end in joined:
        start += -start % granularity
        end -= end % granularity
        for offset in range(start, end, most):
            yield offset, min(most, end - offset)
