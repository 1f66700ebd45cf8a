"""PROTOCOL.md says of channels what the code says."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import lockmgr
from lockmgr.channel import (
    CONFIRM_BYTES,
    CONFIRM_MESSAGES,
    CONFIRM_S,
    LIMIT_BYTES,
    USUAL_BYTES,
    WINDOW_BYTES,
    Control,
)
from lockmgr.cluster.network_settings import NetworkSettings

TEXT = (Path(lockmgr.__file__).parent / "PROTOCOL.md").read_text()
PART = " ".join(TEXT[TEXT.index("\n## Channels\n") :].split())


def test_every_message_with_its_fields() -> None:
    for message in get_args(Control):
        assert f"| `{message.__name__}({', '.join(message.__slots__)})` |" in PART


@pytest.mark.parametrize(
    "words",
    [
        f"after {CONFIRM_MESSAGES}, after {CONFIRM_BYTES >> 20} MiB, or {CONFIRM_S:g} s after one",
        f"**Room.** {WINDOW_BYTES >> 20} MiB are on their way",
        f"estimates: {USUAL_BYTES} bytes for a small message",
        f"at {LIMIT_BYTES >> 20} MiB of what waits",
    ],
)
def test_limits(words: str) -> None:
    assert words in PART


def test_what_is_on_its_way_fits_into_a_connections_queue() -> None:
    assert NetworkSettings().queue_bytes > 2 * WINDOW_BYTES
