"""The B-tree against a dictionary, on a cache that forgets."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from csvfs.btree.edit import DuplicateKey, RemovedRange, TreeEditor
from csvfs.btree.tree import MAX_KEY, MAX_VALUE_BYTES, Tree, TreeRoot
from csvfs.btree.verify import TreeStatistics, verify
from csvfs.journal.transaction import Transaction
from csvfs.ondisk.block import new_block
from csvfs.ondisk.inode import NodeKind
from tests.unit.forgetful import VOLUME_ID, Addresses, ForgetfulBlocks

INO = 77


class Owner:
    """A tree in an inode's block, or in a list's root block."""

    def __init__(self, root: TreeRoot, seed: int = 0, forget: float = 0.0) -> None:
        self.root = root
        self.blocks = ForgetfulBlocks(seed, forget)
        self.addresses = Addresses()
        block = new_block(root.block_type, root.address, root.owner, VOLUME_ID)
        root.initialise(block)
        self.blocks.home[root.address] = bytes(block)

    def editor(self, tx: Transaction) -> TreeEditor:
        source = self.addresses.for_body(tx)
        return TreeEditor(tx, self.root, source.allocate, source.release)

    def insert(self, key: int, value: bytes) -> None:
        self.blocks.transact(lambda tx: self.editor(tx).insert(key, value))

    def replace(self, key: int, value: bytes) -> None:
        self.blocks.transact(lambda tx: self.editor(tx).replace(key, value))

    def remove(self, key: int) -> bytes:
        return self.blocks.transact(lambda tx: self.editor(tx).remove(key))

    def remove_range(
        self, first: int, end: int, blocks: int | None = None, items: int | None = None
    ) -> RemovedRange:
        return self.blocks.transact(
            lambda tx: self.editor(tx).remove_range(first, end, max_blocks=blocks, max_items=items)
        )

    def items(self, first: int = 0) -> list[tuple[int, bytes]]:
        return self.blocks.run(lambda reader: list(Tree(reader, self.root).items(first)))

    def verify(self) -> TreeStatistics:
        """Check the whole tree; and that it owns exactly the blocks that it was given."""
        self.blocks.remember()
        statistics = self.blocks.run(lambda reader: verify(reader, self.root))
        walked = self.blocks.run(lambda reader: list(Tree(reader, self.root).walk_blocks()))
        assert sorted(walked) == sorted(self.addresses.used)
        assert len(walked) == statistics.nodes
        return statistics


def number(value: int) -> bytes:
    return value.to_bytes(16, "little")


ROOTS = {
    "file": TreeRoot.of_file(INO),
    "directory": TreeRoot.of_directory(INO),
    "orphans": TreeRoot.of_orphans(500, 3),
    "reclaim": TreeRoot.of_reclaim(501, 3),
}


@pytest.fixture(params=list(ROOTS))
def owner(request: pytest.FixtureRequest) -> Owner:
    return Owner(ROOTS[request.param], seed=1, forget=0.1)


def test_empty_tree(owner: Owner) -> None:
    def body(reader: ForgetfulBlocks) -> None:
        tree = Tree(reader, owner.root)
        assert tree.is_empty() and tree.count() == 0
        assert tree.get(5) is None
        assert [tree.first(), tree.last(), tree.floor(5), tree.ceiling(5)] == [None] * 4
        assert list(tree.items()) == []
        assert list(tree.walk_blocks()) == []

    owner.blocks.run(body)


def test_ascending_keys_fill_their_nodes(owner: Owner) -> None:
    for key in range(3000):
        owner.insert(key, number(key))
    statistics = owner.verify()
    assert statistics.entries == 3000
    assert statistics.levels == 1
    assert statistics.used_bytes > 0.9 * 4016 * (statistics.nodes - 1)
    assert owner.items(2990) == [(key, number(key)) for key in range(2990, 3000)]


def test_many_levels_grow_and_shrink_back_into_the_root(owner: Owner) -> None:
    # 512-byte values only in directories: seven entries a leaf, so three levels come quickly.
    wide = 500 if owner.root.kind is NodeKind.VARIABLE else 16
    keys = [key * 2654435761 % (1 << 32) for key in range(2000)]
    for key in keys:
        owner.insert(key, key.to_bytes(wide, "little"))
    assert owner.verify().levels == (2 if wide == 500 else 1)
    for number_, key in enumerate(keys):
        assert owner.remove(key) == key.to_bytes(wide, "little")
        if number_ % 300 == 0:
            owner.verify()
    statistics = owner.verify()
    assert (statistics.entries, statistics.levels, statistics.nodes) == (0, 0, 0)
    fresh = Owner(owner.root)
    assert owner.blocks.home == fresh.blocks.home, "an emptied tree is as it was made"


def test_a_tree_that_shrinks_gives_its_blocks_back(owner: Owner) -> None:
    for key in range(5000):
        owner.insert(key * 7919 % 5003, number(key))
    before = owner.verify().nodes
    kept = dict(owner.items())
    for key in range(5003):
        if key % 20 and key in kept:
            owner.remove(key)
    after = owner.verify()
    assert after.nodes < before / 7


def test_insert_of_an_existing_key_and_removal_of_a_missing_one(owner: Owner) -> None:
    owner.insert(5, number(1))
    before = dict(owner.blocks.home)
    with pytest.raises(DuplicateKey):
        owner.insert(5, number(2))
    with pytest.raises(KeyError):
        owner.remove(6)
    with pytest.raises(KeyError):
        owner.replace(4, number(2))
    assert owner.blocks.home == before


def test_extreme_keys(owner: Owner) -> None:
    for key in (0, 1, MAX_KEY, MAX_KEY - 1):
        owner.insert(key, number(key))
    for key in range(10**6, 10**6 + 1000):
        owner.insert(key, number(key))
    owner.verify()
    tree = owner.blocks.run(
        lambda reader: (
            Tree(reader, owner.root).first(),
            Tree(reader, owner.root).last(),
            Tree(reader, owner.root).floor(10**6 - 1),
            Tree(reader, owner.root).ceiling(10**6 + 1000),
        )
    )
    assert tree == (
        (0, number(0)),
        (MAX_KEY, number(MAX_KEY)),
        (1, number(1)),
        (MAX_KEY - 1, number(MAX_KEY - 1)),
    )


def test_remove_range_in_batches(owner: Owner) -> None:
    for key in range(4000):
        owner.insert(key, number(key))
    removed: list[tuple[int, bytes]] = []
    batches = 0
    while True:
        batch = owner.remove_range(100, 3900, 3, 500)
        assert len(batch.items) <= 500
        removed += batch.items
        batches += 1
        owner.verify()
        if batch.done:
            break
    assert batches >= 8
    assert removed == [(key, number(key)) for key in range(100, 3900)]
    assert [key for key, _ in owner.items()] == [*range(100), *range(3900, 4000)]


def test_remove_range_of_nothing(owner: Owner) -> None:
    assert owner.remove_range(0, MAX_KEY) == ([], True)
    owner.insert(10, number(0))
    assert owner.remove_range(0, 10) == ([], True)
    assert owner.remove_range(11, MAX_KEY) == ([], True)
    assert owner.remove_range(10, 11) == ([(10, number(0))], True)


def test_release_may_change_the_same_tree() -> None:
    """The reclaim list notes its own dropped nodes in itself."""
    owner = Owner(TreeRoot.of_reclaim(501, 3), forget=0.1)
    for key in range(2000):
        owner.insert(key, number(key))

    def remove(tx: Transaction, key: int) -> None:
        source = owner.addresses.for_body(tx)

        def release(address: int) -> None:
            source.release(address)
            editor.insert(10**6 + address, number(address))

        editor = TreeEditor(tx, owner.root, source.allocate, release)
        editor.remove(key)

    for key in range(2000):
        owner.blocks.transact(partial(remove, key=key))
    statistics = owner.verify()
    assert statistics.entries > 10
    assert {key - 10**6 for key, _ in owner.items()}.isdisjoint(owner.addresses.used)


def test_values_of_a_directory_may_change_their_length() -> None:
    owner = Owner(TreeRoot.of_directory(INO))
    for key in range(300):
        owner.insert(key, b"x" * 20)
    for length in (300, 0, MAX_VALUE_BYTES, 7):
        for key in range(300):
            owner.replace(key, bytes([key & 255]) * length)
        owner.verify()
    assert owner.items() == [(key, bytes([key & 255]) * 7) for key in range(300)]
    with pytest.raises(ValueError, match="at most 512"):
        owner.insert(1000, bytes(513))


KEYS = st.integers(0, 400) | st.integers(0, 400).map(lambda n: n << 40) | st.just(MAX_KEY)


class TreeMachine(RuleBasedStateMachine):
    """One tree and the dictionary that it must equal."""

    root = TreeRoot.of_file(INO)
    lengths = st.just(16)

    @initialize(seed=st.integers(0, 1000), forget=st.sampled_from([0.0, 0.3, 1.0]))
    def start(self, seed: int, forget: float) -> None:
        self.owner = Owner(self.root, seed, forget)
        self.model: dict[int, bytes] = {}

    @rule(
        first=KEYS,
        count=st.integers(1, 120),
        stride=st.sampled_from([1, -1, 3, 1 << 30]),
        data=st.data(),
    )
    def insert_many(self, first: int, count: int, stride: int, data: st.DataObject) -> None:
        length = data.draw(self.lengths)
        for n in range(count):
            key = (first + n * stride) % (MAX_KEY + 1)
            value = key.to_bytes(8, "little") * (length // 8 + 1)
            value = value[:length]
            if key in self.model:
                self.owner.replace(key, value)
            else:
                self.owner.insert(key, value)
            self.model[key] = value

    @rule(key=KEYS)
    def remove_from(self, key: int) -> None:
        for found in [k for k in sorted(self.model) if k >= key][:40]:
            assert self.owner.remove(found) == self.model.pop(found)

    @rule(
        first=KEYS,
        end=KEYS,
        blocks=st.none() | st.integers(1, 6),
        items=st.none() | st.integers(10, 300),
    )
    def remove_range(self, first: int, end: int, blocks: int | None, items: int | None) -> None:
        expected = [(k, v) for k, v in sorted(self.model.items()) if first <= k < end]
        removed = []
        while True:
            batch = self.owner.remove_range(first, end, blocks, items)
            removed += batch.items
            if batch.done:
                break
        assert removed == expected
        for key, _ in expected:
            del self.model[key]

    @rule(key=KEYS)
    def look_up(self, key: int) -> None:
        below = [k for k in self.model if k <= key]
        above = [k for k in self.model if k >= key]

        def body(reader: ForgetfulBlocks) -> None:
            tree = Tree(reader, self.root)
            assert tree.get(key) == self.model.get(key)
            floor, ceiling = tree.floor(key), tree.ceiling(key)
            assert floor == ((max(below), self.model[max(below)]) if below else None)
            assert ceiling == ((min(above), self.model[min(above)]) if above else None)
            assert [k for k, _ in tree.items(key)] == sorted(above)

        self.owner.blocks.run(body)

    @invariant()
    def equals_the_model(self) -> None:
        assert self.owner.items() == sorted(self.model.items())
        assert self.owner.verify().entries == len(self.model)


class DirectoryMachine(TreeMachine):
    root = TreeRoot.of_directory(INO)
    lengths = st.sampled_from([0, 13, 40, 268, MAX_VALUE_BYTES])


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.full
@pytest.mark.parametrize("machine", [TreeMachine, DirectoryMachine])
def test_long_histories(machine: type[TreeMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=300, stateful_step_count=50, deadline=None),
    )
