"""One self-describing 4 KiB block: which file, which slot, which write.

0   magic       8 bytes  b"CSVFSWL1"
8   file        u32      number of the file in the workload
12  slot        u32      the block's place in the file, in blocks
16  sequence    u64      grows by one with each write of the whole workload
24  filling              bytes derived from the three, so that a torn block is seen
4092 crc32      u32      of everything before
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass

BLOCK_BYTES = 4096
MAGIC = b"CSVFSWL1"
_HEAD = struct.Struct("<8sIIQ")
_TAIL = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a block says of itself."""

    file: int
    slot: int
    sequence: int


def build(stamp: Stamp) -> bytes:
    """The 4096 bytes of a write."""
    head = _HEAD.pack(MAGIC, stamp.file, stamp.slot, stamp.sequence)
    filling = random.Random(stamp.sequence << 1 | 1).randbytes(BLOCK_BYTES - len(head) - _TAIL.size)
    body = head + filling
    return body + _TAIL.pack(zlib.crc32(body))


def parse(block: bytes) -> Stamp | None:
    """The stamp of a block; None for a block of zeros. Raises `ValueError` for anything else."""
    if len(block) != BLOCK_BYTES:
        raise ValueError(f"{len(block)} bytes where a block of {BLOCK_BYTES} was expected")
    if not any(block):
        return None
    magic, file, slot, sequence = _HEAD.unpack_from(block)
    (checksum,) = _TAIL.unpack_from(block, BLOCK_BYTES - _TAIL.size)
    if magic != MAGIC or checksum != zlib.crc32(block[: -_TAIL.size]):
        raise ValueError("neither zeros nor an intact block of the workload (torn or foreign data)")
    return Stamp(file, slot, sequence)
