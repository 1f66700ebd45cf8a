"""The admin socket: how csvctl talks to a daemon.

A unix stream socket of root's, one question a connection: a line of JSON {"command": NAME, ...},
answered by one line, {"ok": {...}} or {"error": {"kind": KIND, "text": TEXT}}. Only root may
connect: the file's mode says so, and the peer's uid (unix(7) SO_PEERCRED) is checked again.

Concurrency. Each connection is a task of `serve_admin`'s nursery. A command runs as long as it
must (``umount`` until the volume is left); a client that goes away does not cancel it, nor does the
end of `serve_admin`, which therefore waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from csvfs.host.problems import Kind, Problem, problem_of

_log = logging.getLogger("csvfs.host.admin")

MAX_QUESTION_BYTES: Final = 65536
_SEND_LIMIT_S: Final = 2.0
_UCRED: Final = struct.Struct("3i")

Answer = dict[str, Any]
Command = Callable[[dict[str, Any]], Awaitable[Answer]]


async def serve_admin(
    path: Path,
    commands: Mapping[str, Command],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at ``path`` until cancelled; a stale socket there is replaced. Raises OSError."""
    with _listen(path) as listener:
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    connection, _ = await listener.accept()
                    nursery.start_soon(_converse, trio.SocketStream(connection), commands)
        finally:
            os.unlink(path)


def _listen(path: Path) -> trio.socket.SocketType:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)
    return trio.socket.from_stdlib_socket(listener)


async def _converse(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    async with stream:
        peer = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(peer)
        if uid not in (0, os.geteuid()):
            return
        try:
            question = await _question(stream)
            # Shielded: who asked for the end of the mount hears of it before the socket goes.
            with trio.CancelScope(shield=True):
                answer = await _answer(question, commands)
                with trio.move_on_after(_SEND_LIMIT_S):
                    await stream.send_all(json.dumps(answer).encode() + b"\n")
        except trio.BrokenResourceError:
            _log.debug("a client of the admin socket went away before its answer")


async def _question(stream: trio.SocketStream) -> bytes:
    question = bytearray()
    while not question.endswith(b"\n"):
        more = await stream.receive_some(4096)
        question += more
        if not more or len(question) > MAX_QUESTION_BYTES:
            break
    return bytes(question)


async def _answer(question: bytes, commands: Mapping[str, Command]) -> Answer:
    try:
        fields = json.loads(question)
        command = commands[fields["command"]]
    except (ValueError, KeyError, TypeError):
        return _error(Problem(Kind.USAGE, "the daemon does not know this command"))
    try:
        return {"ok": await command(fields)}
    except Exception as error:
        problem = problem_of(error)
        if problem.kind is Kind.BUG:
            _log.exception("admin command %s", fields["command"])
        return _error(problem)


def _error(problem: Problem) -> Answer:
    return {"error": {"kind": problem.kind, "text": problem.what}}


def ask(path: Path, command: str, *, timeout_s: float, **fields: Any) -> Answer:
    """Ask the daemon behind ``path`` and wait for its answer (blocking; for csvctl).

    Raises the `Problem` it answers, or one of kind NO_ANSWER when nobody does, or ENDED when the
    daemon ends before it has.
    """
    question = json.dumps({"command": command, **fields}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(str(path))
            client.sendall(question)
            with client.makefile("rb") as stream:
                line = stream.readline()
    except TimeoutError:
        raise Problem(
            Kind.NO_ANSWER, f"the daemon does not answer within {timeout_s:g} s"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise Problem(Kind.NO_ANSWER, "no daemon listens at its admin socket") from None
    except ConnectionError:
        line = b""
    if not line:
        raise Problem(Kind.ENDED, f"the daemon ended before it answered `{command}`")
    answer = json.loads(line)
    if "error" in answer:
        raise Problem(Kind(answer["error"]["kind"]), answer["error"]["text"])
    found: Answer = answer["ok"]
    return found
