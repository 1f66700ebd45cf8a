"""The demo: three hosts, one LUN, guests; one host frozen while it writes, one without power.

What it shows is not this program's opinion: `tests.workload.verify` and `tests.guest.verify` are
programs of their own that compare images on the volume with lists of acknowledged writes kept
outside of it, the target itself says what it refuses, and `csvctl check` looks at the volume.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.guest.image import bootable_image
from tests.guest.machine import Machine

HOSTS = ("host1", "host2", "host3")
LUN_SIZE = "4G"
GUEST_BYTES = 192 << 20
RAW_BYTES = 32 << 20
WRITTEN_BEFORE_FAULT = 200
VERIFIED = "VERIFIED 150 BAD 0"
CSVCTL = str(Path(sys.executable).with_name("csvctl"))


class DemoFailed(Exception):
    """A step did not do what it must."""


class Demo:
    """The steps, and the table of what they did."""

    def __init__(self, directory: Path) -> None:
        self.lab = directory / "lab"
        self.outside = directory
        self.console = Console()
        self.table = Table("step", "what happened", "seconds", title="csvfs: three hosts, one LUN")
        self.ack_log = directory / "acknowledged.log"
        self.guest_logs = {host: directory / f"{host}-console.log" for host in HOSTS}
        self._log_seen: dict[str, int] = {}
        self._rewritten = b""
        self._frozen_life = ""

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

    def lab_command(self, *arguments: str) -> str:
        """Run `csvctl lab` on this demo's lab."""
        command, *rest = arguments
        return self.run(CSVCTL, "lab", command, "--dir", str(self.lab), *rest)

    def on(self, host: str, *command: str) -> str:
        """Run a program on a host: in its network, with its csvctl."""
        return self.lab_command("exec", host, "--", *command)

    def module(self, name: str, *arguments: str | Path) -> str:
        """Run a program of this tree."""
        return self.run(sys.executable, "-m", name, *map(str, arguments))

    def description(self, host: str) -> dict[str, Any]:
        """What the lab knows of a host."""
        shown = json.loads(self.lab_command("status", "--json"))
        found: dict[str, Any] = next(each for each in shown["hosts"] if each["name"] == host)
        return found

    def mount(self, host: str) -> Path:
        return self.lab / host

    def guest(self, host: str) -> str:
        return f"{host}-guest.raw"

    # -- the steps -------------------------------------------------------------------------------
    def up(self) -> str:
        self.lab_command("up", "--hosts", str(len(HOSTS)), "--size", LUN_SIZE)
        nodes = json.loads(self.on("host1", CSVCTL, "node", "list", "--json"))
        active = [each["node"] for each in nodes["nodes"] if each["state"] == "active"]
        if sorted(active) != list(HOSTS):
            raise DemoFailed(f"active are {active}")
        return f"{LUN_SIZE} LUN on one tgtd; view {nodes['epoch']}: {', '.join(active)}"

    def make_images(self) -> str:
        bootable = bootable_image(GUEST_BYTES)
        for host in HOSTS:
            shutil.copyfile(bootable, self.mount(host) / self.guest(host))
        raw = self.mount("host2") / "raw"
        raw.touch()
        os.truncate(raw, RAW_BYTES)
        listings = {tuple(sorted(os.listdir(self.mount(host)))) for host in HOSTS}
        if len(listings) != 1:
            raise DemoFailed(f"the hosts see different trees: {listings}")
        return f"each host made its guest's; all see {', '.join(listings.pop())}"

    def boot(self) -> str:
        for host in HOSTS:
            image = self.mount(host) / self.guest(host)
            with Machine(image, "write:0:150", self.guest_logs[host]) as guest:
                self._expect(guest, VERIFIED)
        return "each host booted its guest; it wrote, flushed and verified 150 blocks"

    def _expect(self, guest: Machine, words: str) -> None:
        guest.wait_for("^GUEST UP", 240)
        verified = guest.wait_for("^VERIFIED", 120)
        guest.wait_ended(30)
        if verified != words:
            raise DemoFailed(f"the guest said: {verified}")

    @contextmanager
    def busy(self, host: str) -> Iterator[tuple[Machine, subprocess.Popen[bytes]]]:
        """A guest and a program that write without end on a host."""
        image = self.mount(host) / self.guest(host)
        argv = [
            sys.executable,
            "-m",
            "tests.workload.writer",
            self.ack_log,
            self.mount(host) / "raw",
        ]
        with (
            Machine(image, "endless:150", self.guest_logs[host]) as guest,
            subprocess.Popen([str(word) for word in argv], stdout=subprocess.PIPE) as writer,
        ):
            try:
                guest.wait_for_acknowledged(WRITTEN_BEFORE_FAULT, 120)
                yield guest, writer
            finally:
                writer.kill()

    def freeze(self) -> str:
        self._mark_log("host2")
        _, self._frozen_life = self._life("host2")
        self.lab_command("fault", "freeze", "host2")
        return "SIGSTOP of its daemon while a guest and a program write"

    def take_over(self) -> str:
        """Returns when host1 has written to host2's image for the first time."""
        write_first_block(self.mount("host1") / "raw")
        nodes = json.loads(self.on("host1", CSVCTL, "node", "list", "--json"))
        left = [each["node"] for each in nodes["nodes"] if each["state"] == "active"]
        if "host2" in left:
            raise DemoFailed("host2 is still a member")
        return f"view {nodes['epoch']}: {', '.join(sorted(left))}; its journal is replayed"

    def compare(self) -> str:
        raw, image = self.mount("host1") / "raw", self.mount("host1") / self.guest("host2")
        ours = self.module("tests.workload.verify", self.ack_log, raw)
        guests = self.module("tests.guest.verify", self.guest_logs["host2"], image)
        return f"{ours}; {guests}"

    def rewrite(self) -> str:
        image = self.mount("host1") / self.guest("host2")
        with Machine(image, "write:100000:150", self.outside / "moved.log") as guest:
            self._expect(guest, VERIFIED)
        with open(self.mount("host1") / "raw", "r+b") as raw:
            raw.write(os.urandom(RAW_BYTES))
            os.fsync(raw.fileno())
        self._rewritten = self._digest("host1")
        return "host2's guest boots on host1 and writes on; the raw image is written anew"

    def _digest(self, host: str) -> bytes:
        digest = hashlib.sha256()
        for name in ("raw", self.guest("host2")):
            with open(self.mount(host) / name, "rb") as image:
                while piece := image.read(1 << 20):
                    digest.update(piece)
        return digest.digest()

    def thaw(self, writer: subprocess.Popen[bytes]) -> str:
        pid = self.description("host2")["pid"]
        os.kill(int(pid), 18)  # SIGCONT: the lab's heal would mount again as well
        writer.wait(60)
        assert writer.stdout is not None
        said = writer.stdout.read().decode().strip()
        stopped = self._wait_log("host2", "this node stops")
        closed = self._wait_log("host2", "the paths are closed")
        for words in (closed, stopped):
            self.console.print(f"    host2: {words}", highlight=False)
        target = json.loads(self.lab_command("status", "--json"))["lun"]
        initiator = self.description("host2")["initiator"]
        refused = self.on("host2", sys.executable, "-m", "tools.demo.zombie", target, initiator)
        self.console.print(f"    host2: {refused}", highlight=False)
        if "reservation conflict" not in refused.lower():
            raise DemoFailed(f"host2 could write: {refused}")
        if not (self._digest("host1") == self._digest("host3") == self._rewritten):
            raise DemoFailed("the images are not what host1 wrote")
        return f"sessions closed, RESERVATION CONFLICT; images as host1 wrote them; {said}"

    def come_back(self) -> str:
        self.lab_command("heal", "host2")
        epoch, life = self._life("host2")
        if life == self._frozen_life:
            raise DemoFailed(f"host2 is {life} again, which was evicted")
        if self._digest("host2") != self._rewritten:
            raise DemoFailed("host2 sees other images than host1 wrote")
        return f"view {epoch}: a new life: {life}; the frozen one was {self._frozen_life}"

    def _life(self, host: str) -> tuple[int, str]:
        """The epoch, and which life of which slot this host is."""
        nodes = json.loads(self.on(host, CSVCTL, "node", "list", "--json"))
        mine = next(each for each in nodes["nodes"] if each["is_this_host"])
        return nodes["epoch"], f"slot {mine['slot']}, incarnation {mine['incarnation']}"

    def power_off(self) -> str:
        image = self.mount("host3") / self.guest("host3")
        log = self.guest_logs["host3"]
        with Machine(image, "endless:150", log) as guest:
            guest.wait_for_acknowledged(50, 120)
            self.lab_command("fault", "power-off", "host3")
            started = time.monotonic()
            write_first_block(self.mount("host1") / self.guest("host3"))
            passed = time.monotonic() - started
        verdict = self.module("tests.guest.verify", log, self.mount("host1") / self.guest("host3"))
        return f"host1's first write to its image after {passed:.1f} s; {verdict}"

    def boot_again(self) -> str:
        image = self.mount("host2") / self.guest("host3")
        with Machine(image, "verify:0:150", self.outside / "again.log") as guest:
            self._expect(guest, VERIFIED)
        return "host3's guest boots on host2 and finds its first 150 blocks"

    def down(self) -> str:
        for host in ("host1", "host2"):
            self.on(host, CSVCTL, "umount", str(self.mount(host)))
        lun = json.loads(self.lab_command("status", "--json"))["lun"]
        return self.on("host1", CSVCTL, "check", lun).splitlines()[-1]

    # -- logs ------------------------------------------------------------------------------------
    def _mark_log(self, host: str) -> None:
        self._log_seen[host] = Path(self.description(host)["log"]).stat().st_size

    def _wait_log(self, host: str, words: str, limit_s: float = 30.0) -> str:
        """The first line with these words since the mark, without its time and place."""
        path, end = Path(self.description(host)["log"]), time.monotonic() + limit_s
        while time.monotonic() < end:
            for line in path.read_text()[self._log_seen[host] :].splitlines():
                if words in line:
                    return re.sub(r"^\S+ \S+ \S+ [^:]+: ", "", line)
            time.sleep(0.05)
        raise DemoFailed(f"{host} did not say within {limit_s:.0f} s: {words}")

    def play(self) -> None:
        """All steps in their order."""
        self.step("three hosts", self.up)
        self.step("images", self.make_images)
        self.step("boot the guests", self.boot)
        with self.busy("host2") as (_guest, writer):
            self.step("freeze host2", self.freeze)
            self.step("host1 takes over", self.take_over)
            self.step("compare", self.compare)
            self.step("rewrite", self.rewrite)
            self.step("thaw host2", lambda: self.thaw(writer))
        self.step("host2 comes back", self.come_back)
        self.step("power off host3", self.power_off)
        self.step("boot its guest", self.boot_again)
        self.step("leave, check", self.down)
        self.console.print(self.table)


def write_first_block(image: Path) -> None:
    """Write the first block of an image as it is, and have it stable."""
    with image.open("r+b") as file:
        block = file.read(4096)
        file.seek(0)
        file.write(block)
        file.flush()
        os.fsync(file.fileno())


def main() -> int:
    """Play the demo; exit status 0 when everything held."""
    if os.geteuid() != 0:
        print("The demo makes namespaces and mounts filesystems: run it as root, or `make demo`.")
        return 77
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csvfs-demo-")))
        demo = Demo(directory)
        stack.callback(
            subprocess.run,
            [CSVCTL, "lab", "down", "--dir", str(demo.lab)],
            capture_output=True,
            check=False,
        )
        try:
            demo.play()
        except (DemoFailed, TimeoutError, subprocess.TimeoutExpired) as error:
            demo.console.print("[bold red]The demo failed.[/bold red]")
            demo.console.print(str(error), markup=False)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
