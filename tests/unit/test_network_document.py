"""PROTOCOL.md says of connections what the code says; and the bytes of their own messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lockmgr
from lockmgr.cluster.codes import new_registry
from lockmgr.cluster.door import LINES_AT_ONCE
from lockmgr.cluster.link_messages import Chosen, Died, Ping, Pong, connection_registry
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import DEFAULT_PORT
from lockmgr.cluster.wire import frame

HERE = Path(lockmgr.__file__).parent
TEXT = (HERE / "PROTOCOL.md").read_text()
PART = TEXT[TEXT.index("\n## Connections\n") :]
SETTINGS = NetworkSettings()


def test_every_module() -> None:
    named = set(re.findall(r"`cluster/(\w+\.py)`", PART))
    assert named == {path.name for path in (HERE / "cluster").glob("*.py")} & named
    shell = {
        path.name
        for path in (HERE / "cluster").glob("*.py")
        if re.search(r"^(import|from) (trio|cryptography|ssl)\b", path.read_text(), re.MULTILINE)
    }
    assert shell <= named


def test_every_message() -> None:
    own = connection_registry().by_code.keys() - new_registry().by_code.keys()
    rows = re.findall(r"^\| `.*\| ([\d, ]+) \|.*$", PART, re.MULTILINE)
    assert {int(code) for row in rows for code in row.split(", ")} == own
    assert max(own) < 16, "the connection's own codes"


@pytest.mark.parametrize(
    "words",
    [
        f"the higher node {SETTINGS.courtesy_s:g} s later",
        f"again after {SETTINGS.redial_first_s:g} s, doubled up to {SETTINGS.redial_most_s:g} s",
        f"Nothing heard for {SETTINGS.ping_s:g} s: `Ping`",
        f"nothing taken by the peer, for {SETTINGS.silence_s:g} s: lost",
        f"it is silent for {SETTINGS.probe_s:g} s",
        f"At {SETTINGS.queue_bytes >> 20} MiB",
        f"up to {SETTINGS.batch_bytes >> 10} KiB at once",
        f"have {SETTINGS.greeting_s:g} s to say who they are",
        f"there are {SETTINGS.strangers} of them at most, {SETTINGS.strangers_each} from",
        f"for {SETTINGS.goodbye_s:g} s at most",
        f"{LINES_AT_ONCE} at once",
        f"port is {DEFAULT_PORT} unless",
    ],
)
def test_times_and_limits(words: str) -> None:
    assert words in " ".join(PART.split())


@pytest.mark.parametrize(
    ("message", "golden"),
    [
        (Chosen(7), "00000002 00000000 01 00 0003 9107"),
        (Ping(1 << 40), "0000000a 00000000 01 00 0004 91cf0000010000000000"),
        (Pong(0), "00000002 00000000 01 00 0005 9100"),
        (Died(), "00000001 00000000 01 00 0006 90"),
    ],
)
def test_golden_bytes(message: object, golden: str) -> None:
    registry = connection_registry()
    data = frame(registry, message, 1)
    assert data == bytes.fromhex(golden)
    code, header, payload = registry.encode(message)
    assert registry.decode(code, header, payload) == message
