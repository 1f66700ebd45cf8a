"""A transaction alone: private copies, bounds, locks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import pytest

from csvfs.format import BLOCK_BYTES, BlockType, block_address, block_flags, block_owner, block_type
from csvfs.journal.transaction import (
    MAX_TX_FREES,
    BlockKey,
    LockHolder,
    NeedBlocks,
    Transaction,
    TransactionScope,
    TransactionTooLarge,
)
from tests.small_store import KIND, VOLUME_ID, sealed, tag_of


class Shelf:
    """A `BlockReader` with a few blocks."""

    def __init__(self, *addresses: int) -> None:
        self.blocks = {address: sealed(address, address) for address in addresses}

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes:
        if address not in self.blocks:
            raise NeedBlocks(BlockKey(address, kind, owner, flags))
        return self.blocks[address]

    def require(self, wanted: Iterable[BlockKey]) -> None:
        absent = [key for key in wanted if key.address not in self.blocks]
        if absent:
            raise NeedBlocks(*absent)


def transaction(*addresses: int, bound: int = 8) -> Transaction:
    return Transaction(TransactionScope(Shelf(*addresses), VOLUME_ID), bound=bound)


def test_edit_gives_one_private_copy() -> None:
    tx = transaction(5)
    before = tx.read(5, KIND, 0)
    copy = tx.edit(5, KIND, 0)
    copy[100:108] = bytes(8)
    assert before == sealed(5, 5)
    assert tx.edit(5, KIND, 0) is copy
    assert tx.read(5, KIND, 0) is copy
    assert tx.blocks_used == 1 and tx.blocks_left == 7
    tx.check()


def test_create_makes_a_block_with_its_header() -> None:
    tx = transaction()
    block = tx.create(9, BlockType.TREE_NODE, 77, flags=2)
    assert len(block) == BLOCK_BYTES
    assert (block_type(block), block_address(block)) == (BlockType.TREE_NODE, 9)
    assert (block_owner(block), block_flags(block)) == (77, 2)
    assert tx.read(9, BlockType.TREE_NODE, 77, 2) is block
    assert tx.images[9].fresh


def test_absent_blocks_are_named_all_at_once() -> None:
    tx = transaction(5)
    tx.create(6, KIND, 0)
    with pytest.raises(NeedBlocks) as caught:
        tx.require([BlockKey(a, KIND, 0) for a in (5, 6, 7, 8)])
    assert [key.address for key in caught.value.wanted] == [7, 8]
    with pytest.raises(NeedBlocks, match="7"):
        tx.edit(7, KIND, 0)
    assert tx.blocks_used == 1


def test_free_takes_back_an_edit_and_create_takes_back_a_free() -> None:
    tx = transaction(5)
    tx.edit(5, KIND, 0)
    tx.free(5)
    assert (set(tx.images), tx.freed) == (set(), {5})
    with pytest.raises(AssertionError, match="was freed"):
        tx.read(5, KIND, 0)
    tx.create(5, KIND, 0)
    assert (set(tx.images), tx.freed) == ({5}, set())
    tx.check()


def test_a_block_is_not_taken_for_something_else() -> None:
    tx = transaction(5)
    tx.edit(5, KIND, 0)
    with pytest.raises(AssertionError, match="not inode"):
        tx.edit(5, BlockType.INODE, 0)
    with pytest.raises(AssertionError, match="exists already"):
        tx.create(5, KIND, 0)


def test_bounds() -> None:
    tx = transaction(1, 2, 3, bound=2)
    tx.edit(1, KIND, 0)
    tx.edit(2, KIND, 0)
    with pytest.raises(TransactionTooLarge):
        tx.edit(3, KIND, 0)
    for address in range(MAX_TX_FREES):
        tx.free(1000 + address)
    with pytest.raises(TransactionTooLarge):
        tx.free(1)


def test_changing_without_the_lock_is_an_error() -> None:
    scope = TransactionScope(Shelf(5), VOLUME_ID, holds=lambda *key: key == (KIND, 1, 0))
    tx = Transaction(scope)
    with pytest.raises(AssertionError, match="without its lock"):
        tx.edit(5, KIND, 0)
    tx.create(6, KIND, 1)


class Locks:
    """A `LockSource` of which some locks are taken by others."""

    def __init__(self, *taken: int) -> None:
        self.taken = set(taken)
        self.log: list[str] = []

    def try_acquire(self, resource: Hashable, mode: int) -> Lock | None:
        assert mode == 5
        return None if resource in self.taken else Lock(self, resource)

    async def acquire(self, resource: Hashable, mode: int) -> Lock:
        self.log.append(f"wait {resource}")
        assert mode == 5
        return Lock(self, resource)

    def order(self, resource: Hashable) -> tuple[int, ...]:
        assert isinstance(resource, int)
        return (resource,)


class Lock:
    def __init__(self, source: Locks, resource: Hashable) -> None:
        self.source = source
        self.resource = resource
        source.log.append(f"lock {resource}")

    def release(self) -> None:
        self.source.log.append(f"free {self.resource}")


def test_locks_are_kept_until_the_holder_lets_go() -> None:
    source = Locks(7)
    holder = LockHolder(source)
    tx = Transaction(TransactionScope(Shelf(), VOLUME_ID), locks=holder)
    assert tx.try_lock(3, 5) and tx.try_lock(3, 5) and not tx.try_lock(7, 5)
    again = Transaction(TransactionScope(Shelf(), VOLUME_ID), locks=holder)
    assert again.try_lock(3, 5)
    assert source.log == ["lock 3"]
    holder.release()
    assert source.log == ["lock 3", "free 3"]


async def test_waiting_keeps_the_lock_order() -> None:
    source = Locks(7)
    holder = LockHolder(source)
    assert holder.try_lock(3, 5) and holder.try_lock(9, 5)
    await holder.wait(7, 5)
    assert source.log == ["lock 3", "lock 9", "free 9", "wait 7", "lock 7"]
    assert holder.try_lock(7, 5)
    holder.release()
    assert sorted(source.log[-2:]) == ["free 3", "free 7"]


def test_the_copy_is_what_the_body_wrote() -> None:
    tx = transaction(5)
    assert tag_of(tx.edit(5, KIND, 0)) == 5
