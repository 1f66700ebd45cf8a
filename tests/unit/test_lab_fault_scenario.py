"""Of whom the lab takes it that it was evicted, and of whom that is a mistake."""

from __future__ import annotations

from typing import cast

import pytest

from csvctl.lab.fault_scenario import Seat, may_be_evicted, sound_ones
from csvctl.lab.faults import Fault
from csvctl.lab.stage import File, Running

SEATS = [Seat(name, File(1, "f", 1, 1), cast(Running, None)) for name in ("a", "b", "c")]
A, B, C = SEATS


@pytest.mark.parametrize(
    ("struck", "sound", "may_go"),
    [
        ([(Fault.NET_CUT, A)], [B, C], []),
        ([(Fault.NET_CUT, A), (Fault.KILL, B)], [C], [C]),
        ([(Fault.NET_CUT, A), (Fault.SAN_CUT, B)], [C], [C]),
        ([(Fault.NET_CUT, A), (Fault.SLOW_SAN, B)], [B, C], []),
        ([(Fault.NET_CUT, A), (Fault.NET_CUT, B), (Fault.FREEZE, C)], [], []),
        ([(Fault.FREEZE, A), (Fault.POWER_OFF, B)], [C], []),
        ([(Fault.TARGET_RESTART, A), (Fault.SAN_RESET, B)], [A, C], []),
        ([(Fault.SLOW_SAN, A)], [A, B, C], []),
        ([(Fault.TARGET_RESTART, A), (Fault.SLOW_SAN, B)], [A, C], []),
    ],
)
def test_who_may_be_evicted(
    struck: list[tuple[Fault, Seat]], sound: list[Seat], may_go: list[Seat]
) -> None:
    assert [seat.host for seat in sound_ones(SEATS, struck)] == [seat.host for seat in sound]
    assert [seat.host for seat in may_be_evicted(SEATS, struck)] == [seat.host for seat in may_go]
