"""A store of blocks in memory, whose cache forgets: bodies are run again and again.

The real transaction over a dictionary. Before each run of a body some cached blocks are dropped at
random; the body runs until nothing it needs is missing, and only the run that ends is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from random import Random
from typing import TypeVar

from csvfs.journal.transaction import (
    BlockKey,
    HeldLock,
    LockHolder,
    NeedBlocks,
    NeedLock,
    Transaction,
    TransactionScope,
)
from csvfs.ondisk.block import BadBlock, BlockType, block_flags, block_owner, block_type

T = TypeVar("T")
VOLUME_ID = bytes(range(16))


class ForgetfulBlocks:
    """Implements `BlockReader`."""

    def __init__(self, seed: int = 0, forget: float = 0.0) -> None:
        self.home: dict[int, bytes] = {}
        self.cached: set[int] = set()
        self.random = Random(seed)
        self.forget = forget
        """Probability that a cached block is dropped before a body runs."""
        self.locks = Locks()
        self.restarts = 0

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes:
        if address not in self.cached:
            raise NeedBlocks(BlockKey(address, kind, owner, flags))
        block = self.home[address]
        if (block_type(block), block_owner(block), block_flags(block)) != (kind, owner, flags):
            raise BadBlock(address, kind, "it is something else")
        return block

    def require(self, wanted: Iterable[BlockKey]) -> None:
        missing = [key for key in wanted if key.address not in self.cached]
        if missing:
            raise NeedBlocks(*missing)

    def _load(self, missing: NeedBlocks) -> None:
        for key in missing.wanted:
            if key.address not in self.home:
                raise BadBlock(key.address, key.kind, "nothing is there")
            self.cached.add(key.address)

    def remember(self) -> None:
        """Nothing is missing for a while: so that proofs of the whole do not run many times."""
        self.cached = set(self.home)

    def run(self, body: Callable[[ForgetfulBlocks], T]) -> T:
        """A body that only reads."""
        while True:
            try:
                return body(self)
            except NeedBlocks as missing:
                self.restarts += 1
                self._load(missing)

    def transact(
        self,
        body: Callable[[Transaction], T],
        *,
        privileged: bool = False,
        bound: int = 48,
    ) -> T:
        """A body that changes blocks. An exception leaves everything as it was."""
        if self.forget:
            self.cached = {a for a in sorted(self.cached) if self.random.random() >= self.forget}
        scope = TransactionScope(self, VOLUME_ID)
        holder = LockHolder(self.locks)
        while True:
            tx = Transaction(scope, privileged=privileged, bound=bound, locks=holder)
            try:
                result = body(tx)
            except NeedBlocks as missing:
                self.restarts += 1
                self._load(missing)
                continue
            except NeedLock as needed:
                self.restarts += 1
                self.locks.busy.discard(needed.resource)
                continue
            tx.check()
            holder.release()
            for address, image in tx.images.items():
                self.home[address] = bytes(image.data)
                self.cached.add(address)
            for address in tx.freed:
                self.home.pop(address, None)
                self.cached.discard(address)
            for callback in tx.merge_callbacks:
                callback()
            return result


class Locks:
    """Implements `LockSource`: everything is free but what is ``busy``."""

    class Held:
        def release(self) -> None:
            pass

    def __init__(self) -> None:
        self.busy: set[Hashable] = set()
        self.taken: list[Hashable] = []

    def try_acquire(self, resource: Hashable, mode: int) -> HeldLock | None:  # noqa: ARG002
        if resource in self.busy:
            return None
        self.taken.append(resource)
        return self.Held()

    async def acquire(self, resource: Hashable, mode: int) -> HeldLock:  # noqa: ARG002
        return self.Held()

    def order(self, resource: Hashable) -> tuple[int, ...]:  # noqa: ARG002
        return (0,)


class Addresses:
    """Where a tree gets its blocks from in a test: counts up, and notes what came back."""

    def __init__(self, first: int = 1000) -> None:
        self.next = first
        self.used: set[int] = set()

    def for_body(self, tx: Transaction) -> BodyAddresses:
        """The callbacks of one run of a body."""
        return BodyAddresses(self, tx)


class BodyAddresses:
    """Addresses that one run of a body took and gave back; counts once the body is merged."""

    def __init__(self, source: Addresses, tx: Transaction) -> None:
        self._source = source
        self._tx = tx
        self.taken: list[int] = []
        self.released: list[int] = []
        tx.after_merge(self.merge)

    def allocate(self) -> int:
        address = self._source.next + len(self.taken)
        self.taken.append(address)
        return address

    def release(self, address: int) -> None:
        assert address in self._source.used or address in self.taken
        assert address not in self.released
        self.released.append(address)
        self._tx.free(address)

    def merge(self) -> None:
        self._source.next += len(self.taken)
        self._source.used |= set(self.taken)
        self._source.used -= set(self.released)
