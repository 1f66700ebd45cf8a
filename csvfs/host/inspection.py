"""Show on-disk structures of a volume that may be mounted elsewhere: read, and never write.

Everything comes as *lines*: (indentation, name, value), so that whoever shows them only formats.
Secrets (the view's heartbeat secret) are named, never shown; certificates by their fingerprint.

Concurrency: the caller's task. The reader is a registered newcomer (`csvfs.membership.newcomer`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from csvfs.btree.tree import TreeRoot
from csvfs.data.extents import extents
from csvfs.format import BLOCK_BYTES, BlockType, Superblock, View, byte_offset, verify
from csvfs.journal.transaction import BlockKey, BlockReader, NeedBlocks
from csvfs.membership.fixed_area import read_slot_blocks, read_view
from csvfs.membership.newcomer import Newcomer
from csvfs.namespace.directory import read_entries
from csvfs.namespace.inode import Inode
from csvfs.namespace.names import read_target

T = TypeVar("T")

_ENTRIES_AT_ONCE = 1 << 20


class Line(NamedTuple):
    """One fact; ``depth`` is how far it is indented."""

    depth: int
    name: str
    value: str


class _Blocks:
    """Verified blocks of a device, for synchronous bodies. Implements `BlockReader`."""

    def __init__(self, newcomer: Newcomer) -> None:
        self._newcomer = newcomer
        self._volume_id = newcomer.superblock.volume_id
        self._blocks: dict[int, bytearray] = {}

    def read(self, address: int, kind: BlockType, owner: int, flags: int = 0) -> bytearray:
        block = self._blocks.get(address)
        if block is None:
            raise NeedBlocks(BlockKey(address, kind, owner, flags))
        verify(block, address, kind, self._volume_id, owner)
        return block

    def require(self, wanted: Iterable[BlockKey]) -> None:
        absent = [key for key in wanted if key.address not in self._blocks]
        if absent:
            raise NeedBlocks(*absent)

    async def run(self, body: Callable[[BlockReader], T]) -> T:
        """Run ``body``, loading what it asks for. Raises `BadBlock`, `BlockError`."""
        while True:
            try:
                return body(self)
            except NeedBlocks as need:
                for key in need.wanted:
                    self._blocks[key.address] = await self._load(key.address)

    async def _load(self, address: int) -> bytearray:
        device = self._newcomer.device
        return await self._newcomer.registration.ask(
            lambda: device.read(byte_offset(address), BLOCK_BYTES)
        )


async def show_superblock(newcomer: Newcomer) -> list[Line]:
    """The superblock, and whether it is the backup."""
    superblock = newcomer.superblock
    lines = [Line(0, "superblock", str(newcomer.superblock_trouble or "valid"))]
    if newcomer.superblock_trouble:
        lines.append(Line(0, "shown", "the backup superblock"))
    return [*lines, *_lines(superblock, 1)]


async def show_view(newcomer: Newcomer) -> list[Line]:
    """The view, with the slots that were ever used. Raises `NoView`."""
    view = await _view(newcomer)
    return [
        Line(0, "epoch", str(view.epoch)),
        Line(0, "holder key", f"{view.holder_key:#018x}"),
        Line(0, "written", _time(view.written_ns)),
        Line(0, "secret", "(not shown)"),
        Line(0, "members", ", ".join(map(str, view.members)) or "none"),
        *_used_slots(view),
    ]


async def show_slots(newcomer: Newcomer) -> list[Line]:
    """The slot blocks: who is, or was last, in each slot, and over which sessions."""
    device, superblock = newcomer.device, newcomer.superblock
    blocks = await newcomer.registration.ask(lambda: read_slot_blocks(device, superblock))
    lines: list[Line] = []
    for slot in range(superblock.geometry.slots):
        if slot in blocks:
            lines += [Line(0, f"slot {slot}", ""), *_lines(blocks[slot], 1)]
    return lines or [Line(0, "slots", "none was ever used")]


async def show_inode(newcomer: Newcomer, ino: int) -> list[Line]:
    """An inode, and its extents, its entries or its target. Raises `BadBlock`, ValueError."""
    last = newcomer.superblock.geometry.backup_superblock
    if not 0 < ino < last:
        raise ValueError(f"inode numbers of this volume are 1 to {last - 1}")
    return await _Blocks(newcomer).run(lambda reader: _inode(reader, ino))


def _inode(reader: BlockReader, ino: int) -> list[Line]:
    inode = Inode.unpack(reader.read(ino, BlockType.INODE, ino))
    inode.check(ino)
    lines = [Line(0, "inode", str(ino)), *_lines(inode, 1)]
    if inode.is_directory:
        entries = read_entries(reader, inode, 0, _ENTRIES_AT_ONCE)
        lines += [
            Line(1, "entry", f"{entry.name.decode(errors='backslashreplace')} -> {entry.ino}")
            for entry in entries
        ]
    elif inode.is_symlink:
        target = read_target(reader, inode)
        lines.append(Line(1, "target", target.decode(errors="backslashreplace")))
    elif inode.is_regular:
        lines += [
            Line(
                1,
                "extent",
                f"units {each.logical} to {each.logical + each.units - 1} at unit "
                f"{each.physical}, written {each.written:#x}",
            )
            for each in extents(reader, TreeRoot.of_file(ino))
        ]
    return lines


async def _view(newcomer: Newcomer) -> View:
    superblock: Superblock = newcomer.superblock
    return await newcomer.registration.ask(lambda: read_view(newcomer.device, superblock.volume_id))


def _used_slots(view: View) -> Iterator[Line]:
    for number, slot in enumerate(view.slots):
        if slot.incarnation:
            yield Line(0, f"slot {number}", "")
            yield from _lines(slot, 1)


def _lines(thing: Any, depth: int) -> Iterator[Line]:
    """The fields of a dataclass, nested ones below their names."""
    for each in fields(thing):
        value = getattr(thing, each.name)
        name = each.name.removesuffix("_ns").replace("_", " ")
        if is_dataclass(value):
            yield Line(depth, name, "")
            yield from _lines(value, depth + 1)
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for item in value:
                yield Line(depth, name.removesuffix("s"), "")
                yield from _lines(item, depth + 1)
        else:
            yield Line(depth, name, _text(each.name, value))


def _text(name: str, value: Any) -> str:
    if name == "certificate":
        return f"SHA-256 {hashlib.sha256(value).hexdigest()}" if value else "none"
    if name.endswith("_ns"):
        return _time(value)
    if name in ("key", "holder_key", "isid", "compat", "ro_compat", "incompat"):
        return f"{value:#x}"
    if name == "mode":
        return f"{value:#o}"
    if isinstance(value, Enum):
        return (value.name or "none").lower().replace("_", " ").replace("|", ", ")
    if isinstance(value, bytes):
        return value.hex() or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _time(time_ns: int) -> str:
    if not time_ns:
        return "never"
    seconds, rest = divmod(time_ns, 10**9)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest:09}"
