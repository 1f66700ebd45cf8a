"""csvctl resignature: a snapshot of a mounted volume, on the same target, becomes a volume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csvctl.outcomes import OUTCOMES
from csvfs.format import BLOCK_BYTES, RESIGNATURE, SUPERBLOCK_ADDRESS, Superblock, byte_offset
from csvfs.host.problems import Kind
from tests.mounts import Host, Mount
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


def snapshot(tgt: Tgt) -> int:
    """The LUN's bytes of this moment on another LUN of the same target."""
    copy = tgt.directory / "copy"
    copy.write_bytes(tgt.backing().read_bytes())
    return tgt.add_lun(path=copy)


def digest(lun: Path) -> str:
    with lun.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def superblock_of(lun: Path) -> Superblock:
    with lun.open("rb") as file:
        return Superblock.decode(file.read(BLOCK_BYTES))


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fill(mnt: Mount) -> dict[str, bytes]:
    contents = {f"file{n}": os.urandom(70_000 + n) for n in range(20)}
    for name, data in contents.items():
        write(mnt.path / name, data)
    return contents


def found(mnt: Mount) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in mnt.path.iterdir()}


def test_copy_and_original_are_mounted_side_by_side(host: Host, tgt: Tgt) -> None:
    host.expect("this LUN is a copy: the volume was formatted on device")
    with host.mounted(tgt.url) as original:
        contents = fill(original)
        lun = snapshot(tgt)
        url = tgt.lun_url(lun)
        told = host.csvctl("mount", url, str(host.mountpoint("no")), code=89).stderr
        assert "csvctl resignature" in told
        write(original.path / "later", b"not in the copy")
        done = host.csvctl("resignature", url, "--label", "copy")
        volume = superblock_of(tgt.backing(lun)).volume_id
        assert f"volume copy ({volume.hex()})" in done.stdout
        assert superblock_of(tgt.backing()).volume_id.hex() in done.stdout
        assert " 0 journal records replayed" not in done.stdout
        # Nothing of this was noticed at the original: its session is what it was.
        write(original.path / "later still", b"written on")
        with host.mounted(url, "copy") as copy:
            assert found(copy) == contents
            write(copy.path / "only here", b"of the copy")
            assert original.status()["volume_id"] != copy.status()["volume_id"]
            both = json.loads(host.csvctl("status", "--json").stdout)
            assert len(both if isinstance(both, list) else both["volumes"]) == 2
            assert not (original.path / "only here").exists()
            assert not (copy.path / "later").exists()
        assert (original.path / "later still").read_bytes() == b"written on"
    for each in (tgt.url, url):
        assert "the volume is clean" in host.csvctl("check", each).stdout
    told = host.csvctl("resignature", url, code=OUTCOMES[Kind.NOT_A_COPY].code).stderr
    assert "is no copy" in told


def test_the_original_is_refused_and_left_alone(host: Host, tgt: Tgt) -> None:
    code = OUTCOMES[Kind.NOT_A_COPY].code
    with host.mounted(tgt.url) as mnt:
        contents = fill(mnt)
        assert "is no copy" in host.csvctl("resignature", tgt.url, code=code).stderr
        assert found(mnt) == contents
    before = digest(tgt.backing())
    host.csvctl("resignature", tgt.url, code=code)
    assert digest(tgt.backing()) == before
    with host.mounted(tgt.url) as mnt:
        assert found(mnt) == contents


def test_cut_off_it_is_refused_by_everything_until_it_is_run_again(host: Host, tgt: Tgt) -> None:
    with host.mounted(tgt.url) as mnt:
        contents = fill(mnt)
    lun = snapshot(tgt)
    url, path = tgt.lun_url(lun), tgt.backing(lun)
    old = superblock_of(path)
    begun = replace(
        old,
        volume_id=b"half of a volume",
        former_volume_id=old.volume_id,
        incompat=old.incompat | RESIGNATURE,
    )
    with path.open("r+b") as file:
        for address in (SUPERBLOCK_ADDRESS, old.geometry.backup_superblock):
            file.seek(byte_offset(address))
            file.write(begun.encode(address))
    before = digest(path)
    code = OUTCOMES[Kind.LUN_COPY].code
    words = "run `csvctl resignature` again"
    host.expect(words)
    assert words in host.csvctl("mount", url, str(host.mountpoint("no")), code=code).stderr
    assert words in host.csvctl("check", url, code=8).stderr
    assert words in host.csvctl("check", url, "--repair", code=8).stderr
    assert words in host.csvctl("dump", url, "view", code=code).stderr
    assert old.volume_id.hex() in host.csvctl("dump", url, "superblock").stdout
    validated = host.csvctl("validate", url, code=2).stdout
    assert "Run `csvctl resignature` again" in validated
    assert digest(path) == before
    done = host.csvctl("resignature", url)
    assert "begun by an earlier run" in done.stdout
    assert "the volume is clean" in host.csvctl("check", url).stdout
    with host.mounted(url) as mnt:
        assert found(mnt) == contents


def test_bad_input(host: Host, tgt: Tgt) -> None:
    lun = snapshot(tgt)
    before = digest(tgt.backing(lun))
    told = host.csvctl("resignature", tgt.lun_url(lun), "--label", "x" * 65, code=64).stderr
    assert "label" in told
    host.csvctl("resignature", "nonsense", code=OUTCOMES[Kind.BAD_URL].code)
    empty = tgt.add_lun(64 << 20)
    host.csvctl("resignature", tgt.lun_url(empty), code=OUTCOMES[Kind.NOT_CSVFS].code)
    assert digest(tgt.backing(lun)) == before


def test_a_file_is_a_lun_too(host: Host) -> None:
    first, second = host.directory / "lun", host.directory / "copy"
    with first.open("wb") as file:
        file.truncate(LUN_BYTES)
    host.format(f"file://{first}")
    with host.mounted(f"file://{first}") as mnt:
        contents = fill(mnt)
        second.write_bytes(first.read_bytes())
    host.csvctl("resignature", f"file://{second}")
    with host.mounted(f"file://{second}") as mnt:
        assert found(mnt) == contents
    assert "the volume is clean" in host.csvctl("check", f"file://{second}").stdout
