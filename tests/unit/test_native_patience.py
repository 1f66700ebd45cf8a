"""When a session is given up, and when not: slow is not lost, silent is."""

from __future__ import annotations

import os
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from redirector.native._native import Completion, Session
from tests.scripted_target import (
    LOGIN_RESPONSE,
    SOLICITED,
    Request,
    ScriptedTarget,
    Talk,
)

LARGE = 12 << 20
"""More than the sockets take."""
WRITE_16 = 0x8A


@contextmanager
def session_of(
    target: ScriptedTarget,
    *,
    ping_interval_ms: int = 50,
    ping_timeout_ms: int = 200,
    command_timeout_ms: int = 20_000,
) -> Iterator[Session[object]]:
    session: Session[object] = Session(
        "login",
        portal=target.portal,
        target=target.iqn,
        initiator="iqn.2026-11.test:y",
        isid=0x80_0000_0000_01,
        lun=1,
        ping_interval_ms=ping_interval_ms,
        ping_timeout_ms=ping_timeout_ms,
        command_timeout_ms=command_timeout_ms,
    )
    try:
        assert reap(session) == [("login", None)], session.text
        session.set_geometry(512, LARGE)
        yield session
    finally:
        session.close()


def reap(session: Session[object], count: int = 1) -> list[tuple[object, Completion | None]]:
    ended: list[tuple[object, Completion | None]] = []
    while len(ended) < count:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended += session.reap()
    return ended


def test_a_slow_line_is_no_silence() -> None:
    """The ping waits behind 12 MiB that take five ping timeouts to leave; no answer comes."""
    received = 0
    write: list[Request] = []

    def answer(talk: Talk, request: Request) -> None:
        nonlocal received
        if request.operation == WRITE_16:
            write.append(request)
            talk.r2t(request, 0, LARGE)
            return
        received += len(request.data)
        if received % (1 << 18) == 0:
            time.sleep(0.02)
        if received == LARGE:
            talk.respond(write[0])

    with (
        ScriptedTarget(answer, keys=SOLICITED, receive_buffer_bytes=65536) as target,
        session_of(target) as session,
    ):
        session.write(0, bytes(LARGE), False, "write")
        assert reap(session) == [("write", None)], session.text
        assert received == LARGE


def test_a_target_that_stops_reading_is_lost() -> None:
    stop = threading.Event()

    def answer(talk: Talk, request: Request) -> None:
        talk.r2t(request, 0, LARGE)
        stop.wait(20)

    with (
        ScriptedTarget(answer, keys=SOLICITED, receive_buffer_bytes=4096) as target,
        session_of(target) as session,
    ):
        started = time.monotonic()
        session.write(0, bytes(LARGE), False, "write")
        ((_, completion),) = reap(session)
        assert completion is not None
        assert completion.unknown
        assert "silent" in session.text
        assert time.monotonic() - started < 5
        stop.set()


def test_the_last_of_many_commands_may_wait_longer_than_the_timeout() -> None:
    """Each takes 40 ms, one after the other; the timeout of 300 ms is of the oldest."""
    commands = 25

    def answer(talk: Talk, request: Request) -> None:
        time.sleep(0.04)
        talk.respond(request)

    with ScriptedTarget(answer) as target, session_of(target, command_timeout_ms=300) as session:
        started = time.monotonic()
        for number in range(commands):
            session.scsi(bytes(6), number)
        assert reap(session, commands) == [(number, None) for number in range(commands)]
        assert time.monotonic() - started > 0.9


def test_a_command_that_is_forgotten_among_others_loses_the_session() -> None:
    def answer(talk: Talk, request: Request) -> None:
        if seen:
            talk.respond(request)
        seen.append(request)

    seen: list[Request] = []
    with ScriptedTarget(answer) as target, session_of(target, command_timeout_ms=300) as session:
        session.scsi(bytes(6), "forgotten")
        while not session.lost:
            session.scsi(bytes(6), "other")
            select.select([session.fileno()], [], [], 0.02)
            session.reap()
        assert session.text == "a command had no answer in time"


def test_a_timeout_of_ones_own_counts_from_the_issue() -> None:
    with (
        ScriptedTarget(lambda *_: None) as target,
        session_of(target, command_timeout_ms=10_000) as session,
    ):
        session.scsi(bytes(6), "patient")
        session.scsi(bytes(6), "hasty", timeout_ms=100)
        started = time.monotonic()
        assert len(reap(session, 2)) == 2
        assert 0.09 < time.monotonic() - started < 5


def test_a_dropped_connection_sends_nothing_more() -> None:
    """Not even what the kernel holds, and though a forked child still has the descriptor."""
    dropped = threading.Event()
    received = bytearray()
    ended = threading.Event()

    def answer(talk: Talk, request: Request) -> None:
        talk.r2t(request, 0, LARGE)
        assert dropped.wait(10)
        try:
            while data := talk.connection.recv(1 << 20):
                received.extend(data)
        finally:
            ended.set()

    with (
        ScriptedTarget(answer, keys=SOLICITED, receive_buffer_bytes=4096) as target,
        session_of(target, ping_interval_ms=0) as session,
    ):
        session.write(0, bytes(LARGE), False, "write")
        assert not select.select([session.fileno()], [], [], 0.1)[0]
        child = os.fork()
        if not child:
            signal.pause()
        try:
            session.close()
            dropped.set()
            assert ended.wait(5)
            assert len(received) < LARGE // 4
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_forked_child_can_let_go_of_a_session() -> None:
    """It has no thread to wait for, and must not disturb the session of its parent."""
    with ScriptedTarget(lambda talk, r: talk.respond(r)) as target, session_of(target) as session:
        session.scsi(bytes(6), "ended before the fork")
        assert select.select([session.fileno()], [], [], 10)[0]
        child = os.fork()
        if not child:
            session.close()
            os._exit(7)
        deadline = time.monotonic() + 10
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 7
        assert reap(session) == [("ended before the fork", None)]
        session.scsi(bytes(6), "still here")
        assert reap(session) == [("still here", None)]


@pytest.mark.parametrize("name", [b"storage.test:3260,1", b"[storage.test]:3260"])
def test_a_redirection_to_a_name_is_not_looked_up(name: bytes) -> None:
    """That would block the session's thread, and whoever closes it, for seconds."""

    class Redirector(ScriptedTarget):
        def _talk(self, talk: Talk) -> None:
            request = talk.receive()
            assert request is not None
            tail = struct.pack(">BB10x", 1, 1)
            data = b"TargetAddress=" + name + b"\0"
            talk.send(LOGIN_RESPONSE, 0, request.tag, data, tail=tail, target_tag=0)
            talk.receive()

    with Redirector(lambda *_: None) as target:
        session: Session[str] = Session(
            "login",
            portal=target.portal,
            target=target.iqn,
            initiator="iqn.2026-11.test:y",
            isid=0x80_0000_0000_01,
            lun=1,
        )
        assert select.select([session.fileno()], [], [], 10)[0]
        ((_, completion),) = session.reap()
        assert completion is not None
        assert "storage.test" in session.text
        session.close()
