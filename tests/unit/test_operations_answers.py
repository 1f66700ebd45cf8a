"""Errors become errno in one place, and nothing is missing there."""

from __future__ import annotations

import errno
import inspect
import logging

import pytest

from csvfs import errors
from csvfs.host.answers import Answers, entry_attributes, errno_of
from csvfs.namespace.inode import Attributes
from lockmgr.cluster.effects import Stop, StopReason
from lockmgr.cluster.errors import ClusterStopped
from redirector.block.device import MediumError, OutcomeUnknown, SpaceExhausted


def filesystem_errors() -> list[type[errors.FilesystemError]]:
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.FilesystemError) and kind is not errors.FilesystemError
    ]


@pytest.mark.parametrize("kind", filesystem_errors())
def test_every_filesystem_error_has_an_errno(kind: type[errors.FilesystemError]) -> None:
    if kind is errors.AttributeTooBig:
        assert errno_of(errors.AttributeTooBig("v", value=True)) == errno.E2BIG
        assert errno_of(errors.AttributeTooBig("n", value=False)) == errno.ERANGE
    else:
        assert errno_of(kind("x")) is not None


def test_errors_of_the_lun() -> None:
    assert errno_of(OutcomeUnknown("gone")) == errno.EIO
    assert errno_of(MediumError("READ")) == errno.EIO
    assert errno_of(SpaceExhausted("WRITE")) == errno.ENOSPC


def test_a_group_answers_as_its_members() -> None:
    group = ExceptionGroup("x", [errors.NoSpace("full"), errors.DataLost("y")])
    assert errno_of(group) == errno.ENOSPC
    assert errno_of(ExceptionGroup("x", [errors.NoSpace("full"), KeyError("y")])) is None


def test_what_is_no_answer_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    answer = Answers().to("read(7)", ZeroDivisionError("oops"))
    assert answer.errno == errno.EIO
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "read(7)" in record.message
    assert record.exc_info


def test_a_failed_volume_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers()
    for _ in range(3):
        assert answers.to("write(1)", errors.VolumeFailed("no journal")).errno == errno.EIO
    assert len(caplog.records) == 1


def test_a_lease_that_is_over_for_good_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers()
    for _ in range(3):
        over = ClusterStopped(Stop(StopReason.EVICTED, "evicted"))
        assert answers.to("lease", over).errno == errno.EIO
    (record,) = caplog.records
    assert "evicted" in record.message
    assert not record.exc_info


def test_ordinary_answers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert Answers().to("lookup(1)", errors.NotFound("x")).errno == errno.ENOENT
    assert not caplog.records


def test_attributes_are_never_to_be_cached() -> None:
    entry = entry_attributes(Attributes(9, 3, 0o100644, 1, 2, 4, 5, 8, 0, -1, 10**18 + 1, 7, 6))
    assert (entry.entry_timeout, entry.attr_timeout) == (0, 0)
    assert (entry.st_ino, entry.generation, entry.st_mode) == (9, 3, 0o100644)
    assert (entry.st_uid, entry.st_gid, entry.st_nlink) == (1, 2, 4)
    assert (entry.st_size, entry.st_blocks) == (5, 8)
    assert (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns) == (-1, 10**18 + 1, 7)
