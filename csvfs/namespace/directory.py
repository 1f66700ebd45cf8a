"""A directory: names as entries of its B-tree, found by hash.

Theory. The key of an entry is 63 bits: a keyed hash of the name with the low byte cleared, plus a
number 0..255 that tells names apart whose hashes collide. So a look-up is one descent, and a key
is a place in the listing that stays as long as the entry does: it serves as the readdir cookie
(POSIX: an entry that is there from the first read to the last is seen exactly once, whatever
comes and goes meanwhile). The hash is BLAKE2b (RFC 7693) with 8 bytes of digest, keyed with the
directory's random seed: nobody outside can choose names that collide.

Cookies 1 and 2 are "." and "..", which have no entries; keys begin at 256.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from csvfs.btree.edit import TreeEditor
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.errors import NoEntrySpace
from csvfs.journal.transaction import BlockReader
from csvfs.namespace.inode import Inode
from csvfs.ondisk.inode import (
    DIRECTORY_HASH_MASK,
    DIRECTORY_MAX_COLLISIONS,
    DIRECTORY_MIN_KEY,
    DIRECTORY_VALUE,
    DIRECTORY_VALUE_BYTES,
)

DOT_COOKIE: Final = 1
DOT_DOT_COOKIE: Final = 2


class Entry(NamedTuple):
    """One name. ``key`` is its cookie, ``dtype`` the type as readdir(3) tells it (DT_DIR, ...)."""

    key: int
    ino: int
    generation: int
    dtype: int
    name: bytes

    @property
    def is_directory(self) -> bool:
        return self.dtype == stat.S_IFDIR >> 12


def name_key(hash_seed: int, name: bytes) -> int:
    """The first key at which ``name`` may stand."""
    digest = blake2b(name, digest_size=8, key=hash_seed.to_bytes(8, "little")).digest()
    return max(DIRECTORY_MIN_KEY, int.from_bytes(digest, "little") & DIRECTORY_HASH_MASK)


def _decode(key: int, value: bytes) -> Entry:
    ino, generation, dtype = DIRECTORY_VALUE.unpack_from(value)
    return Entry(key, ino, generation, dtype, value[DIRECTORY_VALUE_BYTES:])


def find_entry(reader: BlockReader, directory: Inode, name: bytes) -> Entry | None:
    """The entry called ``name``. Raises `NeedBlocks` and `BadBlock`."""
    tree = Tree(reader, TreeRoot.of_directory(directory.ino))
    first = name_key(directory.hash_seed, name)
    for key, value in _candidates(tree, first):
        if value[DIRECTORY_VALUE_BYTES:] == name:
            return _decode(key, value)
    return None


def _candidates(tree: Tree, first: int) -> Iterator[tuple[int, bytes]]:
    """Entries whose names have the hash of ``first``, ascending."""
    key, end = first, first + DIRECTORY_MAX_COLLISIONS
    while key < end:
        found = tree.ceiling(key)
        if found is None or found[0] >= end:
            return
        yield found
        key = found[0] + 1


def read_entries(reader: BlockReader, directory: Inode, after_key: int, limit: int) -> list[Entry]:
    """At most ``limit`` entries behind ``after_key``, in the order of their keys."""
    found: list[Entry] = []
    first = max(after_key + 1, DIRECTORY_MIN_KEY)
    if limit <= 0:
        return found
    for key, value in Tree(reader, TreeRoot.of_directory(directory.ino)).items(first):
        found.append(_decode(key, value))
        if len(found) == limit:
            break
    return found


def add_entry(tree: TreeEditor, directory: Inode, name: bytes, child: Inode) -> None:
    """Enter a name that is not there. The caller counts (`Inode.entries`, ``nlink``).

    Raises `NoEntrySpace`.
    """
    key = name_key(directory.hash_seed, name)
    end = key + DIRECTORY_MAX_COLLISIONS
    for taken, value in _candidates(tree, key):
        assert value[DIRECTORY_VALUE_BYTES:] != name, f"{name!r} is entered twice"
        if taken != key:
            break
        key += 1
    if key == end:
        raise NoEntrySpace(f"{DIRECTORY_MAX_COLLISIONS} names with the hash of {name!r}")
    tree.insert(key, _encode(child, name))


def change_entry(tree: TreeEditor, entry: Entry, child: Inode) -> None:
    """The name stands for another inode from now on."""
    tree.replace(entry.key, _encode(child, entry.name))


def _encode(child: Inode, name: bytes) -> bytes:
    return DIRECTORY_VALUE.pack(child.ino, child.generation, child.dtype) + name
