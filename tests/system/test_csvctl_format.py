"""csvctl format on a real target: what it shows, refuses, overrides, and never overrides."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from csvctl.outcomes import OUTCOMES
from csvfs.host.problems import Kind
from redirector.block.device import InitiatorPort
from redirector.block.url import open_lun
from tests.mounts import Host
from tests.tgt import Tgt

pytestmark = pytest.mark.system

MIB = 1 << 20
STRANGER = 0x1234_5678_9ABC_DEF0


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


def refused(host: Host, tgt: Tgt, kind: Kind, *options: str) -> str:
    """Format, which must be refused with the LUN as it was; the message."""
    before = digest(tgt)
    arguments = ["format", tgt.url, "--label", "x", *options]
    told = host.csvctl(*arguments, code=OUTCOMES[kind].code).stderr
    assert digest(tgt) == before
    assert OUTCOMES[kind].next_step.split()[0] in told
    return told


async def leave_key(tgt: Tgt, key: int) -> None:
    """Register a key and go away, as another cluster's host that died."""
    device = await open_lun(tgt.url).login(InitiatorPort("iqn.2026-11.test:stranger", 0x80 << 40))
    await device.register(key)
    await device.aclose()


def test_an_empty_lun(host: Host, tgt: Tgt) -> None:
    done = host.csvctl("format", tgt.url, "--label", "my vms")
    shown = dict(re.findall(r"^(\w+): +(.*)$", done.stdout, re.MULTILINE))
    assert shown["LUN"] == "IET VIRTUAL-DISK"
    assert shown["serial"] == f"{tgt.iqn.rpartition(':')[2]}01"
    assert shown["size"] == "256 MiB"
    assert re.fullmatch(r"my vms \([0-9a-f]{32}\)", shown["volume"])
    assert shown["hosts"] == "16, each with a journal of 1 MiB"
    with host.mounted(tgt.url) as mnt:
        assert mnt.status()["label"] == "my vms"
        assert list(mnt.path.iterdir()) == []
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


def test_a_mount_after_format_needs_no_silence(host: Host, tgt: Tgt) -> None:
    """The formatter's key is parked under the empty view: the first host succeeds it at once."""
    host.format(tgt.url)
    with host.mounted(tgt.url) as mnt:
        assert "waiting" not in mnt.host.log()


def test_slots_and_journal_size(host: Host, tgt: Tgt) -> None:
    done = host.csvctl("format", tgt.url, "--label", "x", "--slots", "3", "--journal-size", "4M")
    assert "3, each with a journal of 4 MiB" in done.stdout
    shown = host.csvctl("dump", tgt.url, "superblock").stdout
    assert re.search(r"slots: +3\n", shown)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("mkfs.ext4 -q -F {}", "ext4"),
        ("echo 'label: gpt' | sfdisk -q {}", "GPT partition table"),
        ("echo 'label: dos\n1M,10M,83' | sfdisk -q {}", "MBR partition table"),
        ("mkswap {}", "swap"),
    ],
)
def test_something_is_on_it(host: Host, tgt: Tgt, command: str, name: str) -> None:
    subprocess.run(command.format(tgt.backing()), shell=True, check=True, capture_output=True)
    assert name in refused(host, tgt, Kind.OCCUPIED_LUN)
    host.format(tgt.url, "--force")
    with host.mounted(tgt.url):
        pass


def test_a_volume_is_on_it(host: Host, tgt: Tgt) -> None:
    """Its last host has left and parked its key: --force is enough, and needed."""
    host.format(tgt.url, label="precious")
    assert 'csvfs volume "precious"' in refused(host, tgt, Kind.OCCUPIED_LUN)
    host.format(tgt.url, "--force", label="next")
    assert "next" in host.csvctl("dump", tgt.url, "superblock").stdout


def test_a_volume_whose_keys_the_target_forgot(host: Host, tgt: Tgt) -> None:
    host.format(tgt.url, label="precious")
    tgt.restart()
    assert 'csvfs volume "precious"' in refused(host, tgt, Kind.OCCUPIED_LUN)


def test_a_mounted_volume_is_never_formatted(host: Host, tgt: Tgt) -> None:
    host.format(tgt.url)
    with host.mounted(tgt.url) as mnt, Host("other") as other:
        (mnt.path / "file").write_text("precious")
        arguments = ["format", tgt.url, "--label", "x"]
        for more in ([], ["--force"]):
            told = other.csvctl(*arguments, *more, code=OUTCOMES[Kind.FOREIGN_KEY].code).stderr
            assert host.name in told
        assert (mnt.path / "file").read_text() == "precious"
    assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


async def test_a_strangers_key(host: Host, tgt: Tgt) -> None:
    await leave_key(tgt, STRANGER)
    told = refused(host, tgt, Kind.FOREIGN_KEY)
    assert "123456789abcdef0" in told.lower()
    refused(host, tgt, Kind.FOREIGN_KEY, "--force")
    refused(host, tgt, Kind.FOREIGN_KEY, "--preempt-key", "0x1")
    host.format(tgt.url, "--preempt-key", hex(STRANGER))
    with host.mounted(tgt.url):
        pass


def test_too_small(host: Host) -> None:
    with Tgt(lun_bytes=16 * MIB) as tgt:
        assert "MiB" in refused(host, tgt, Kind.TOO_SMALL)


def test_journals_that_do_not_fit(host: Host, tgt: Tgt) -> None:
    refused(host, tgt, Kind.TOO_SMALL, "--journal-size", "64M")


def test_a_label_that_cannot_be(host: Host, tgt: Tgt) -> None:
    before = digest(tgt)
    told = host.csvctl("format", tgt.url, "--label", "x" * 65, code=64).stderr
    assert "64 bytes" in told
    assert digest(tgt) == before
