"""Sizes on the command line: 67108864, 64M, 64MiB, 1.5G. Units are binary."""

from __future__ import annotations

import re

from csvfs.host.problems import Kind, Problem

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes. Raises `Problem` (kind USAGE)."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise Problem(Kind.USAGE, f"{text!r} is no size; write for example 64M")
    return int(float(found[1]) * (1 << _SHIFT[found[2].upper()]))


def parse_key(text: str) -> int:
    """A reservation key as it is shown: 0x and hexadecimal digits. Raises `Problem`."""
    try:
        key = int(text, 16)
    except ValueError:
        key = 0
    if not 0 < key < 1 << 64:
        raise Problem(Kind.USAGE, f"{text!r} is no reservation key such as 0xc5f5000000070002")
    return key
