"""A target that refuses a write before it has read its data: RFC 7143 allows it, tgt never does."""

from __future__ import annotations

import select
import threading

from redirector.native._native import Completion, Session
from tests.scripted_target import DATA_OUT, SOLICITED, Request, ScriptedTarget, Talk

LENGTH = 12 << 20
"""More than the sockets take."""
WRITE_16 = 0x8A
SENSE = bytes([0x70, 0, 7, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x27, 0x07, 0, 0, 0, 0])


class Refuser:
    """Asks for the data of a write (R2T), refuses the write at once, reads on only when told."""

    def __init__(self) -> None:
        self.refused = threading.Event()
        self.read_on = threading.Event()
        self.data_out_bytes = 0

    def answer(self, talk: Talk, request: Request) -> None:
        if request.operation == WRITE_16:
            talk.r2t(request, 0, LENGTH)
            talk.respond(request, 2, SENSE)
            self.refused.set()
            self.read_on.wait(20)
        elif request.opcode == DATA_OUT:
            self.data_out_bytes += len(request.data)
        else:
            talk.respond(request)


def reap(session: Session[str]) -> list[tuple[str, Completion | None]]:
    ended: list[tuple[str, Completion | None]] = []
    while not ended:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended += session.reap()
    return ended


def test_a_write_refused_early_ends_when_its_data_has_left() -> None:
    refuser = Refuser()
    with ScriptedTarget(refuser.answer, keys=SOLICITED, receive_buffer_bytes=4096) as target:
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
            assert reap(session) == [("login", None)], session.text
            session.set_geometry(512, LENGTH)
            data = bytearray(LENGTH)
            session.write(0, data, False, "write")
            assert refuser.refused.wait(10)
            session.scsi(bytes(6), "later")
            # Data-Out PDUs that point into the buffer wait for the socket: it is still pinned.
            assert not select.select([session.fileno()], [], [], 0.2)[0]
            refuser.read_on.set()
            ((token, completion),) = reap(session)
            assert token == "write"
            assert completion is not None
            assert (completion.unknown, completion.status, completion.sense) == (False, 2, SENSE)
            data.extend(b"x")
            assert reap(session) == [("later", None)]
            assert refuser.data_out_bytes == LENGTH
        finally:
            refuser.read_on.set()
            session.close()
