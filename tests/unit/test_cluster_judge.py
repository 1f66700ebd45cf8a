"""The judge and the leases, piece by piece."""

from __future__ import annotations

import pytest

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.judge import Judge
from lockmgr.cluster.lease import Lease, LeasesGiven
from lockmgr.cluster.links import Links
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId

A, B, C = NodeId(0, 1), NodeId(1, 1), NodeId(2, 1)
SETTINGS = Settings()


def everywhere(*nodes: NodeId) -> Links:
    links = Links(SETTINGS)
    for node in nodes:
        links.connected(node)
    return links


def beat(node: NodeId, sequence: int, *hears: NodeId, direct: bool = True) -> Heartbeat:
    flags = HeartbeatFlag.HAS_DIRECT_PATH if direct else HeartbeatFlag.NONE
    bits = sum(1 << other.slot for other in {node, *hears})
    return Heartbeat(node.slot, node.incarnation, sequence, 1, bits, flags)


def judge_of_three() -> Judge:
    judge = Judge(A, SETTINGS, everywhere(A, B, C))
    judge.set_nodes((A, B, C), 0.0)
    return judge


def test_all_are_fresh_for_the_whole_time_before_silence_counts() -> None:
    judge = judge_of_three()
    assert judge.verdict(6.0, True) == {A, B, C}
    assert judge.verdict(6.1, True) == {A}


def test_a_living_disk_does_not_save_who_does_not_hear() -> None:
    judge = judge_of_three()
    for n in range(20):
        now = n * 0.5
        judge.take_blocks((beat(C, n),), now)
        judge.take_beat(beat(B, n, A), now)
    assert judge.is_alive(C, 9.5)
    assert judge.verdict(9.5, True) == {A, B}


def test_one_sided_hearing_is_none() -> None:
    judge = judge_of_three()
    for n in range(20):
        judge.take_beat(beat(B, n, A, C), n * 0.5)
        judge.take_beat(beat(C, n, A), n * 0.5)
    assert judge.verdict(9.5, True) == {A, B}  # and not {A, C}: lexicographically lower


def test_who_is_joining_costs_no_active_member_its_place() -> None:
    judge = Judge(A, SETTINGS, everywhere(A, B, C))
    judge.set_nodes((A, B, C), 0.0, joining=(B,))
    for n in range(20):
        judge.take_beat(beat(B, n, A), n * 0.5)
        judge.take_beat(beat(C, n, A), n * 0.5)
    assert judge.verdict(9.5, True) == {A, C}


def test_while_a_cut_does_not_show_everywhere_nobody_is_judged() -> None:
    judge = judge_of_three()
    for n in range(8):
        judge.take_beat(beat(B, n, A, C), n * 0.5)
        judge.take_beat(beat(C, n, A, B), n * 0.5 + 0.4)
    for n in range(8, 16):  # datagrams to and from A stop; blocks tell what the others hear
        judge.take_blocks((beat(B, n, C), beat(C, n, B)), n * 0.5)
    assert judge.verdict(9.6, True) == {A, B, C}  # A and B are apart, A and C for 5.7 s
    assert judge.verdict(10.1, True) == {B, C}


def test_who_slept_starts_afresh_but_knows_what_did_not_change() -> None:
    judge = judge_of_three()
    judge.take_blocks((beat(B, 1),), 1.0)
    judge.restart(100.0)
    judge.take_blocks((beat(B, 1),), 100.0)
    assert judge.verdict(105.0, True) == {A, B, C}
    assert judge.changed_at(B, 100.0) == 1.0
    judge.take_blocks((beat(B, 2),), 101.0)
    assert judge.changed_at(B, 101.0) == 101.0


def test_a_block_that_is_seen_first_is_no_sign_of_life() -> None:
    judge = judge_of_three()
    judge.take_blocks((beat(B, 1, A),), 5.0)
    assert not judge.is_alive(B, 6.5)


def test_an_old_datagram_is_no_sign_of_life() -> None:
    judge = judge_of_three()
    assert judge.take_beat(beat(B, 5), 1.0)
    assert not judge.take_beat(beat(B, 5), 2.0)
    assert not judge.take_beat(beat(B, 4), 2.0)
    assert judge.last_sign(B) == 1.0


def test_another_incarnation_is_nobody() -> None:
    judge = judge_of_three()
    assert not judge.take_beat(beat(NodeId(1, 2), 5), 1.0)


def test_the_lease_runs_from_sending() -> None:
    lease = Lease(SETTINGS)
    assert lease.renewed(10.0) == 14.0
    assert lease.renewed(9.0) is None


def test_a_coordinator_that_was_frozen_gives_no_lease() -> None:
    given = LeasesGiven(SETTINGS)
    assert not given.may_answer(0.0)
    given.wrote(10.0)  # the confirmation may be read much later
    assert given.may_answer(11.0)
    assert not given.may_answer(11.1)


@pytest.mark.parametrize(
    ("holder_changed", "fenced", "over"),
    [(2.0, 8.0, 8.0), (20.0, 8.0, 14.0)],
)
def test_a_deposed_coordinators_last_answer_counts(
    holder_changed: float, fenced: float, over: float
) -> None:
    given = LeasesGiven(SETTINGS)
    given.other_held(holder_changed, fenced)
    assert given.over_at(B, block_changed_at=0.0) == pytest.approx(over, abs=0.01)


def test_settings_whose_times_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="lease"):
        Settings(lease_s=5.0)
