"""csvctl validate on a real target: a live volume, an empty LUN, CHAP, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from csvctl.outcomes import OUTCOMES, VALID, VALID_WITH_WARNINGS
from csvfs.host.problems import Kind
from redirector.block.device import InitiatorPort
from redirector.block.keys import PathKey
from redirector.block.reservations import survey
from redirector.block.url import open_lun
from tests.mounts import Host
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

MIB = 1 << 20
DOORS = {"CHAP", "LUN masking"}
"""tgt as it is tested with lets everybody in."""


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 * MIB) as made:
        yield made


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


def digest(tgt: Tgt) -> str:
    with tgt.backing().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def validate(
    host: Host, tgt: Tgt, *options: str, code: int = VALID_WITH_WARNINGS
) -> dict[str, Any]:
    told = host.csvctl("validate", tgt.url, "--json", *options, code=code)
    assert not told.stderr
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def having(found: dict[str, Any], verdict: str) -> dict[str, str]:
    return {p["name"]: p["found"] for p in found["properties"] if p["verdict"] == verdict}


async def standing(tgt: Tgt) -> tuple[set[int], int]:
    """(registered keys, the holder's)."""
    port = InitiatorPort("iqn.2026-11.test:look", 0x80 << 40)
    async with await open_lun(tgt.url).login(port) as device:
        found = await survey(device)
    return set(found.keys.keys), found.holder_key


@contextmanager
def frozen(pid: int, tgt: Tgt) -> Iterator[str]:
    """A daemon that writes nothing meanwhile: SIGSTOP; the LUN's digest once all has landed."""
    os.kill(pid, signal.SIGSTOP)
    try:
        seen = [digest(tgt)]

        def quiet() -> bool:
            seen.append(digest(tgt))
            return seen[-1] == seen[-2]

        wait_until(quiet, "the last writes to land")
        yield seen[-1]
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_live_volume_is_not_touched(host: Host, tgt: Tgt) -> None:
    host.format(tgt.url)
    with host.mounted(tgt.url) as mnt, Host("other") as other:
        image = mnt.path / "image"
        image.write_bytes(b"x" * MIB)
        pid, keys = mnt.pid, await standing(tgt)
        with frozen(pid, tgt) as before:
            validate(other, tgt)
            assert digest(tgt) == before
        found = validate(other, tgt)
        assert await standing(tgt) == keys, "its own key is gone again"
        assert set(having(found, "warning")) == DOORS
        assert not having(found, "failed")
        passed = having(found, "passed")
        assert passed["reservation"] == f"held by {host.name}"
        assert passed["members"].startswith(host.name)
        assert passed["exclusion"] == "who is not registered is refused a READ"
        assert {(key["path"], key["holds"]) for key in found["keys"]} == {
            ("data", False),
            ("control", True),
        }
        (mnt.path / "after").write_text("undisturbed")
        assert image.read_bytes() == b"x" * MIB
        refused = OUTCOMES[Kind.FOREIGN_KEY].code
        told = other.csvctl("validate", tgt.url, "--destructive", code=refused)
        assert host.name in told.stderr
        assert (mnt.path / "after").read_text() == "undisturbed"
        assert mnt.pid == pid
        assert await standing(tgt) == keys
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


async def test_an_empty_lun_is_tried_by_writing(host: Host, tgt: Tgt) -> None:
    before = digest(tgt)
    found = validate(host, tgt, "--destructive")
    passed = having(found, "passed")
    for name in (
        "the fence stops READ",
        "the fence stops WRITE",
        "PREEMPT of a key that nobody registered conflicts",
        "LOGICAL UNIT RESET is answered, and nothing lands after it",
        "a new login closes the old session of the same initiator port",
    ):
        assert name in passed
    assert set(having(found, "warning")) == DOORS
    assert digest(tgt) == before
    assert await standing(tgt) == (set(), 0)
    host.format(tgt.url)


@pytest.mark.parametrize("command", ["", "mkfs.ext4 -q -F {}", "mkswap {}"])
def test_writing_is_refused_on_a_lun_that_carries_something(
    host: Host, tgt: Tgt, command: str
) -> None:
    if command:
        run = command.format(tgt.backing())
        subprocess.run(run, shell=True, check=True, capture_output=True)
    else:
        host.format(tgt.url)
    before = digest(tgt)
    code = OUTCOMES[Kind.OCCUPIED_LUN].code
    host.csvctl("validate", tgt.url, "--destructive", code=code)
    assert digest(tgt) == before
    found = validate(host, tgt)
    assert digest(tgt) == before
    assert ("volume" in having(found, "warning")) == bool(command)


def test_chap(host: Host) -> None:
    user = ("vmhost", "correct-horse-battery")
    with Tgt(lun_bytes=256 * MIB, chap=user) as tgt:
        credentials = host.config / "credentials"
        credentials.write_text(f"{tgt.iqn} {' '.join(user)}\n")
        credentials.chmod(0o600)
        host.format(tgt.url)
        found = validate(host, tgt, code=VALID)
        assert having(found, "passed")["CHAP"] == "the target asks for a password"
        assert "password" in having(found, "note")["LUN masking"]
        credentials.unlink()
        host.csvctl("validate", tgt.url, code=OUTCOMES[Kind.CHAP_REFUSED].code)


async def test_a_target_that_forgot_and_keys_that_were_left(host: Host, tgt: Tgt) -> None:
    host.format(tgt.url)
    tgt.restart()
    found = validate(host, tgt)
    assert "restarted" in having(found, "note")["reservation"]
    assert found["keys"] == []
    left = PathKey(3, 9, 1).pack()
    device = await open_lun(tgt.url).login(InitiatorPort("iqn.2026-11.test:left", 1 << 46))
    await device.register(left)
    await device.aclose()
    found = validate(host, tgt)
    assert f"{left:#018x}" in having(found, "warning")["stale keys"]
    assert [key["state"] for key in found["keys"]] == ["stale"]
