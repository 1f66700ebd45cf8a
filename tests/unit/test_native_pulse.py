"""The native pulse: what it sends and writes, and when it does not.

Against the Python decoders of datagram and block, and a target that answers as it is told to.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from csvfs.format import decode_heartbeat as decode_block
from csvfs.format import encode_heartbeat as encode_block
from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.datagram import decode_heartbeat
from redirector.native._native import Pulse, Session
from tests.scripted_target import (
    SCSI_COMMAND,
    Request,
    ScriptedTarget,
    Talk,
)

CLUSTER_ID = bytes(range(16))
SECRET = bytes(range(100, 132))
VOLUME_ID = bytes(range(50, 66))
ADDRESS = 9 * 16
KEY = 0xC5F5_0001
INTERVAL_S = 0.05
ALIVE_S = 0.3
LEASE_S = 4.0
BEAT = Heartbeat(7, 3, 0, 99, 0b1010_0001, HeartbeatFlag.HAS_DIRECT_PATH)
LIMIT_S = 10.0


class Rig:
    """A pulse, and a peer that listens."""

    def __init__(self) -> None:
        self.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.peer.bind(("127.0.0.1", 0))
        self.peer.settimeout(LIMIT_S)
        self.own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.own.bind(("127.0.0.1", 0))
        self.pulse = Pulse(
            self.own.fileno(),
            CLUSTER_ID,
            interval_ms=round(INTERVAL_S * 1000),
            alive_ms=round(ALIVE_S * 1000),
            lease_ms=round(LEASE_S * 1000),
        )
        self.address()

    def address(self, secret: bytes = SECRET) -> None:
        self.pulse.address(secret, [self.peer.getsockname()[:2]])

    def show(self, beat: Heartbeat = BEAT, *, now: bool = False) -> None:
        self.pulse.show(
            slot=beat.slot,
            incarnation=beat.incarnation,
            flags=beat.flags,
            epoch=beat.epoch,
            hears=beat.hears,
            block=bytes(encode_block(beat, VOLUME_ID, ADDRESS)),
            now=now,
        )

    def receive(self, secret: bytes = SECRET) -> Heartbeat:
        return decode_heartbeat(self.peer.recv(100), CLUSTER_ID, secret)

    def hears_nothing(self, for_s: float) -> bool:
        """Once what was on its way is read."""
        self.peer.setblocking(False)
        try:
            while True:
                self.peer.recv(100)
        except BlockingIOError:
            pass
        self.peer.settimeout(for_s)
        try:
            self.peer.recv(100)
        except TimeoutError:
            return True
        finally:
            self.peer.settimeout(LIMIT_S)
        return False

    def close(self) -> None:
        del self.pulse
        self.peer.close()
        self.own.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@contextmanager
def stamped(pulse: Pulse) -> Iterator[None]:
    """The owner lives."""
    over = threading.Event()

    def stamp() -> None:
        while not over.wait(0.02):
            pulse.stamp()

    thread = threading.Thread(target=stamp)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_readable(pulse: Pulse) -> None:

    assert select.select([pulse.fileno()], [], [], LIMIT_S)[0], "no news"


# -- datagrams -----------------------------------------------------------------------------------
def test_datagrams_are_those_of_the_protocol(rig: Rig) -> None:
    rig.show()
    with stamped(rig.pulse):
        beats = [rig.receive() for _ in range(5)]
    assert [beat.sequence for beat in beats] == [1, 2, 3, 4, 5]
    for beat in beats:
        shown = (beat.slot, beat.incarnation, beat.epoch, beat.hears, beat.flags)
        assert shown == (BEAT.slot, BEAT.incarnation, BEAT.epoch, BEAT.hears, BEAT.flags)


def test_the_greatest_numbers_fit(rig: Rig) -> None:
    flags = HeartbeatFlag.LEAVING | HeartbeatFlag.HAS_DIRECT_PATH
    beat = Heartbeat(63, (1 << 24) - 1, 1, (1 << 63) - 1, (1 << 64) - 1, flags)
    rig.show(beat)
    assert rig.receive() == beat


def test_what_is_new_is_shown_at_once(rig: Rig) -> None:
    rig.show()
    rig.receive()
    began = time.monotonic()
    for epoch in range(100, 120):
        rig.show(Heartbeat(7, 3, 0, epoch, 1), now=True)
        assert rig.receive().epoch == epoch
    assert time.monotonic() - began < 20 * INTERVAL_S


def test_another_secret(rig: Rig) -> None:
    rig.show()
    rig.receive()
    other = bytes(32)
    rig.address(other)
    with stamped(rig.pulse):
        while True:
            data = rig.peer.recv(100)
            try:
                decode_heartbeat(data, CLUSTER_ID, other)
            except ValueError:
                decode_heartbeat(data, CLUSTER_ID, SECRET)  # it was on its way
            else:
                break


def test_nothing_before_there_is_something_to_show(rig: Rig) -> None:
    with stamped(rig.pulse):
        assert rig.hears_nothing(3 * INTERVAL_S)
        assert rig.pulse.statistics()["sent"] == 0


def test_silent_while_nobody_stamps_and_back_at_once(rig: Rig) -> None:
    rig.show()
    with stamped(rig.pulse):
        rig.receive()
    time.sleep(ALIVE_S + INTERVAL_S)
    assert rig.hears_nothing(4 * INTERVAL_S)
    assert rig.pulse.statistics()["silences"] == 1
    last = rig.pulse.statistics()["sent"]
    rig.pulse.stamp()
    assert rig.receive().sequence == last + 1


def test_to_show_is_not_to_live(rig: Rig) -> None:
    """Whoever says something new, but does not come round, is silent all the same."""
    time.sleep(ALIVE_S + 0.01)
    rig.show()
    rig.show(now=True)
    assert rig.hears_nothing(3 * INTERVAL_S)


def test_stop_is_for_good(rig: Rig) -> None:
    rig.show()
    with stamped(rig.pulse):
        rig.receive()
        rig.pulse.stop()
        assert rig.hears_nothing(4 * INTERVAL_S)
        rig.show(now=True)
        assert rig.hears_nothing(4 * INTERVAL_S)


def test_a_peer_that_cannot_be_reached_is_in_nobodys_way(rig: Rig) -> None:
    closed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    closed.bind(("127.0.0.1", 0))
    nowhere = closed.getsockname()[:2]
    closed.close()
    rig.pulse.address(SECRET, [("::1", 9), nowhere, rig.peer.getsockname()[:2]])
    rig.show()
    with stamped(rig.pulse):
        for _ in range(5):
            rig.receive()
    assert rig.pulse.statistics()["not_sent"] >= 5


def test_what_cannot_be_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="secret"):
        rig.pulse.address(b"short", [])
    with pytest.raises(ValueError, match="numeric"):
        rig.pulse.address(SECRET, [("localhost", 1)])
    with pytest.raises(ValueError, match="block"):
        rig.pulse.show(slot=0, incarnation=1, flags=0, epoch=0, hears=0, block=b"", now=True)
    with pytest.raises(OverflowError):
        rig.show(Heartbeat(256, 1, 0, 0, 0))
    with pytest.raises(ValueError, match="cluster id"):
        Pulse(rig.own.fileno(), b"", interval_ms=1, alive_ms=1, lease_ms=1)
    with pytest.raises(OSError, match="descriptor"):
        Pulse(-1, CLUSTER_ID, interval_ms=1, alive_ms=1, lease_ms=1)


def test_thread_and_descriptors_go_with_it() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = descriptors(), threads()
    for _ in range(50):
        rig = Rig()
        rig.show()
        rig.receive()
        rig.close()
    assert (descriptors(), threads()) == before


def test_a_forked_child_may_drop_it(rig: Rig) -> None:
    rig.show()
    rig.receive()
    child = os.fork()
    if not child:
        try:
            rig.pulse.detach()
            rig.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with stamped(rig.pulse):
        rig.receive()


# -- writes --------------------------------------------------------------------------------------
WRITE_16 = 0x8A
CHECK_CONDITION, CONFLICT = 0x02, 0x18
UNIT_ATTENTION_2A03 = bytes([0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x2A, 3, 0, 0, 0, 0])


class Disk:
    """What the target does with writes."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, bytes]] = []
        self.status = 0
        self.sense = b""
        self.answers = threading.Event()
        self.answers.set()

    def answer(self, talk: Talk, request: Request) -> None:
        if request.opcode != SCSI_COMMAND:
            return
        assert request.head[32] == WRITE_16
        lba = int.from_bytes(request.head[34:42], "big")
        self.answers.wait(LIMIT_S)
        if not self.status:
            self.blocks.append((lba, request.data))
        talk.respond(request, self.status, self.sense)

    def beats(self) -> list[Heartbeat]:
        return [decode_block(data, ADDRESS, VOLUME_ID, BEAT.slot) for _, data in self.blocks]


@contextmanager
def session_to(target: ScriptedTarget) -> Iterator[Session[str]]:
    session = Session(
        "login",
        portal=target.portal,
        target="iqn.2026-11.test:pulse",
        initiator="iqn.2026-11.test:host",
        isid=0x80 << 40,
        lun=1,
        ping_interval_ms=0,
    )
    deadline = time.monotonic() + LIMIT_S
    while not (ended := session.reap()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert ended == [("login", None)], session.text
    session.set_geometry(512, 1 << 20)
    try:
        yield session
    finally:
        session.close()


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def session(disk: Disk) -> Iterator[Session[str]]:
    with ScriptedTarget(disk.answer) as target, session_to(target) as session:
        yield session
        disk.answers.set()


def attach(rig: Rig, session: Session[str], key: int = KEY) -> bool:
    return rig.pulse.attach(session, key, ADDRESS * 4096)


def test_blocks_are_those_of_the_format(rig: Rig, disk: Disk, session: Session[str]) -> None:
    rig.show()
    began = boottime()
    attach(rig, session)
    with stamped(rig.pulse):
        while len(disk.blocks) < 4:
            wait_readable(rig.pulse)
            key, sent_at, failure = rig.pulse.reap()
            assert (key, failure) == (KEY, None)
            assert sent_at is not None
            assert began <= sent_at <= boottime()
            assert rig.pulse.lease_until_s == pytest.approx(sent_at + LEASE_S, abs=2 * INTERVAL_S)
    assert {lba for lba, _ in disk.blocks} == {ADDRESS * 8}
    beats = disk.beats()
    assert [beat.sequence for beat in beats] == sorted({beat.sequence for beat in beats})
    assert {beat.epoch for beat in beats} == {BEAT.epoch}
    assert {beat.hears for beat in beats} == {BEAT.hears}
    assert rig.pulse.statistics()["written"] >= 4


def test_lease_counts_from_sending(rig: Rig, disk: Disk, session: Session[str]) -> None:
    disk.answers.clear()
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        time.sleep(0.3)
        assert rig.pulse.lease_until_s == float("-inf")
        assert rig.pulse.writing
        answered = boottime()
        disk.answers.set()
        wait_readable(rig.pulse)
    _, sent_at, _ = rig.pulse.reap()
    assert sent_at is not None
    assert sent_at < answered - 0.2
    # (A later write may have been confirmed meanwhile; the first is what was reported first.)
    assert rig.pulse.lease_until_s >= sent_at + LEASE_S - 1e-6


def test_one_write_at_a_time(rig: Rig, disk: Disk, session: Session[str]) -> None:
    disk.answers.clear()
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        for _ in range(8):
            rig.receive()  # they go on
        assert session.statistics()["peak_in_flight"] == 1
        assert session.statistics()["in_flight"] == 1
        disk.answers.set()
        wait_readable(rig.pulse)


def test_silence_is_no_renewal(rig: Rig, disk: Disk, session: Session[str]) -> None:
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        wait_readable(rig.pulse)
    stamped_at = boottime()
    time.sleep(ALIVE_S + 4 * INTERVAL_S)
    assert rig.pulse.lease_until_s <= stamped_at + ALIVE_S + LEASE_S
    count = len(disk.blocks)
    time.sleep(4 * INTERVAL_S)
    assert len(disk.blocks) == count
    rig.pulse.stamp()
    rig.pulse.reap()
    wait_readable(rig.pulse)


@pytest.mark.parametrize(
    ("status", "sense"), [(CONFLICT, b""), (CHECK_CONDITION, UNIT_ATTENTION_2A03)]
)
def test_a_refusal_ends_writing(
    rig: Rig, disk: Disk, session: Session[str], status: int, sense: bytes
) -> None:
    disk.status, disk.sense = status, sense
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        wait_readable(rig.pulse)
        key, sent_at, failure = rig.pulse.reap()
        assert (key, sent_at) == (KEY, None)
        assert failure is not None
        assert not failure.unknown
        assert failure.status == status
        assert failure.sense == sense
        commands = session.statistics()["commands"]
        for _ in range(4):
            rig.receive()
        assert session.statistics()["commands"] == commands, "it writes on"
        assert rig.pulse.lease_until_s == float("-inf")
        disk.status = 0
        attach(rig, session)
        wait_readable(rig.pulse)
        assert rig.pulse.reap()[2] is None
        assert disk.blocks


def test_a_lost_session_ends_writing(rig: Rig, disk: Disk, session: Session[str]) -> None:
    disk.answers.clear()
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        rig.receive()
        session.abort()
        wait_readable(rig.pulse)
        key, sent_at, failure = rig.pulse.reap()
        assert (key, sent_at) == (KEY, None)
        assert failure is not None
        assert failure.unknown
        assert not attach(rig, session)
        for _ in range(3):
            rig.receive()  # datagrams go on
    assert rig.pulse.lease_until_s == float("-inf")


def test_what_comes_after_it_was_detached_counts_nothing(
    rig: Rig, disk: Disk, session: Session[str]
) -> None:
    disk.answers.clear()
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        for _ in range(2):
            rig.receive()
        rig.pulse.detach()
        disk.answers.set()
        while rig.pulse.writing:
            time.sleep(0.002)
    assert disk.blocks, "it has landed"
    assert rig.pulse.lease_until_s == float("-inf")
    assert rig.pulse.reap() == (0, None, None)


def test_nothing_renews_after_stop(rig: Rig, disk: Disk, session: Session[str]) -> None:
    rig.show()
    attach(rig, session)
    with stamped(rig.pulse):
        wait_readable(rig.pulse)
        rig.pulse.reap()
        disk.answers.clear()
        while not rig.pulse.writing:
            time.sleep(0.002)
        rig.pulse.stop()
        assert rig.pulse.lease_until_s == float("-inf")
        disk.answers.set()
        while rig.pulse.writing:
            time.sleep(0.002)
    assert rig.pulse.lease_until_s == float("-inf")


def test_another_session_waits_for_the_write_on_the_one_before(rig: Rig, disk: Disk) -> None:
    other = Disk()
    disk.answers.clear()
    rig.show()
    with (
        ScriptedTarget(disk.answer) as first,
        ScriptedTarget(other.answer) as second,
        session_to(second) as next_session,
        stamped(rig.pulse),
    ):
        with session_to(first) as session:
            attach(rig, session)
            while not rig.pulse.writing:
                time.sleep(0.002)
            attach(rig, next_session, KEY + 1)
            for _ in range(3):
                rig.receive()
            assert not other.blocks
            disk.answers.set()
        while (news := rig.pulse.reap())[1] is None:
            wait_readable(rig.pulse)
        assert news[0] == KEY + 1
        assert other.blocks


def test_sessions_and_pulses_may_go_in_any_order() -> None:
    for number in range(12):
        with ScriptedTarget(Disk().answer) as target:
            rig = Rig()
            rig.show()
            with session_to(target) as session:
                attach(rig, session)
                if number % 2:
                    rig.receive()
                if number % 3 == 0:
                    rig.close()
            if number % 3:
                rig.close()
