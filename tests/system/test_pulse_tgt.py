"""Heartbeats of a real node on a real target: its loop busy, hung, stopped, its session cut.

Seen from outside: datagrams by the kernel's time of arrival, the block in the file behind the LUN.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from csvfs.membership.peek import peek
from redirector.block.url import open_lun
from tests.member_nodes import format_lun
from tests.pulse_observer import BlockObserver, Observer
from tests.tgt import Tgt

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
GAP_S = 0.6
"""At a peer: heartbeats come every half second."""
LEASE_S = 4.0


class HostProcess:
    """A `tests.pulse_host`."""

    def __init__(
        self, url: str, name: str, port: int, kind: str = "native", heartbeat_s: float = 0.5
    ) -> None:
        command = [sys.executable, "-m", "tests.pulse_host", url, name, str(port), kind]
        command += [str(heartbeat_s)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def answer(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], limit_s)[0], "no answer"
        line = self.process.stdout.readline()
        assert line, f"the host has ended: {self.process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words.encode() + b"\n")
        self.process.stdin.flush()

    def do(self, words: str) -> dict[str, Any]:
        self.tell(words)
        return self.answer()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@asynccontextmanager
async def a_host(
    kind: str = "native",
) -> AsyncIterator[tuple[HostProcess, Observer, BlockObserver, Tgt]]:
    with Tgt(lun_bytes=1 << 30) as tgt, Observer() as observer:
        await format_lun(open_lun(tgt.url, None))
        superblock = (await peek(open_lun(tgt.url, None), "iqn.2026-11.test:look")).superblock
        host = HostProcess(tgt.url, "alpha", observer.port, kind)
        try:
            slot = (await trio.to_thread.run_sync(host.answer))["slot"]
            with BlockObserver(tgt.backing(), superblock, slot) as block:
                await wait(lambda: len(block.seen) > 2)
                yield host, observer, block, tgt
        finally:
            host.close()


async def wait(condition: Any) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await trio.sleep(0.02)


async def do(host: HostProcess, words: str) -> dict[str, Any]:
    return await trio.to_thread.run_sync(host.do, words)


async def test_a_busy_loop_beats_on() -> None:
    async with a_host() as (host, observer, block, _):
        told = await do(host, "busy 20")
        began, ended = told["began"], told["ended"]
        gaps = observer.gaps(began, ended)
        assert ended - began > 19
        assert max(gaps) < GAP_S, sorted(gaps)[-3:]
        assert max(block.gaps(began, ended)) < 2 * GAP_S
        assert told["lease_valid"]
        assert told["lease_least_left_s"] > LEASE_S - 3 * GAP_S
        assert (await do(host, "leave")) == {"left": "left"}


async def test_a_hung_loop_falls_silent_and_renews_nothing() -> None:
    async with a_host() as (host, observer, block, _):
        told = await do(host, "hang 3")
        began, ended = told["began"], told["ended"]
        assert not [when for when, _ in observer.heard if began + 1.5 < when < ended]
        assert not [when for when, _ in block.seen if began + 1.5 < when < ended - 0.1]
        assert told["lease_most_s"] <= 1.0 + LEASE_S + 0.1
        await wait(lambda: observer.heard[-1][0] > ended)
        assert observer.heard[-1][0] < ended + 1.0
        await wait(lambda: block.seen[-1][0] > ended)
        told = await do(host, "status")
        assert told["lease_valid"]
        assert told["has_path"]


async def test_a_stopped_process_is_silent_and_goes_on() -> None:
    async with a_host() as (host, observer, block, _):
        host.process.send_signal(signal.SIGSTOP)
        stopped = time.time() + 0.1
        await trio.sleep(5)
        going = time.time()
        host.process.send_signal(signal.SIGCONT)
        assert not [when for when, _ in observer.heard if stopped < when < going]
        assert not [when for when, _ in block.seen if stopped + 0.1 < when < going]
        told = await do(host, "status")
        # It was over when the process woke up, and is renewed only by what was sent since.
        await wait(lambda: observer.heard[-1][0] > going)
        await wait(lambda: block.seen[-1][0] > going)
        told = await do(host, "status")
        assert told["lease_valid"]
        sequences = [sequence for _, sequence in observer.heard]
        assert sequences == sorted(set(sequences))


async def test_the_session_is_cut_in_the_middle() -> None:
    async with a_host() as (host, observer, block, tgt):
        host.tell("busy 4")
        await trio.sleep(1.2)
        assert tgt.cut("iqn.2026-11.test:alpha")
        told = await trio.to_thread.run_sync(host.answer)
        began, ended = told["began"], told["ended"]
        assert max(observer.gaps(began, ended)) < GAP_S
        await wait(lambda: block.seen[-1][0] > ended + 1)
        told = await do(host, "status")
        assert told["has_path"]
        assert told["lease_valid"]
        sequences = [beat.sequence for _, beat in block.seen]
        assert sequences == sorted(set(sequences))


async def test_a_frozen_target_ends_the_lease() -> None:
    async with a_host() as (host, observer, _, tgt):
        with tgt.paused():
            began = time.time()
            await trio.sleep(LEASE_S + 1.5)
            assert max(observer.gaps(began, time.time())) < GAP_S
            told = await do(host, "status")
            assert not told["lease_valid"]
        await wait_lease(host)


async def wait_lease(host: HostProcess) -> None:
    with trio.fail_after(LIMIT_S):
        while not (await do(host, "status"))["lease_valid"]:  # noqa: ASYNC110 - another process's
            await trio.sleep(0.2)
