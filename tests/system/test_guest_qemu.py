"""A real guest: boots from an image on the volume, writes, flushes, and finds everything again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csvfs.host import mountpoint
from tests.guest.image import bootable_image
from tests.guest.machine import Machine
from tests.mounts import Mount
from tests.tgt import Tgt, wait_until

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
IMAGE_BYTES = 128 << 20
BOOT_LIMIT_S = 120.0
"""A guest without KVM on a busy machine."""


@pytest.fixture(scope="module")
def template() -> Path:
    return bootable_image(IMAGE_BYTES)


def install(template: Path, image: Path) -> None:
    """Put a guest's disk onto the volume, with its holes."""
    subprocess.run(["cp", "--sparse=always", template, image], check=True)
    descriptor = os.open(image, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def verify(console: Path, image: Path) -> None:
    """Run the program that compares the image with what the guest said it had flushed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.guest.verify", str(console), str(image)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_guest_boots_writes_and_verifies(
    cache: str, mnt: Mount, template: Path, tmp_path: Path
) -> None:
    image, console = mnt.path / "guest.raw", tmp_path / "console"
    install(template, image)
    with Machine(image, "write:1:60", console, cache=cache) as guest:
        guest.wait_for("VERIFIED 60 BAD 0", BOOT_LIMIT_S)
        assert guest.wait_ended(30) == 0
    verify(console, image)
    mnt.umount()
    mnt.remount()
    verify(console, image)
    with Machine(image, "verify:1:60", console, cache=cache) as guest:
        guest.wait_for("VERIFIED 60 BAD 0", BOOT_LIMIT_S)
        assert guest.wait_ended(30) == 0


@pytest.mark.parametrize(
    ("cache", "rounds"), [("none", 1), pytest.param("writeback", 4, marks=pytest.mark.full)]
)
def test_the_daemon_is_killed_under_a_guest(
    cache: str, rounds: int, mnt: Mount, template: Path, tmp_path: Path
) -> None:
    """The guest stops at the first error; what it had flushed is there, and it boots again."""
    mnt.host.expect("the mount was dead and is detached: .* killed by SIGKILL")
    image, console = mnt.path / "guest.raw", tmp_path / "console"
    install(template, image)
    first = 1
    for _ in range(rounds):
        with Machine(image, f"endless:{first}", console, cache=cache) as guest:
            guest.wait_for_acknowledged(40, BOOT_LIMIT_S)
            os.kill(mnt.pid, signal.SIGKILL)
            wait_until(lambda: mountpoint.find(str(mnt.path)) is None, "the mount to be detached")
            acknowledged = guest.acknowledged
        mnt.remount()
        verify(console, image)
        first = acknowledged[-1].sequence + 1
    with Machine(image, f"verify:1:{first - 1}", console, cache=cache) as guest:
        guest.wait_for(f"VERIFIED {first - 1} BAD 0", BOOT_LIMIT_S)


@pytest.mark.full
def test_guests_see_a_pause_when_connections_are_cut(
    lun: Tgt, mnt: Mount, template: Path, tmp_path: Path
) -> None:
    """The SAN path is lost under two running guests, and comes back: never an error."""
    mnt.host.expect("")
    images = [mnt.path / "one.raw", mnt.path / "two.raw"]
    consoles = [tmp_path / "one", tmp_path / "two"]
    for image in images:
        install(template, image)
    with (
        Machine(images[0], "write:1:120", consoles[0]) as one,
        Machine(images[1], "write:1:120", consoles[1]) as two,
    ):
        for count in (20, 60, 90):
            one.wait_for_acknowledged(count, BOOT_LIMIT_S)
            two.wait_for_acknowledged(count, BOOT_LIMIT_S)
            lun.cut()
        for guest in (one, two):
            guest.wait_for("VERIFIED 120 BAD 0", BOOT_LIMIT_S)
            assert guest.wait_ended(30) == 0
    for console, image in zip(consoles, images, strict=True):
        verify(console, image)
