"""csvctl check on a volume whose view or superblock is destroyed, both copies, on a real target."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvctl.outcomes import OUTCOMES
from csvfs.format import (
    BLOCK_BYTES,
    JOURNAL_AREA,
    SUPERBLOCK_ADDRESS,
    VIEW_ADDRESSES,
    Superblock,
    byte_offset,
)
from csvfs.host.problems import Kind
from tests.mounts import Host
from tests.tgt import Tgt

pytestmark = pytest.mark.system

LUN_BYTES = 256 << 20


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


@pytest.fixture
def tgt(host: Host) -> Iterator[Tgt]:
    with Tgt(lun_bytes=LUN_BYTES) as made:
        host.format(made.url, "--slots", "4")
        yield made


def digest(lun: Path) -> str:
    with lun.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def overwrite(lun: Path, address: int, data: bytes) -> None:
    with lun.open("r+b") as file:
        file.seek(byte_offset(address))
        file.write(data)


def destroy_views(lun: Path) -> None:
    for address in VIEW_ADDRESSES:
        overwrite(lun, address + 1, os.urandom(BLOCK_BYTES))


def destroy_superblocks(lun: Path) -> None:
    for address in (SUPERBLOCK_ADDRESS, LUN_BYTES // BLOCK_BYTES - 16):
        overwrite(lun, address, os.urandom(BLOCK_BYTES))


def fsync(path: Path) -> None:
    """sync(2) sends nothing to a FUSE filesystem."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def fill(path: Path) -> dict[str, bytes]:
    contents = {f"file{n}": os.urandom(100_000 + n) for n in range(20)}
    for name, data in contents.items():
        (path / name).write_bytes(data)
    for each in path.iterdir():
        fsync(each)
    fsync(path)
    return contents


def assert_whole(host: Host, url: str, contents: dict[str, bytes]) -> None:
    """Everything is there, on the next mount and to the next check."""
    with host.mounted(url) as mnt:
        assert {each.name: each.read_bytes() for each in mnt.path.iterdir()} == contents
    assert "the volume is clean" in host.csvctl("check", url).stdout


@pytest.mark.parametrize("left", ["cleanly", "by a crash"])
def test_both_views(host: Host, tgt: Tgt, left: str) -> None:
    if left == "by a crash":
        host.expect("killed|ended")
    lun = tgt.backing()
    with host.mounted(tgt.url) as mnt:
        contents = fill(mnt.path)
        if left == "by a crash":
            mnt.kill()
    destroy_views(lun)
    before = digest(lun)
    host.expect("both copies of the view, which says who is a member, are destroyed")
    told = host.csvctl(
        "mount", tgt.url, str(host.mountpoint("other")), code=OUTCOMES[Kind.DAMAGED].code
    )
    assert "csvctl check --repair" in told.stderr
    done = host.csvctl("check", tgt.url, code=4)
    assert "both views are damaged" in done.stdout
    assert "`csvctl check --repair` mends them" in done.stdout
    report = json.loads(host.csvctl("check", tgt.url, "--json", code=4).stdout)
    assert [finding["damage"] for finding in report["findings"]] == ["view"]
    assert report["findings"][0]["repairable"] and not report["complete"]
    assert digest(lun) == before
    done = host.csvctl("check", tgt.url, "--repair", code=1)
    assert "made anew of slot blocks and journals" in done.stdout
    assert "the volume is clean now" in done.stdout
    assert_whole(host, tgt.url, contents)


def test_everything_before_the_journals_but_the_superblock(host: Host, tgt: Tgt) -> None:
    """As of a ``dd`` over the start: root inode, views, slot blocks, lists. The target still knows
    the key that was parked; nobody can tell whose it is."""
    lun = tgt.backing()
    with host.mounted(tgt.url) as mnt:
        contents = fill(mnt.path)
    overwrite(lun, 1, bytes(byte_offset(JOURNAL_AREA - 1)))
    before = digest(lun)
    told = host.csvctl("check", tgt.url, "--repair", code=8).stderr
    found = re.search(r"0x[0-9a-f]{16}", told)
    assert found is not None and "no slot block names" in told
    assert digest(lun) == before
    done = host.csvctl("check", tgt.url, "--repair", "--preempt-key", found[0], code=1)
    assert "the root directory is damaged" in done.stdout
    with host.mounted(tgt.url) as mnt:
        lost = sorted((mnt.path / "lost+found").iterdir())
        assert {each.read_bytes() for each in lost} == set(contents.values())
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def test_another_host_is_not_disturbed(host: Host, tgt: Tgt) -> None:
    lun = tgt.backing()
    with Host("other") as other:
        with other.mounted(tgt.url) as mnt:
            destroy_views(lun)
            told = host.csvctl("check", tgt.url, "--repair", code=8).stderr
            assert "of other" in told and "unmount it there" in told
            contents = fill(mnt.path)
        # It has left, and so written one copy of the view again; the next claim writes the other.
        host.csvctl("check", tgt.url, "--repair")
    assert_whole(host, tgt.url, contents)


def test_preempt_key_goes_with_repair(host: Host, tgt: Tgt) -> None:
    assert "--repair" in host.csvctl("check", tgt.url, "--preempt-key", "0x1", code=16).stderr


@pytest.mark.parametrize("left", ["cleanly", "by a crash"])
def test_both_superblocks(host: Host, tgt: Tgt, left: str) -> None:
    if left == "by a crash":
        host.expect("killed|ended")
    lun = tgt.backing()
    old = Superblock.decode(lun.read_bytes()[:BLOCK_BYTES])
    with host.mounted(tgt.url) as mnt:
        contents = fill(mnt.path)
        if left == "by a crash":
            mnt.kill()
    destroy_superblocks(lun)
    before = digest(lun)
    host.expect("block 0 is not a valid superblock")
    code = OUTCOMES[Kind.SUPERBLOCK_DESTROYED].code
    told = host.csvctl("mount", tgt.url, str(host.mountpoint("other")), code=code).stderr
    assert "csvctl check --repair" in told
    done = host.csvctl("check", tgt.url, code=4)
    assert "both superblocks are destroyed" in done.stdout
    assert "4 slots, journals of 1024 KiB" in done.stdout
    assert "`csvctl check --repair` mends them" in done.stdout
    assert digest(lun) == before
    done = host.csvctl("check", tgt.url, "--repair", code=1)
    assert "the label" in done.stdout
    new = Superblock.decode(lun.read_bytes()[:BLOCK_BYTES])
    assert (new.volume_id, new.geometry, new.device_id) == (
        old.volume_id,
        old.geometry,
        old.device_id,
    )
    assert_whole(host, tgt.url, contents)


def test_superblocks_and_views(host: Host, tgt: Tgt) -> None:
    lun = tgt.backing()
    destroy_superblocks(lun)
    destroy_views(lun)
    before = digest(lun)
    for options in ([], ["--repair"]):
        done = host.csvctl("check", tgt.url, *options, code=4)
        assert "number of slots stands nowhere else" in done.stdout
        assert "mends them" not in done.stdout
    assert digest(lun) == before


def test_a_file_is_a_lun_too(host: Host) -> None:
    lun = host.directory / "lun"
    with lun.open("wb") as file:
        file.truncate(LUN_BYTES)
    url = f"file://{lun}"
    host.format(url)
    with host.mounted(url) as mnt:
        contents = fill(mnt.path)
    destroy_views(lun)
    host.csvctl("check", url, "--repair", code=1)
    destroy_superblocks(lun)
    host.csvctl("check", url, "--repair", code=1)
    assert_whole(host, url, contents)
