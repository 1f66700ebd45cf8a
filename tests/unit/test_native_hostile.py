"""Targets that answer wrongly: no buffer is touched out of turn, nothing untrue is believed.

Two answers are missing here because libiscsi 1.19 does not survive them: Data-In and R2T that carry
the tag of a ping or of a task management request.
"""

from __future__ import annotations

import gc
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from redirector.native._native import Completion, Session
from tests.scripted_target import (
    DATA_IN,
    DATA_OUT,
    FINAL,
    LOGIN_RESPONSE,
    NOP_OUT,
    SOLICITED,
    TASK_RESPONSE,
    UNSOLICITED,
    Answer,
    Request,
    ScriptedTarget,
    Talk,
)

BYTES = 4096
LARGE = 12 << 20
"""More than the sockets take."""
UNDERFLOW, OVERFLOW = 0x82, 0x84
STATUS = FINAL | 1
DATA = bytes(range(256)) * (BYTES // 256)
BEFORE = b"\xa5" * BYTES


@contextmanager
def session_of(target: ScriptedTarget, max_transfer_bytes: int = 1 << 20) -> Iterator[Session[str]]:
    session: Session[str] = Session(
        "login",
        portal=target.portal,
        target=target.iqn,
        initiator="iqn.2026-11.test:y",
        isid=0x80_0000_0000_01,
        lun=1,
        ping_interval_ms=0,
    )
    try:
        assert reap(session) == {"login": None}, session.text
        session.set_geometry(512, max_transfer_bytes)
        yield session
    finally:
        session.close()


def reap(session: Session[str], count: int = 1) -> dict[str, Completion | None]:
    ended: dict[str, Completion | None] = {}
    while len(ended) < count:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended |= dict(session.reap())
    return ended


def read(answer: Answer) -> tuple[Completion | None, bytearray, str]:
    """Read 4 KiB in the middle of a larger buffer; the answer, the buffer, why it was lost."""
    buffer = bytearray(BEFORE * 3)
    with ScriptedTarget(answer) as target, session_of(target) as session:
        session.read(0, memoryview(buffer)[BYTES : 2 * BYTES], "read")
        completion = reap(session)["read"]
        text = session.text
    assert buffer[:BYTES] == buffer[2 * BYTES :] == BEFORE
    return completion, buffer[BYTES : 2 * BYTES], text


def pdu_with_length(opcode: int, length: bytes, request: Request) -> bytes:
    return bytes([opcode, FINAL, 0, 0]) + length + bytes(8) + request.head[16:20] + bytes(28)


def larger_blocks(talk: Talk, request: Request) -> None:
    talk.data_in(request, DATA)
    talk.respond(request, flags=OVERFLOW, residual_bytes=7 * BYTES)


# -- answers that end the session ------------------------------------------------------------------
HOSTILE: dict[str, Callable[[Talk, Request], object]] = {
    "data beyond the buffer": lambda t, r: t.data_in(r, DATA, offset_bytes=BYTES),
    "data far beyond the buffer": lambda t, r: t.data_in(r, DATA, offset_bytes=0xFFFFFFFF),
    "data over the end of the buffer": lambda t, r: t.data_in(r, DATA, offset_bytes=512),
    "more data than asked for": lambda t, r: t.data_in(r, DATA * 2, flags=STATUS),
    "GOOD without data": lambda t, r: t.respond(r),
    "GOOD with empty data": lambda t, r: t.data_in(r, b"", flags=STATUS),
    "GOOD after half of the data": lambda t, r: t.data_in(r, DATA[: BYTES // 2], flags=STATUS),
    "larger blocks": larger_blocks,
    "R2T for a read": lambda t, r: t.r2t(r, 0, BYTES),
    "reject": lambda t, r: t.reject(r),
    "reject, log out": lambda t, r: t.reject(r, 12),
    "please log out": lambda t, _: t.async_message(1),
    "please negotiate": lambda t, _: t.async_message(4),
    "an event of the vendor": lambda t, _: t.async_message(255),
    "a status that is none": lambda t, r: t.respond(r, 0x14),
    "a response that is not final": lambda t, r: t.respond(r, flags=0),
    "another kind of response": lambda t, r: t.send(TASK_RESPONSE, FINAL, r.tag),
    "a login response": lambda t, r: t.send(LOGIN_RESPONSE, 0x87, r.tag, b"a=b\0"),
    "a long segment": lambda t, r: t.raw(pdu_with_length(DATA_IN, b"\0\xff\xff\xff", r)),
    "an additional header": lambda t, r: t.raw(pdu_with_length(DATA_IN, b"\1\0\0\0", r)),
    "0xFF": lambda t, _: t.raw(b"\xff" * 4096),
    "HTTP": lambda t, _: t.raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 10),
    "the end": lambda t, _: t.connection.shutdown(2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_answer_loses_the_session(name: str) -> None:
    completion, _, text = read(HOSTILE[name])
    assert completion is not None
    assert completion.unknown
    assert text


# -- answers that it lives with --------------------------------------------------------------------
def test_what_is_not_for_us_is_ignored() -> None:
    def answer(talk: Talk, request: Request) -> None:
        if request.opcode == NOP_OUT:
            return
        talk.data_in(request, b"x" * BYTES, tag=request.tag + 77)
        talk.r2t(request, 0, BYTES, tag=request.tag + 78)
        talk.nop_in(target_tag=5)
        talk.nop_in()
        talk.async_message(0)
        talk.async_message(2)
        talk.data_in(request, DATA[:512])
        talk.data_in(request, DATA[512:], offset_bytes=512, flags=STATUS)

    completion, buffer, text = read(answer)
    assert completion is None, text
    assert buffer == DATA


@pytest.mark.parametrize(("told", "residual"), [(3584, 3584), (0xFFFFFFFF, BYTES), (BYTES, BYTES)])
def test_a_short_read_is_no_success(told: int, residual: int) -> None:
    def answer(talk: Talk, request: Request) -> None:
        talk.data_in(request, DATA[:512])
        talk.respond(request, flags=UNDERFLOW, residual_bytes=told)

    completion, _, _ = read(answer)
    assert completion is not None
    assert (completion.unknown, completion.residual) == (False, residual)


def test_short_parts_of_a_large_read_do_not_add_up_to_nothing() -> None:
    def answer(talk: Talk, request: Request) -> None:
        talk.respond(request, flags=UNDERFLOW, residual_bytes=0x80000000)

    with ScriptedTarget(answer) as target, session_of(target, 2048) as session:
        session.read(0, bytearray(BYTES), "read")
        completion = reap(session)["read"]
    assert completion is not None
    assert completion.residual == BYTES


@pytest.mark.parametrize("sense", [b"", b"\x72", b"\x70\0\3", bytes([0x72, 3, 0, 0, 0, 0, 0, 255])])
def test_a_refusal_with_little_sense(sense: bytes) -> None:
    completion, _, _ = read(lambda talk, request: talk.respond(request, 2, sense))
    assert completion is not None
    assert (completion.unknown, completion.status, completion.sense) == (False, 2, sense)


# -- writes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("offset", "length"), [(BYTES, 512), (0, 2 * BYTES), (0xFFFFFE00, 512)])
def test_data_beyond_a_write_is_not_sent(offset: int, length: int) -> None:
    sent = []

    def answer(talk: Talk, request: Request) -> None:
        if request.opcode == DATA_OUT:
            sent.append(request.data)
        else:
            talk.r2t(request, offset, length)

    with ScriptedTarget(answer, keys=SOLICITED) as target, session_of(target) as session:
        session.write(0, DATA, False, "write")
        completion = reap(session)["write"]
        assert completion is not None
        assert completion.unknown
    assert not sent


def test_a_rejected_write_comes_back_when_nothing_of_it_can_be_sent() -> None:
    """R2T and Reject arrive together, while libiscsi still has the data to send."""

    def answer(talk: Talk, request: Request) -> None:
        if request.opcode != DATA_OUT:
            talk.r2t(request, 0, LARGE)
            talk.reject(request)

    data = bytearray(LARGE)
    with ScriptedTarget(answer, keys=SOLICITED) as target, session_of(target, LARGE) as session:
        session.write(0, data, False, "write")
        completion = reap(session)["write"]
        assert completion is not None
        assert completion.unknown
        data.extend(b"x")
        assert session.text.startswith("Request was rejected")


def test_good_before_the_data_was_sent() -> None:
    """The buffer is the caller's again: what the target still asked for cannot be sent any more."""
    answered = threading.Event()

    def answer(talk: Talk, request: Request) -> None:
        if request.opcode != DATA_OUT:
            talk.r2t(request, 0, LARGE)
            talk.respond(request)
            assert answered.wait(10)

    data = bytearray(LARGE)
    with (
        ScriptedTarget(answer, keys=SOLICITED, receive_buffer_bytes=4096) as target,
        session_of(target, LARGE) as session,
    ):
        session.write(0, data, False, "write")
        assert reap(session) == {"write": None}
        data.clear()
        answered.set()
        while not session.lost:
            assert select.select([session.fileno()], [], [], 10)[0]
            assert session.reap() == []


# -- the connection closes at every byte -----------------------------------------------------------
def test_an_answer_that_ends_at_any_byte() -> None:
    whole = 3 * 48 + 1024

    def answer(talk: Talk, request: Request) -> None:
        talk.bytes_left = left
        talk.data_in(request, DATA[:512])
        talk.data_in(request, DATA[512:1024], offset_bytes=512)
        talk.respond(request)

    for left in (*range(100), *range(48 + 512, 48 + 512 + 52), whole - 1, whole):
        buffer = bytearray(1024)
        with ScriptedTarget(answer) as target, session_of(target) as session:
            session.read(0, buffer, "read")
            completion = reap(session)["read"]
        assert (completion is None) == (left == whole)
        buffer.extend(b"x")


def native_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("csvfs-iscsi")


def test_a_login_that_ends_at_any_byte() -> None:
    """No descriptor and no thread is left, whatever the target said before it closed."""
    gc.collect()  # what others left must not go in between
    before = len(os.listdir("/proc/self/fd")), native_threads()
    whole = len(b"AuthMethod=None\0") + 48
    for left in range(0, whole + 48 + len(UNSOLICITED), 5):
        with ScriptedTarget(lambda *_: None, cut_login_at=left) as target:
            session: Session[str] = Session(
                "login",
                portal=target.portal,
                target=target.iqn,
                initiator="iqn.2026-11.test:y",
                isid=0x80_0000_0000_01,
                lun=1,
            )
            completion = reap(session)["login"]
            assert completion is not None
            assert completion.unknown
            assert session.text
            session.close()
    assert (len(os.listdir("/proc/self/fd")), native_threads()) == before
