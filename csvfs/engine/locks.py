"""The names and the order of the locks: which resource covers what.

    resource        covers                                                     placement
    rename          the shape of the directory tree (renames across            "rename"
                    directories)
    i <inode>       the inode, its tree, xattr and symlink blocks, its data    its group
    o <inode>       held PR from open to release: who else has it open?        its group
    g <group>       header, maps and shared ranges of an allocation group      the group
    n <slot>        the slot's orphan list                                     the slot
    r <slot>        the slot's reclaim list                                    the slot
    w <slot>        nothing; held EX by the node of the slot (`csvfs.data.peers`) the slot

Order in which they are waited for: rename; directories, in the order of their paths (ancestors
first, brothers by number); other inodes by number; orphan lists, reclaim lists, groups, each
ascending. So nobody waits for a directory with the lock of a file in hand. Open
locks are only ever tried. Within a transaction everything is only tried (`Transaction.try_lock`).

Modes of an inode's lock: PR to look at it; EX to change it. Tasks of this node that read or write
*data*, or only look, share it (``shared_here``): they keep out of each other's way by
`csvfs.data.ranges` and by the table of conversions. EX that is not shared means alone: nothing
reads, writes or looks meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from csvfs.ondisk.block import BlockType
from csvfs.ondisk.geometry import Geometry
from csvfs.ondisk.inode import TreeOwner
from lockmgr.messages import Resource

_U64: Final = Struct(">Q")
_U32: Final = Struct(">I")

INODE_PREFIX: Final = b"i"
FLUSHED_PREFIXES: Final = (INODE_PREFIX, b"g", b"n", b"r")
"""Of the locks that cover blocks, and names that begin alike."""
TENDED_PREFIX: Final = b"w"
RENAME: Final = Resource(b"rename", b"rename")

_IN_WORDS: Final = {
    INODE_PREFIX: "inode",
    b"o": "opens of inode",
    b"g": "allocation group",
    b"n": "orphan list of slot",
    b"r": "reclaim list of slot",
    TENDED_PREFIX: "lists tended by the node of slot",
}

_REMEMBERED: Final = 65536
"""Inode resources kept: building one costs more than a lock that is granted at once."""

_ORDER: Final = {kind: place for place, kind in enumerate(b"inrgo", 1)}


class Resources:
    """Names the locks of one volume."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._inodes: dict[int, Resource] = {}
        self._groups: dict[int, Resource] = {}

    def inode(self, ino: int) -> Resource:
        """The lock of an inode."""
        found = self._inodes.get(ino)
        if found is None:
            if len(self._inodes) >= _REMEMBERED:
                self._inodes.clear()
            found = Resource(INODE_PREFIX + _U64.pack(ino), self._placement(ino))
            self._inodes[ino] = found
        return found

    def opened(self, ino: int) -> Resource:
        """The open lock of an inode."""
        return Resource(b"o" + _U64.pack(ino), self._placement(ino))

    def group(self, group: int) -> Resource:
        """The lock of an allocation group."""
        found = self._groups.get(group)
        if found is None:
            found = Resource(b"g" + _U32.pack(group), _U32.pack(group))
            self._groups[group] = found
        return found

    def orphans(self, slot: int) -> Resource:
        """The lock of a slot's orphan list."""
        return Resource(b"n%c" % slot, b"s%c" % slot)

    def reclaim(self, slot: int) -> Resource:
        """The lock of a slot's reclaim list."""
        return Resource(b"r%c" % slot, b"s%c" % slot)

    def tended(self, slot: int) -> Resource:
        """What the node of a slot holds as long as it has the volume mounted."""
        return Resource(TENDED_PREFIX + b"%c" % slot, b"s%c" % slot)

    def covering(self, kind: BlockType, owner: int, flags: int = 0) -> Resource:
        """The one lock that covers a metadata block (type, owner and flags of its header)."""
        lock = _COVERING.get(kind) if kind != BlockType.TREE_NODE else _OF_TREES.get(flags)
        if lock is None:
            raise ValueError(f"a {kind.words} block (flags {flags:#x}) belongs to no lock")
        return lock(self, owner)

    def _placement(self, ino: int) -> bytes:
        geometry = self._geometry
        return _U32.pack(geometry.group_of(ino) if geometry.holds(ino) else 0)


_COVERING: Final[dict[int, Callable[[Resources, int], Resource]]] = {
    BlockType.INODE: Resources.inode,
    BlockType.XATTR: Resources.inode,
    BlockType.SYMLINK_TAIL: Resources.inode,
    BlockType.GROUP_HEADER: Resources.group,
    BlockType.GROUP_MAP: Resources.group,
    BlockType.ORPHAN_ROOT: Resources.orphans,
    BlockType.RECLAIM_ROOT: Resources.reclaim,
}
_OF_TREES: Final[dict[int, Callable[[Resources, int], Resource]]] = {
    TreeOwner.INODE: Resources.inode,
    TreeOwner.ORPHAN: Resources.orphans,
    TreeOwner.RECLAIM: Resources.reclaim,
}


def in_words(name: bytes) -> str:
    """A resource's name, for people."""
    kind, rest = name[:1], name[1:]
    if name == RENAME.name:
        return "renames across directories"
    if kind not in _IN_WORDS:
        return repr(name)
    return f"{_IN_WORDS[kind]} {int.from_bytes(rest)}"


def lock_order(resource: Resource) -> tuple[int, int]:
    """Place in the lock order, as far as that does not depend on the shape of the tree."""
    if resource == RENAME:
        return 0, 0
    return _ORDER[resource.name[0]], int.from_bytes(resource.name[1:])
