"""Both pulses do what every pulse does; and what is the native one's own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from csvfs.format import Geometry, Superblock, decode_heartbeat, encode_heartbeat
from csvfs.membership.native_pulse import NativePulse
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.datagram import encode_heartbeat as encode_datagram
from lockmgr.cluster.effects import Beat, WriteHeartbeat
from lockmgr.cluster.events import HeartbeatWritten
from lockmgr.cluster.outcomes import Good, Outcome, Refused
from lockmgr.cluster.pulse import PulseWiring, PythonPulse
from redirector.block.device import BlockError, InitiatorPort, UnitAttention
from redirector.block.iscsi_device import IscsiDevice
from redirector.native.nexus import Nexus
from tests.pulse_conformance import (
    CLUSTER_ID,
    LIMIT_S,
    SECRET,
    SETTINGS,
    Bench,
    PulseConformance,
    install,
    listening_peer,
)
from tests.scripted_target import SCSI_COMMAND, Request, ScriptedTarget, Talk

KEY = 0xC5F5_0001
SLOT = 2
SUPERBLOCK = Superblock(bytes(range(50, 66)), Geometry.for_lun(1 << 30, 4), 0, "v", b"device")
ADDRESS = SUPERBLOCK.geometry.heartbeat(SLOT)
CONFLICT, CHECK_CONDITION = 0x18, 0x02
ATTENTION_2900 = bytes([0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 0, 0, 0, 0, 0])


class Disk:
    """A LUN of which only the heartbeat block is looked at."""

    key = KEY

    def __init__(self) -> None:
        self.blocks: list[Heartbeat] = []
        self.status = 0
        self.sense = b""
        self.from_python = 0
        self._going = threading.Event()
        self._going.set()

    def written(self) -> list[int]:
        return [beat.sequence for beat in self.blocks]

    def hold(self) -> None:
        self._going.clear()

    def let_go(self) -> None:
        self._going.set()

    def refuse(self) -> None:
        self.status = CONFLICT

    def answer(self, talk: Talk, request: Request) -> None:
        """To a command from C, on the target's thread."""
        if request.opcode != SCSI_COMMAND:
            return
        self._going.wait(LIMIT_S)
        status, sense = self.status, self.sense
        if status == CHECK_CONDITION:  # told once
            self.status, self.sense = 0, b""
        if not status:
            self.blocks.append(decode_heartbeat(request.data, ADDRESS, SUPERBLOCK.volume_id, SLOT))
        talk.respond(request, status, sense)

    async def write(self, effect: WriteHeartbeat) -> Outcome:
        """As an arbiter does for Python."""
        self.from_python += 1
        while not self._going.is_set():  # noqa: ASYNC110 - it is a thread's
            await trio.sleep(0.005)
        if self.status:
            return Refused()
        beat = effect.heartbeat
        encode_heartbeat(beat, SUPERBLOCK.volume_id, ADDRESS)
        self.blocks.append(beat)
        return Good()


class FakeArbiter:
    """One control session."""

    def __init__(self, control: Any) -> None:
        self.control = control
        self.lost: list[str] = []

    def lose(self, registration: object, why: BlockError) -> None:
        assert registration is self.control
        self.control = None
        self.lost.append(str(why))


@asynccontextmanager
async def running(pulse: Any, disk: Disk) -> AsyncIterator[Bench]:
    with listening_peer() as peer:
        bench = Bench(pulse, disk, peer)
        install(pulse, peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pulse.run, bench.told.append)
            try:
                yield bench
            finally:
                disk.let_go()
                nursery.cancel_scope.cancel()


class TestPythonPulse(PulseConformance):
    @asynccontextmanager
    async def bench(self) -> AsyncIterator[Bench]:
        disk = Disk()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            bench: Bench

            def send(beat: Heartbeat) -> None:
                data = encode_datagram(beat, CLUSTER_ID, secret)
                own.sendto(data, bench.peer.getsockname()[:2])

            secret = SECRET
            pulse = PythonPulse(PulseWiring(CLUSTER_ID, own.fileno(), SETTINGS, send, disk.write))

            def installed(new: bytes, _targets: object) -> None:
                nonlocal secret
                secret = new

            pulse.install = installed  # type: ignore[method-assign,assignment] # the network does it
            async with running(pulse, disk) as bench:
                yield bench


@dataclass
class NativeBench:
    """A native pulse on a session of its own."""

    bench: Bench
    disk: Disk
    arbiter: FakeArbiter
    device: IscsiDevice
    pulse: NativePulse


@asynccontextmanager
async def native_bench(*, with_session: bool = True) -> AsyncIterator[NativeBench]:
    disk = Disk()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own,
        ScriptedTarget(disk.answer) as target,
    ):
        own.bind(("127.0.0.1", 0))
        port = InitiatorPort("iqn.2026-11.test:pulse", 0x80 << 40)
        nexus, failure = await Nexus.open(
            portal=target.portal,
            target=target.iqn,
            initiator=port.name,
            isid=port.isid,
            lun=1,
            ping_interval_ms=0,
        )
        assert failure is None
        nexus.session.set_geometry(512, 1 << 20)
        device = IscsiDevice("iscsi://test", port, nexus)
        shown = device if with_session else SimpleNamespace(native_session=None)
        arbiter = FakeArbiter(SimpleNamespace(key=KEY, device=shown))
        wiring = PulseWiring(CLUSTER_ID, own.fileno(), SETTINGS, _never, disk.write)
        pulse = NativePulse(cast("Any", arbiter), SUPERBLOCK, wiring)
        try:
            async with running(pulse, disk) as bench:
                yield NativeBench(bench, disk, arbiter, device, pulse)
        finally:
            disk.let_go()
            await nexus.drop()


def _never(beat: Heartbeat) -> None:
    raise AssertionError(f"{beat} is sent from Python")


class TestNativePulse(PulseConformance):
    @asynccontextmanager
    async def bench(self) -> AsyncIterator[Bench]:
        async with native_bench() as it:
            yield it.bench


class TestNativePulseWithoutNativeSession(PulseConformance):
    """file:// and the like: datagrams from C, blocks from Python."""

    @asynccontextmanager
    async def bench(self) -> AsyncIterator[Bench]:
        async with native_bench(with_session=False) as it:
            yield it.bench
            assert it.pulse.lease_until_s == float("-inf")


# -- what is the native one's own ------------------------------------------------------------------
async def test_heartbeats_go_on_while_the_loop_computes() -> None:
    async with native_bench() as it:
        it.bench.beat(key=KEY)
        await it.bench.until(it.bench.confirmed)
        before, written = it.pulse.statistics().sent, len(it.disk.blocks)
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            pass
        assert it.pulse.statistics().sent >= before + 6
        assert len(it.disk.blocks) >= written + 6
        assert it.pulse.lease_until_s > boottime() + SETTINGS.lease_s - 0.3
        shown = it.bench.confirmed()[-1]
        await it.bench.until(lambda: it.bench.confirmed()[-1] > shown + 0.5)
        assert not it.disk.from_python


async def test_a_loop_that_hangs_falls_silent_and_comes_back() -> None:
    async with native_bench() as it:
        it.bench.beat(key=KEY)
        await it.bench.until(it.bench.confirmed)
        began = boottime()
        time.sleep(1.6)  # noqa: ASYNC251 - that is the point
        sent, written = it.pulse.statistics().sent, len(it.disk.blocks)
        assert it.pulse.lease_until_s <= began + 1.1 + SETTINGS.lease_s
        time.sleep(0.5)  # noqa: ASYNC251
        assert it.pulse.statistics().sent == sent
        assert len(it.disk.blocks) == written
        await it.bench.until(lambda: len(it.disk.blocks) > written)


async def test_a_unit_attention_is_for_python() -> None:
    async with native_bench() as it:
        it.bench.beat(key=KEY)
        await it.bench.until(it.bench.confirmed)
        it.disk.sense, it.disk.status = ATTENTION_2900, CHECK_CONDITION
        refused_at = boottime()
        await it.bench.until(lambda: it.disk.from_python)
        await it.bench.until(lambda: it.bench.confirmed()[-1] > refused_at)
        assert all(isinstance(each, HeartbeatWritten) for each in it.bench.told)
        with pytest.raises(UnitAttention) as told:
            await it.device.test_unit_ready()
        assert told.value.asc_ascq == 0x2900
        python = it.disk.from_python
        it.bench.beat(key=KEY)  # with the next tick C goes on
        count = it.pulse.statistics().written
        await it.bench.until(lambda: it.pulse.statistics().written > count + 2)
        assert it.disk.from_python == python
        assert it.disk.written() == sorted(set(it.disk.written()))


async def test_a_lost_session_is_told_to_the_arbiter_first() -> None:
    async with native_bench() as it:
        it.bench.beat(key=KEY)
        await it.bench.until(it.bench.confirmed)
        it.disk.hold()
        it.bench.beat(key=KEY)
        await trio.sleep(0.05)
        it.device.abort()
        await it.bench.until(lambda: not isinstance(it.bench.told[-1], HeartbeatWritten))
        assert len(it.arbiter.lost) == 1
        lease = it.pulse.lease_until_s
        it.disk.let_go()
        for _ in range(3):
            it.bench.beat()
            await it.bench.receive()
        assert it.pulse.lease_until_s == lease


async def test_another_control_session_is_not_written_on_unasked() -> None:
    """The member names a key; if the arbiter's session has another one by now, nothing is."""
    async with native_bench() as it:
        it.arbiter.control.key = KEY + 1
        for _ in range(3):
            it.bench.beat(key=KEY)
            await trio.sleep(0.1)
        assert not it.disk.blocks


async def test_every_heartbeat_of_a_member_in_a_hurry_is_sent_at_once() -> None:
    async with native_bench() as it:
        same = Beat(Heartbeat(SLOT, 5, 1, 1, 0))
        it.pulse.beat(same)
        await it.bench.receive()
        began = time.monotonic()
        for _ in range(10):
            it.pulse.beat(same)
            await it.bench.receive()
        assert time.monotonic() - began < 10 * SETTINGS.heartbeat_s / 2
