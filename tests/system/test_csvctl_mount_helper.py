"""mount(8), fstab and systemd: `mount -t csvfs`, `mount -a`, the units.

mount(8) looks for its helpers in /sbin only. So these tests run in a mount namespace of their own,
in which mount.csvfs is there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import CSVCTL, MOUNT_HELPER, Host
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

UNITS = Path(__file__).parents[2] / "tools" / "csvctl" / "systemd"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def volume() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 << 20) as tgt:
        with Host("formatter") as host:
            host.format(tgt.url)
        yield tgt


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


@pytest.fixture
def inside(host: Host) -> Iterator[Run]:
    """Run a command in a mount namespace that has /sbin/mount.csvfs."""
    lower = host.directory / "sbin"
    lower.mkdir()
    (lower / "mount.csvfs").symlink_to(MOUNT_HELPER)
    ready = host.directory / "ready"
    script = (
        f"mount -t overlay overlay -o lowerdir={lower}:/usr/sbin /usr/sbin && "
        f"touch {ready} && exec sleep 1000"
    )
    keeper = subprocess.Popen(["unshare", "--mount", "sh", "-c", script])
    try:
        wait_until(lambda: ready.exists() or keeper.poll() is not None, "the mount namespace")
        assert keeper.poll() is None

        def run(*argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
            enter = ("nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt")
            return host.command(*enter, *argv, code=code)

        yield run
    finally:
        keeper.kill()
        keeper.wait()


def left(host: Host) -> None:
    wait_until(lambda: not host.daemons(), "the daemon to end")


def test_mount_t_csvfs(volume: Tgt, host: Host, inside: Run) -> None:
    path = host.mountpoint()
    done = inside("mount", "-t", "csvfs", volume.url, str(path), "-o", f"node={host.name}")
    assert done.stdout == ""
    inside("touch", f"{path}/file")
    assert inside("findmnt", "-no", "FSTYPE", str(path)).stdout == "fuse.csvfs\n"
    assert inside("findmnt", "-no", "SOURCE", str(path)).stdout.strip() == volume.url
    options = inside("findmnt", "-no", "OPTIONS", str(path)).stdout
    assert "nosuid" in options and "nodev" in options
    inside("umount", str(path))
    left(host)
    assert "the volume is left" in host.log()


def test_options_are_handed_on(volume: Tgt, host: Host, inside: Run) -> None:
    path = host.mountpoint()
    wanted = f"node={host.name},initiator={host.initiator},allow_dev,allow_suid,noexec"
    inside("mount", "-t", "csvfs", volume.url, str(path), "-o", wanted)
    options = inside("findmnt", "-no", "OPTIONS", str(path)).stdout
    assert "nosuid" not in options and "nodev" not in options and "noexec" in options
    assert host.initiator in host.csvctl("status").stdout
    inside(CSVCTL, "umount", str(path))
    left(host)


def test_a_read_only_mount(volume: Tgt, host: Host, inside: Run) -> None:
    path = host.mountpoint()
    inside("mount", "-r", "-t", "csvfs", volume.url, str(path), "-o", f"node={host.name}")
    assert "Read-only" in inside("touch", f"{path}/new", code=1).stderr
    inside("umount", str(path))
    left(host)


def test_mount_a_with_an_fstab(volume: Tgt, host: Host, inside: Run) -> None:
    path = host.mountpoint()
    fstab = host.directory / "fstab"
    fstab.write_text(f"{volume.url} {path} csvfs _netdev,nofail,node={host.name} 0 0\n")
    inside("mount", "-a", "-T", str(fstab), "-O", "no_netdev")
    assert not host.daemons(), "_netdev is passed over before the network is up"
    inside("mount", "-a", "-T", str(fstab))
    inside("touch", f"{path}/file")
    first = host.daemons()
    inside("mount", "-a", "-T", str(fstab))
    assert host.daemons() == first, "it is mounted already"
    inside("umount", "-a", "-t", "fuse.csvfs")
    left(host)
    inside("mount", "-T", str(fstab), str(path))
    inside("umount", str(path))
    left(host)


def test_what_mount_8_is_told(volume: Tgt, host: Host, inside: Run) -> None:
    host.expect("")
    path = host.mountpoint()
    done = inside("mount", "-t", "csvfs", volume.lun_url(9), str(path), code=32)
    assert "mount.csvfs: " in done.stderr and "LUN number" in done.stderr
    done = inside("mount", "-t", "csvfs", volume.url, str(path), "-o", "quota", code=1)
    assert "'quota' is not known" in done.stderr
    inside("mount", "-t", "csvfs", "nfs://x", str(path), code=1)
    assert inside("mount", "-f", "-t", "csvfs", volume.url, str(path)).stderr == ""
    assert not host.daemons()


def test_the_unit_is_one(tmp_path: Path) -> None:
    """systemd accepts it, and starts libvirtd after it."""
    unit = UNITS / "csvfs@.service"
    instance = tmp_path / "csvfs@vms.service"
    instance.write_text(unit.read_text())
    for verified in (unit, instance):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(verified)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
        )
        assert (done.returncode, done.stderr) == (0, "")
    text = unit.read_text()
    before = next(line for line in text.splitlines() if line.startswith("Before=remote-fs"))
    assert "libvirtd.service" in before
