"""What one entry of a directory and one record of a file must look like."""

from __future__ import annotations

from csvfs.errors import FilesystemError
from csvfs.format import (
    DIRECTORY_HASH_MASK,
    DIRECTORY_MIN_KEY,
    DIRECTORY_VALUE,
    DIRECTORY_VALUE_BYTES,
    MAX_EXTENT_UNITS,
    MAX_NAME_BYTES,
    UNIT_BYTES,
)
from csvfs.namespace.directory import Entry, name_key
from csvfs.namespace.inode import MAX_FILE_BYTES, check_name


def parse_entry(key: int, value: bytes) -> Entry:
    """The entry at ``key``, whose value is long enough."""
    ino, generation, dtype = DIRECTORY_VALUE.unpack_from(value)
    return Entry(key, ino, generation, dtype, value[DIRECTORY_VALUE_BYTES:])


def name_words(name: bytes) -> str:
    """A name for people, whatever bytes it has."""
    return repr(name.decode(errors="backslashreplace"))


def entry_fault(hash_seed: int, key: int, value: bytes) -> str | None:
    """Why ``value`` cannot stand at ``key`` of a directory with this seed; None if it can."""
    if not DIRECTORY_VALUE_BYTES < len(value) <= DIRECTORY_VALUE_BYTES + MAX_NAME_BYTES:
        return f"a value of {len(value)} bytes"
    name = value[DIRECTORY_VALUE_BYTES:]
    try:
        check_name(name)
    except FilesystemError as error:
        return str(error)
    if key < DIRECTORY_MIN_KEY or name_key(hash_seed, name) != key & DIRECTORY_HASH_MASK:
        return f"the name {name_words(name)} does not belong at this key"
    return None


def extent_fault(logical: int, count: int, mask: int, end_of_last: int) -> str | None:
    """Why an extent cannot stand behind one that ends at ``end_of_last``; None if it can."""
    if count > MAX_EXTENT_UNITS:
        return f"a run of {count} units"
    if mask >> count:
        return f"its written mask {mask:#x} is longer than {count} units"
    if logical < end_of_last:
        return f"it overlaps the one that ends at unit {end_of_last}"
    if (logical + count - 1) * UNIT_BYTES > MAX_FILE_BYTES:
        return "it lies beyond the greatest file size"
    return None
