"""The cache of metadata blocks: what transactions read, and where missing blocks are loaded.

Theory. A block is cached while this node holds the lock that covers it, so what is cached is true
until `drop`. Reading is synchronous and must cost next to nothing; loading is concurrent: all the
blocks that a body misses are read at once, neighbours in one command, and two tasks that miss the
same block read it once. What was read is verified before anyone sees it.

A block that the journal still needs (running, committing, or committed and not home) is *pinned*;
the others are *clean* and leave, least recently used first, beyond a cap. Eviction gives a block
that was read since the last sweep a second chance, so that a read costs one attribute and no list.

invariants:
  1. a block is pinned or in `_clean`, never both: clean ones alone are evicted
  2. cached data is what its key says, and never changes: a changed block is a new object
  3. what a load brings is kept only if, since it began, nobody put, forgot or dropped that block
  4. `_by_resource` lists exactly the cached blocks

Concurrency: no task of its own. `load` runs in the caller's task; when that is cancelled, those
that waited for the same blocks load them themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from csvfs.journal.block_transfer import MAX_RUN_BLOCKS, most_blocks
from csvfs.journal.transaction import BlockKey, Image, NeedBlocks
from csvfs.ondisk.block import BLOCK_BYTES, BadBlock, BlockType, block_flags, verify
from redirector.block.device import BlockError, BlockIO

DEFAULT_CLEAN_BYTES: Final = 64 << 20
BLOCK_COST_BYTES: Final = BLOCK_BYTES + 400
"""What a cached block takes in memory: its bytes, and Python's objects around them."""
LOAD_DEPTH: Final = 32

ResourceOf = Callable[[BlockType, int, int], Hashable]
"""``resource_of(kind, owner, flags)``: the lock that covers such a block."""


class CachedBlock:
    """One block. ``used``: read since the last sweep of the eviction."""

    __slots__ = ("address", "data", "flags", "kind", "owner", "pinned", "resource", "used")

    def __init__(self, key: BlockKey, resource: Hashable, data: bytes | bytearray) -> None:
        self.address, self.kind, self.owner, self.flags = key
        self.resource = resource
        self.data = data
        self.pinned = False
        self.used = True


class _Load:
    """A block that is being read. ``void``: what is read is not to be kept."""

    __slots__ = ("done", "resource", "void")

    def __init__(self, resource: Hashable) -> None:
        self.resource = resource
        self.done = trio.Event()
        self.void = False


class BlockCache:
    """Metadata blocks by address. Implements `csvfs.journal.transaction.BlockReader`."""

    def __init__(
        self,
        device: BlockIO,
        volume_id: bytes,
        resource_of: ResourceOf,
        *,
        clean_bytes: int = DEFAULT_CLEAN_BYTES,
    ) -> None:
        self._device = device
        self._volume_id = volume_id
        self.resource_of = resource_of
        self._blocks: dict[int, CachedBlock] = {}
        self._clean: OrderedDict[int, CachedBlock] = OrderedDict()
        self._by_resource: dict[Hashable, set[int]] = {}
        self._loading: dict[int, _Load] = {}
        self._limit = trio.CapacityLimiter(LOAD_DEPTH)
        self._eviction_off = 0
        self.clean_blocks = max(16, clean_bytes // BLOCK_COST_BYTES)
        """Clean blocks beyond this many are evicted."""
        self.greatest_version = 0
        """The Lamport clock: no version that was seen or given is greater."""
        self.loads = 0
        """Blocks read from the LUN so far."""

    # -- reading ---------------------------------------------------------------------------
    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes | bytearray:
        """The block's 4096 bytes, not to be changed. Raises `NeedBlocks` and `BadBlock`."""
        block = self._blocks.get(address)
        if block is None:
            raise NeedBlocks(BlockKey(address, kind, owner, flags))
        if (
            (block.kind is not kind and block.kind != kind)
            or block.owner != owner
            or block.flags != flags
        ):
            raise _misfit(block, kind, owner, flags)
        block.used = True
        return block.data

    def require(self, wanted: Iterable[BlockKey]) -> None:
        """Raise `NeedBlocks` with all of ``wanted`` that are absent."""
        absent = [key for key in wanted if key.address not in self._blocks]
        if absent:
            raise NeedBlocks(*absent)

    def __contains__(self, address: int) -> bool:
        return address in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def key_of(self, address: int) -> BlockKey | None:
        """What a cached block is, None if it is not cached."""
        block = self._blocks.get(address)
        if block is None:
            return None
        return BlockKey(address, block.kind, block.owner, block.flags)

    def resource_at(self, address: int) -> Hashable:
        """The lock that covers a block that is cached."""
        return self._blocks[address].resource

    # -- loading ---------------------------------------------------------------------------
    async def load(self, wanted: Sequence[BlockKey]) -> None:
        """Read and verify what is absent. On return a block may be absent all the same, if
        another task was reading it and failed, or its lock was dropped: look again.

        Raises `BadBlock` naming the block, and what the device raises.
        """
        mine: list[BlockKey] = []
        others: list[_Load] = []
        for key in sorted(set(wanted)):
            if key.address in self._blocks:
                continue
            load = self._loading.get(key.address)
            if load is not None:
                others.append(load)
            else:
                self._loading[key.address] = _Load(self.resource_of(*key[1:]))
                mine.append(key)
        try:
            await self._read_runs(list(_runs(mine, min(MAX_RUN_BLOCKS, most_blocks(self._device)))))
        finally:
            for key in mine:
                self._loading.pop(key.address).done.set()
        for load in others:
            await load.done.wait()

    async def _read_runs(self, runs: list[list[BlockKey]]) -> None:
        """Read all runs at once. Every one is ended before the first failure is raised."""
        if len(runs) == 1:
            await self._read_run(runs[0])
            return
        failures: list[BlockError | BadBlock] = []

        async def read(run: list[BlockKey]) -> None:
            try:
                async with self._limit:
                    await self._read_run(run)
            except (BlockError, BadBlock) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(read, run)
        if failures:
            raise failures[0]

    async def _read_run(self, run: list[BlockKey]) -> None:
        """Read neighbours in one command and keep those that are valid."""
        data = await self._device.read(run[0].address * BLOCK_BYTES, len(run) * BLOCK_BYTES)
        failure: BadBlock | None = None
        for index, key in enumerate(run):
            image = bytes(memoryview(data)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
            try:
                self._admit(key, image)
            except BadBlock as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _admit(self, key: BlockKey, image: bytes) -> None:
        version = verify(image, key.address, key.kind, self._volume_id, key.owner)
        flags = block_flags(image)
        if flags != key.flags:
            raise BadBlock(key.address, key.kind, f"flags are {flags:#x}, not {key.flags:#x}")
        if version > self.greatest_version:
            self.greatest_version = version
        self.loads += 1
        load = self._loading[key.address]
        if load.void or key.address in self._blocks:
            return
        block = self._insert(key, load.resource, image)
        self._clean[key.address] = block
        self._evict()

    # -- what the journal tells --------------------------------------------------------------
    def put(self, address: int, image: Image) -> None:
        """A merged transaction's image is the truth from now on. The block is pinned."""
        block = self._blocks.get(address)
        if block is None or image.fresh:
            self.forget(address)
            key = BlockKey(address, image.kind, image.owner, image.flags)
            block = self._insert(key, self.resource_of(*key[1:]), image.data)
        block.data = image.data
        if not block.pinned:
            block.pinned = True
            self._clean.pop(address, None)

    def unpin(self, address: int) -> None:
        """The journal needs the block no more: it may be evicted."""
        block = self._blocks.get(address)
        if block is not None and block.pinned:
            block.pinned = False
            self._clean[address] = block
            self._evict()

    def forget(self, address: int) -> None:
        """The block was freed: whatever is cached, or on its way into the cache, is void."""
        block = self._blocks.pop(address, None)
        if block is not None:
            self._clean.pop(address, None)
            owned = self._by_resource[block.resource]
            owned.discard(address)
            if not owned:
                del self._by_resource[block.resource]
        load = self._loading.get(address)
        if load is not None:
            load.void = True

    def forget_clean(self, address: int) -> None:
        """What was read there is nobody's: forget it, unless the journal needs it."""
        if address in self._clean:
            self.forget(address)

    # -- what the locks tell -----------------------------------------------------------------
    def drop(self, resource: Hashable) -> None:
        """The lock is gone: forget the blocks that it covers. None may be pinned any more."""
        for address in list(self._by_resource.get(resource, ())):
            assert not self._blocks[address].pinned, (
                f"block {address} of {resource!r} is not home, yet its lock is given up"
            )
            self.forget(address)
        for load in self._loading.values():
            if load.resource == resource:
                load.void = True

    def pinned(self) -> set[int]:
        """Addresses of the blocks that the journal still needs."""
        return self._blocks.keys() - self._clean.keys()

    def owned(self, resource: Hashable) -> frozenset[int]:
        """Addresses of the cached blocks that a lock covers."""
        return frozenset(self._by_resource.get(resource, ()))

    # -- eviction ----------------------------------------------------------------------------
    @contextmanager
    def eviction_off(self) -> Iterator[None]:
        """Keep everything meanwhile: for a body that keeps losing blocks before it has them all."""
        self._eviction_off += 1
        try:
            yield
        finally:
            self._eviction_off -= 1
            self._evict()

    def _insert(self, key: BlockKey, resource: Hashable, data: bytes | bytearray) -> CachedBlock:
        block = self._blocks[key.address] = CachedBlock(key, resource, data)
        owned = self._by_resource.get(resource)
        if owned is None:
            self._by_resource[resource] = {key.address}
        else:
            owned.add(key.address)
        return block

    def _evict(self) -> None:
        clean = self._clean
        while len(clean) > self.clean_blocks and not self._eviction_off:
            address, block = clean.popitem(last=False)
            if block.used:
                block.used = False
                clean[address] = block
            else:
                self.forget(address)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for address, block in self._blocks.items():
            assert block.address == address
            assert block.pinned != (address in self._clean)
            assert address in self._by_resource[block.resource]
            assert len(block.data) == BLOCK_BYTES
        assert self._clean.keys() <= self._blocks.keys()
        assert sum(map(len, self._by_resource.values())) == len(self._blocks)
        assert self._eviction_off or len(self._clean) <= self.clean_blocks


def _runs(keys: list[BlockKey], most: int) -> Iterator[list[BlockKey]]:
    """Neighbours together; ``keys`` ascend by address."""
    run: list[BlockKey] = []
    for key in keys:
        if run and (key.address != run[-1].address + 1 or len(run) == most):
            yield run
            run = []
        run.append(key)
    if run:
        yield run


def _misfit(block: CachedBlock, kind: BlockType, owner: int, flags: int) -> BadBlock:
    return BadBlock(
        block.address,
        kind,
        f"it is known as {block.kind.words} of {block.owner} (flags {block.flags:#x}),"
        f" not of {owner} (flags {flags:#x})",
    )
