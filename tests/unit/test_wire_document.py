"""PROTOCOL.md says of byte ranges and of the wire what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import lockmgr
from lockmgr.cluster.codes import REGISTRY
from lockmgr.ranges_messages import RangeMessage

HERE = Path(lockmgr.__file__).parent
TEXT = (HERE / "PROTOCOL.md").read_text()


def table() -> list[str]:
    """The table at the end of the part "Wire"."""
    return [
        f"| {code} | {entry.type.__name__} | {entry.limit_bytes:,} | {entry.max_items:,} |"
        for code, entry in sorted(REGISTRY.by_code.items())
    ]


def test_table_of_codes() -> None:
    part = TEXT[TEXT.index("\n## Wire\n") :]
    assert re.findall(r"^\| \d+ \| [A-Z]\w+ \|.*$", part, re.MULTILINE) == table()


def test_every_range_message_with_its_fields() -> None:
    for message in get_args(RangeMessage):
        fields = [name for name in message.__slots__ if name not in ("resource", "epoch", "node")]
        assert f"`{message.__name__}({', '.join(fields)})`" in TEXT, message


def test_every_module_of_the_wire() -> None:
    for name in ("wire", "codec", "codes", "datagram"):
        assert f"`cluster/{name}.py`" in TEXT and (HERE / "cluster" / f"{name}.py").exists()


if __name__ == "__main__":
    print("\n".join(table()))
