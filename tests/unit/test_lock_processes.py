"""The lock manager without csvfs and without a LUN: processes of their own, killed and frozen."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.directory_arbiter import make_directory
from lockmgr.cluster.obituary import report_death_from
from lockmgr.cluster.settings import Settings

TREE = Path(__file__).parents[2]
SETTINGS = Settings()


class Daemon:
    """One process, and what its supervisor has of it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.credentials = make_credentials()
        self._process: trio.Process
        self._rest = b""

    async def start(self, nursery: trio.Nursery) -> None:
        """Until it is an active member."""
        command = [sys.executable, "-m", "tests.lock_program", str(self.directory), self.name]
        run = partial(
            trio.run_process,
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=TREE,
            check=False,
        )
        self._process = await nursery.start(run)
        secret = {
            "certificate": self.credentials.certificate.hex(),
            "key": self.credentials.key_pem.hex(),
        }
        await self.say(json.dumps(secret))
        assert (await self.hear()).startswith("active ")

    async def say(self, line: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(line.encode() + b"\n")

    async def hear(self) -> str:
        """The next line of it; "": it has ended."""
        assert self._process.stdout is not None
        with trio.fail_after(120):
            while b"\n" not in self._rest:
                more = await self._process.stdout.receive_some()
                if not more:
                    return ""
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def ask(self, line: str) -> str:
        await self.say(line)
        return await self.hear()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def freeze(self) -> None:
        """Not while it has the lock of the directory, which nobody could take from it."""
        with (self.directory / "lock").open() as file:
            while True:
                self._process.send_signal(signal.SIGSTOP)
                with trio.move_on_after(1):
                    while True:
                        with suppress(BlockingIOError):
                            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                            return
                        await trio.sleep(0.01)
                self._process.send_signal(signal.SIGCONT)
                await trio.sleep(0.01)

    async def reaped(self) -> None:
        """As its supervisor: it is dead, and the others are told."""
        await self._process.wait()
        path = self.directory / f"{self.name}.obituary"
        assert await report_death_from(path, self.credentials)


@asynccontextmanager
async def three(tmp_path: Path) -> AsyncIterator[list[Daemon]]:
    make_directory(tmp_path, 4)
    daemons = [Daemon(tmp_path, name) for name in ("a", "b", "c")]
    async with trio.open_nursery() as nursery:
        for daemon in daemons:
            await daemon.start(nursery)
        yield daemons
        nursery.cancel_scope.cancel()


async def test_locks_of_processes_that_die_and_freeze(tmp_path: Path) -> None:
    async with three(tmp_path) as (a, b, c):
        assert await a.ask("foreign") == "none"
        assert await a.ask("take") == "taken not valid", "nobody has written it yet"
        assert [await a.ask("add") for _ in range(2)] == ["is 1", "is 2"]
        assert await a.ask("give") == "given"
        assert await b.ask("take") == "taken 2"
        assert await b.ask("add") == "is 3"

        # The holder is killed; its supervisor says so: nobody waits for a lease.
        await c.say("take")
        began = boottime()
        b.signal(signal.SIGKILL)
        await b.reaped()
        assert await c.hear() == "taken not valid", "its writer is dead"
        assert boottime() - began < SETTINGS.evict_after_s
        assert await c.ask("add") == "is 4"

        # The holder is frozen; nobody can know that it will not go on.
        await a.say("take")
        began = boottime()
        await c.freeze()
        assert (await a.hear()).startswith("taken")
        assert boottime() - began > SETTINGS.lease_s, "it may have answered from its cache so long"
        assert await a.ask("add") == "is 5"
        await c.say("add")
        c.signal(signal.SIGCONT)
        said = {await c.hear(), await c.hear()} - {""}
        assert said in ({"fenced", "stopped evicted"}, {"stopped evicted"})
        assert await a.ask("add") == "is 6", "and nothing of it came in between"
        assert await a.ask("give") == "given"
        assert await a.ask("leave") == "stopped left"
