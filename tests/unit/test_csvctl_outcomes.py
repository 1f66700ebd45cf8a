"""One table says how csvctl ends, and it is whole."""

from __future__ import annotations

import re

import pytest

from csvctl import outcomes
from csvctl.outcomes import OUTCOMES, fsck_code, mount_code
from csvfs.errors import Damaged, DataLost
from csvfs.host import mountpoint
from csvfs.host.problems import Kind, Problem, problem_of
from csvfs.ondisk.geometry import BadGeometry
from redirector.block import device


def test_every_kind_has_a_code_of_its_own() -> None:
    assert set(OUTCOMES) == set(Kind)
    codes = [outcome.code for outcome in OUTCOMES.values()]
    assert len(set(codes)) == len(codes)
    assert all(64 <= code <= 99 for code in codes)
    assert OUTCOMES[Kind.BUG].code == 70


def test_the_table_in_the_text_lists_them_all() -> None:
    text = str(outcomes.__doc__)
    assert {int(found) for found in re.findall(r"\| (\d\d) ", text)} == {
        outcome.code for outcome in OUTCOMES.values()
    }


def test_every_outcome_says_what_it_means_and_what_to_do() -> None:
    for outcome in OUTCOMES.values():
        assert outcome.means.endswith(".")
        assert len(outcome.next_step) > 10


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (device.BadUrl("x"), Kind.BAD_URL),
        (device.NoSuchLun("x"), Kind.NO_SUCH_LUN),
        (device.AuthenticationFailed("x"), Kind.CHAP_REFUSED),
        (device.Unreachable("x"), Kind.UNREACHABLE),
        (device.MediumError("x"), Kind.MEDIUM_ERROR),
        (device.SpaceExhausted("x"), Kind.LUN_FULL),
        (device.ReservationConflict("x"), Kind.LUN_REFUSED),
        (device.OutcomeUnknown("x"), Kind.LUN_LOST),
        (BadGeometry("x"), Kind.TOO_SMALL),
        (Damaged("x"), Kind.DAMAGED),
        (DataLost("x"), Kind.MEDIUM_ERROR),
        (mountpoint.Missing("x"), Kind.MOUNT_POINT_MISSING),
        (mountpoint.NotADirectory("x"), Kind.MOUNT_POINT_MISSING),
        (mountpoint.NotEmpty("x"), Kind.MOUNT_POINT_NOT_EMPTY),
        (mountpoint.Occupied("x"), Kind.MOUNT_POINT_BUSY),
        (mountpoint.NotMounted("x"), Kind.NOT_MOUNTED),
        (mountpoint.InUse("x"), Kind.FILES_OPEN),
        (PermissionError("x"), Kind.PERMISSION),
        (OSError("x"), Kind.SYSTEM),
        (KeyError("x"), Kind.BUG),
        (Problem(Kind.LUN_COPY, "x"), Kind.LUN_COPY),
    ],
)
def test_errors_are_sorted_into_kinds(error: Exception, kind: Kind) -> None:
    assert problem_of(error).kind is kind
    assert "x" in problem_of(error).what


def test_a_group_is_what_its_members_are() -> None:
    inner = ExceptionGroup("inner", [KeyError("bug"), device.NoSuchLun("lun 7")])
    assert problem_of(ExceptionGroup("outer", [inner])).kind is Kind.NO_SUCH_LUN


def test_codes_of_mount_and_fsck() -> None:
    assert {mount_code(kind) for kind in Kind} == {1, 2, 4, 8, 32}
    assert fsck_code(Kind.USAGE) == 16
    assert fsck_code(Kind.UNREACHABLE) == 8
    assert fsck_code(Kind.INTERRUPTED) == 32
