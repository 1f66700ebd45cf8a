"""What every `lockmgr.cluster.pulse.Pulse` does, whoever sends its heartbeats.

A test class inherits `PulseConformance` and says in `bench` which pulse, on which storage.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.datagram import DATAGRAM_BYTES, decode_heartbeat
from lockmgr.cluster.effects import Beat
from lockmgr.cluster.events import HeartbeatFailed, HeartbeatWritten
from lockmgr.cluster.peers import Address
from lockmgr.cluster.pulse import Pulse
from lockmgr.cluster.settings import Settings

CLUSTER_ID = bytes(range(16))
SECRET = bytes(range(100, 132))
SETTINGS = Settings(heartbeat_s=0.1, hears_s=0.5, judge_gap_s=0.4, answer_within_s=0.4)
LIMIT_S = 20.0


class Storage(Protocol):
    """Where the heartbeat block is, as a test wants it."""

    key: int
    """Of the control session."""

    def written(self) -> list[int]:
        """The sequence numbers of what has landed, in order."""
        ...

    def hold(self) -> None:
        """Answer nothing until `let_go`."""
        ...

    def let_go(self) -> None:
        """See `hold`."""
        ...

    def refuse(self) -> None:
        """From now on the session is not registered any more."""
        ...


@dataclass
class Bench:
    """One pulse, its storage, and a peer that listens."""

    pulse: Pulse
    storage: Storage
    peer: trio.socket.SocketType
    told: list[HeartbeatWritten | HeartbeatFailed] = field(default_factory=list)
    epoch: int = 1

    def beat(self, *, key: int = 0) -> None:
        """As a member does with a tick that brings something new."""
        self.epoch += 1
        flags = HeartbeatFlag.HAS_DIRECT_PATH
        self.pulse.beat(Beat(Heartbeat(2, 5, self.epoch, self.epoch, 0b110, flags), key))

    async def receive(self) -> Heartbeat:
        with trio.fail_after(LIMIT_S):
            data = await self.peer.recv(DATAGRAM_BYTES + 1)
        return decode_heartbeat(data, CLUSTER_ID, SECRET)

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of any kind
                await trio.sleep(0.005)

    def has_told(self, count: int) -> bool:
        """So many writes have ended."""
        return len(self.told) >= count

    def confirmed(self) -> list[float]:
        """When what was told of was sent."""
        return [each.sent_at for each in self.told if isinstance(each, HeartbeatWritten)]


@contextmanager
def listening_peer() -> Iterator[trio.socket.SocketType]:
    raw = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    raw.bind(("127.0.0.1", 0))
    with trio.socket.from_stdlib_socket(raw) as peer:
        yield peer


def install(pulse: Pulse, peer: trio.socket.SocketType) -> None:
    host, port = peer.getsockname()[:2]
    pulse.install(SECRET, (Address(host, port),))


class PulseConformance:
    """Inherit it, and give `bench`: a running pulse that was told secret and peer."""

    def bench(self) -> AbstractAsyncContextManager[Bench]:
        raise NotImplementedError

    async def test_every_beat_is_sent(self) -> None:
        async with self.bench() as bench:
            sequences = []
            for _ in range(5):
                bench.beat()
                while (beat := await bench.receive()).epoch != bench.epoch:
                    sequences.append(beat.sequence)
                sequences.append(beat.sequence)
                assert (beat.slot, beat.incarnation, beat.hears) == (2, 5, 0b110)
                assert bench.pulse.last is not None
                assert bench.pulse.last.epoch == bench.epoch
            assert sequences == sorted(set(sequences))
            assert not bench.storage.written()
            assert bench.pulse.statistics().sent >= 5

    async def test_writes_are_told_of_with_a_time_before_they_were_sent(self) -> None:
        async with self.bench() as bench:
            began = boottime()
            while len(bench.confirmed()) < 3:
                told = len(bench.told)
                bench.beat(key=bench.storage.key)
                await bench.until(partial(bench.has_told, told + 1))
            times = bench.confirmed()
            assert times == sorted(times)
            assert began <= times[0]
            assert times[-1] <= boottime()
            assert all(
                isinstance(each, HeartbeatWritten) and each.key == bench.storage.key
                for each in bench.told
            )
            sequences = bench.storage.written()
            assert len(sequences) >= 3
            assert sequences == sorted(set(sequences))
            assert bench.pulse.statistics().written >= 3

    async def test_a_time_is_not_that_of_the_answer(self) -> None:
        async with self.bench() as bench:
            bench.storage.hold()
            bench.beat(key=bench.storage.key)
            await trio.sleep(0.3)
            assert not bench.told
            answered = boottime()
            bench.storage.let_go()
            await bench.until(bench.confirmed)
            assert bench.confirmed()[0] < answered - 0.25

    async def test_one_write_at_a_time(self) -> None:
        async with self.bench() as bench:
            bench.storage.hold()
            for _ in range(5):
                bench.beat(key=bench.storage.key)
                await bench.receive()  # datagrams do not wait for it
                await trio.sleep(0.02)
            bench.storage.let_go()
            await bench.until(bench.confirmed)
            assert len(bench.storage.written()) <= 3, "they had queued up"

    async def test_nothing_is_written_without_a_key(self) -> None:
        async with self.bench() as bench:
            bench.beat(key=bench.storage.key)
            await bench.until(bench.confirmed)
            bench.beat(key=0)
            await trio.sleep(0.1)  # what was on its way
            count = len(bench.storage.written())
            for _ in range(6):
                bench.beat(key=0)
                await trio.sleep(0.05)
            assert len(bench.storage.written()) == count

    async def test_another_key_ends_writing_at_once(self) -> None:
        async with self.bench() as bench:
            bench.beat(key=bench.storage.key)
            await bench.until(bench.confirmed)
            bench.pulse.follow(0)
            await trio.sleep(0.1)  # what was on its way
            count = len(bench.storage.written())
            await trio.sleep(0.4)
            assert len(bench.storage.written()) == count

    async def test_a_refusal_is_told(self) -> None:
        async with self.bench() as bench:
            bench.beat(key=bench.storage.key)
            await bench.until(bench.confirmed)
            bench.storage.refuse()
            with trio.fail_after(LIMIT_S):
                while HeartbeatFailed(bench.storage.key) not in bench.told:
                    bench.beat(key=bench.storage.key)
                    await trio.sleep(0.05)
            lease, count = bench.pulse.lease_until_s, len(bench.storage.written())
            for _ in range(4):
                bench.beat()
                await trio.sleep(0.05)
            assert bench.pulse.lease_until_s == lease, "it renews what nobody has confirmed"
            assert len(bench.storage.written()) == count
            assert bench.pulse.statistics().failed >= 1

    async def test_lease_is_not_longer_than_it_may_be(self) -> None:
        async with self.bench() as bench:
            for _ in range(5):
                bench.beat(key=bench.storage.key)
                await bench.until(bench.confirmed)
                until = bench.pulse.lease_until_s
                assert until == -math.inf or until <= boottime() + SETTINGS.lease_s
                await trio.sleep(0.05)

    async def test_stop_is_for_good(self) -> None:
        async with self.bench() as bench:
            bench.beat(key=bench.storage.key)
            await bench.until(bench.confirmed)
            bench.storage.hold()
            bench.beat(key=bench.storage.key)
            bench.pulse.stop()
            bench.storage.let_go()
            await trio.sleep(0.2)
            _drained(bench.peer)
            count = len(bench.storage.written())
            for _ in range(4):
                bench.beat(key=bench.storage.key)
                await trio.sleep(0.1)
            assert not _drained(bench.peer), "it shows life"
            assert len(bench.storage.written()) == count
            assert bench.pulse.lease_until_s == -math.inf

    async def test_another_secret(self) -> None:
        async with self.bench() as bench:
            bench.beat()
            await bench.receive()
            host, port = bench.peer.getsockname()[:2]
            bench.pulse.install(bytes(32), (Address(host, port),))
            with trio.fail_after(LIMIT_S):
                while True:
                    bench.beat()
                    data = await bench.peer.recv(DATAGRAM_BYTES + 1)
                    try:
                        decode_heartbeat(data, CLUSTER_ID, bytes(32))
                        break
                    except WireError:
                        decode_heartbeat(data, CLUSTER_ID, SECRET)  # it was on its way

    async def test_ticks_are_counted(self) -> None:
        async with self.bench() as bench:
            for late_s in (0.1, 0.3, 0.2):
                bench.pulse.ticked(late_s)
            shown = bench.pulse.statistics()
            assert (shown.ticks, shown.late_s, shown.late_most_s) == (3, 0.2, 0.3)


def _drained(peer: trio.socket.SocketType) -> int:
    """How many datagrams waited there."""
    count = 0
    with socket.socket(fileno=os.dup(peer.fileno())) as raw:
        raw.setblocking(False)
        while True:
            try:
                raw.recv(DATAGRAM_BYTES + 1)
            except BlockingIOError:
                return count
            count += 1
