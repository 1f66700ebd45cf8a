"""A block that says what it is: which file, which place, which write of whose.

 0  magic      8 bytes   b"CSVLABB1"
 8  file       u32       number of the file in the scenario
12  term       u32       grows each time the file gets another writer; 0: never written
16  offset     u64       bytes
24  sequence   u64       grows by one with each write of a term
32  length     u32       of the whole block, bytes
36  filling              made from all of the above, so that a mixture of two writes is seen
-4  crc32      u32       of everything before
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"CSVLABB1"
_HEAD: Final = struct.Struct("<8sIIQQI")
_TAIL: Final = struct.Struct("<I")
assert _HEAD.size == 36

Version = tuple[int, int]
"""(term, sequence): of two writes to one place, the greater is the later one."""
NEVER: Final[Version] = (0, 0)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a block says of itself."""

    file: int
    offset: int
    version: Version


class Foreign(ValueError):
    """Neither zeros nor an intact block of this file and place: torn, or somebody else's."""


def build(stamp: Stamp, length: int) -> bytes:
    """The bytes of a write."""
    term, sequence = stamp.version
    head = _HEAD.pack(MAGIC, stamp.file, term, stamp.offset, sequence, length)
    seed = hash((stamp.file, stamp.offset, term, sequence))  # of integers: the same everywhere
    body = head + random.Random(seed).randbytes(length - _HEAD.size - _TAIL.size)
    return body + _TAIL.pack(zlib.crc32(body))


def version_of(block: bytes, file: int, offset: int) -> Version:
    """The version of the block of a file that was read at ``offset``; `NEVER` for zeros.

    Raises `Foreign`.
    """
    if not any(block):
        return NEVER
    if len(block) < _HEAD.size + _TAIL.size:
        raise Foreign(f"{len(block)} bytes are no block")
    magic, of_file, term, of_offset, sequence, length = _HEAD.unpack_from(block)
    (checksum,) = _TAIL.unpack_from(block, len(block) - _TAIL.size)
    if magic != MAGIC or length != len(block) or checksum != zlib.crc32(block[: -_TAIL.size]):
        raise Foreign("torn, or not of this workload")
    if (of_file, of_offset) != (file, offset):
        raise Foreign(f"belongs to file {of_file} at {of_offset}")
    return term, sequence
