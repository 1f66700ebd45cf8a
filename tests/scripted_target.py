"""An iSCSI target (RFC 7143) that answers as a test tells it to: rightly, wrongly, or with garbage.

    def answer(talk: Talk, request: Request) -> None:
        talk.data_in(request, bytes(512), offset_bytes=1 << 20)

    with ScriptedTarget(answer) as target: ...

It logs initiators in without asking anything and echoes pings. Every other request comes to
``answer``, on the target's thread, one at a time. One connection after the other.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

NOP_OUT, SCSI_COMMAND, TASK_MANAGEMENT, LOGIN, DATA_OUT, LOGOUT = 0, 1, 2, 3, 5, 6
NOP_IN, SCSI_RESPONSE, TASK_RESPONSE, LOGIN_RESPONSE, DATA_IN, LOGOUT_RESPONSE = (
    *(0x20, 0x21, 0x22),
    *(0x23, 0x25, 0x26),
)
R2T, ASYNC_MESSAGE, REJECT = 0x31, 0x32, 0x3F
NO_TAG = 0xFFFFFFFF
FINAL = 0x80
HEADER_BYTES = 48

UNSOLICITED = (
    b"HeaderDigest=None\0DataDigest=None\0InitialR2T=No\0ImmediateData=Yes\0MaxBurstLength=262144\0"
    b"FirstBurstLength=65536\0MaxRecvDataSegmentLength=65536\0MaxOutstandingR2T=1\0"
)
SOLICITED = (
    b"HeaderDigest=None\0DataDigest=None\0InitialR2T=Yes\0ImmediateData=No\0MaxBurstLength=16776192\0"
    b"FirstBurstLength=65536\0MaxRecvDataSegmentLength=8192\0MaxOutstandingR2T=1\0"
)


@dataclass(frozen=True, slots=True)
class Request:
    """A PDU of the initiator."""

    head: bytes
    data: bytes

    @property
    def opcode(self) -> int:
        return self.head[0] & 0x3F

    @property
    def tag(self) -> int:
        """Initiator task tag."""
        return int.from_bytes(self.head[16:20], "big")

    @property
    def command_number(self) -> int:
        """CmdSN."""
        return int.from_bytes(self.head[24:28], "big")

    @property
    def referenced_tag(self) -> int:
        """Of task management."""
        return int.from_bytes(self.head[20:24], "big")

    @property
    def immediate(self) -> bool:
        return bool(self.head[0] & 0x40)

    @property
    def operation(self) -> int:
        """SCSI operation code; -1 if this is no SCSI command."""
        return self.head[32] if self.opcode == SCSI_COMMAND else -1


class Talk:
    """One connection, as the target sees it."""

    def __init__(self, connection: socket.socket, keys: bytes, window: int) -> None:
        self.connection = connection
        self.window = window
        self.next_command = 0
        """ExpCmdSN."""
        self.bytes_left: int | None = None
        """The connection is closed when so many more were sent."""
        self._keys = keys
        self._status = 1
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> Request | None:
        """The next PDU; None at the end."""
        head = self._exactly(HEADER_BYTES)
        if head is None:
            return None
        length = int.from_bytes(head[5:8], "big")
        data = self._exactly(length + 3 & ~3)
        if data is None:
            return None
        request = Request(head, data[:length])
        if request.opcode != DATA_OUT and not head[0] & 0x40:
            self.next_command = request.command_number + 1
        return request

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            more = self.connection.recv(count - len(data))
            if not more:
                return None
            data += more
        return data

    # -- what a target says ---------------------------------------------------------------------
    def login(self, request: Request) -> None:
        secure = request.head[1] & 0x0C == 0
        self.next_command = request.command_number
        self.send(
            LOGIN_RESPONSE,
            0x81 if secure else 0x87,
            request.tag,
            b"AuthMethod=None\0" if secure else self._keys,
            lun=request.head[8:14] + b"\0\1",
            target_tag=0,
        )

    def nop_in(self, *, tag: int = NO_TAG, target_tag: int = NO_TAG) -> None:
        self.send(NOP_IN, FINAL, tag, target_tag=target_tag, advance=tag != NO_TAG)

    def respond(
        self,
        request: Request,
        status: int = 0,
        data: bytes = b"",
        *,
        flags: int = FINAL,
        residual_bytes: int = 0,
    ) -> None:
        """SCSI Response; ``data`` is sense data without its length."""
        if data:
            data = len(data).to_bytes(2, "big") + data
        tail = struct.pack(">III", 0, 0, residual_bytes)
        self.send(SCSI_RESPONSE, flags, request.tag, data, status=status, tail=tail)

    def data_in(
        self,
        request: Request,
        data: bytes,
        *,
        offset_bytes: int = 0,
        flags: int = FINAL,
        status: int = 0,
        tag: int | None = None,
    ) -> None:
        """Data-In; with ``flags=0x81`` it carries the status as well."""
        self.send(
            DATA_IN,
            flags,
            request.tag if tag is None else tag,
            data,
            status=status,
            tail=struct.pack(">III", 0, offset_bytes, 0),
            advance=bool(flags & 1),
        )

    def r2t(
        self, request: Request, offset_bytes: int, length_bytes: int, *, tag: int | None = None
    ) -> None:
        self.send(
            R2T,
            FINAL,
            request.tag if tag is None else tag,
            target_tag=1,
            tail=struct.pack(">III", 0, offset_bytes, length_bytes),
            advance=False,
        )

    def task_response(self, request: Request, response: int = 1) -> None:
        """To task management; 1 is "task does not exist"."""
        self.send(TASK_RESPONSE, FINAL, request.tag, response=response)

    def reject(self, request: Request, reason: int = 4) -> None:
        head = bytes([REJECT, FINAL, reason, 0]) + len(request.head).to_bytes(4, "big")
        head += bytes(8) + struct.pack(">II", NO_TAG, 0) + self._numbers(True) + bytes(12)
        self.raw(head + request.head)

    def async_message(self, event: int) -> None:
        self.send(ASYNC_MESSAGE, FINAL, NO_TAG, tail=bytes([event]) + bytes(11))

    def send(
        self,
        opcode: int,
        flags: int,
        tag: int,
        data: bytes = b"",
        *,
        response: int = 0,
        status: int = 0,
        lun: bytes = bytes(8),
        target_tag: int = NO_TAG,
        tail: bytes = bytes(12),
        advance: bool = True,
    ) -> None:
        """Any PDU; ``tail`` is bytes 36 to 47 of its header."""
        head = bytes([opcode, flags, response, status]) + len(data).to_bytes(4, "big") + lun
        head += struct.pack(">II", tag, target_tag) + self._numbers(advance) + tail
        self.raw(head + data + bytes(-len(data) % 4))

    def raw(self, data: bytes) -> None:
        if self.bytes_left is None:
            self.connection.sendall(data)
            return
        self.connection.sendall(data[: self.bytes_left])
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            self.connection.shutdown(socket.SHUT_WR)
            raise ConnectionAbortedError("cut, as told")

    def _numbers(self, advance: bool) -> bytes:
        """StatSN, ExpCmdSN, MaxCmdSN."""
        numbers = struct.pack(
            ">III", self._status, self.next_command, self.next_command + self.window - 1
        )
        self._status += advance
        return numbers


Answer = Callable[[Talk, Request], object]


class ScriptedTarget:
    """A portal on a free port of 127.0.0.1."""

    iqn = "iqn.2026-11.test:scripted"

    def __init__(
        self,
        answer: Answer,
        *,
        keys: bytes = UNSOLICITED,
        window: int = 64,
        receive_buffer_bytes: int = 0,
        echo_pings: bool = True,
        cut_login_at: int | None = None,
    ) -> None:
        """``window`` is how many commands may be on their way. ``cut_login_at`` closes each
        connection when so many bytes of answers to a login were sent."""
        self._answer = answer
        self._keys = keys
        self._window = window
        self._echo_pings = echo_pings
        self._cut_login_at = cut_login_at
        self._stopped = False
        self._connection: socket.socket | None = None
        self.failure: BaseException | None = None
        """What ``answer`` raised."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        if receive_buffer_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.port: int = self._listener.getsockname()[1]
        self.portal = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = True
        for each in (self._listener, self._connection):
            with contextlib.suppress(OSError):
                if each is not None:
                    each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self.failure is not None and error is None:
            raise self.failure

    def _serve(self) -> None:
        while not self._stopped:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection as self._connection:
                try:
                    talk = Talk(connection, self._keys, self._window)
                    talk.bytes_left = self._cut_login_at
                    self._talk(talk)
                except OSError:
                    pass  # the initiator dropped the connection
                except BaseException as error:
                    self.failure = error

    def _talk(self, talk: Talk) -> None:
        while (request := talk.receive()) is not None:
            if request.opcode == LOGIN:
                talk.login(request)
            elif request.opcode == NOP_OUT and self._echo_pings:
                if request.tag != NO_TAG:
                    talk.nop_in(tag=request.tag)
            elif request.opcode == LOGOUT:
                talk.send(LOGOUT_RESPONSE, FINAL, request.tag)
            else:
                self._answer(talk, request)
