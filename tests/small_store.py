"""A `Store` on a small simulated LUN, and short ways to write and read its blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from struct import Struct
from typing import Any

from csvfs.format import (
    BLOCK_BYTES,
    HEADER_BYTES,
    PAYLOAD_BYTES,
    BlockType,
    block_type,
    new_block,
    seal,
)
from csvfs.journal.record import JournalPlace
from csvfs.journal.replay import initialise_journal, replay
from csvfs.journal.store import Store, open_store
from csvfs.journal.transaction import Transaction
from redirector.block.device import InitiatorPort
from redirector.block.simulated import Command, SimulatedDevice, SimulatedLun

VOLUME_ID = b"a store for test"
LUN_BYTES = 8 << 20
PLACE = JournalPlace(VOLUME_ID, slot=0, address=16, blocks=256)
"""The smallest journal there is: 1 MiB."""
PORT = InitiatorPort("iqn.2026-01.test:store", 1)
KIND = BlockType.XATTR
FIRST = 512
"""Blocks from here on are free for tests."""

_TAG = Struct("<Q")


def resource_of(kind: BlockType, owner: int, flags: int) -> Hashable:
    """One lock an owner; the orphan root has its own."""
    del flags
    return "root" if kind == BlockType.ORPHAN_ROOT else owner


def fill(block: bytearray, tag: int) -> None:
    """Write ``tag`` all over the payload, so that a torn block is seen."""
    block[HEADER_BYTES:] = _TAG.pack(tag) * (PAYLOAD_BYTES // _TAG.size)


def tag_of(block: bytes | bytearray | memoryview) -> int:
    return int(_TAG.unpack_from(block, HEADER_BYTES)[0])


def sealed(address: int, tag: int, version: int = 1, owner: int = 0) -> bytes:
    """A block as it lies on the LUN."""
    block = new_block(KIND, address, owner, VOLUME_ID)
    fill(block, tag)
    seal(block, version)
    return bytes(block)


def creating(*tags: tuple[int, int], owner: int = 0) -> Callable[[Transaction], None]:
    """A body that creates blocks from (address, tag) pairs."""

    def body(tx: Transaction) -> None:
        for address, tag in tags:
            fill(tx.create(address, KIND, owner), tag)

    return body


def editing(*tags: tuple[int, int], owner: int = 0) -> Callable[[Transaction], None]:
    """A body that edits blocks."""

    def body(tx: Transaction) -> None:
        for address, tag in tags:
            fill(tx.edit(address, KIND, owner), tag)

    return body


def freeing(*addresses: int) -> Callable[[Transaction], None]:
    """A body that frees blocks."""

    def body(tx: Transaction) -> None:
        for address in addresses:
            tx.free(address)

    return body


def home_tag(lun: SimulatedLun, address: int) -> int | None:
    """What lies at a block's home now, None if nothing was ever written there."""
    block = lun.blocks.get(address)
    return None if block is None else tag_of(block)


def is_record(command: Command) -> bool:
    """A write of a journal record."""
    return len(command.data) >= BLOCK_BYTES and block_type(command.data) == BlockType.JOURNAL_RECORD


def is_header(command: Command) -> bool:
    """A write of a journal header."""
    return len(command.data) == BLOCK_BYTES and block_type(command.data) == BlockType.JOURNAL_HEADER


def is_home(command: Command) -> bool:
    """A write to blocks outside the journal."""
    return bool(command.data) and command.offset_bytes >= FIRST * BLOCK_BYTES


@asynccontextmanager
async def small_store(
    lun: SimulatedLun, *, incarnation: int = 1, **options: Any
) -> AsyncIterator[Store]:
    """A store on ``lun``, whose journal is initialised in incarnation 1, else replayed."""
    device = await lun.login(PORT)
    if incarnation == 1:
        start = await initialise_journal(device, PLACE, 1)
    else:
        start = (await replay(device, PLACE, incarnation)).start
    async with open_store(
        device, PLACE, incarnation, start, resource_of=resource_of, **options
    ) as store:
        yield store


async def recovered(lun: SimulatedLun) -> SimulatedLun:
    """What replay makes of the LUN as it is now, if the host died but the target did not."""
    copy = SimulatedLun(LUN_BYTES, blocks=dict(lun.blocks))
    device: SimulatedDevice = await copy.login(PORT)
    await replay(device, PLACE, 99)
    return copy
