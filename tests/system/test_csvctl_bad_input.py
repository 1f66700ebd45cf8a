"""Every bad input: one message that says what to do, a code of its own, nothing written."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csvctl.outcomes import OUTCOMES
from csvfs.format import BLOCK_BYTES, SUPERBLOCK_ADDRESS, Superblock, byte_offset
from csvfs.host.problems import Kind
from tests.mounts import Host
from tests.tgt import Tgt

pytestmark = pytest.mark.system

MIB = 1 << 20


@pytest.fixture(scope="module")
def volume() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 * MIB) as tgt:
        with Host("formatter") as host:
            host.format(tgt.url)
        yield tgt


@pytest.fixture
def empty() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 * MIB) as tgt:
        yield tgt


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        made.expect("")
        yield made


def digest(tgt: Tgt) -> str:
    with tgt.backing().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused(host: Host, kind: Kind, *arguments: str) -> str:
    """Run csvctl, which must end with the code of ``kind`` and say what follows; its message."""
    outcome = OUTCOMES[kind]
    done = host.csvctl(*arguments, code=outcome.code)
    assert done.stdout == ""
    told = done.stderr
    flat = " ".join(told.split())
    assert " ".join(outcome.means.split()) in flat
    assert " ".join(outcome.next_step.split()) in flat
    assert "Traceback" not in told
    return told


def mount_refused(host: Host, kind: Kind, url: str, *options: str) -> str:
    path = host.directory / "mnt"
    if not path.exists():
        host.mountpoint()
    return refused(host, kind, "mount", url, str(path), *options)


# -- the LUN -------------------------------------------------------------------------------------
def test_a_url_that_cannot_be_read(host: Host) -> None:
    assert "nfs://" in mount_refused(host, Kind.BAD_URL, "nfs://server/share")


def test_an_unreachable_target(host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        url = f"iscsi://127.0.0.1:{port}/iqn.2026-11.test.csvfs:x/1"
        assert str(port) in mount_refused(host, Kind.UNREACHABLE, url)
        refused(host, Kind.UNREACHABLE, "format", url, "--label", "x")
        refused(host, Kind.UNREACHABLE, "dump", url, "view")
    host.csvctl("check", url, code=8)


def test_no_such_target_and_no_such_lun(host: Host, volume: Tgt) -> None:
    mount_refused(host, Kind.NO_SUCH_LUN, volume.lun_url(7))
    mount_refused(host, Kind.NO_SUCH_LUN, volume.url.replace(volume.iqn, volume.iqn + "x"))


def test_a_file_that_does_not_exist(host: Host) -> None:
    mount_refused(host, Kind.NO_SUCH_LUN, f"file://{host.directory}/absent")


def test_chap_refused(host: Host) -> None:
    with Tgt(lun_bytes=64 * MIB, chap=("vmhost", "correct-horse")) as tgt:
        told = mount_refused(host, Kind.CHAP_REFUSED, tgt.url)
        credentials = host.config / "credentials"
        credentials.write_text(f"{tgt.iqn} vmhost wrong-horse-wrong\n")
        credentials.chmod(0o600)
        told += mount_refused(host, Kind.CHAP_REFUSED, tgt.url)
        assert "wrong-horse" not in told + host.log()
        credentials.write_text(f"{tgt.iqn} vmhost correct-horse\n")
        told = mount_refused(host, Kind.NOT_CSVFS, tgt.url)
        assert "correct-horse" not in told + host.log()
        credentials.chmod(0o644)
        assert "mode 0644" in mount_refused(host, Kind.CREDENTIALS, tgt.url)


def test_a_password_in_the_url(host: Host) -> None:
    """It works, is warned of, and shows up nowhere."""
    with Tgt(lun_bytes=64 * MIB, chap=("vmhost", "correct-horse")) as tgt:
        url = tgt.url.replace("iscsi://", "iscsi://vmhost:correct-horse@")
        done = host.csvctl("format", url, "--label", "secret")
        assert "warning" in done.stderr
        said = done.stdout + done.stderr
        path = host.mountpoint()
        done = host.csvctl("mount", url, str(path), "--node", host.name)
        said += done.stdout + done.stderr + host.csvctl("status").stdout
        said += host.csvctl("status", "--json").stdout
        for pid in host.daemons():
            said += Path(f"/proc/{pid}/cmdline").read_text()
            said += Path(f"/proc/{pid}/environ").read_text()
        said += Path("/proc/mounts").read_text()
        for record in host.run.glob("*.json"):
            said += record.read_text()
        host.csvctl("umount", str(path))
        done = host.csvctl("dump", url, "slots")
        said += done.stdout + done.stderr + host.log()
        assert "correct-horse" not in said
        assert "vmhost@" in said


def test_not_a_csvfs_volume(host: Host, empty: Tgt) -> None:
    before = digest(empty)
    mount_refused(host, Kind.NOT_CSVFS, empty.url)
    refused(host, Kind.NOT_CSVFS, "dump", empty.url, "superblock")
    host.csvctl("check", empty.url, code=8)
    assert digest(empty) == before


def test_a_newer_format(host: Host, empty: Tgt) -> None:
    host.format(empty.url)
    with empty.backing().open("r+b") as file:
        old = Superblock.decode(file.read(BLOCK_BYTES))
        newer = Superblock(
            old.volume_id,
            old.geometry,
            old.created_ns,
            old.label,
            old.device_id,
            old.vendor,
            old.product,
            old.serial,
            old.probe,
            old.write_cache,
            incompat=1 << 40,
        )
        for address in (SUPERBLOCK_ADDRESS, old.geometry.backup_superblock):
            file.seek(byte_offset(address))
            file.write(newer.encode(address))
    before = digest(empty)
    assert "0x10000000000" in mount_refused(host, Kind.NEWER_FORMAT, empty.url)
    assert digest(empty) == before


def test_a_copy_that_the_array_made(host: Host, empty: Tgt) -> None:
    host.format(empty.url)
    copy = empty.directory / "copy"
    copy.write_bytes(empty.backing().read_bytes())
    lun = empty.add_lun(path=copy)
    assert "copy" in mount_refused(host, Kind.LUN_COPY, empty.lun_url(lun))
    assert copy.read_bytes() == empty.backing().read_bytes()


def test_a_destroyed_superblock_is_said_and_its_backup_used(host: Host, empty: Tgt) -> None:
    host.format(empty.url)
    with empty.backing().open("r+b") as file:
        file.write(bytes(BLOCK_BYTES))
    path = host.mountpoint()
    done = host.csvctl("mount", empty.url, str(path), "--node", host.name)
    assert "superblock is damaged" in done.stderr
    assert "backup was used" in done.stderr
    (path / "file").write_text("x")
    host.csvctl("umount", str(path))
    done = host.csvctl("dump", empty.url, "superblock")
    assert "backup" in done.stdout
    done = host.csvctl("check", empty.url, code=4)
    assert "superblock is damaged" in done.stdout
    host.csvctl("check", empty.url, "--repair", code=1)
    assert "clean" in host.csvctl("check", empty.url).stdout


def test_both_superblocks_destroyed(host: Host, empty: Tgt) -> None:
    host.format(empty.url)
    with empty.backing().open("r+b") as file:
        backup = Superblock.decode(file.read(BLOCK_BYTES)).geometry.backup_superblock
        for address in (SUPERBLOCK_ADDRESS, backup):
            file.seek(byte_offset(address))
            file.write(os.urandom(BLOCK_BYTES))
    before = digest(empty)
    mount_refused(host, Kind.SUPERBLOCK_DESTROYED, empty.url)
    assert digest(empty) == before


def test_another_host_has_it(host: Host, volume: Tgt) -> None:
    with Host("other") as other, other.mounted(volume.url) as mnt:
        (mnt.path / "file").write_text("undisturbed")
        assert "other" in mount_refused(host, Kind.OTHER_HOST, volume.url)
        done = host.csvctl("check", volume.url, code=8)
        assert "other" in done.stderr
        assert "view" not in host.csvctl("dump", volume.url, "view").stderr
        assert (mnt.path / "file").read_text() == "undisturbed"
        (mnt.path / "file").write_text("still writable")
    with host.mounted(volume.url) as mnt:
        assert (mnt.path / "file").read_text() == "still writable"


def test_a_host_that_died_is_not_succeeded_by_another(host: Host, empty: Tgt) -> None:
    host.format(empty.url)
    with Host("other") as other:
        other.expect("dead and is detached")
        with other.mounted(empty.url) as mnt:
            (mnt.path / "file").write_text("x")
            mnt.kill()
            assert "other" in mount_refused(host, Kind.OTHER_HOST, empty.url)
            mnt.remount()
    with host.mounted(empty.url):
        pass


# -- the mount point -----------------------------------------------------------------------------
def test_a_missing_mount_point(host: Host, volume: Tgt) -> None:
    refused(host, Kind.MOUNT_POINT_MISSING, "mount", volume.url, str(host.directory / "absent"))
    file = host.directory / "file"
    file.touch()
    refused(host, Kind.MOUNT_POINT_MISSING, "mount", volume.url, str(file))


def test_a_mount_point_that_is_not_empty(host: Host, volume: Tgt) -> None:
    path = host.mountpoint()
    (path / "something").touch()
    told = refused(host, Kind.MOUNT_POINT_NOT_EMPTY, "mount", volume.url, str(path))
    assert "something" in told


def test_mounted_twice(host: Host, volume: Tgt) -> None:
    with host.mounted(volume.url) as mnt:
        (mnt.path / "file").write_text("x")
        told = refused(host, Kind.MOUNT_POINT_BUSY, "mount", volume.url, str(mnt.path))
        assert volume.iqn in told
        second = host.mountpoint("second")
        told = refused(host, Kind.MOUNTED_TWICE, "mount", volume.url, str(second))
        assert str(mnt.path) in told
        done = host.csvctl("check", volume.url, code=8)
        assert "mounted on this host" in done.stderr
        assert (mnt.path / "file").read_text() == "x"


def test_a_busy_mount_point(host: Host, volume: Tgt) -> None:
    path = host.mountpoint()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    try:
        assert "tmpfs" in refused(host, Kind.MOUNT_POINT_BUSY, "mount", volume.url, str(path))
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_not_mounted(host: Host) -> None:
    path = host.mountpoint()
    refused(host, Kind.NOT_MOUNTED, "umount", str(path))
    refused(host, Kind.NOT_MOUNTED, "status", str(path))
    refused(host, Kind.NOT_MOUNTED, "umount", "/proc")
    assert "no csvfs volume" in host.csvctl("status").stdout


def test_files_are_open(host: Host, volume: Tgt) -> None:
    with host.mounted(volume.url) as mnt:
        with (mnt.path / "file").open("w") as file:
            told = refused(host, Kind.FILES_OPEN, "umount", str(mnt.path))
            assert str(os.getpid()) in told
            file.write("still served")
        assert (mnt.path / "file").read_text() == "still served"


def test_bad_names(host: Host, volume: Tgt) -> None:
    mount_refused(host, Kind.USAGE, volume.url, "--node", "x" * 65)
    mount_refused(host, Kind.USAGE, volume.url, "--initiator", "not an iqn")


def test_not_root(host: Host, volume: Tgt) -> None:
    path = host.mountpoint()
    code = (
        "import os, sys; os.setuid(65534); from csvctl.main import run; sys.exit(run(sys.argv[1:]))"
    )
    for arguments in (["mount", volume.url, str(path)], ["umount", str(path)], ["status"]):
        told = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=host.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == OUTCOMES[Kind.PERMISSION].code, told.stderr
        assert "only root" in told.stderr
