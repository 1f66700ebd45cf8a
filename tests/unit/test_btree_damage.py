"""A damaged B-tree is an error that names a block: never a crash, a loop or an unnoticed guess."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from csvfs.btree.edit import DuplicateKey, TreeEditor
from csvfs.btree.tree import MAX_KEY, Tree, TreeRoot
from csvfs.btree.verify import faults, verify
from csvfs.journal.transaction import BlockReader, Transaction, TransactionTooLarge
from csvfs.ondisk.block import BadBlock
from csvfs.ondisk.inode import NODE_HEADER, NODE_OFFSET, NodeKind
from tests.unit.test_btree import INO, Owner, number

KEYS_AT = NODE_OFFSET + NODE_HEADER.size
CHILDREN_AT = KEYS_AT + 251 * 8


def build(kind: NodeKind, entries: int = 2000) -> Owner:
    """A tree of two levels in the root block of a list, or of a directory's inode."""
    if kind is NodeKind.FIXED:
        owner = Owner(TreeRoot.of_reclaim(501, 3))
    else:
        owner = Owner(TreeRoot.of_directory(INO))
    for n in range(entries):
        owner.insert(n * 7919 % 100_003, number(n))
    assert owner.verify().levels == 1
    return owner


def all_faults(owner: Owner) -> list[BadBlock]:
    return owner.blocks.run(lambda reader: list(faults(reader, owner.root)))


def damage(owner: Owner, address: int, offset: int, data: bytes) -> None:
    block = bytearray(owner.blocks.home[address])
    block[offset : offset + len(data)] = data
    owner.blocks.home[address] = bytes(block)


def first_leaf(owner: Owner) -> int:
    return owner.blocks.run(lambda reader: Tree(reader, owner.root).path(0)[-1].address)


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (NODE_OFFSET, b"\1", "level 1"),
        (NODE_OFFSET, b"\xff", "level 255"),
        (NODE_OFFSET + 1, b"\2", "kind 2"),
        (NODE_OFFSET + 2, b"\0\0", "0 entries"),
        (NODE_OFFSET + 2, b"\xff\xff", "65535 entries"),
        (NODE_OFFSET + 2, b"\xa8\0", "168 entries"),
    ],
)
def test_an_impossible_header_is_found_on_the_way(offset: int, data: bytes, reason: str) -> None:
    owner = build(NodeKind.FIXED)
    leaf = first_leaf(owner)
    damage(owner, leaf, offset, data)
    for call in (
        lambda: owner.blocks.run(lambda reader: Tree(reader, owner.root).get(0)),
        lambda: owner.insert(1, number(1)),
        lambda: owner.items(),
        lambda: owner.remove_range(0, 10),
        lambda: owner.verify(),
    ):
        with pytest.raises(BadBlock, match=reason) as caught:
            call()
        assert caught.value.address == leaf
    assert [fault.address for fault in all_faults(owner)] == [leaf]


@pytest.mark.parametrize("data", [b"\1\3\1\0", b"\11\1\1\0", b"\1\1\0\0", b"\0\1\xff\0"])
def test_an_impossible_root(data: bytes) -> None:
    owner = build(NodeKind.FIXED)
    damage(owner, 501, NODE_OFFSET, data)
    with pytest.raises(BadBlock, match="its root"):
        owner.items()
    assert [fault.address for fault in all_faults(owner)] == [501]


def test_a_child_that_is_an_ancestor_ends_by_its_level() -> None:
    owner = Owner(TreeRoot.of_directory(INO))
    for n in range(3000):
        owner.insert(n * 7919 % 100_003, number(n) * 20)
    assert owner.verify().levels == 2
    path = owner.blocks.run(lambda reader: Tree(reader, owner.root).path(0))
    middle = path[1].address
    damage(owner, middle, CHILDREN_AT, middle.to_bytes(8, "little"))
    with pytest.raises(BadBlock, match="level 1") as caught:
        owner.items()
    assert caught.value.address == middle
    assert all_faults(owner)


def test_two_parents_of_one_node() -> None:
    owner = build(NodeKind.FIXED)
    leaf = first_leaf(owner)
    damage(owner, 501, CHILDREN_AT + 8, leaf.to_bytes(8, "little"))
    with pytest.raises(BadBlock, match="out of order") as caught:
        owner.items()
    assert caught.value.address == leaf
    with pytest.raises(BadBlock, match=f"node {leaf} has two parents") as caught:
        owner.blocks.run(lambda reader: list(Tree(reader, owner.root).walk_blocks()))
    assert caught.value.address == 501
    assert [fault.reason for fault in all_faults(owner)] == [f"node {leaf} has two parents"]


def test_keys_out_of_order_and_out_of_bounds() -> None:
    owner = build(NodeKind.FIXED)
    leaf = first_leaf(owner)
    damage(owner, leaf, KEYS_AT + 80, MAX_KEY.to_bytes(8, "little"))
    with pytest.raises(BadBlock, match="out of order"):
        owner.items()
    reasons = [fault.reason for fault in all_faults(owner)]
    assert reasons[0] == "keys 10 and 11 are out of order"
    assert reasons[1].startswith(f"key {MAX_KEY} is not within 0..")
    owner = build(NodeKind.FIXED)
    damage(owner, 501, KEYS_AT, b"\5")
    assert "the first key of an index node is 5, not 0" in str(all_faults(owner)[0])


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (NODE_OFFSET + 4, b"\0\0", "heap that begins at 0"),
        (NODE_OFFSET + 4, b"\xff\xff", "heap that begins at 65535"),
        (NODE_OFFSET + 6, b"\1", "do not add up"),
    ],
)
def test_a_heap_that_cannot_be(offset: int, data: bytes, reason: str) -> None:
    owner = build(NodeKind.VARIABLE)
    leaf = first_leaf(owner)
    damage(owner, leaf, offset, data)
    assert reason in all_faults(owner)[0].reason
    assert all_faults(owner)[0].address == leaf


def test_every_fault_is_listed() -> None:
    owner = build(NodeKind.FIXED)
    leaves = sorted(owner.addresses.used)
    for leaf in leaves[::3]:
        damage(owner, leaf, NODE_OFFSET + 2, b"\0\0")
    assert sorted(fault.address for fault in all_faults(owner)) == leaves[::3]
    with pytest.raises(BadBlock):
        owner.blocks.run(lambda reader: verify(reader, owner.root))


ALLOWED = (BadBlock, KeyError, DuplicateKey, TransactionTooLarge)


def everything(owner: Owner, key: int) -> list[Callable[[], object]]:
    """Every operation on a tree."""

    def read(body: Callable[[Tree], object]) -> Callable[[], object]:
        def run(reader: BlockReader) -> object:
            return body(Tree(reader, owner.root))

        return lambda: owner.blocks.run(run)

    def change(body: Callable[[TreeEditor], object]) -> Callable[[], object]:
        def run(tx: Transaction) -> None:
            source = owner.addresses.for_body(tx)
            body(TreeEditor(tx, owner.root, source.allocate, tx.free))
            raise KeyError("leave the tree as it is")

        return lambda: owner.blocks.transact(run)

    return [
        read(lambda tree: tree.get(key)),
        read(lambda tree: tree.floor(key)),
        read(lambda tree: tree.ceiling(key)),
        read(lambda tree: tree.last()),
        read(lambda tree: list(tree.items(key))),
        read(lambda tree: tree.count()),
        read(lambda tree: list(tree.walk_blocks())),
        change(lambda tree: tree.insert(key + 1, number(key))),
        change(lambda tree: tree.remove(key)),
        change(lambda tree: tree.replace(key, number(1))),
        change(lambda tree: tree.remove_range(key, key + 50_000)),
        lambda: all_faults(owner),
    ]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", list(NodeKind))
def test_random_damage_never_does_worse_than_an_error(kind: NodeKind, seed: int) -> None:
    random = Random(seed)
    owner = build(kind, 400 + seed * 10)
    for _ in range(random.choice([1, 1, 3, 20])):
        address = random.choice([owner.root.address, *owner.addresses.used])
        offset = owner.root.leaf.offset if address == owner.root.address else NODE_OFFSET
        # Mostly where it hurts: header, keys, slots.
        reach = random.choice([8, 16, 200, 4096 - offset])
        data = random.choice([b"\xff\xff", b"\0\0\0\0", random.randbytes(random.choice([1, 2, 8]))])
        damage(owner, address, offset + random.randrange(reach - 8 or 1), data)
    for key in (0, random.choice(range(100_003)), MAX_KEY - 1):
        for operation in everything(owner, key):
            try:
                operation()
            except ALLOWED:
                continue
