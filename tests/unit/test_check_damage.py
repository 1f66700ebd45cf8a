"""Each kind of damage is named, and repair leaves nothing of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from csvfs.btree.node import LEVEL_KIND_COUNT
from csvfs.btree.tree import TreeRoot
from csvfs.check import Damage, Report
from csvfs.format import (
    EXTENT_VALUE,
    GROUP_FREE_UNITS_OFFSET,
    INODE_ROOT_OFFSET,
    ORPHAN_VALUE,
    RECLAIM_VALUE,
    VIEW_ADDRESSES,
    BlockType,
    OrphanKind,
    ReclaimKind,
    UnitState,
    pack_place,
    set_unit_state,
    set_used_blocks,
    unit_state,
    unpack_place,
    used_blocks,
)
from csvfs.namespace.directory import name_key
from tests.damaged_volume import DamagedVolume, damaged_volume
from tests.simulated_volume import ROOT, SLOT, mounted, names

Action = Callable[[DamagedVolume], Awaitable[None]]
DAMAGES: dict[str, tuple[Damage, Action]] = {}


def damage(kind: Damage, name: str = "") -> Callable[[Action], Action]:
    """Register a way to damage a volume, and the name that check must give it."""

    def register(action: Action) -> Action:
        DAMAGES[kind.name.lower() + (f"-{name}" if name else "")] = (kind, action)
        return action

    return register


@damage(Damage.SUPERBLOCK)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(0)


@damage(Damage.BACKUP_SUPERBLOCK)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.backup_superblock)


@damage(Damage.SLOT_BLOCK)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.slot_block(SLOT))


@damage(Damage.JOURNAL)
async def _(volume: DamagedVolume) -> None:
    for index in range(2):
        await volume.tear(volume.superblock.geometry.journal(SLOT) + index)


@damage(Damage.LIST_ROOT, "orphans")
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.orphan_root(SLOT))


@damage(Damage.LIST_ROOT, "reclaim")
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.reclaim_root(SLOT))


async def _enter(volume: DamagedVolume, root: TreeRoot, key: int, value: bytes) -> None:
    await volume.forge(root.address, lambda block: root.leaf.insert(block, 0, key, value))


@damage(Damage.LIST_ENTRY, "orphan-of-nothing")
async def _(volume: DamagedVolume) -> None:
    root = TreeRoot.of_orphans(volume.superblock.geometry.orphan_root(SLOT), SLOT)
    await _enter(volume, root, 4242, ORPHAN_VALUE.pack(OrphanKind.OPEN, 1, 0))


@damage(Damage.LIST_ENTRY, "orphan-with-a-name")
async def _(volume: DamagedVolume) -> None:
    root = TreeRoot.of_orphans(volume.superblock.geometry.orphan_root(SLOT), SLOT)
    inode = await volume.inode(volume.content.file)
    value = ORPHAN_VALUE.pack(OrphanKind.OPEN, inode.generation, 0)
    await _enter(volume, root, inode.ino, value)


@damage(Damage.LIST_ENTRY, "reclaim-of-owned-units")
async def _(volume: DamagedVolume) -> None:
    root = TreeRoot.of_reclaim(volume.superblock.geometry.reclaim_root(SLOT), SLOT)
    block = await volume.read(volume.content.file)
    word, _ = EXTENT_VALUE.unpack(TreeRoot.of_file(volume.content.file).leaf.value(block, 0))
    unit, _ = unpack_place(word)
    await _enter(volume, root, unit * 16, RECLAIM_VALUE.pack(ReclaimKind.DATA, 1, 0))


@damage(Damage.LIST_ENTRY, "unknown-kind")
async def _(volume: DamagedVolume) -> None:
    root = TreeRoot.of_reclaim(volume.superblock.geometry.reclaim_root(SLOT), SLOT)
    await _enter(volume, root, 99, RECLAIM_VALUE.pack(77, 1, 0))


@damage(Damage.ROOT_DIRECTORY)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(ROOT)


@damage(Damage.INODE)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.content.file)


@damage(Damage.INODE, "directory")
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.content.directory)


@damage(Damage.TREE_NODE, "directory-leaf")
async def _(volume: DamagedVolume) -> None:
    nodes = await volume.blocks(BlockType.TREE_NODE, volume.content.large_directory)
    await volume.tear(nodes[-1])


@damage(Damage.TREE_NODE, "extent-leaf")
async def _(volume: DamagedVolume) -> None:
    nodes = await volume.blocks(BlockType.TREE_NODE, volume.content.fragmented)
    await volume.tear(nodes[0])


@damage(Damage.TREE_NODE, "root-area")
async def _(volume: DamagedVolume) -> None:
    await volume.forge(
        volume.content.large_directory,
        lambda block: LEVEL_KIND_COUNT.pack_into(block, INODE_ROOT_OFFSET, 1, 2, 4000),
    )


@damage(Damage.TREE_NODE, "keys-out-of-order")
async def _(volume: DamagedVolume) -> None:
    nodes = await volume.blocks(BlockType.TREE_NODE, volume.content.fragmented)
    root = TreeRoot.of_file(volume.content.fragmented)

    def swap(block: bytearray) -> None:
        at = root.node_leaf.keys_at
        block[at : at + 16] = block[at + 8 : at + 16] + block[at : at + 8]

    await volume.forge(nodes[0], swap)


async def _set_extent(volume: DamagedVolume, unit: int, count: int, mask: int) -> None:
    root = TreeRoot.of_file(volume.content.file)
    value = EXTENT_VALUE.pack(pack_place(unit, count), mask)
    await volume.forge(volume.content.file, lambda block: root.leaf.replace(block, 0, value))


@damage(Damage.EXTENT, "outside")
async def _(volume: DamagedVolume) -> None:
    await _set_extent(volume, 3, 1, 1)


@damage(Damage.EXTENT, "mask")
async def _(volume: DamagedVolume) -> None:
    await _set_extent(volume, volume.superblock.geometry.groups_unit + 900, 1, 0xFF)


@damage(Damage.DOUBLE_UNITS)
async def _(volume: DamagedVolume) -> None:
    nodes = await volume.blocks(BlockType.TREE_NODE, volume.content.fragmented)
    root = TreeRoot.of_file(volume.content.fragmented)
    word, mask = EXTENT_VALUE.unpack(root.node_leaf.value(await volume.read(nodes[0]), 0))
    unit, count = unpack_place(word)
    await _set_extent(volume, unit, count, mask)


@damage(Damage.DOUBLE_BLOCK)
async def _(volume: DamagedVolume) -> None:
    inode = await volume.inode(volume.content.attributes)
    await volume.forge_inode(volume.content.file, xattr_block=inode.xattr_block)


@damage(Damage.XATTRS)
async def _(volume: DamagedVolume) -> None:
    inode = await volume.inode(volume.content.attributes)
    await volume.tear(inode.xattr_block)


@damage(Damage.SYMLINK)
async def _(volume: DamagedVolume) -> None:
    inode = await volume.inode(volume.content.symlink)
    await volume.tear(inode.symlink_tail)


@damage(Damage.SYMLINK, "size")
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.symlink, size=70_000)


async def _change_entry(
    volume: DamagedVolume, directory: int, name: bytes, change: Callable[[bytes], bytes]
) -> None:
    inode = await volume.inode(directory)
    root = TreeRoot.of_directory(directory)

    def edit(block: bytearray) -> None:
        at = root.leaf.position(block, name_key(inode.hash_seed, name))
        root.leaf.replace(block, at, change(root.leaf.value(block, at)))

    await volume.forge(directory, edit)


@damage(Damage.ENTRY)
async def _(volume: DamagedVolume) -> None:
    await _change_entry(volume, ROOT, b"symlink", lambda value: value[:-1] + b"X")


@damage(Damage.DANGLING_ENTRY)
async def _(volume: DamagedVolume) -> None:
    await _change_entry(volume, ROOT, b"symlink", lambda value: b"\7" + bytes(7) + value[8:])


@damage(Damage.STALE_ENTRY)
async def _(volume: DamagedVolume) -> None:
    await _change_entry(
        volume, ROOT, b"symlink", lambda value: value[:8] + b"\1\2\3\4" + value[12:]
    )


@damage(Damage.ENTRY_TYPE)
async def _(volume: DamagedVolume) -> None:
    await _change_entry(volume, ROOT, b"symlink", lambda value: value[:12] + b"\4" + value[13:])


@damage(Damage.SECOND_NAME)
async def _(volume: DamagedVolume) -> None:
    inode = await volume.inode(volume.content.large_directory)
    head = inode.ino.to_bytes(8, "little") + inode.generation.to_bytes(4, "little")
    await _change_entry(volume, ROOT, b"symlink", lambda value: head + b"\4" + value[13:])


@damage(Damage.LOST_INODE)
async def _(volume: DamagedVolume) -> None:
    await _remove_entry(volume, b"fragmented")


@damage(Damage.LOST_INODE, "tree")
async def _(volume: DamagedVolume) -> None:
    await _remove_entry(volume, b"directory")


async def _remove_entry(volume: DamagedVolume, name: bytes) -> None:
    inode = await volume.inode(ROOT)
    root = TreeRoot.of_directory(ROOT)

    def edit(block: bytearray) -> None:
        at = root.leaf.position(block, name_key(inode.hash_seed, name))
        root.leaf.remove(block, at, at + 1)

    await volume.forge(ROOT, edit)


@damage(Damage.PARENT)
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.directory, parent=volume.content.large_directory)


@damage(Damage.LINK_COUNT)
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.file, nlink=9)


@damage(Damage.LINK_COUNT, "directory")
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.directory, nlink=9)


@damage(Damage.ENTRY_COUNT)
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.large_directory, entries=9)


@damage(Damage.UNIT_COUNT)
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.file, units=9)


@damage(Damage.UNIT_COUNT, "metadata")
async def _(volume: DamagedVolume) -> None:
    await volume.forge_inode(volume.content.fragmented, metadata_blocks=99)


@damage(Damage.GROUP_HEADER)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.group_header(0))


@damage(Damage.GROUP_MAP)
async def _(volume: DamagedVolume) -> None:
    await volume.tear(volume.superblock.geometry.group_map(0, 0))


@damage(Damage.LEAKED, "unit")
async def _(volume: DamagedVolume) -> None:
    def use_one(block: bytearray) -> None:
        free = next(at for at in range(1792) if unit_state(block, at) == UnitState.FREE)
        set_unit_state(block, free, UnitState.DATA)

    await volume.forge(volume.superblock.geometry.group_map(0, 0), use_one)


@damage(Damage.LEAKED, "block")
async def _(volume: DamagedVolume) -> None:
    _, _, position = volume.superblock.geometry.map_place(volume.content.symlink // 16)

    def use_all(block: bytearray) -> None:
        for other in range(position, 1792):
            bits = used_blocks(block, other)
            if 0 < bits < 0xFFFF:
                set_used_blocks(block, other, 0xFFFF)
                return
        raise AssertionError("no metadata unit has a free block")

    await volume.forge(volume.superblock.geometry.group_map(0, 0), use_all)


@damage(Damage.UNMARKED)
async def _(volume: DamagedVolume) -> None:
    block = await volume.read(volume.content.file)
    word, _ = EXTENT_VALUE.unpack(TreeRoot.of_file(volume.content.file).leaf.value(block, 0))
    group, index, position = volume.superblock.geometry.map_place(unpack_place(word)[0])
    address = volume.superblock.geometry.group_map(group, index)
    await volume.forge(address, lambda block: set_unit_state(block, position, UnitState.FREE))


@damage(Damage.FREE_COUNT)
async def _(volume: DamagedVolume) -> None:
    def change(block: bytearray) -> None:
        block[GROUP_FREE_UNITS_OFFSET] ^= 1

    await volume.forge(volume.superblock.geometry.group_header(0), change)


@pytest.mark.parametrize("name", sorted(DAMAGES))
async def test_damage_is_named_and_repaired(name: str) -> None:
    kind, action = DAMAGES[name]
    async with damaged_volume() as volume:
        await action(volume)
        report = await volume.check()
        assert kind in report.counts(), [str(finding) for finding in report.findings]
        assert report.exit_code == 4
        repaired = await volume.check(repair=True)
        assert not repaired.left, [str(finding) for finding in repaired.left]
        assert repaired.exit_code == 1
        assert_clean(await volume.check())
        async with mounted(volume.device, volume.superblock, incarnation=2) as (again, _):
            assert await names(again)


async def test_every_kind_of_damage_is_tested() -> None:
    elsewhere = {Damage.SUPERBLOCKS, Damage.VIEW, Damage.VIEW_COPY}
    assert {kind for kind, _ in DAMAGES.values()} | elsewhere == set(Damage)


@pytest.mark.parametrize("copies", [1, 2])
async def test_damaged_views(copies: int) -> None:
    async with damaged_volume() as volume:
        for address in VIEW_ADDRESSES[:copies]:
            await volume.tear(address + 3)
        report = await check_alone(volume)
        assert (Damage.VIEW_COPY if copies == 1 else Damage.VIEW) in report.counts()
        assert not (await check_alone(volume, repair=True)).left
        assert Damage.VIEW_COPY not in (await check_alone(volume)).counts()


async def check_alone(volume: DamagedVolume, *, repair: bool = False) -> Report:
    from csvfs.check import check_volume

    return await check_volume(volume.device, volume.superblock, repair=repair, now_ns=10**18)


def assert_clean(report: Report) -> None:
    assert report.clean, [str(finding) for finding in report.findings]
    assert report.exit_code == 0


async def test_a_crashed_volume_is_clean_and_nothing_is_written() -> None:
    async with damaged_volume(crashed=True) as volume:
        before = volume.lun.journal.writes
        report = await volume.check()
        assert_clean(report)
        assert report.totals.orphans == 1
        assert report.totals.replayed_records > 0
        assert volume.lun.journal.writes == before


async def test_a_lost_file_keeps_its_content() -> None:
    async with damaged_volume() as volume:
        await _remove_entry(volume, b"directory")
        assert not (await volume.check(repair=True)).left
        async with mounted(volume.device, volume.superblock, incarnation=2) as (again, _):
            lost = await again.lookup(ROOT, b"lost+found")
            found = await again.lookup(lost.ino, b"#%d" % volume.content.directory)
            assert found.ino == volume.content.directory
            inside = await again.lookup(found.ino, b"file")
            assert (inside.ino, inside.size, inside.nlink) == (volume.content.file, 196608, 2)


async def test_an_inode_inside_file_data_is_never_believed() -> None:
    """A guest copies a directory's inode into its image, and a name is bent to lead there."""
    async with damaged_volume() as volume:
        block = await volume.read(volume.content.file)
        leaf = TreeRoot.of_file(volume.content.file).leaf
        unit, _ = unpack_place(EXTENT_VALUE.unpack(leaf.value(block, 0))[0])
        forged = await volume.read(volume.content.symlink)
        forged[32:40] = (unit * 16).to_bytes(8, "little")
        forged[48:56] = forged[64:72] = (unit * 16).to_bytes(8, "little")
        await volume.write(unit * 16, forged)
        await volume.forge(unit * 16, lambda _: None)
        await _change_entry(
            volume, ROOT, b"symlink", lambda value: (unit * 16).to_bytes(8, "little") + value[8:]
        )
        report = await volume.check()
        assert Damage.DANGLING_ENTRY in report.counts()
        assert "file data" in str(report.findings[0])
