"""The admin socket, the mount records and the lock file of a daemon."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from csvfs.host import admin, places
from csvfs.host.daemon_lock import DaemonLock, daemon_lives, wait_daemon_ended
from csvfs.host.events import Event, EventKind, Reporter, read_events
from csvfs.host.problems import Kind, Problem
from csvfs.host.record import MountRecord, MountState, find_record, records

VOLUME = bytes(range(16))


@pytest.fixture(autouse=True)
def _run_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Short, as /run/csvfs is: the name of a socket has at most 107 bytes (unix(7)).
    with tempfile.TemporaryDirectory(prefix="csvfs-run-") as directory:
        monkeypatch.setenv("CSVFS_RUN_DIR", directory)
        places.make_run_directory()
        yield


async def echo(fields: dict[str, Any]) -> dict[str, Any]:
    return {"echo": fields["text"]}


async def fail(_fields: dict[str, Any]) -> dict[str, Any]:
    raise Problem(Kind.FILES_OPEN, "files are open")


async def trip(_fields: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError("oops")


COMMANDS = {"echo": echo, "fail": fail, "trip": trip}


async def ask(command: str, **fields: Any) -> dict[str, Any]:
    path = places.socket_path(VOLUME)
    return await trio.to_thread.run_sync(lambda: admin.ask(path, command, timeout_s=5, **fields))


async def test_question_and_answer(nursery: trio.Nursery) -> None:
    await nursery.start(admin.serve_admin, places.socket_path(VOLUME), COMMANDS)
    assert await ask("echo", text="hello") == {"echo": "hello"}
    with pytest.raises(Problem, match="files are open") as raised:
        await ask("fail")
    assert raised.value.kind is Kind.FILES_OPEN
    with pytest.raises(Problem, match="does not know") as raised:
        await ask("unheard-of")
    assert raised.value.kind is Kind.USAGE
    assert await ask("echo", text="still there") == {"echo": "still there"}
    nursery.cancel_scope.cancel()


async def test_a_command_that_trips_is_told_and_logged(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    await nursery.start(admin.serve_admin, places.socket_path(VOLUME), COMMANDS)
    with pytest.raises(Problem, match="oops") as raised:
        await ask("trip")
    assert raised.value.kind is Kind.BUG
    assert "ZeroDivisionError" in caplog.text
    nursery.cancel_scope.cancel()


async def test_only_root_gets_in(nursery: trio.Nursery) -> None:
    path = places.socket_path(VOLUME)
    await nursery.start(admin.serve_admin, path, COMMANDS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("question", [b"", b"no json\n", b"[]\n", b"{}\n", b"x" * 200_000])
async def test_nonsense_is_answered(nursery: trio.Nursery, question: bytes) -> None:
    path = places.socket_path(VOLUME)
    await nursery.start(admin.serve_admin, path, COMMANDS)
    stream = await trio.open_unix_socket(path)
    try:
        await stream.send_all(question)
        await stream.send_eof()
        answer = await stream.receive_some()
    except trio.BrokenResourceError:  # it had heard enough
        answer = b'{"error": '
    assert answer.startswith(b'{"error": ')
    await stream.aclose()
    assert await ask("echo", text="x") == {"echo": "x"}
    nursery.cancel_scope.cancel()


async def test_who_waits_for_the_end_hears_of_it() -> None:
    """`csvctl umount`: the answer comes although the socket is being closed."""
    ended = trio.Event()
    asked = trio.Event()

    async def umount(_fields: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        await ended.wait()
        return {"left": True}

    answers: list[dict[str, Any]] = []

    async def client() -> None:
        answers.append(await ask("umount"))

    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as nursery:
            await nursery.start(admin.serve_admin, places.socket_path(VOLUME), {"umount": umount})
            outer.start_soon(client)
            await asked.wait()
            ended.set()
            nursery.cancel_scope.cancel()
    assert answers == [{"left": True}]
    assert not places.socket_path(VOLUME).exists()


def test_nobody_there() -> None:
    with pytest.raises(Problem) as raised:
        admin.ask(places.socket_path(VOLUME), "status", timeout_s=1)
    assert raised.value.kind is Kind.NO_ANSWER


def test_nobody_answers() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(places.socket_path(VOLUME)))
        listener.listen(1)
        with pytest.raises(Problem, match=r"within 0\.1 s") as raised:
            admin.ask(places.socket_path(VOLUME), "status", timeout_s=0.1)
        assert raised.value.kind is Kind.NO_ANSWER


def test_the_lock_is_one_daemons() -> None:
    first, second = DaemonLock(), DaemonLock()
    assert not daemon_lives(VOLUME)
    assert first.take(VOLUME) and first.take(VOLUME)
    assert daemon_lives(VOLUME)
    assert not second.take(VOLUME)
    assert not wait_daemon_ended(VOLUME, timeout_s=0.02)
    with pytest.raises(ValueError, match="another volume"):
        first.take(bytes(16))
    first.release()
    first.release()
    assert not daemon_lives(VOLUME)
    assert wait_daemon_ended(VOLUME, timeout_s=0)
    with second:
        assert second.take(VOLUME)
    assert not daemon_lives(VOLUME)


def test_the_lock_goes_with_its_process() -> None:
    code = (
        "import sys\n"
        "from csvfs.host.daemon_lock import DaemonLock\n"
        "lock = DaemonLock()\n"
        "print(lock.take(bytes(range(16))), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        assert daemon_lives(VOLUME)
        holder.kill()
    assert not daemon_lives(VOLUME)


def record(number: int, directory: str, since_ns: int) -> MountRecord:
    return MountRecord(
        bytes([number] * 16).hex(),
        f"label{number}",
        directory,
        "file:///x",
        "node",
        123,
        MountState.MOUNTED,
        since_ns,
        "stderr",
    )


def test_records() -> None:
    assert list(records()) == []
    older, newer = record(1, "/a", 1), record(2, "/a", 2)
    older.write()
    newer.write()
    assert list(records()) == [older, newer]
    assert find_record("/a") == newer
    assert find_record("/b") is None
    failed = newer.failed("it was killed")
    failed.write()
    found = find_record("/a")
    assert found is not None
    assert (found.state, found.reason) == (MountState.FAILED, "it was killed")
    newer.remove()
    newer.remove()
    assert find_record("/a") == older
    places.record_path(bytes(16)).write_text("{")
    assert list(records()) == [older], "what cannot be read is left out"


def test_events_travel_through_a_pipe() -> None:
    reader, writer = os.pipe()
    reporter = Reporter(writer)
    reporter.step("one")
    reporter.warning("two")
    assert reporter.is_open
    reporter.failed(Problem(Kind.NO_SUCH_LUN, "three"))
    assert not reporter.is_open
    reporter.step("nobody listens any more")
    assert list(read_events(reader)) == [
        Event(EventKind.STEP, "one"),
        Event(EventKind.WARNING, "two"),
        Event(EventKind.FAILED, "three", Kind.NO_SUCH_LUN),
    ]


def test_a_parent_that_is_gone_does_not_matter() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    reporter = Reporter(writer)
    reporter.step("one")
    assert not reporter.is_open
    Reporter(-1).ready("nobody was ever there")
