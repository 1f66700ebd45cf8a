"""The native session without a target: what it refuses, and that it gives everything back."""

from __future__ import annotations

import gc
import os
import select
import socket
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from redirector.native._native import MAX_IN_FLIGHT, Completion, Session, isid_valid

ISID = 0x80_0000_0000_01


@pytest.fixture
def silent() -> Iterator[str]:
    """A portal that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def session(portal: str, *, limit_ms: int = 60_000, isid: int = ISID) -> Session[object]:
    return Session(
        "login",
        portal=portal,
        target="iqn.2026-11.test:x",
        initiator="iqn.2026-11.test:y",
        isid=isid,
        lun=1,
        login_timeout_ms=limit_ms,
    )


def reap(session: Session[object], count: int) -> list[tuple[object, Completion | None]]:
    ended: list[tuple[object, Completion | None]] = []
    while len(ended) < count:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended += session.reap()
    return ended


@pytest.mark.parametrize(
    ("isid", "valid"),
    [
        (0x00_0000_0000_00, True),
        (0x3F_FFFF_FFFF_FF, True),
        (0x40_FFFF_FFFF_FF, True),
        (0x41_0000_0000_00, False),
        (0x80_FFFF_FFFF_FF, True),
        (0xBF_0000_0000_00, False),
        (0xC0_0000_0000_00, False),
        (1 << 48, False),
        (-1, False),
    ],
)
def test_isids(isid: int, valid: bool) -> None:
    assert isid_valid(isid) is valid
    if not valid:
        with pytest.raises(ValueError, match="ISID"):
            session("127.0.0.1:1", isid=isid)


def test_bad_arguments(silent: str) -> None:
    bad: Any
    for bad in (
        {"initiator": "i" * 224},
        {"target": "t\0"},
        {"max_in_flight": 0},
        {"max_in_flight": MAX_IN_FLIGHT + 1},
    ):
        arguments = {"target": "t", "initiator": "i", **bad}
        with pytest.raises(ValueError, match=r"223|max_in_flight"):
            Session(None, portal=silent, isid=ISID, lun=1, **arguments)


def test_a_login_that_is_not_answered(silent: str) -> None:
    one = session(silent, limit_ms=50)
    ((token, completion),) = reap(one, 1)
    assert token == "login"
    assert completion is not None
    assert completion.unknown
    assert one.lost
    assert one.text == "no answer within 50 ms"
    assert one.close() == []


def test_a_refused_connection() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        one = session(f"127.0.0.1:{closed.getsockname()[1]}")
        ((_, completion),) = reap(one, 1)
        assert completion is not None
        assert completion.status == 0
        assert "refused" in one.text


def test_everything_comes_back_when_it_is_closed(silent: str) -> None:
    one = session(silent)
    one.set_geometry(512, 4096)
    buffer = bytearray(512)
    one.read(0, buffer, "read")
    one.write(512, b"w" * 65536, True, "write")
    one.scsi(bytes(6), "scsi")
    one.task_management(5, "task")
    one.logout("logout")
    assert one.outstanding == 6
    with pytest.raises(BufferError):
        buffer.extend(b"x")
    ended = one.close()
    assert sorted(str(token) for token, _ in ended) == [
        "login",
        "logout",
        "read",
        "scsi",
        "task",
        "write",
    ]
    assert all(completion is not None and completion.unknown for _, completion in ended)
    assert one.outstanding == 0
    buffer.extend(b"x")
    assert one.close() == []
    assert one.fileno() == -1
    with pytest.raises(ValueError, match="closed"):
        one.read(0, bytearray(512), "late")


def test_a_lost_session_answers_at_once(silent: str) -> None:
    one = session(silent)
    one.abort()
    reap(one, 1)
    for number in range(100):
        one.scsi(bytes(6), number)
    assert [token for token, _ in reap(one, 100)] == list(range(100))
    one.close()


def test_whole_blocks_only(silent: str) -> None:
    one = session(silent)
    with pytest.raises(ValueError, match="block"):
        one.read(0, bytearray(512), "before set_geometry")
    one.set_geometry(4096, 1 << 20)
    for offset, length in ((0, 512), (512, 4096), (-4096, 4096), (0, 0)):
        with pytest.raises(ValueError, match="block"):
            one.read(offset, bytearray(length), "read")
        with pytest.raises(ValueError, match="block"):
            one.write(offset, bytes(length), False, "write")
    with pytest.raises(BufferError):
        one.read(0, memoryview(bytes(4096)), "read only")
    with pytest.raises(BufferError):
        one.write(0, memoryview(bytes(8192))[::2], False, "not contiguous")
    assert one.outstanding == 1
    one.close()


def test_a_forgotten_session_gives_everything_back(silent: str) -> None:
    class Token:
        pass

    token = Token()
    seen = weakref.ref(token)
    buffer = bytearray(4096)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    references = sys.getrefcount(buffer)
    one = session(silent)
    one.scsi(bytes(6), token, data_in=buffer)
    del token, one
    gc.collect()
    assert seen() is None
    assert sys.getrefcount(buffer) == references
    assert len(os.listdir("/proc/self/fd")) == descriptors
