"""FORMAT.md says what the code does: its tables are compared with the structures."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from struct import Struct, calcsize

import pytest

import csvfs
from csvfs import format as fmt

_DOCUMENT = Path(csvfs.__file__).with_name("FORMAT.md").read_text()

_TABLES = {
    "header": (fmt.HEADER, 0),
    "superblock": (fmt.SUPERBLOCK_FIELDS, fmt.HEADER_BYTES),
    "view": (fmt.VIEW_FIELDS, fmt.HEADER_BYTES),
    "view slot": (fmt.VIEW_SLOT, 0),
    "identity": (fmt.IDENTITY_FIELDS, fmt.HEADER_BYTES),
    "join": (fmt.JOIN_SEQUENCE, fmt.JOIN_SEQUENCE_OFFSET),
    "session": (fmt.SESSION, 0),
    "heartbeat": (fmt.HEARTBEAT_FIELDS, fmt.HEADER_BYTES),
    "journal header": (fmt.JOURNAL_FIELDS, fmt.HEADER_BYTES),
    "record": (fmt.RECORD_FIELDS, fmt.RECORD_FIELDS_OFFSET),
    "group header": (fmt.GROUP_FIELDS, fmt.GROUP_FIELDS_OFFSET),
    "inode": (fmt.INODE_FIELDS, fmt.INODE_FIELDS_OFFSET),
    "node": (fmt.NODE_HEADER, 0),
}


def _fields(layout: Struct, base: int) -> list[tuple[int, int]]:
    """(offset, size) of each field; runs of padding count as one field."""
    fields = []
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        pieces = [f"{count}{code}"] if code in "sx" else [code] * int(count or 1)
        for piece in pieces:
            size = calcsize("<" + piece)
            fields.append((base, size))
            base += size
    return fields


def _rows(name: str) -> list[tuple[int, int]]:
    section = _DOCUMENT.split(f"<!-- table: {name} -->\n")[1]
    table = next(
        list(lines)
        for is_row, lines in groupby(section.splitlines(), lambda line: line.startswith("|"))
        if is_row
    )
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in table[2:]]
    return [(int(offset), int(size)) for offset, size in cells]


@pytest.mark.parametrize("name", _TABLES)
def test_table_matches_structure(name: str) -> None:
    assert _rows(name) == _fields(*_TABLES[name])


def test_every_marked_table_is_compared() -> None:
    assert re.findall(r"<!-- table: (.+) -->", _DOCUMENT) == list(_TABLES)


def test_every_block_type_is_described() -> None:
    for kind in fmt.BlockType:
        assert f"| {kind.name} | {kind.value} |" in _DOCUMENT


def test_inode_offsets_are_those_of_the_structure() -> None:
    constants = [
        fmt.INODE_INO,
        fmt.INODE_GENERATION,
        fmt.INODE_MODE,
        fmt.INODE_UID,
        fmt.INODE_GID,
        fmt.INODE_NLINK,
        fmt.INODE_FLAGS,
        fmt.INODE_SIZE,
        fmt.INODE_UNITS,
        fmt.INODE_METADATA_BLOCKS,
        fmt.INODE_RDEV,
        fmt.INODE_ATIME,
        fmt.INODE_MTIME,
        fmt.INODE_CTIME,
        fmt.INODE_BTIME,
        fmt.INODE_CHANGE,
        fmt.INODE_PARENT,
        fmt.INODE_ENTRIES,
        fmt.INODE_XATTR_BLOCK,
        fmt.INODE_SYMLINK_TAIL,
        fmt.INODE_HASH_SEED,
    ]
    assert constants == [at for at, _ in _fields(fmt.INODE_FIELDS, fmt.INODE_FIELDS_OFFSET)]


def test_header_offsets_are_those_of_the_structure() -> None:
    offsets = [at for at, _ in _fields(fmt.HEADER, 0)]
    assert offsets[1:4] == [fmt.TYPE_OFFSET, fmt.FLAGS_OFFSET, fmt.CRC_OFFSET]
    assert offsets[4] == fmt.CRC_END
    assert offsets[5:9] == [
        fmt.VOLUME_ID_OFFSET,
        fmt.ADDRESS_OFFSET,
        fmt.VERSION_OFFSET,
        fmt.OWNER_OFFSET,
    ]
