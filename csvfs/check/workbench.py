"""Repairs: small changes to the image, made with the filesystem's own tree code.

Each repair is one body run over the image until nothing is missing; its blocks go into the
overlay. A block that a repair needs is taken from what nobody claims (`Claims.free_block`); what
a repair drops is simply no longer owned. The maps are written anew in the last stage.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from csvfs.btree.edit import TreeEditor
from csvfs.btree.node import Item
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.check.claims import Claims
from csvfs.check.entries import parse_entry
from csvfs.check.image import VolumeImage
from csvfs.format import ROOT_INODE, BlockType, Geometry
from csvfs.journal.transaction import BlockKey, NeedBlocks, Transaction, TransactionScope
from csvfs.namespace.directory import add_entry, change_entry, find_entry
from csvfs.namespace.inode import Inode, new_inode

T = TypeVar("T")
LOST_AND_FOUND = b"lost+found"
UNBOUNDED = 1 << 30


class ImageReader:
    """`BlockReader` over the image."""

    def __init__(self, image: VolumeImage) -> None:
        self._image = image

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes | bytearray:
        """A block; raises `NeedBlocks`, `BadBlock`."""
        block = self._image.block(BlockKey(address, kind, owner, flags))
        assert not isinstance(block, memoryview)
        return block

    def require(self, wanted: object) -> None:
        """Repairs load blocks one by one."""


class Workbench:
    """What a repair works with."""

    def __init__(self, image: VolumeImage, geometry: Geometry, claims: Claims, now_ns: int) -> None:
        self.image = image
        self.geometry = geometry
        self.claims = claims
        self.now_ns = now_ns
        self._scope = TransactionScope(ImageReader(image), image.volume_id)

    async def run(self, body: Callable[[Transaction], T]) -> T:
        """Run a body until it has all blocks; its changes go to the image."""
        while True:
            tx = Transaction(self._scope, bound=UNBOUNDED)
            try:
                result = body(tx)
            except NeedBlocks as need:
                await self.image.keep(need.wanted)
                continue
            for address, changed in tx.images.items():
                self.image.put(address, changed.data)
            return result

    def editor(self, tx: Transaction, root: TreeRoot) -> TreeEditor:
        """Changes to a tree: nodes come from unclaimed space, dropped ones are left behind."""
        group = self.geometry.group_of(root.address) if self.geometry.holds(root.address) else 0
        return TreeEditor(tx, root, partial(self.claims.free_block, group), lambda _: None)

    # -- inodes ------------------------------------------------------------------------------
    async def edit_inode(self, *, ino: int, **fields: int) -> None:
        """Set fields of an inode."""

        def body(tx: Transaction) -> None:
            block = tx.edit(ino, BlockType.INODE, ino)
            inode = Inode.unpack(block)
            for name, value in fields.items():
                setattr(inode, name, value)
            inode.pack_into(block)

        await self.run(body)

    async def make_root(self) -> None:
        """An empty root directory in place of one that cannot be read."""

        def body(tx: Transaction) -> None:
            inode = new_inode(ROOT_INODE, stat.S_IFDIR | 0o755, 0, 0, self.now_ns, parent=None)
            self._create(tx, inode)

        await self.run(body)

    def _create(self, tx: Transaction, inode: Inode) -> None:
        block = tx.create(inode.ino, BlockType.INODE, inode.ino)
        inode.pack_into(block)
        TreeRoot.of_directory(inode.ino).initialise(block)

    # -- entries -----------------------------------------------------------------------------
    async def remove_entry(self, *, directory: int, key: int) -> None:
        """Remove one name."""

        def body(tx: Transaction) -> None:
            tree = self.editor(tx, TreeRoot.of_directory(directory))
            if tree.get(key) is not None:
                tree.remove(key)

        await self.run(body)

    async def remove_names(self, *, names: list[tuple[int, int]]) -> None:
        """Remove every name in the list of (directory, key)."""
        for directory, key in names:
            await self.remove_entry(directory=directory, key=key)

    async def correct_types(self, *, ino: int, names: list[tuple[int, int]]) -> None:
        """Let every name of an inode show its type."""

        def body(tx: Transaction) -> None:
            child = Inode.unpack(tx.read(ino, BlockType.INODE, ino))
            for directory, key in names:
                tree = self.editor(tx, TreeRoot.of_directory(directory))
                for entry_key, value in tree.items(key):
                    if entry_key == key:
                        entry = parse_entry(key, value)
                        change_entry(tree, entry, child)
                    break

        await self.run(body)

    async def name_lost(self, *, ino: int) -> None:
        """Give an inode without a name the name ``#INO`` in /lost+found, made if need be."""
        fresh = await self.run(self._lost_and_found)

        def body(tx: Transaction) -> None:
            child_block = tx.edit(ino, BlockType.INODE, ino)
            child = Inode.unpack(child_block)
            block = tx.edit(fresh, BlockType.INODE, fresh)
            directory = Inode.unpack(block)
            name = b"#%d" % ino
            if find_entry(tx, directory, name) is not None:
                name = b"#%d.%d" % (ino, child.generation)
            add_entry(self.editor(tx, TreeRoot.of_directory(fresh)), directory, name, child)
            directory.entries += 1
            if child.is_directory:
                child.parent = fresh
                directory.nlink += 1
            elif child.nlink == 0:
                child.nlink = 1
            child.pack_into(child_block)
            directory.pack_into(block)

        await self.run(body)

    def _lost_and_found(self, tx: Transaction) -> int:
        root_block = tx.edit(ROOT_INODE, BlockType.INODE, ROOT_INODE)
        root = Inode.unpack(root_block)
        entry = find_entry(tx, root, LOST_AND_FOUND)
        if entry is not None and entry.is_directory:
            return entry.ino
        assert entry is None, "/lost+found is no directory"
        ino = self.claims.free_block(0)
        directory = new_inode(ino, stat.S_IFDIR | 0o700, 0, 0, self.now_ns, parent=root)
        self._create(tx, directory)
        add_entry(
            self.editor(tx, TreeRoot.of_directory(ROOT_INODE)), root, LOST_AND_FOUND, directory
        )
        root.entries += 1
        root.nlink += 1
        root.pack_into(root_block)
        return ino

    # -- trees -------------------------------------------------------------------------------
    async def rebuild_tree(self, *, root: TreeRoot, items: list[Item]) -> None:
        """Make the tree hold exactly these items."""

        def body(tx: Transaction) -> None:
            block = tx.edit(root.address, root.block_type, root.owner)
            root.initialise(block)
            tree = self.editor(tx, root)
            last = -1
            for key, value in sorted(items):
                if key != last:
                    tree.insert(key, value)
                last = key

        await self.run(body)

    async def remove_item(self, *, root: TreeRoot, key: int) -> None:
        """Remove one entry of a list."""

        def body(tx: Transaction) -> None:
            if Tree(tx, root).get(key) is not None:
                self.editor(tx, root).remove(key)

        await self.run(body)

    async def make_list(self, *, root: TreeRoot) -> None:
        """An empty list in place of one whose root cannot be read."""

        def body(tx: Transaction) -> None:
            root.initialise(tx.create(root.address, root.block_type, root.owner))

        await self.run(body)

    async def put_block(self, *, address: int, block: bytearray) -> None:
        """Replace a whole block."""
        self.image.put(address, block)
