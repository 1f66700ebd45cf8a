"""The matrix, and what is computed from it."""

from __future__ import annotations

import pytest

from lockmgr.modes import WRITES_VALUE, Mode, compatible, covers, join, meet, yielded

NL, CR, CW, PR, PW, EX = Mode

COMPATIBLE_WITH = {
    NL: {NL, CR, CW, PR, PW, EX},
    CR: {NL, CR, CW, PR, PW},
    CW: {NL, CR, CW},
    PR: {NL, CR, PR},
    PW: {NL, CR},
    EX: {NL},
}
"""Snaman and Thiel 1987, figure 1; also dlm(7)."""


@pytest.mark.parametrize("a", list(Mode))
def test_matrix_is_the_classical_one(a: Mode) -> None:
    assert {b for b in Mode if compatible(a, b)} == COMPATIBLE_WITH[a]


def test_numbers_are_those_of_vms_and_dlm() -> None:
    assert [mode.value for mode in (NL, CR, CW, PR, PW, EX)] == [0, 1, 2, 3, 4, 5]
    assert str(EX) == "EX"


def test_order_is_a_chain_but_for_cw_and_pr() -> None:
    chain = [NL, CR, CW, PW, EX]
    assert all(covers(b, a) for i, a in enumerate(chain) for b in chain[i:])
    assert not any(covers(a, b) for i, a in enumerate(chain) for b in chain[i + 1 :])
    assert covers(PW, PR) and covers(PR, CR) and not covers(CW, PR) and not covers(PR, CW)


@pytest.mark.parametrize("a", list(Mode))
@pytest.mark.parametrize("b", list(Mode))
def test_join_and_meet(a: Mode, b: Mode) -> None:
    both = join(a, b)
    assert covers(both, a) and covers(both, b)
    assert all(covers(c, both) for c in Mode if covers(c, a) and covers(c, b))
    common = meet(a, b)
    assert covers(a, common) and covers(b, common)
    assert all(covers(common, c) for c in Mode if covers(a, c) and covers(b, c))
    assert COMPATIBLE_WITH[both] == COMPATIBLE_WITH[a] & COMPATIBLE_WITH[b]


@pytest.mark.parametrize("held", list(Mode))
@pytest.mark.parametrize("wanted", list(Mode))
def test_yielded_is_the_most_that_may_stay(held: Mode, wanted: Mode) -> None:
    kept = yielded(held, wanted)
    assert covers(held, kept) and compatible(kept, wanted)
    assert all(
        covers(kept, mode) for mode in Mode if covers(held, mode) and compatible(mode, wanted)
    )


def test_what_a_writer_keeps() -> None:
    assert yielded(EX, PR) is PR
    assert yielded(EX, EX) is NL
    assert yielded(PR, CW) is CR
    assert yielded(PR, PR) is PR


def test_value_block_is_written_from_pw_and_ex() -> None:
    assert [mode for mode in Mode if WRITES_VALUE[mode]] == [PW, EX]
