"""How long the metadata structures take, in memory: B-tree, extents, allocator.

    python -m benchmarks.metadata [NAME ...]

Each operation runs in a transaction of its own over a dictionary of blocks: what is measured is
the work on packed blocks, without journal, cache management or I/O. Prints microseconds for one
operation, the median of the batches, and what it is meant to stay below.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

from csvfs.allocation.allocator import Groups
from csvfs.btree.edit import TreeEditor
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.data import extents
from csvfs.engine.locks import Resources
from csvfs.errors import NoSpace
from csvfs.journal.transaction import BlockKey, NeedBlocks, Transaction, TransactionScope
from csvfs.ondisk.block import BlockType, new_block
from csvfs.ondisk.geometry import Geometry
from csvfs.ondisk.groups import GroupHeader
from csvfs.ondisk.inode import DIRECTORY_VALUE

Operations = Iterator[Callable[[], object]]

VOLUME_ID = bytes(16)
INO = 16 * 1000
BATCHES = 9
BATCH = 2000


class Blocks:
    """All blocks in memory."""

    def __init__(self) -> None:
        self.home: dict[int, bytes | bytearray] = {}
        self.scope = TransactionScope(self, VOLUME_ID)
        self.next = 1_000_000

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes | bytearray:
        block = self.home.get(address)
        if block is None:
            raise NeedBlocks(BlockKey(address, kind, owner, flags))
        return block

    def require(self, wanted: Iterable[BlockKey]) -> None:
        missing = [key for key in wanted if key.address not in self.home]
        if missing:
            raise NeedBlocks(*missing)

    def begin(self) -> Transaction:
        return Transaction(self.scope)

    def merge(self, tx: Transaction) -> None:
        for address, image in tx.images.items():
            self.home[address] = image.data
        for address in tx.freed:
            del self.home[address]

    def allocate(self) -> int:
        self.next += 1
        return self.next

    def inode(self, root: TreeRoot) -> None:
        block = new_block(BlockType.INODE, INO, INO, VOLUME_ID)
        root.initialise(block)
        self.home[INO] = block


@dataclass(frozen=True)
class Benchmark:
    """One figure: ``prepare`` gives a source of at least BATCHES x BATCH operations."""

    name: str
    limit_us: float
    prepare: Callable[[], Operations]

    def run(self) -> float:
        """Microseconds for one operation."""
        source = self.prepare()
        medians = []
        for _ in range(BATCHES):
            operations = [next(source) for _ in range(BATCH)]
            start = time.perf_counter()
            for operation in operations:
                operation()
            medians.append((time.perf_counter() - start) / BATCH * 1e6)
        return statistics.median(medians)


# -- directories -------------------------------------------------------------------------------
def _insert_name(blocks: Blocks, root: TreeRoot, key: int) -> None:
    tx = blocks.begin()
    name = b"virtual-machine-%019d.img" % key
    TreeEditor(tx, root, blocks.allocate, tx.free).insert(
        key, DIRECTORY_VALUE.pack(key, 1, 8) + name
    )
    blocks.merge(tx)


def _remove_name(blocks: Blocks, root: TreeRoot, key: int) -> None:
    tx = blocks.begin()
    TreeEditor(tx, root, blocks.allocate, tx.free).remove(key)
    blocks.merge(tx)


def _directory(entries: int) -> tuple[Blocks, TreeRoot, list[int], Random]:
    blocks, root, random = Blocks(), TreeRoot.of_directory(INO), Random(1)
    blocks.inode(root)
    keys = [random.getrandbits(62) for _ in range(entries)]
    for key in keys:
        _insert_name(blocks, root, key)
    return blocks, root, keys, random


def directory_insert() -> Operations:
    """A new name in a directory of 50,000."""
    blocks, root, _, random = _directory(50_000)
    while True:
        yield partial(_insert_name, blocks, root, random.getrandbits(62))


def directory_lookup() -> Operations:
    """A name of a directory of 50,000."""
    blocks, root, keys, random = _directory(50_000)
    tree = Tree(blocks, root)
    while True:
        yield partial(tree.get, random.choice(keys))


def directory_remove() -> Operations:
    """A name out of a directory that shrinks from 50,000."""
    blocks, root, keys, random = _directory(50_000)
    random.shuffle(keys)
    for key in keys:
        yield partial(_remove_name, blocks, root, key)


def directory_listing() -> Operations:
    """100 entries of a directory of 50,000, from a cookie on."""
    blocks, root, keys, random = _directory(50_000)

    def batch(first: int) -> None:
        assert len(list(islice(Tree(blocks, root).items(first), 100))) <= 100

    while True:
        yield partial(batch, random.choice(keys))


# -- extents -----------------------------------------------------------------------------------
def _image(records: int) -> tuple[Blocks, TreeRoot, Random]:
    """A file of as many records, each of 16 units, none contiguous with the next."""
    blocks, root = Blocks(), TreeRoot.of_file(INO)
    blocks.inode(root)
    for number in range(records):
        tx = blocks.begin()
        editor = TreeEditor(tx, root, blocks.allocate, tx.free)
        extents.insert_units(editor, number * 16, 5000 + number * 17, 16)
        blocks.merge(tx)
    return blocks, root, Random(1)


def extent_lookup() -> Operations:
    """Where one unit lies, in a file of 10,000 records."""
    blocks, root, random = _image(10_000)
    while True:
        yield partial(extents.lookup, blocks, root, random.randrange(160_000), 1)


def extent_lookup_1mib() -> Operations:
    """Where 16 units lie that span two records."""
    blocks, root, random = _image(10_000)
    while True:
        yield partial(extents.lookup, blocks, root, random.randrange(9_000) * 16 + 8, 16)


def extent_set_written() -> Operations:
    """One unit becomes written."""
    blocks, root, random = _image(10_000)

    def write(unit: int) -> None:
        tx = blocks.begin()
        extents.set_written(TreeEditor(tx, root, blocks.allocate, tx.free), unit, 1)
        blocks.merge(tx)

    while True:
        yield partial(write, random.randrange(160_000))


def extent_append() -> Operations:
    """One unit behind the end of a file."""
    blocks, root, _ = _image(1)
    unit = 1000

    def append(unit: int) -> None:
        tx = blocks.begin()
        extents.insert_units(TreeEditor(tx, root, blocks.allocate, tx.free), unit, unit * 2, 1)
        blocks.merge(tx)

    while True:
        unit += 1
        yield partial(append, unit)


# -- allocator ---------------------------------------------------------------------------------
def _volume(groups: int) -> tuple[Blocks, Groups, Random]:
    geometry = Geometry.of_units(39 + groups * 26880 + 1, 1, 16)
    blocks = Blocks()
    for number in range(geometry.group_count):
        first = geometry.group_first_unit(number)
        header = GroupHeader.fresh(number, first, geometry.group_units(number))
        blocks.home[header.address] = header.encode(VOLUME_ID, 1)
    return blocks, Groups(geometry, Resources(geometry)), Random(1)


def _allocate(blocks: Blocks, groups: Groups, count: int, goal: int | None) -> int:
    tx = blocks.begin()
    run = groups.allocate_units(tx, count, goal)
    blocks.merge(tx)
    return run.first_unit


def _fragment(blocks: Blocks, groups: Groups) -> None:
    """Leave only single free units in the first group."""
    first = groups.geometry.group_first_unit(0)
    tx = blocks.begin()
    for unit in range(1, 26880, 1792):
        groups.allocate_units(tx, 1792, first + unit)
    try:
        while groups.geometry.group_of_unit(groups.allocate_units(tx, 1, first).first_unit) == 0:
            pass
    except NoSpace:
        pass
    for unit in range(3, 26870, 4):
        groups.free_units(tx, first + unit, 1)
    blocks.merge(tx)


def allocate_sequential() -> Operations:
    """One unit where the last one ended, on 64 groups."""
    blocks, groups, _ = _volume(64)
    last = groups.geometry.group_first_unit(0)

    def allocate() -> None:
        nonlocal last
        last = _allocate(blocks, groups, 1, last + 1)

    while True:
        yield allocate


def allocate_fragmented() -> Operations:
    """Sixteen units in a group that has only single ones, so that another group serves them."""
    blocks, groups, random = _volume(20)
    _fragment(blocks, groups)
    first = groups.geometry.group_first_unit(0)
    while True:
        yield partial(_allocate, blocks, groups, 16, first + random.randrange(26880))


def allocate_in_fragments() -> Operations:
    """One unit, near a random place of a group that has only single ones."""
    blocks, groups, random = _volume(4)
    _fragment(blocks, groups)
    first = groups.geometry.group_first_unit(0)
    while True:
        yield partial(_allocate, blocks, groups, 1, first + random.randrange(26880))


def allocate_block() -> Operations:
    """A metadata block."""
    blocks, groups, _ = _volume(64)

    def allocate() -> None:
        tx = blocks.begin()
        groups.allocate_block(tx, 0)
        blocks.merge(tx)

    while True:
        yield allocate


def free_units() -> Operations:
    """One unit of a full group becomes free."""
    blocks, groups, _ = _volume(4)
    first = groups.geometry.group_first_unit(0)
    for unit in range(1792, 26880, 1792):
        _allocate(blocks, groups, 1792, first + unit)

    def free(unit: int) -> None:
        tx = blocks.begin()
        groups.free_units(tx, unit, 1)
        blocks.merge(tx)

    for unit in range(1792, 26880):
        yield partial(free, first + unit)


BENCHMARKS = [
    Benchmark("directory_insert", 60, directory_insert),
    Benchmark("directory_lookup", 10, directory_lookup),
    Benchmark("directory_remove", 60, directory_remove),
    Benchmark("directory_listing", 150, directory_listing),
    Benchmark("extent_lookup", 6, extent_lookup),
    Benchmark("extent_lookup_1mib", 20, extent_lookup_1mib),
    Benchmark("extent_set_written", 40, extent_set_written),
    Benchmark("extent_append", 60, extent_append),
    Benchmark("allocate_sequential", 40, allocate_sequential),
    Benchmark("allocate_in_fragments", 40, allocate_in_fragments),
    Benchmark("allocate_fragmented", 400, allocate_fragmented),
    Benchmark("allocate_block", 40, allocate_block),
    Benchmark("free_units", 40, free_units),
]


def main(names: list[str]) -> int:
    """Run the benchmarks, all or those named; 1 if one is above its limit."""
    slow = 0
    for benchmark in BENCHMARKS:
        if names and benchmark.name not in names:
            continue
        took = benchmark.run()
        slow += took > benchmark.limit_us
        print(f"{benchmark.name:24} {took:8.1f} us   (at most {benchmark.limit_us:.0f})")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
