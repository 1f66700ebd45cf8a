"""A transaction: the blocks that one synchronous function changes, all of them or none.

Theory. A body ``body(tx)`` runs without an await, so what it reads and changes is atomic in memory
and transactions are serial by construction; no two bodies ever interleave. A body reads blocks
only from the cache. Where one is absent it raises `NeedBlocks`, its private copies are thrown
away, the caller loads what was missing and runs the body again, from the start. So a body has no
effect but through ``tx`` and its return value: a body that ended early was never there.

What a body changed is *merged* into the running set of the journal in one step, and is stable
when the record of that set is (`csvfs.journal.journal`).

invariants:
  1. an address is in at most one of: images, freed
  2. `edit` always copies: no image that anyone else can see is ever changed through a transaction
  3. len(images) <= bound and len(freed) <= MAX_TX_FREES, so that the room held in the journal
     before the body ran is enough
  4. locks taken by bodies are released after the merge, or when the transaction is given up
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeVar

from csvfs.ondisk.block import BlockType, new_block

MAX_TX_BLOCKS: Final = 48
"""Images that one transaction may hold: what fits in the smallest journal beside its neighbours."""
MAX_TX_FREES: Final = 512
"""Blocks that one transaction may free (each costs 8 bytes of a record's header)."""

T = TypeVar("T")


class BlockKey(NamedTuple):
    """A block and what it must be found to be: type, owner and flags name the lock that covers it.

    ``flags`` tell the three uses of a TREE_NODE apart, whose owners are numbered independently.
    """

    address: int
    kind: BlockType
    owner: int
    flags: int = 0


class NeedBlocks(Exception):
    """The body cannot go on without these blocks; `Store` loads them and runs it again."""

    def __init__(self, *wanted: BlockKey) -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def __str__(self) -> str:
        return "not in the cache: " + ", ".join(str(key.address) for key in self.wanted)


class NeedLock(Exception):
    """The body has no way on without this lock; `Store` waits for it and runs the body again."""

    def __init__(self, resource: Hashable, mode: int) -> None:
        super().__init__(resource, mode)
        self.resource = resource
        self.mode = mode


class TransactionTooLarge(AssertionError):
    """A body used more blocks than the bound it was run with: a programmer's error."""


class BlockReader(Protocol):
    """Where blocks are read from: the cache, or a transaction over it."""

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes | bytearray:
        """The 4096 bytes of a block, not to be changed.

        Raises `NeedBlocks` if it is not cached, `BadBlock` if it is cached as something else.
        """

    def require(self, wanted: Iterable[BlockKey]) -> None:
        """Raise `NeedBlocks` with *all* that are absent: they are then loaded in parallel."""


class HeldLock(Protocol):
    """A lock that was granted."""

    def release(self) -> None:
        """Give it back, at once."""


class LockSource(Protocol):
    """Where a transaction takes locks: allocation groups, orphan and reclaim lists."""

    def try_acquire(self, resource: Hashable, mode: int) -> HeldLock | None:
        """The lock if it is to be had without waiting, else None."""

    async def acquire(self, resource: Hashable, mode: int) -> HeldLock:
        """Wait for the lock."""

    def order(self, resource: Hashable) -> tuple[int, ...]:
        """Place in the lock order: several are waited for in ascending order."""


class LockHolder:
    """The locks that bodies took on one caller's behalf, kept until its transaction has ended.

    They are kept while missing blocks are loaded too: a block is read only under its lock.
    """

    __slots__ = ("_held", "_source")

    def __init__(self, source: LockSource) -> None:
        self._source = source
        self._held: dict[Hashable, tuple[int, HeldLock]] = {}

    def try_lock(self, resource: Hashable, mode: int) -> bool:
        """Hold ``resource`` if that needs no waiting."""
        held = self._held.get(resource)
        if held is not None:
            assert held[0] >= mode, f"{resource!r} is held in a lower mode by this transaction"
            return True
        lock = self._source.try_acquire(resource, mode)
        if lock is None:
            return False
        self._held[resource] = (mode, lock)
        return True

    async def wait(self, resource: Hashable, mode: int) -> None:
        """Wait for ``resource``, holding only what comes before it in the lock order."""
        place = self._source.order(resource)
        for other in [other for other in self._held if self._source.order(other) >= place]:
            self._held.pop(other)[1].release()
        self._held[resource] = (mode, await self._source.acquire(resource, mode))

    def release(self) -> None:
        """Give all of them back."""
        while self._held:
            self._held.popitem()[1][1].release()


Holds = Callable[[BlockType, int, int], bool]
"""``holds(kind, owner, flags)``: is the lock that covers such a block held EX?"""


class Image:
    """One block's private copy. Only the transaction that made it changes it, until merged."""

    __slots__ = ("data", "flags", "fresh", "kind", "owner")

    def __init__(
        self, kind: BlockType, owner: int, flags: int, data: bytearray, fresh: bool
    ) -> None:
        self.kind = kind
        self.owner = owner
        self.flags = flags
        self.data = data
        self.fresh = fresh


@dataclass(slots=True)
class TransactionScope:
    """What all transactions of one store share."""

    reader: BlockReader
    volume_id: bytes
    holds: Holds | None = None
    """Asserted for each block that is changed; None: not asserted."""


class Transaction:
    """The changes of one body. Implements `BlockReader`: a body sees its own changes."""

    __slots__ = (
        "_locks",
        "_scope",
        "bound",
        "freed",
        "images",
        "merge_callbacks",
        "privileged",
        "stable_callbacks",
    )

    def __init__(
        self,
        scope: TransactionScope,
        *,
        bound: int = MAX_TX_BLOCKS,
        privileged: bool = False,
        locks: LockHolder | None = None,
    ) -> None:
        self._scope = scope
        self._locks = locks
        self.bound = bound
        self.privileged = privileged
        """May use the blocks kept in reserve (unlink, punch, reclaim on a full volume)."""
        self.images: dict[int, Image] = {}
        self.freed: set[int] = set()
        self.merge_callbacks: list[Callable[[], None]] = []
        self.stable_callbacks: list[Callable[[], None]] = []

    # -- reading ---------------------------------------------------------------------------
    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes | bytearray:
        """The block as this transaction sees it. Raises as `BlockReader.read` does."""
        image = self.images.get(address)
        if image is not None:
            _expect(image, address, kind, owner, flags)
            return image.data
        assert address not in self.freed, f"block {address} was freed by this transaction"
        return self._scope.reader.read(address, kind, owner, flags)

    def require(self, wanted: Iterable[BlockKey]) -> None:
        """Raise `NeedBlocks` with all of ``wanted`` that are not at hand."""
        self._scope.reader.require(key for key in wanted if key.address not in self.images)

    # -- changing --------------------------------------------------------------------------
    def edit(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytearray:
        """The private copy of a block, to be changed in place; the first call makes it.

        Raises as `BlockReader.read` does, and `TransactionTooLarge` beyond the bound.
        """
        image = self.images.get(address)
        if image is not None:
            _expect(image, address, kind, owner, flags)
            return image.data
        data = bytearray(self.read(address, kind, owner, flags))
        self._add(address, Image(kind, owner, flags, data, False))
        return data

    def create(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytearray:
        """A zeroed block with its header, to be filled in place.

        Whatever lay at that address means nothing: it may be what a guest wrote when the block
        was data, so replay does not look at it (`ImageFlag.FRESH`).
        """
        assert address not in self.images, f"block {address} exists already"
        data = new_block(kind, address, owner, self._scope.volume_id, flags)
        self._add(address, Image(kind, owner, flags, data, True))
        self.freed.discard(address)
        return data

    def free(self, address: int) -> None:
        """The block is nobody's any more: its images die (revoke), and it leaves the cache.

        It must not become anything else before this transaction is stable *and* home writes in
        flight have ended (`Store.settle`).
        """
        self.images.pop(address, None)
        self.freed.add(address)
        if len(self.freed) > MAX_TX_FREES:
            raise TransactionTooLarge(f"more than {MAX_TX_FREES} blocks freed by one transaction")

    def _add(self, address: int, image: Image) -> None:
        if len(self.images) >= self.bound:
            raise TransactionTooLarge(f"more than {self.bound} blocks changed by one transaction")
        holds = self._scope.holds
        assert holds is None or holds(image.kind, image.owner, image.flags), (
            f"{image.kind.words} block {address} of {image.owner} is changed without its lock"
        )
        self.images[address] = image

    @property
    def blocks_used(self) -> int:
        """Images so far. A body that works in batches stops before `bound`."""
        return len(self.images)

    @property
    def blocks_left(self) -> int:
        """Images that may still be added."""
        return self.bound - len(self.images)

    # -- locks -----------------------------------------------------------------------------
    def try_lock(self, resource: Hashable, mode: int) -> bool:
        """Hold ``resource`` until the transaction has ended, if that needs no waiting.

        On False the body takes another way, or gives up with `NeedLock`.
        """
        return self._locks is None or self._locks.try_lock(resource, mode)

    # -- callbacks -------------------------------------------------------------------------
    def after_merge(self, callback: Callable[[], None]) -> None:
        """Call it as soon as the changes are merged: memory of the caller follows the blocks."""
        self.merge_callbacks.append(callback)

    def on_stable(self, callback: Callable[[], None]) -> None:
        """Call it once the changes are stable on the LUN; never if that fails."""
        self.stable_callbacks.append(callback)

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        assert not self.images.keys() & self.freed
        assert len(self.images) <= self.bound and len(self.freed) <= MAX_TX_FREES
        assert all(len(image.data) == 4096 for image in self.images.values())


def _expect(image: Image, address: int, kind: BlockType, owner: int, flags: int) -> None:
    """A body that takes its own block for something else is wrong, whatever the disk holds."""
    assert image.kind == kind and image.owner == owner and image.flags == flags, (
        f"block {address} is {image.kind.words} of {image.owner}, not {kind.words} of {owner}"
    )
