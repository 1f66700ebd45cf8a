"""Format, claim and release on a real tgtd: cut off by SIGKILL, with a write still on its way."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from csvfs.format import Superblock
from csvfs.membership.claim import Claim, ClaimRefused, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.newcomer import open_newcomer
from csvfs.membership.refusals import RefuseOther
from csvfs.membership.seat import JournalTask
from csvfs.mkfs import FormatOptions, make_filesystem
from csvfs.mkfs_claim import Formatter
from redirector.block.device import BlockDevice
from redirector.block.keys import choose_port
from redirector.block.reservations import survey
from redirector.block.url import open_lun
from tests.tgt import Tgt

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LUN_BYTES = 64 << 20
AT = LUN_BYTES // 2
SLOW = b"SLOW" * 1024
LATE_LIMIT_S = 20

_CHILD = """
import sys, trio
from random import SystemRandom
from tests.system.test_claim_tgt import AT, SLOW, Node
from redirector.block.url import open_lun

async def main():
    claim = await Node("alpha").claim(sys.argv[1])
    print("claimed", flush=True)
    await claim.data.device.write(AT, SLOW)

trio.run(main)
"""


class Node:
    """A host's daemon as far as a claim sees it."""

    def __init__(self, name: str, seed: int | None = None) -> None:
        identity = name.encode().ljust(16, b"\0")
        self.host = Host(name, identity, identity, f"iqn.2026-11.test.csvfs:{name}")
        self.rng = Random(seed)
        self.tasks: list[JournalTask] = []
        self.prepared = trio.Event()

    async def claim(self, url: str) -> Claim:
        async def prepare(device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
            del device, superblock
            self.tasks.append(task)
            self.prepared.set()

        return await claim_volume(
            open_lun(url), self.host, prepare=prepare, take_lock=lambda _: True, rng=self.rng
        )


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(lun_bytes=LUN_BYTES, late_gate=True) as tgt:
        trio.run(_format, tgt.url)
        yield tgt


async def _format(url: str) -> Superblock:
    options = FormatOptions(label="v", slots=2)
    return await Formatter(open_lun(url), "iqn.2026-11.test.csvfs:format", options).run()


@contextlib.contextmanager
def child_that_writes_late(tgt: Tgt) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed the volume and has a write in the target, held back."""
    tgt.hold_writes()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, tgt.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        end = time.monotonic() + LATE_LIMIT_S
        while not tgt.held_writes():
            assert time.monotonic() < end
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_a_write_held_over_sigkill_never_lands_after_the_next_claim(tgt: Tgt) -> None:
    with child_that_writes_late(tgt) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        node = Node("alpha", 2)
        claims: list[Claim] = []

        async def claim() -> None:
            claims.append(await node.claim(tgt.url))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(claim)
                with trio.move_on_after(3):
                    await node.prepared.wait()
                assert not node.tasks, "replayed while a write of the dead was on its way"
                tgt.release_writes()
    (taken,) = claims
    assert taken.incarnation == 2
    device = taken.data.device
    assert await device.read(AT, len(SLOW)) == SLOW, "it had landed before the claim"
    await device.write(AT, bytes(4096), fua=True)
    with tgt.backing().open("rb") as file:
        for _ in range(20):
            file.seek(AT)
            assert file.read(4096) == bytes(4096)
            await trio.sleep(0.02)
    await release_volume(taken)


@pytest.mark.full
async def test_a_claim_given_up_while_the_target_drains_leaves_the_volume_to_the_next(
    tgt: Tgt,
) -> None:
    with child_that_writes_late(tgt) as child:
        child.kill()
        child.wait()
        node = Node("alpha", 2)
        with trio.move_on_after(3) as patience:
            await node.claim(tgt.url)
        assert patience.cancelled_caught
        assert not node.tasks
        tgt.release_writes()
        claim = await Node("alpha", 3).claim(tgt.url)
        await release_volume(claim)


async def test_another_host_is_refused_and_disturbs_nothing(tgt: Tgt) -> None:
    claim = await Node("alpha", 1).claim(tgt.url)
    with pytest.raises(ClaimRefused, match="alpha has the volume") as caught:
        await Node("beta", 2).claim(tgt.url)
    assert isinstance(caught.value.refusal, RefuseOther)
    await claim.data.device.write(AT, bytes(4096))
    async with await open_newcomer(open_lun(tgt.url), "iqn.2026-11.test:tool", Random(3)) as tool:
        standing = await survey(tool.device)
        expected = {claim.data.key, claim.control.key, tool.key}
        assert set(standing.keys.keys) == expected
        assert standing.holder_key == claim.control.key
    await release_volume(claim)
    beta = await Node("beta", 2).claim(tgt.url)
    await release_volume(beta)


async def test_of_two_hosts_at_once_one_wins(tgt: Tgt) -> None:
    outcomes: list[Claim | ClaimRefused] = []

    async def take(name: str, seed: int) -> None:
        try:
            outcomes.append(await Node(name, seed).claim(tgt.url))
        except ClaimRefused as error:
            outcomes.append(error)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, "alpha", 1)
            nursery.start_soon(take, "beta", 2)
    winners = [each for each in outcomes if isinstance(each, Claim)]
    assert len(outcomes) == 2
    assert len(winners) == 1
    await release_volume(winners[0])


async def test_the_target_restarted_under_a_dead_host(tgt: Tgt) -> None:
    (await Node("alpha", 1).claim(tgt.url)).abort()
    tgt.kill()
    tgt.restart()
    with pytest.raises(ClaimRefused):
        await Node("beta", 2).claim(tgt.url)
    claim = await Node("alpha", 3).claim(tgt.url)
    assert claim.incarnation == 2
    await release_volume(claim)


async def test_a_claim_after_a_clean_leave_is_quick(tgt: Tgt) -> None:
    await release_volume(await Node("alpha", 1).claim(tgt.url))
    started = time.perf_counter()
    claim = await Node("alpha", 2).claim(tgt.url)
    assert time.perf_counter() - started < 1
    await release_volume(claim)


async def test_one_tebibyte_is_formatted_in_two_seconds() -> None:
    with Tgt(lun_bytes=1 << 40) as tgt:
        lun = open_lun(tgt.url)
        port = choose_port("iqn.2026-11.test.csvfs:format", Random(1))
        async with await lun.login(port) as device:
            started = time.perf_counter()
            await make_filesystem(device, FormatOptions(label="big"), now_ns=1, rng=Random(1))
            assert time.perf_counter() - started < 2
        options = FormatOptions(label="big")
        started = time.perf_counter()
        superblock = await Formatter(lun, port.name, options, force=True, rng=Random(2)).run()
        assert time.perf_counter() - started < 2, "the probe included"
    assert superblock.geometry.group_count == 624
