"""What counts as a sign of life when pings cannot pass, and how patient a session is."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from redirector.native._native import Completion, Session
from tests.scripted_target import NO_TAG, NOP_OUT, TASK_MANAGEMENT, Request, ScriptedTarget, Talk

WINDOW = 4
COMMANDS = 3 * WINDOW
INTERVAL_S, TIMEOUT_S = 0.05, 0.2
ABORT_TASK = 1


@contextmanager
def session_of(
    target: ScriptedTarget, *, patience_ms: int = 0, calm_ms: int = 60_000
) -> Iterator[Session[object]]:
    session: Session[object] = Session(
        "login",
        portal=target.portal,
        target=target.iqn,
        initiator="iqn.2026-11.test:z",
        isid=0x80_0000_0000_01,
        lun=1,
        ping_interval_ms=int(INTERVAL_S * 1000),
        ping_timeout_ms=int(TIMEOUT_S * 1000),
        patience_ms=patience_ms,
        calm_ms=calm_ms,
    )
    try:
        assert reap(session) == [("login", None)], session.text
        yield session
    finally:
        session.close()


def reap(session: Session[object], count: int = 1) -> list[tuple[object, Completion | None]]:
    ended: list[tuple[object, Completion | None]] = []
    while len(ended) < count:
        assert select.select([session.fileno()], [], [], 10)[0], "nothing came back"
        ended += session.reap()
    return ended


class SlowTarget:
    """Keeps every command until it has answered so many probes; its window is full of them."""

    def __init__(self, probes: int, answer: Callable[[Talk, Request], None]) -> None:
        self.probes: list[Request] = []
        self.ended: list[int] = []
        self.nops: list[Request] = []
        self.wanted = probes
        self._answer = answer
        self._waiting: list[Request] = []

    def __call__(self, talk: Talk, request: Request) -> None:
        if request.opcode == TASK_MANAGEMENT:
            self.probes.append(request)
        elif request.opcode == NOP_OUT:
            self.nops.append(request)
        else:
            self._waiting.append(request)
        done = len(self.probes) >= self.wanted
        talk.window = WINDOW if done else WINDOW - len(self._waiting) - len(self.nops)
        if request.opcode == TASK_MANAGEMENT:
            self._answer(talk, request)
        if done:
            for nop in self.nops:
                talk.nop_in(tag=nop.tag)
            self.nops.clear()
            for each in self._waiting:
                self.ended.append(each.tag)
                talk.respond(each)
            self._waiting.clear()


@pytest.mark.parametrize("answer", [Talk.task_response, Talk.reject])
def test_a_slow_target_whose_window_is_closed_is_not_lost(
    answer: Callable[[Talk, Request], None],
) -> None:
    """For four ping timeouts it answers nothing but what is immediate."""
    slow = SlowTarget(int(4 * TIMEOUT_S / INTERVAL_S), answer)
    with ScriptedTarget(slow, window=WINDOW) as target, session_of(target) as session:
        for number in range(COMMANDS):
            session.scsi(bytes(6), number)
        assert reap(session, COMMANDS) == [(n, None) for n in range(COMMANDS)], session.text
        assert not session.lost
        assert session.statistics()["pings"] >= len(slow.probes)
    assert all(probe.immediate and probe.head[1] & 0x7F == ABORT_TASK for probe in slow.probes)


def test_a_probe_names_a_command_that_has_ended() -> None:
    """So it can abort nothing."""
    slow = SlowTarget(0, Talk.task_response)
    with ScriptedTarget(slow, window=WINDOW) as target, session_of(target) as session:
        session.scsi(bytes(6), "first")
        assert reap(session) == [("first", None)]
        slow.wanted = 3
        for number in range(COMMANDS):
            session.scsi(bytes(6), number)
        reap(session, COMMANDS)
        assert [probe.referenced_tag for probe in slow.probes[:3]] == [slow.ended[0]] * 3


def test_before_any_command_has_ended_a_probe_names_none() -> None:
    slow = SlowTarget(1, Talk.task_response)
    with ScriptedTarget(slow, window=WINDOW) as target, session_of(target) as session:
        for number in range(COMMANDS):
            session.scsi(bytes(6), number)
        reap(session, COMMANDS)
    assert slow.probes[0].referenced_tag == NO_TAG


def test_a_frozen_target_whose_window_is_closed_is_lost() -> None:
    """Every command comes back once, as unknown, long before the command timeout."""
    thaw = threading.Event()
    received: list[Request] = []

    def answer(_: Talk, request: Request) -> None:
        received.append(request)
        if len(received) == WINDOW:
            thaw.wait(20)

    with ScriptedTarget(answer, window=WINDOW) as target, session_of(target) as session:
        started = time.monotonic()
        for number in range(COMMANDS):
            session.scsi(bytes(6), number)
        ended = reap(session, COMMANDS)
        assert TIMEOUT_S <= time.monotonic() - started < 5
        assert sorted(token for token, _ in ended) == list(range(COMMANDS))  # type: ignore[type-var]
        assert all(completion is not None and completion.unknown for _, completion in ended)
        assert session.silent_ms == TIMEOUT_S * 1000
        thaw.set()
        assert session.reap() == []


def test_a_window_that_a_nop_has_filled_is_closed_as_well() -> None:
    slow = SlowTarget(10, Talk.task_response)
    with (
        ScriptedTarget(slow, window=WINDOW, echo_pings=False) as target,
        session_of(target) as session,
    ):
        while not slow.nops:
            time.sleep(0.005)
        for number in range(COMMANDS):
            session.scsi(bytes(6), number)
        assert len(reap(session, COMMANDS)) == COMMANDS
        assert not session.lost, session.text


def test_a_nop_that_is_stuck_is_followed_by_a_probe() -> None:
    """The target has a place for every command that the session dares, and none for the NOP-Out."""
    slow = SlowTarget(10, Talk.task_response)
    with (
        ScriptedTarget(slow, window=WINDOW, echo_pings=False) as target,
        session_of(target) as session,
    ):
        for number in range(WINDOW):
            session.scsi(bytes(6), number)
        assert len(reap(session, WINDOW)) == WINDOW
        assert not session.lost, session.text
        assert session.statistics()["peak_in_flight"] == WINDOW


# -- patience --------------------------------------------------------------------------------------
def freeze(_: Talk, request: Request) -> None:
    """Neither pings nor commands are answered."""


def test_a_patient_session_waits_longer() -> None:
    with (
        ScriptedTarget(freeze, echo_pings=False) as target,
        session_of(target, patience_ms=600) as session,
    ):
        started = time.monotonic()
        session.scsi(bytes(6), "lost")
        reap(session)
        assert time.monotonic() - started >= 0.6
        assert session.silent_ms == 600


def test_patience_is_forgotten_when_the_target_was_quick() -> None:
    with (
        ScriptedTarget(lambda talk, r: talk.respond(r)) as target,
        session_of(target, patience_ms=30_000, calm_ms=200) as session,
    ):
        assert session.statistics()["patience_ms"] == 30_000
        end = time.monotonic() + 10
        while session.statistics()["patience_ms"] != TIMEOUT_S * 1000:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_patience_is_kept_with_a_target_that_still_falls_silent() -> None:
    pings = 0

    def answer(talk: Talk, request: Request) -> None:
        nonlocal pings
        pings += 1
        time.sleep(TIMEOUT_S)
        talk.nop_in(tag=request.tag)

    with (
        ScriptedTarget(answer, echo_pings=False) as target,
        session_of(target, patience_ms=30_000, calm_ms=300) as session,
    ):
        while pings < 4:
            time.sleep(0.01)
        assert session.statistics()["patience_ms"] == 30_000
        assert not session.lost


def test_a_session_that_is_lost_otherwise_was_not_silent() -> None:
    def cut(talk: Talk, _: Request) -> None:
        talk.connection.close()

    with ScriptedTarget(cut) as target, session_of(target) as session:
        session.scsi(bytes(6), "lost")
        reap(session)
        assert session.lost
        assert session.silent_ms == 0


# -- the judge -------------------------------------------------------------------------------------
JUDGE = """
import select, sys
from redirector.native._native import Session
session = Session("login", portal=sys.argv[1], target=sys.argv[2],
                  initiator="iqn.2026-11.test:judge", isid=0x800000000001, lun=1,
                  ping_interval_ms=50, ping_timeout_ms=1000)
assert select.select([session.fileno()], [], [], 10)[0]
session.reap()
sys.stdin.read()
print(session.lost, session.text)
"""


def test_a_judge_that_was_asleep_does_not_condemn() -> None:
    """It is stopped while its ping is on the way; the target is as late in answering."""
    pings = 0
    judges: list[subprocess.Popen[str]] = []

    def answer(talk: Talk, request: Request) -> None:
        nonlocal pings
        pings += 1
        if pings == 3:
            judges[0].send_signal(signal.SIGSTOP)
            time.sleep(2.5)
            judges[0].send_signal(signal.SIGCONT)
            time.sleep(0.2)
        talk.nop_in(tag=request.tag)

    with ScriptedTarget(answer, echo_pings=False) as target:
        command = [sys.executable, "-c", JUDGE, target.portal, target.iqn]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as judge:
            judges.append(judge)
            end = time.monotonic() + 20
            while pings < 6 and judge.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert judge.communicate(timeout=10)[0] == "False \n"
