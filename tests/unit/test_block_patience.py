"""A target that blocks is left, but not again and again."""

from __future__ import annotations

import struct
import time

from hypothesis import given
from hypothesis import strategies as st

from redirector.block.device import InitiatorPort, OutcomeUnknown
from redirector.block.iscsi import IscsiLun, IscsiOptions
from redirector.block.patience import Patience
from tests.scripted_target import Request, ScriptedTarget, Talk

LEAST_S, MOST_S, CALM_S = 2.0, 30.0, 60.0
PORT = InitiatorPort("iqn.2026-11.test:y", 0x80_0000_0000_01)
INQUIRY, MODE_SENSE, SYNCHRONIZE_CACHE, READ_CAPACITY = 0x12, 0x1A, 0x91, 0x9E
NO_SUCH_FIELD = bytes([0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0x00, 0, 0, 0, 0])


def test_every_silent_loss_doubles_it() -> None:
    patience = Patience(LEAST_S, MOST_S, CALM_S)
    waited = []
    for now in range(6):
        waited.append(patience.of_next(now))
        patience.lost(waited[-1], now)
    assert waited == [2, 4, 8, 16, 30, 30]


def test_two_sessions_lost_at_once_count_as_one() -> None:
    patience = Patience(LEAST_S, MOST_S, CALM_S)
    patience.lost(2, 100)
    patience.lost(2, 100)
    assert patience.of_next(101) == 4


def test_an_impatient_session_takes_nothing_from_the_others() -> None:
    patience = Patience(LEAST_S, MOST_S, CALM_S)
    patience.lost(8, 100)
    patience.lost(2, 101)
    assert patience.of_next(102) == 16


def test_it_is_forgotten() -> None:
    patience = Patience(LEAST_S, MOST_S, CALM_S)
    patience.lost(8, 100)
    assert patience.of_next(100 + CALM_S) == 16
    assert patience.of_next(101 + CALM_S) == LEAST_S
    patience.lost(2, 101 + CALM_S)
    assert patience.of_next(101 + CALM_S) == 4


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans())))
def test_it_stays_within_its_bounds(steps: list[tuple[float, bool]]) -> None:
    patience = Patience(LEAST_S, MOST_S, CALM_S)
    now = 0.0
    for passed_s, lost in steps:
        now += passed_s
        assert LEAST_S <= patience.of_next(now) <= MOST_S
        if lost:
            patience.lost(patience.of_next(now), now)


class BlockingDisk:
    """A target with one thread: while it flushes, it answers nothing at all."""

    def __init__(self, flush_s: float) -> None:
        self.flush_s = flush_s
        self.flushes = 0

    def answer(self, talk: Talk, request: Request) -> None:
        length = int.from_bytes(request.head[20:24], "big")
        if request.operation == SYNCHRONIZE_CACHE:
            self.flushes += 1
            time.sleep(self.flush_s)
            talk.respond(request)
        elif request.operation == INQUIRY and not request.head[33] & 1:
            self._data(talk, request, bytes(36), length)
        elif request.operation == READ_CAPACITY:
            self._data(talk, request, struct.pack(">QI20x", 2047, 512), length)
        elif request.operation in (INQUIRY, MODE_SENSE):
            talk.respond(request, 2, NO_SUCH_FIELD)
        else:
            talk.respond(request)

    def _data(self, talk: Talk, request: Request, data: bytes, length: int) -> None:
        talk.data_in(request, data)
        talk.respond(request, flags=0x82, residual_bytes=length - len(data))


async def test_a_target_that_blocks_in_every_flush_is_waited_for_at_last() -> None:
    disk = BlockingDisk(flush_s=0.7)
    options = IscsiOptions(ping_interval_s=0.05, ping_timeout_s=0.1)
    with ScriptedTarget(disk.answer) as target:
        lun = IscsiLun("127.0.0.1", target.port, target.iqn, 1, options=options)
        losses = 0
        while True:
            async with await lun.login(PORT) as device:
                try:
                    await device.flush()
                    break
                except OutcomeUnknown:
                    losses += 1
        assert 1 <= losses <= 4  # 0.1, 0.2, 0.4 s, and one more when this host is slow
        assert disk.flushes == losses + 1
