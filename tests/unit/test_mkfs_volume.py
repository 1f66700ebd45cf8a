"""What format leaves behind, whole or cut anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from random import Random

import pytest

from csvfs import format as fmt
from csvfs.btree.tree import Tree, TreeRoot
from csvfs.format import BadBlock, BlockType, Superblock
from csvfs.journal.transaction import BlockKey
from csvfs.mkfs import FormatOptions, make_filesystem, read_signatures
from csvfs.namespace.inode import Inode
from redirector.block.device import (
    BlockDevice,
    InitiatorPort,
    LunIdentity,
    MediumError,
    OutcomeUnknown,
)
from redirector.block.medium import Blocks, keep_all, keep_none
from redirector.block.simulated import Command, SimulatedLun

MIB = 1 << 20
OPTIONS = FormatOptions(label="images", slots=4, holder_key=77)


async def login(lun: SimulatedLun) -> BlockDevice:
    return await lun.login(InitiatorPort("iqn.2026-11.test:format", 1))


async def format_lun(
    lun: SimulatedLun, options: FormatOptions = OPTIONS, seed: int = 1
) -> Superblock:
    async with await login(lun) as device:
        return await make_filesystem(device, options, now_ns=5, rng=Random(seed))


def block_at(blocks: Blocks, address: int) -> bytes:
    return blocks.get(address, bytes(4096))


class _BlocksReader:
    def __init__(self, blocks: Blocks, volume_id: bytes) -> None:
        self.blocks = blocks
        self.volume_id = volume_id

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytes:
        block = block_at(self.blocks, address)
        fmt.verify(block, address, kind, self.volume_id, owner)
        assert fmt.block_flags(block) == flags
        return block

    def require(self, wanted: Iterable[BlockKey]) -> None:
        """Everything is there."""


def assert_complete(blocks: Blocks, superblock: Superblock) -> None:
    """Everything that an empty volume has is there and valid."""
    volume_id, geometry = superblock.volume_id, superblock.geometry
    copies = [
        b"".join(block_at(blocks, address + n) for n in range(16)) for address in fmt.VIEW_ADDRESSES
    ]
    views = [
        fmt.decode_view(copy, at, volume_id)
        for copy, at in zip(copies, fmt.VIEW_ADDRESSES, strict=True)
    ]
    assert [view.epoch for view in views] == [2, 1]
    for view in views:
        assert not view.members
        assert len(view.slots) == geometry.slots
        assert view.holder_key == 77
        assert view.secret == views[0].secret != bytes(32)
    for address in range(fmt.SLOT_AREA, fmt.JOURNAL_AREA):
        assert not any(block_at(blocks, address))
    free = 0
    for group in range(geometry.group_count):
        address = geometry.group_header(group)
        header = fmt.GroupHeader.decode(block_at(blocks, address), address, volume_id, group)
        assert header.unit_count == geometry.group_units(group)
        assert header.flags == fmt.GroupFlag.UNINIT
        free += header.free_units
    assert free == geometry.groups_end_unit - geometry.groups_unit - geometry.group_count
    reader = _BlocksReader(blocks, volume_id)
    root = Inode.unpack(reader.read(1, BlockType.INODE, 1))
    root.check(1)
    assert (root.mode, root.uid, root.gid, root.nlink, root.parent) == (0o40755, 0, 0, 2, 1)
    assert Tree(reader, TreeRoot.of_directory(1)).is_empty()


def superblocks_of(blocks: Blocks, size: int) -> list[Superblock]:
    """The valid superblocks, main before backup."""
    found = []
    for address in (0, (size // 65536 - 1) * 16):
        try:
            found.append(Superblock.decode(block_at(blocks, address), address))
        except BadBlock:
            pass
    return found


async def test_a_formatted_lun() -> None:
    lun = SimulatedLun(70 * MIB, seed=3)
    superblock = await format_lun(lun)
    assert superblocks_of(lun.blocks, 70 * MIB) == [superblock, superblock]
    assert_complete(lun.blocks, superblock)
    assert superblock.volume_id == Random(1).randbytes(16)
    assert superblock.device_id == lun.identity.device_id
    assert superblock.serial == lun.identity.serial
    assert superblock.label == "images"


async def test_a_size_that_is_no_multiple_of_anything() -> None:
    size = 70 * MIB + 3 * 512
    lun = SimulatedLun(size)
    superblock = await format_lun(lun)
    assert superblocks_of(lun.blocks, size) == [superblock, superblock]
    assert_complete(lun.blocks, superblock)


async def test_whatever_was_there_is_gone() -> None:
    lun = SimulatedLun(80 * MIB)
    async with await login(lun) as device:
        for at in (0, 512, 0x10000, 0x100000, 0x200000, 0x4000000, 80 * MIB - 65536):
            await device.write(at, b"\xee" * 512)
        for at, magic in (
            (512, b"EFI PART"),
            (80 * MIB - 512, b"EFI PART"),
            (0x4000000, bytes(0x40) + b"_BHRfS_M"),
            (0x200000, b"\x5e\xf1\xab\x2f"),
        ):
            await device.write(at, magic.ljust(512, b"\0"))
        assert len(await read_signatures(device)) == 4
        await make_filesystem(device, OPTIONS, now_ns=5, rng=Random(1))
        names = {signature.name for signature in await read_signatures(device)}
    assert names == {'csvfs volume "images"', 'csvfs volume "images" (backup superblock)'}


@pytest.mark.parametrize("old", [False, True])
async def test_cut_anywhere_there_is_no_half_volume(old: bool) -> None:
    size = 64 * MIB
    lun = SimulatedLun(size, seed=9, record=True)
    before = 0
    old_superblock = None
    if old:
        old_superblock = await format_lun(lun, seed=2)
        before = lun.journal.writes
    superblock = await format_lun(lun, seed=1)
    outcomes = set()
    for cut in range(before, lun.journal.writes + 1):
        for keep in (None, keep_all, keep_none):
            blocks = lun.crashed(cut, keep=keep).blocks
            found = superblocks_of(blocks, size)
            outcomes.add(len(found))
            for volume in found:
                assert volume in (superblock, old_superblock)
                assert_complete(blocks, volume)
    assert outcomes == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (FormatOptions(label="x" * 65), "label"),
        (FormatOptions(label="a\nb"), "label"),
        (FormatOptions(slots=65), "65 slots"),
        (FormatOptions(slots=0), "0 slots"),
        (FormatOptions(journal_bytes=1000), "journal of 1000 bytes"),
        (FormatOptions(slots=4, journal_bytes=64 * MIB), "fewer slots"),
    ],
)
async def test_bad_options_write_nothing(options: FormatOptions, words: str) -> None:
    lun = SimulatedLun(70 * MIB)
    with pytest.raises(ValueError, match=words):
        await format_lun(lun, options)
    assert lun.journal.writes == 0


async def test_a_small_lun_is_refused_with_the_number() -> None:
    lun = SimulatedLun(64 * MIB - 4096)
    with pytest.raises(fmt.BadGeometry, match="at least 67108864"):
        await format_lun(lun)
    assert lun.journal.writes == 0


@pytest.mark.parametrize("address", [0, fmt.VIEW_ADDRESSES[0]])
async def test_a_refused_write_is_passed_on(address: int) -> None:
    lun = SimulatedLun(70 * MIB)

    def hits(command: Command) -> bool:
        return bool(command.data.strip(b"\0")) and command.offset_bytes == address * 4096

    lun.inject(hits, lambda what: MediumError(what, sense_key=3, asc_ascq=0x0C00))
    with pytest.raises(MediumError):
        await format_lun(lun)
    # Without the main superblock there may be a backup, of a volume that is complete by then.
    assert len(superblocks_of(lun.blocks, 70 * MIB)) == (address == 0)


async def test_a_lost_session_leaves_no_volume() -> None:
    lun = SimulatedLun(70 * MIB)
    lun.lose_answer(lambda command: command.data.startswith(b"CSVB"), landed=True)
    with pytest.raises(OutcomeUnknown):
        await format_lun(lun)
    assert superblocks_of(lun.blocks, 70 * MIB) == []


async def test_progress_ends_at_the_total() -> None:
    steps: list[tuple[int, int]] = []
    lun = SimulatedLun(70 * MIB)
    async with await login(lun) as device:
        await make_filesystem(
            device, OPTIONS, now_ns=5, progress=lambda done, total: steps.append((done, total))
        )
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1][1]


async def test_long_words_of_a_target_are_cut() -> None:
    lun = SimulatedLun(70 * MIB)
    lun.identity = LunIdentity(70 * MIB, 512, "v" * 99, "p" * 99, "", "s" * 200, bytes(300))
    superblock = await format_lun(lun)
    assert superblocks_of(lun.blocks, 70 * MIB) == [superblock, superblock]
    assert (len(superblock.vendor), len(superblock.serial)) == (16, 96)


async def test_one_tebibyte_is_quick() -> None:
    lun = SimulatedLun(1 << 40)
    started = time.perf_counter()
    superblock = await format_lun(lun, FormatOptions(slots=16))
    assert time.perf_counter() - started < 2
    assert superblock.geometry.group_count == 624
