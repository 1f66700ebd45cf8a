"""The part "Membership" of PROTOCOL.md says what the code and the tests say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import lockmgr
from lockmgr.cluster.messages import Message
from lockmgr.cluster.settings import Settings

HERE = Path(lockmgr.__file__).parent
TEXT = (HERE / "PROTOCOL.md").read_text()
PART = TEXT[TEXT.index("## Membership") : TEXT.index("## Recovery")]
TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_cluster_*.py"))
MODULES = (
    *("view", "blocks", "messages", "events", "effects", "outcomes", "cliques", "judge", "lease"),
    *("change", "admission", "newcomer", "succession", "coordinator", "leave", "install"),
    *("proof", "state", "beating", "hearsay", "member", "settings"),
)


def test_every_message_with_its_fields() -> None:
    for message in get_args(Message):
        names = ", ".join(field.name for field in fields(message))
        assert f"`{message.__name__}({names})`" in PART or (
            not names and f"`{message.__name__}`" in PART
        ), message


def test_every_module() -> None:
    for module in MODULES:
        assert (HERE / "cluster" / f"{module}.py").exists()
        assert f"`{module}.py`" in PART or f"`cluster/{module}.py`" in PART, module


def test_every_timeline_is_a_test() -> None:
    names = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:\.\.\.)?(?:\[\w+\])?`", PART))
    timelines = {name for name in names if name.count("_") >= 2 or f"test_{name}(" in TESTS}
    settings = {field.name for field in fields(Settings)}
    missing = {
        name for name in timelines - settings if not re.search(rf"def test_{name}\w*\(", TESTS)
    }
    assert not missing
    assert len(timelines) >= 25


def test_the_times() -> None:
    settings = Settings()
    assert f"{settings.heartbeat_s} s" in PART
    assert f"{settings.lease_over_bound_s:.3f} s" in PART
    assert f"up to {settings.spread_s} s" in PART
    for seconds in (settings.lease_s, settings.silence_s, settings.evict_after_s):
        assert f"{seconds:.0f} s" in PART
