"""`LunArbiter` on a real tgtd."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from csvfs.format import SlotState, ViewSlot
from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.fixed_area import read_superblock, read_view, write_view
from lockmgr.cluster import effects
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.outcomes import Good, Won
from lockmgr.cluster.view import NodeId
from redirector.block.device import InitiatorPort, Lun, OutcomeUnknown
from redirector.block.keys import PathKey
from redirector.block.reservations import RESET_TIMEOUT_S, Registration
from redirector.block.url import open_lun
from tests.arbiter_conformance import ArbiterConformance, Stage
from tests.member_nodes import QUICK, Cluster, format_lun, open_cluster
from tests.tgt import Tgt

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
HOLDER, VICTIM = NodeId(0, 1), NodeId(1, 1)
AT = 32 << 20


class TgtStage(Stage):
    def __init__(self, tgt: Tgt) -> None:
        self.tgt = tgt

    def cluster(self) -> AbstractAsyncContextManager[Cluster]:
        return open_cluster(self.lun, QUICK)

    def lun(self) -> Lun:
        return open_lun(self.tgt.url)

    def hold_writes(self) -> None:
        self.tgt.hold_writes()

    async def wait_held(self) -> None:
        with trio.fail_after(20):
            while not self.tgt.held_writes():  # noqa: ASYNC110 (another process's file)
                await trio.sleep(0.005)

    def release_writes(self) -> None:
        self.tgt.release_writes()

    def restart(self) -> None:
        self.tgt.restart()


class TestTgt(ArbiterConformance):
    @pytest.fixture
    def stage(self) -> Iterator[Stage]:
        with Tgt(late_gate=True) as tgt:
            yield TgtStage(tgt)

    @pytest.fixture
    def clock(self) -> None:
        """The real one."""


# -- one arbiter against another process -----------------------------------------------------------
@asynccontextmanager
async def arbiter_of(url: str, name: str) -> AsyncIterator[tuple[LunArbiter, list[str]]]:
    """And what it tells, in order."""
    lun = open_lun(url)
    certificate = name.encode()
    fingerprint = hashlib.sha256(certificate).digest()
    identity = Identity(name, bytes(16), bytes(16), fingerprint, (), certificate)
    async with await lun.login(InitiatorPort(f"iqn.2026-11.test:{name}", 0x80 << 40 | 7)) as device:
        # Whoever is registered may read.
        path = await Registration.register(device, PathKey(9, 1, os.getpid() & 0x7FFF).pack())
        superblock, _ = await path.ask(lambda: read_superblock(device))
        await path.unregister()
    told: list[str] = []
    arbiter = LunArbiter(
        lun,
        superblock,
        identity,
        f"iqn.2026-11.test:{name}",
        on_lost=lambda _: told.append("lost"),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: arbiter.run(task_status=task_status))
        yield arbiter, told
        nursery.cancel_scope.cancel()


async def found_cluster(url: str, *listed: NodeId) -> None:
    """A volume, held by an officer's key, with these members."""
    lun = open_lun(url)
    await format_lun(lun)
    officer = PathKey(*HOLDER, 99).pack()
    async with await lun.login(InitiatorPort("iqn.2026-11.test:officer", 0x80 << 40 | 9)) as device:
        path = await Registration.register(device, officer)
        await path.reserve()
        superblock, _ = await read_superblock(device)
        view = await read_view(device, superblock.volume_id)
        slots = {
            node.slot: ViewSlot(node.incarnation, SlotState.ACTIVE, node_name=f"node {node}")
            for node in listed
        }
        await write_view(path, view.next(officer, slots, 0), superblock.volume_id)


@asynccontextmanager
async def holder(url: str) -> AsyncIterator[tuple[LunArbiter, list[str]]]:
    """The arbiter of the node that holds the reservation."""
    async with arbiter_of(url, "holder") as (arbiter, told):
        assert isinstance(await arbiter.carry_out(effects.OpenPaths(1, *HOLDER)), Good)
        take = effects.Take(2, PathKey(*HOLDER, 99).pack())
        assert await arbiter.carry_out(take) == Good(Won())
        yield arbiter, told


async def read_for_ever(url: str) -> None:
    """What a child process does until it is fenced: as much as there can be under way."""
    async with arbiter_of(url, "victim") as (arbiter, _), trio.open_nursery() as nursery:
        assert isinstance(await arbiter.carry_out(effects.OpenPaths(1, *VICTIM)), Good)

        async def carry_out(effect: effects.IoEffect) -> None:
            while isinstance(await arbiter.carry_out(effect), Good):
                pass
            nursery.cancel_scope.cancel()

        async def read_data(path: Registration) -> None:
            while True:
                await path.ask(lambda: path.device.read(AT, 1 << 20))

        for effect in (effects.Survey(1), effects.ReadBlocks(2)):
            nursery.start_soon(carry_out, effect)
        if arbiter.data is not None:
            for _ in range(8):
                nursery.start_soon(read_data, arbiter.data)
        await trio.sleep(0.1)
        print("reading", flush=True)
    print("over", arbiter.trouble)


def start_reader(url: str) -> subprocess.Popen[str]:
    command = (
        "import sys, trio; from tests.system.test_arbiter_tgt import read_for_ever;"
        " trio.run(read_for_ever, sys.argv[1])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", command, url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_a_stopped_process_does_not_keep_the_fence_waiting() -> None:
    """Its sessions are closed, whatever it has left unread in them."""
    with Tgt() as tgt:
        await found_cluster(tgt.url, HOLDER, VICTIM)
        child = start_reader(tgt.url)
        try:
            assert child.stdout is not None
            assert await trio.to_thread.run_sync(child.stdout.readline) == "reading\n"
            child.send_signal(signal.SIGSTOP)
            async with holder(tgt.url) as (arbiter, _):
                began = trio.current_time()
                fence = effects.Fence(3, (), (VICTIM,))
                assert await arbiter.carry_out(fence) == Good(None)
                assert trio.current_time() - began < RESET_TIMEOUT_S
                assert arbiter.control is not None
                standing = await arbiter.control.survey()
                assert not standing.of_incarnation(*VICTIM)
            child.send_signal(signal.SIGCONT)
            words, trouble = await trio.to_thread.run_sync(child.communicate)
            assert words.startswith("over") or "OutcomeUnknown" in trouble
        finally:
            child.kill()
            child.wait()


async def test_a_connection_that_is_cut_is_told_before_the_answers() -> None:
    with Tgt(late_gate=True) as tgt:
        await found_cluster(tgt.url, HOLDER)
        async with holder(tgt.url) as (arbiter, told):
            data = arbiter.data
            assert data is not None
            seen: list[list[str]] = []
            slow = b"SLOW" * 1024
            tgt.hold_writes()

            async def write(number: int) -> None:
                with pytest.raises(OutcomeUnknown):
                    await data.device.write(AT + 4096 * number, slow)
                seen.append(list(told))

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(write, number)
                with trio.fail_after(20):
                    while tgt.held_writes() < 8:  # noqa: ASYNC110 (another process's file)
                        await trio.sleep(0.005)
                tgt.cut()
                await data.device.wait_lost()
                tgt.release_writes()
            assert seen == [["lost"]] * 8
            assert arbiter.data is None and arbiter.control is None
            assert isinstance(await arbiter.carry_out(effects.OpenPaths(4, *HOLDER)), Good)
            assert not arbiter.restarted
