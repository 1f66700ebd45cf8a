"""A target that refuses a write before it has read its data: RFC 7143 allows it, tgt never does."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from redirector.native._native import Completion, Session

LENGTH = 12 << 20
"""More than the sockets take."""
KEYS = (
    b"HeaderDigest=None\0DataDigest=None\0InitialR2T=Yes\0ImmediateData=No\0MaxBurstLength=16776192\0"
    b"FirstBurstLength=65536\0MaxRecvDataSegmentLength=8192\0MaxOutstandingR2T=1\0"
)
SENSE = bytes([0x70, 0, 7, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x27, 0x07, 0, 0, 0, 0])


class RefusingTarget:
    """Asks for the data of a write (R2T), refuses the write at once, reads on only when told."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.portal = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.refused = threading.Event()
        self.read_on = threading.Event()
        self.data_out_bytes = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self.read_on.set()
        self.listener.close()
        self._thread.join()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            while (head := self._read(connection, 48)) is not None:
                data = self._read(connection, int.from_bytes(head[5:8], "big") + 3 & ~3)
                assert data is not None
                self._answer(connection, head, data)

    def _read(self, connection: socket.socket, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            more = connection.recv(count - len(data))
            if not more:
                return None
            data += more
        return data

    def _answer(self, connection: socket.socket, head: bytes, data: bytes) -> None:
        command = int.from_bytes(head[24:28], "big")
        if head[0] & 0x3F == 0x03:
            secure = head[1] & 0x0C == 0
            keys = b"AuthMethod=None\0" if secure else KEYS
            self._send(connection, 0x23, 0x81 if secure else 0x87, head, command, keys)
        elif head[0] & 0x3F == 0x01 and head[32] == 0x8A:
            numbers = struct.pack(">III", 0, 0, LENGTH)  # R2TSN, offset, length
            self._send(connection, 0x31, 0x80, head, command + 1, b"", transfer_tag=1, tail=numbers)
            sense = len(SENSE).to_bytes(2, "big") + SENSE
            self._send(connection, 0x21, 0x80, head, command + 1, sense, status=2)
            self.refused.set()
            self.read_on.wait()
        elif head[0] & 0x3F == 0x01:
            self._send(connection, 0x21, 0x80, head, command + 1, b"")
        elif head[0] & 0x3F == 0x05:
            self.data_out_bytes += len(data)

    def _send(
        self,
        connection: socket.socket,
        opcode: int,
        flags: int,
        request: bytes,
        command: int,
        data: bytes,
        *,
        status: int = 0,
        transfer_tag: int = 0xFFFFFFFF,
        tail: bytes = bytes(12),
    ) -> None:
        self._stat = getattr(self, "_stat", 0) + (opcode != 0x31)
        head = bytes([opcode, flags, 0, status]) + len(data).to_bytes(4, "big")
        head += request[8:14] + b"\0\1" if opcode == 0x23 else bytes(8)
        head += request[16:20]
        head += struct.pack(">I", 0 if opcode == 0x23 else transfer_tag)
        head += struct.pack(">III", self._stat, command, command + 64)
        head += bytes(12) if opcode == 0x23 else tail
        connection.sendall(head + data + bytes(-len(data) % 4))


@pytest.fixture
def target() -> Iterator[RefusingTarget]:
    running = RefusingTarget()
    try:
        yield running
    finally:
        running.stop()


def reap(session: Session[str]) -> list[tuple[str, Completion | None]]:
    ended: list[tuple[str, Completion | None]] = []
    while not ended:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended += session.reap()
    return ended


def test_a_write_refused_early_ends_when_its_data_has_left(target: RefusingTarget) -> None:
    session: Session[str] = Session(
        "login",
        portal=target.portal,
        target="iqn.2026-11.test:refusing",
        initiator="iqn.2026-11.test:y",
        isid=0x80_0000_0000_01,
        lun=1,
        ping_interval_ms=0,
    )
    try:
        assert reap(session) == [("login", None)], session.text
        session.set_geometry(512, LENGTH)
        data = bytearray(LENGTH)
        session.write(0, data, False, "write")
        assert target.refused.wait(10)
        session.scsi(bytes(6), "later")
        # Data-Out PDUs that point into the buffer wait for the socket: it is still pinned.
        assert not select.select([session.fileno()], [], [], 0.2)[0]
        target.read_on.set()
        ((token, completion),) = reap(session)
        assert token == "write"
        assert completion is not None
        assert (completion.unknown, completion.status, completion.sense) == (False, 2, SENSE)
        data.extend(b"x")
        assert reap(session) == [("later", None)]
        assert target.data_out_bytes == LENGTH
    finally:
        session.close()
