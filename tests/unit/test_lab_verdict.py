"""The workload finds what it is there to find: each kind of mistake, made on purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from csvctl.lab import workload
from csvctl.lab.block import NEVER, Foreign, Stamp, Version, build, version_of
from csvctl.lab.history import Diary, History, add_lines, read_log
from csvctl.lab.verdict import Verdict, judge
from csvctl.lab.workload import Job, Writer

BLOCK = 4096


def told(*lines: str) -> History:
    history = History()
    add_lines(lines, history)
    return history


def verdict(history: History, holds: Version | None = None) -> Verdict:
    """The judgement on file 1, offset 0."""
    return judge(history, {} if holds is None else {(1, 0): holds}, {})


TWO_WRITES = (
    "ISSUED 1 0 1 1",
    "ACKED 1 0 1 1 100 110",
    "ISSUED 1 0 1 2",
    "ACKED 1 0 1 2 200 210",
)
TAKEN_OVER = (
    *TWO_WRITES,
    "ISSUED 1 0 1 3",  # under way when its host was frozen
    "FOUND 1 0 1 2 2 300",
    "ISSUED 1 0 2 1",
    "ACKED 1 0 2 1 400 410",
)


# -- blocks ------------------------------------------------------------------------------------
def test_a_block_says_what_it_is() -> None:
    block = build(Stamp(7, 8192, (3, 99)), BLOCK)
    assert len(block) == BLOCK
    assert version_of(block, 7, 8192) == (3, 99)
    assert version_of(bytes(BLOCK), 7, 8192) == NEVER


@pytest.mark.parametrize("at", [0, 8, 12, 16, 24, 32, 36, 2000, BLOCK - 1])
def test_one_damaged_byte_is_found(at: int) -> None:
    block = bytearray(build(Stamp(7, 8192, (3, 99)), BLOCK))
    block[at] ^= 1
    with pytest.raises(Foreign):
        version_of(bytes(block), 7, 8192)


@pytest.mark.parametrize("at", [512, 2048, BLOCK - 512])
def test_a_mixture_of_two_writes_is_found(at: int) -> None:
    older, newer = (build(Stamp(7, 0, (1, number)), BLOCK) for number in (1, 2))
    for torn in (older[:at] + newer[at:], newer[:at] + older[at:], newer[:at] + bytes(BLOCK - at)):
        with pytest.raises(Foreign):
            version_of(torn, 7, 0)


def test_a_block_of_another_place_is_found() -> None:
    block = build(Stamp(7, 8192, (1, 1)), BLOCK)
    for file, offset in ((8, 8192), (7, 4096)):
        with pytest.raises(Foreign, match="belongs to"):
            version_of(block, file, offset)


# -- the judgement -------------------------------------------------------------------------------
def test_all_is_well() -> None:
    assert verdict(told(*TWO_WRITES), (1, 2)).ok


def test_a_newer_write_that_was_not_acknowledged_may_be_there() -> None:
    assert verdict(told(*TWO_WRITES, "ISSUED 1 0 1 3"), (1, 3)).ok


@pytest.mark.parametrize("holds", [(1, 1), NEVER])
def test_a_lost_write(holds: Version) -> None:
    found = verdict(told(*TWO_WRITES), holds)
    assert len(found.lost) == 1 and not found.stale and not found.zombies


def test_a_write_that_nobody_made() -> None:
    assert verdict(told(*TWO_WRITES), (1, 9)).lost == [
        "file 1 offset 0: holds (1, 9), which nobody wrote"
    ]


def test_a_torn_block_at_the_end_is_lost() -> None:
    assert judge(told(*TWO_WRITES), {}, {(1, 0): "torn"}).lost


def test_a_write_lost_before_the_next_writer_came_is_found_though_it_wrote_again() -> None:
    history = told(*TWO_WRITES, "FOUND 1 0 1 1 2 300", "ISSUED 1 0 2 1", "ACKED 1 0 2 1 400 410")
    assert len(verdict(history, (2, 1)).lost) == 1


def test_a_late_write_over_a_later_writers() -> None:
    found = verdict(told(*TAKEN_OVER), (1, 3))
    assert len(found.zombies) == 1 and not found.lost


def test_a_late_write_over_what_a_later_writer_found_and_had_not_yet_written() -> None:
    found = verdict(told(*TAKEN_OVER[:6]), (1, 3))
    assert len(found.zombies) == 1 and not found.lost


def test_a_later_writers_lost_write_is_lost_and_not_late() -> None:
    found = verdict(told(*TAKEN_OVER), (1, 2))
    assert len(found.lost) == 1 and not found.zombies


def test_a_late_write_that_only_a_reader_saw() -> None:
    found = verdict(told(*TAKEN_OVER, "READ 1 0 1 3 320 330"), (2, 1))
    assert len(found.zombies) == 1


def test_a_read_that_began_after_the_write_had_returned_and_is_older() -> None:
    assert len(verdict(told(*TWO_WRITES, "READ 1 0 1 1 201 220")).stale) == 1


def test_a_read_that_began_before_the_write_returned_may_be_either() -> None:
    for sequence in (1, 2):
        assert verdict(told(*TWO_WRITES, f"READ 1 0 1 {sequence} 199 220")).ok


def test_a_read_older_than_one_that_was_over_before_it_began() -> None:
    reads = ("READ 1 0 1 2 150 160", "READ 1 0 1 1 170 180")
    assert len(verdict(told(*TWO_WRITES, *reads)).stale) == 1


def test_a_read_of_what_a_crash_undid_proves_nothing() -> None:
    history = told(*TWO_WRITES, "ISSUED 1 0 1 3", "READ 1 0 1 3 220 230", "READ 1 0 1 2 240 250")
    assert verdict(history, (1, 2)).ok


def test_a_read_of_a_torn_block_is_stale() -> None:
    assert (
        len(verdict(told(*TWO_WRITES, "FOREIGN 1 0 150 torn, or not of this"), (1, 2)).stale) == 1
    )


def test_a_stale_zero() -> None:
    assert len(verdict(told(*TWO_WRITES, "READ 1 0 0 0 300 310")).stale) == 1


# -- logs -------------------------------------------------------------------------------------
def test_pauses_count_up_to_the_end() -> None:
    diary = add_lines(["ENDED 5000000000", *TWO_WRITES], History())
    assert diary.max_pause_s == pytest.approx(5, rel=1e-6)
    assert Diary().max_pause_s == 0


def test_a_line_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(TWO_WRITES) + "\nACKED 1 0 1 99 3")
    history = History()
    read_log(log, history)
    assert [ack.version for ack in history.acked[1, 0]] == [(1, 1), (1, 2)]


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="BANANA"):
        told("BANANA 1 2 3 4")


# -- the programs, on a plain directory ----------------------------------------------------------
@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory that stands for a mount."""
    monkeypatch.setattr(workload, "mounted_device", lambda path: os.stat(path).st_dev)
    return tmp_path


def job(directory: Path, **options: object) -> Job:
    fields = {"file": 1, "blocks": 16, "term": 1, "rewrite": True, "once": True} | options
    image, log = str(directory / "image"), str(directory / f"log{fields['term']}")
    return Job(mountpoint=str(directory), path=image, log=log, **fields)  # type: ignore[arg-type]


def compare(directory: Path, *terms: int) -> Verdict:
    history = History()
    for term in terms:
        read_log(directory / f"log{term}", history)
    found = json.loads(workload.verify(job(directory)))
    final = {(1, int(offset)): tuple(each) for offset, each in found["versions"].items()}
    return judge(history, final, {(1, int(o)): why for o, why in found["foreign"].items()})


def test_what_the_writer_wrote_is_what_it_says(anywhere: Path) -> None:
    assert Writer(job(anywhere)).run() == 0
    assert Writer(job(anywhere, term=2)).run() == 0
    assert compare(anywhere, 1, 2).ok


def test_a_corrupted_block_is_found(anywhere: Path) -> None:
    assert Writer(job(anywhere)).run() == 0
    image = bytearray((anywhere / "image").read_bytes())
    image[3 * BLOCK + 700] ^= 1
    (anywhere / "image").write_bytes(image)
    assert len(compare(anywhere, 1).lost) == 1


def test_a_write_that_never_happened_is_found(
    anywhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def forgetful(handle: int, buffers: list[bytes], offset: int) -> int:
        return BLOCK if offset == 5 * BLOCK else real(handle, buffers, offset)

    monkeypatch.setattr(os, "pwritev", forgetful)
    assert Writer(job(anywhere)).run() == 0
    assert compare(anywhere, 1).lost == [
        "file 1 offset 20480: holds (0, 0), (1, 6) was acknowledged"
    ]


def test_a_write_to_the_wrong_place_is_found(
    anywhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev
    monkeypatch.setattr(
        os,
        "pwritev",
        lambda handle, buffers, offset: real(handle, buffers, 0 if offset == BLOCK else offset),
    )
    assert Writer(job(anywhere)).run() == 0
    assert len(compare(anywhere, 1).lost) == 2


def test_an_old_image_put_back_is_found(anywhere: Path) -> None:
    assert Writer(job(anywhere)).run() == 0
    old = (anywhere / "image").read_bytes()
    assert Writer(job(anywhere, term=2)).run() == 0
    (anywhere / "image").write_bytes(old)
    assert len(compare(anywhere, 1, 2).lost) == 16


def test_an_error_is_logged_and_ends_the_program(
    anywhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_handle: int) -> None:
        raise OSError(5, "no")

    monkeypatch.setattr(os, "fsync", refused)
    assert Writer(job(anywhere)).run() == workload.FAILED
    history = History()
    assert read_log(anywhere / "log1", history).errors[0].startswith("writer 5 ")
    assert not history.acked


def test_a_short_write_is_an_error(anywhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda _handle, _buffers, _offset: 512)
    assert Writer(job(anywhere)).run() == workload.FAILED


def test_nothing_is_written_where_nothing_is_mounted(tmp_path: Path) -> None:
    assert Writer(job(tmp_path)).run() == workload.FAILED
    assert not (tmp_path / "image").exists()
