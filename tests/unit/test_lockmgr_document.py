"""PROTOCOL.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import lockmgr
from lockmgr.claim import Phase
from lockmgr.messages import AnyMessage
from lockmgr.modes import Mode, compatible
from lockmgr.snapshot_messages import Snapshots

HERE = Path(lockmgr.__file__).parent
TEXT = (HERE / "PROTOCOL.md").read_text()


def test_matrix() -> None:
    for a in Mode:
        (cells,) = re.findall(rf"^\| {a} \| +([y.| ]+)\|$", TEXT, re.MULTILINE)
        assert [cell.strip() == "y" for cell in cells.split("|")] == [
            compatible(a, b) for b in Mode
        ]


def test_every_message_with_its_fields() -> None:
    for message in (*get_args(AnyMessage), *get_args(Snapshots)):
        fields = [name for name in message.__slots__ if name not in ("resource", "epoch", "node")]
        assert f"`{message.__name__}({', '.join(fields)})`" in TEXT or (
            not fields and f"`{message.__name__}`" in TEXT
        ), message


def test_every_phase_and_module() -> None:
    for phase in Phase:
        assert f"| {phase.name} |" in TEXT
    for module in HERE.glob("*.py"):
        assert module.name == "__init__.py" or f"`{module.name}`" in TEXT
