"""Format a LUN: lay out an empty volume.

Theory. Until its very last write a LUN that is being formatted is *no csvfs volume*: the old
superblocks go first, each for certain, before anything else changes; the new ones come last, after
a flush of all the rest. A crash in between leaves either the old volume untouched (its backup
superblock still there), or nothing that anybody would mount, or the finished volume. So whoever
finds a valid superblock may believe what it describes.

    1. block 0, then the backup superblock's block: zeroes, FUA
    2. the fixed area, and wherever other systems keep their superblocks: zeroes
    3. group headers (32 at a time), root inode, two empty views
    4. flush
    5. backup superblock, FUA; superblock, FUA

Journals, orphan and reclaim roots are written when their slot is first used: their blocks are
zeroes or leftovers of another volume id, neither of which is ever believed.

Concurrency: `make_filesystem` owns the device for its duration; cancelled, it leaves no volume.
Who may format at all is decided by `csvfs.mkfs_claim`.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.btree.tree import TreeRoot
from csvfs.format import (
    BLOCK_BYTES,
    DEVICE_ID_BYTES,
    JOURNAL_AREA,
    LABEL_BYTES,
    ROOT_INODE,
    SECRET_BYTES,
    SUPERBLOCK_ADDRESS,
    BlockType,
    Geometry,
    GroupHeader,
    ProbeFlag,
    Superblock,
    View,
    WriteCache,
    byte_offset,
    encode_view,
    new_block,
    seal,
    view_address,
)
from csvfs.namespace.inode import new_inode
from csvfs.signatures import Signature, find_signatures, windows
from redirector.block.device import BlockDevice, LunIdentity

FORMAT_DEPTH: Final = 32
"""Commands in flight."""
_FIRST_VERSION: Final = 1
_EMPTY_VIEW_EPOCHS: Final = (1, 2)
"""One in each copy, so that the first view that a node writes may be torn too."""

_SYSTEM_RANDOM: Final = SystemRandom()

Progress = Callable[[int, int], None]
"""(writes done, writes in all)."""


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What a volume is to be; everything else comes from the LUN."""

    label: str = ""
    """At most 64 bytes of UTF-8."""
    slots: int = 16
    journal_bytes: int | None = None
    """None: min(64 MiB, LUN/256)."""
    probe: ProbeFlag = ProbeFlag.NONE
    write_cache: WriteCache = WriteCache.VOLATILE
    holder_key: int = 0
    """The key under which the formatting nexus holds the reservation. The empty view names it
    as parked, so that the first node succeeds it at once; 0: nobody holds."""


async def read_signatures(device: BlockDevice) -> tuple[Signature, ...]:
    """What is on the LUN. Raises what `BlockDevice.read` raises."""
    size = device.identity.size_bytes
    pieces = {at: await device.read(at, length) for at, length in windows(size)}
    return find_signatures(size, pieces)


def plan_superblock(
    identity: LunIdentity, options: FormatOptions, *, volume_id: bytes, now_ns: int
) -> Superblock:
    """The superblock that formatting will write.

    Raises `BadGeometry` when the volume does not fit, ValueError for a label that is too long.
    """
    if len(options.label.encode()) > LABEL_BYTES:
        raise ValueError(f"the label {options.label!r} is longer than {LABEL_BYTES} bytes")
    if not options.label.isprintable():
        raise ValueError(f"the label {options.label!r} holds characters that cannot be shown")
    superblock = Superblock(
        volume_id=volume_id,
        geometry=Geometry.for_lun(identity.size_bytes, options.slots, options.journal_bytes),
        created_ns=now_ns,
        label=options.label,
        device_id=stored_device_id(identity),
        vendor=_cut(identity.vendor, 16),
        product=_cut(identity.product, 32),
        serial=_cut(identity.serial, 96),
        probe=options.probe,
        write_cache=options.write_cache,
    )
    superblock.encode(SUPERBLOCK_ADDRESS)
    return superblock


def stored_device_id(identity: LunIdentity) -> bytes:
    """What the superblock remembers, and later compares, of VPD page 83h."""
    return identity.device_id[:DEVICE_ID_BYTES]


async def make_filesystem(
    device: BlockDevice,
    options: FormatOptions,
    *,
    now_ns: int,
    rng: Random = _SYSTEM_RANDOM,
    progress: Progress | None = None,
) -> Superblock:
    """Destroy what is on the LUN and write an empty volume; stable on return.

    ``rng`` draws the volume id, the secret and the root's hash seed. Raises `BadGeometry` and
    ValueError before the first write, `BlockError` at any time.
    """
    superblock = plan_superblock(
        device.identity, options, volume_id=rng.randbytes(16), now_ns=now_ns
    )
    geometry = superblock.geometry
    main, backup = SUPERBLOCK_ADDRESS, geometry.backup_superblock
    nothing = bytes(BLOCK_BYTES)
    for address in (main, backup):
        await device.write(byte_offset(address), nothing, fua=True)
    zeroes = list(_zeroes(device.identity, geometry))
    contents = list(_contents(superblock, options, rng, now_ns))
    counter = _Counter(progress, len(zeroes) + len(contents) + 5)
    counter.add(2)
    await _write_all(device, zeroes, counter)
    await _write_all(device, contents, counter)
    await device.flush()
    counter.add(1)
    for address in (backup, main):
        await device.write(
            byte_offset(address), superblock.encode(address, _FIRST_VERSION), fua=True
        )
        counter.add(1)
    return superblock


class _Counter:
    """Tells the caller how far it is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._done = 0
        self._total = total

    def add(self, writes: int) -> None:
        self._done += writes
        if self._progress is not None:
            self._progress(self._done, self._total)


_Write = tuple[int, bytes | bytearray]
"""(offset on the LUN in bytes, data)."""


def _zeroes(identity: LunIdentity, geometry: Geometry) -> Iterator[_Write]:
    """The fixed area, the last unit with what lies behind it, all places of signatures."""
    size = identity.size_bytes
    wanted = [
        (0, byte_offset(JOURNAL_AREA)),
        *((at, at + length) for at, length in windows(size)),
        (byte_offset(geometry.backup_superblock), size),
    ]
    step = max(BLOCK_BYTES, identity.max_transfer_bytes // BLOCK_BYTES * BLOCK_BYTES)
    zeroes = bytes(min(step, 1 << 20))
    done = 0
    for start, end in sorted(wanted):
        at = max(start, done)
        while at < end:
            length = min(len(zeroes), end - at)
            yield at, zeroes[:length]
            at += length
        done = max(done, end)


def _contents(
    superblock: Superblock, options: FormatOptions, rng: Random, now_ns: int
) -> Iterator[_Write]:
    volume_id, geometry = superblock.volume_id, superblock.geometry
    yield byte_offset(ROOT_INODE), _root_inode(volume_id, rng, now_ns)
    secret = rng.randbytes(SECRET_BYTES)
    for epoch in _EMPTY_VIEW_EPOCHS:
        view = View.empty(geometry.slots, epoch, holder_key=options.holder_key, secret=secret)
        view = replace(view, written_ns=now_ns)
        yield byte_offset(view_address(epoch)), encode_view(view, volume_id)
    for group in range(geometry.group_count):
        header = GroupHeader.fresh(
            group, geometry.group_first_unit(group), geometry.group_units(group)
        )
        yield byte_offset(header.address), header.encode(volume_id, _FIRST_VERSION)


def _root_inode(volume_id: bytes, rng: Random, now_ns: int) -> bytearray:
    """An empty directory of root's, mode 0755, its own parent."""
    inode = new_inode(ROOT_INODE, stat.S_IFDIR | 0o755, 0, 0, now_ns, parent=None)
    inode.generation = 1
    inode.hash_seed = rng.getrandbits(64)
    block = new_block(BlockType.INODE, ROOT_INODE, ROOT_INODE, volume_id)
    inode.pack_into(block)
    TreeRoot.of_directory(ROOT_INODE).initialise(block)
    seal(block, _FIRST_VERSION)
    return block


async def _write_all(device: BlockDevice, writes: list[_Write], counter: _Counter) -> None:
    """All of them, `FORMAT_DEPTH` at a time, in no order. The first error ends it."""
    waiting = iter(writes)

    async def work() -> None:
        for offset, data in waiting:
            await device.write(offset, data)
            counter.add(1)

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(min(FORMAT_DEPTH, len(writes))):
                nursery.start_soon(work)
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the workers; the others were its echo (cancelled, or lost with it)."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = next(
            (e for e in error.exceptions if not isinstance(e, trio.Cancelled)),
            error.exceptions[0],
        )
    return error


def _cut(text: str, size_bytes: int) -> str:
    """As much of a text for people as the field holds."""
    return text.replace("\0", "").encode()[:size_bytes].decode(errors="ignore")
