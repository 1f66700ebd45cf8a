"""Where a session ended up, for whoever must reinstate it."""

from __future__ import annotations

import select
import struct

import pytest

from redirector.native._native import Session
from tests.scripted_target import LOGIN_RESPONSE, ScriptedTarget, Talk


def log_in(target: ScriptedTarget) -> Session[str]:
    session: Session[str] = Session(
        "login",
        portal=target.portal,
        target=target.iqn,
        initiator="iqn.2026-11.test:p",
        isid=0x80_0000_0000_01,
        lun=1,
    )
    assert select.select([session.fileno()], [], [], 10)[0]
    assert session.reap() == [("login", None)], session.text
    return session


def test_it_is_the_portal_that_was_asked_for() -> None:
    with ScriptedTarget(lambda *_: None) as target:
        session = log_in(target)
        assert session.portal == target.portal
        session.close()
        assert session.portal == ""


@pytest.mark.parametrize("group", [b"", b",6"])
def test_after_a_redirection_it_is_the_new_one(group: bytes) -> None:
    class Redirector(ScriptedTarget):
        to = b""

        def _talk(self, talk: Talk) -> None:
            request = talk.receive()
            assert request is not None
            tail = struct.pack(">BB10x", 1, 1)
            data = b"TargetAddress=" + self.to + group + b"\0"
            talk.send(LOGIN_RESPONSE, 0, request.tag, data, tail=tail, target_tag=0)
            talk.receive()

    with ScriptedTarget(lambda *_: None) as there, Redirector(lambda *_: None) as here:
        here.to = there.portal.encode()
        session = log_in(here)
        assert session.portal == there.portal
        session.close()
