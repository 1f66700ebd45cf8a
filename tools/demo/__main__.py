"""The demo: format, mount, guests, SIGKILL in the middle of writing, mount again, compare.

What it shows at the end is not this program's opinion: `tests.workload.verify` and
`tests.guest.verify` are programs of their own that compare the images on the volume with lists of
acknowledged writes kept outside of it, and `csvctl check` looks at the volume itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.guest.image import bootable_image
from tests.guest.machine import Machine
from tests.tgt import Tgt

LUN_BYTES = 4 << 30
GUEST_BYTES = 192 << 20
IMAGE_BYTES = 32 << 20
IMAGES = 4
WRITTEN_BEFORE_KILL = 400
CSVCTL = str(Path(sys.executable).with_name("csvctl"))


class DemoFailed(Exception):
    """A step did not do what it must."""


class Demo:
    """The steps, and the table of what they did."""

    def __init__(self, directory: Path, target: Tgt) -> None:
        self.lun = target.url
        self.outside = directory
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.guest_log = directory / "guest-console.log"
        self.ack_log = directory / "acknowledged.log"
        self.console = Console()
        self.table = Table("step", "what happened", "seconds", title="csvfs: one host, end to end")
        self.images = [self.mountpoint / f"vm{number}.raw" for number in range(1, IMAGES + 1)]
        self.guest_image = self.mountpoint / "guest.raw"

    # -- running things ------------------------------------------------------------------------
    def step(self, name: str, action: Callable[[], str]) -> None:
        """Run one step, print and tabulate what it says."""
        self.console.print(f"[bold]{name}[/bold] ...")
        started = time.monotonic()
        said = action()
        seconds = f"{time.monotonic() - started:.2f}"
        self.console.print(f"    {said} ({seconds} s)", highlight=False)
        self.table.add_row(name, said, seconds)

    def run(self, *argv: str, accept: tuple[int, ...] = (0,)) -> str:
        """Run a program to its end; its words, or `DemoFailed` with them."""
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode not in accept:
            raise DemoFailed(
                f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()

    def csvctl(self, *arguments: str) -> str:
        """Run csvctl."""
        return self.run(CSVCTL, *arguments)

    def module(self, name: str, *arguments: str | Path) -> str:
        """Run a program of this tree."""
        return self.run(sys.executable, "-m", name, *map(str, arguments))

    # -- the steps -------------------------------------------------------------------------------
    def format(self) -> str:
        self.csvctl("format", self.lun, "--label", "demo")
        return f"{LUN_BYTES >> 30} GiB LUN on a real tgtd"

    def mount(self) -> str:
        self.csvctl("mount", self.lun, str(self.mountpoint))
        return f"at {self.mountpoint}, daemon {self.status()['pid']}"

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.csvctl("status", str(self.mountpoint), "--json"))
        return found

    def make_images(self) -> str:
        shutil.copyfile(bootable_image(GUEST_BYTES), self.guest_image)
        for image in self.images:
            image.touch()
            os.truncate(image, IMAGE_BYTES)
        self.run("qemu-img", "create", "-f", "qcow2", str(self.mountpoint / "vm5.qcow2"), "8G")
        return f"a bootable guest, {IMAGES} raw images and a qcow2"

    def boot(self) -> str:
        with Machine(self.guest_image, "write:0:150", self.guest_log) as guest:
            guest.wait_for("^GUEST UP", 90)
            verified = guest.wait_for("^VERIFIED", 120)
            guest.wait_ended(30)
        if verified != "VERIFIED 150 BAD 0":
            raise DemoFailed(f"the guest said: {verified}")
        return "booted from its image; wrote, flushed and verified 150 blocks"

    @contextmanager
    def writer(self) -> Iterator[subprocess.Popen[bytes]]:
        argv = [sys.executable, "-m", "tests.workload.writer", self.ack_log, *self.images]
        with subprocess.Popen([str(word) for word in argv], stdout=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    def kill_while_writing(self) -> str:
        with (
            Machine(self.guest_image, "endless:150", self.guest_log) as guest,
            self.writer() as writer,
        ):
            guest.wait_for_acknowledged(WRITTEN_BEFORE_KILL, 120)
            pid = int(str(self.status()["pid"]))
            os.kill(pid, signal.SIGKILL)
            writer.wait(60)
            acknowledged = len(self.ack_log.read_bytes().splitlines())
            seen = len(guest.acknowledged)
        if not acknowledged:
            raise DemoFailed("the writer had nothing acknowledged when the daemon was killed")
        return f"SIGKILL after {acknowledged} acknowledged writes of a process, {seen} of the guest"

    def compare(self) -> str:
        ours = self.module("tests.workload.verify", self.ack_log, *self.images)
        guests = self.module("tests.guest.verify", self.guest_log, self.guest_image)
        return f"{ours}; {guests}"

    def boot_again(self) -> str:
        with Machine(self.guest_image, "verify:0:150", self.outside / "second.log") as guest:
            verified = guest.wait_for("^VERIFIED", 120)
            guest.wait_ended(30)
        if verified != "VERIFIED 150 BAD 0":
            raise DemoFailed(f"the guest said: {verified}")
        return "the guest boots again and finds its 150 blocks"

    def umount(self) -> str:
        self.csvctl("umount", str(self.mountpoint))
        return "left cleanly"

    def check(self) -> str:
        return self.csvctl("check", self.lun).splitlines()[-1]

    def play(self) -> None:
        """All steps in their order."""
        self.step("format", self.format)
        self.step("mount", self.mount)
        self.step("images", self.make_images)
        self.step("boot a guest", self.boot)
        self.step("kill the daemon", self.kill_while_writing)
        self.step("mount again", self.mount)
        self.step("compare", self.compare)
        self.step("boot again", self.boot_again)
        self.step("umount", self.umount)
        self.step("check", self.check)
        self.console.print(self.table)


def clean_up(mountpoint: Path) -> None:
    """Leave no mount behind, whatever happened."""
    if mountpoint.is_mount():
        subprocess.run([CSVCTL, "umount", str(mountpoint)], capture_output=True, check=False)
    if mountpoint.is_mount():
        subprocess.run(["umount", "--lazy", str(mountpoint)], capture_output=True, check=False)


def main() -> int:
    """Play the demo; exit status 0 when everything held."""
    if os.geteuid() != 0:
        print("The demo mounts a filesystem and starts a target: run it as root, or `make demo`.")
        return 77
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csvfs-demo-")))
        target = stack.enter_context(Tgt(lun_bytes=LUN_BYTES))
        demo = Demo(directory, target)
        stack.callback(clean_up, demo.mountpoint)
        try:
            demo.play()
        except (DemoFailed, TimeoutError) as error:
            demo.console.print(f"[bold red]The demo failed.[/bold red] {error}", markup=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
