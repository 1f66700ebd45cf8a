"""Timelines of paths that are lost and come back (lockmgr/PROTOCOL.md, Membership: Proof).

The world asserts of each `PathsReady` that it is the first of that session, and that none of the
node's earlier keys is registered; what the fence drains, it drains at the target.
"""

from __future__ import annotations

import pytest

from lockmgr.cluster.effects import Beat, Fence, OpenPaths, PathsReady
from lockmgr.cluster.errors import MembershipViolation
from lockmgr.cluster.events import Done, EvictWanted, HeartbeatFailed, PathLost, Received, Tick
from lockmgr.cluster.messages import KEYS_PER_MESSAGE, FenceAsked, Fenced
from tests.unit.cluster_host import Host
from tests.unit.cluster_lun import KEYS
from tests.unit.cluster_world import FENCE_S, World
from tests.unit.test_cluster_failures import listed, lose, names, power_off


def keys_of(host: Host) -> tuple[int, ...]:
    return tuple(session.key for session in (host.control, host.data) if session is not None)


def fences(host: Host, keys: tuple[int, ...]) -> list[float]:
    """When it began to fence all of these."""
    return [t for t, e in host.log if isinstance(e, Fence) and set(keys) <= set(e.keys)]


def is_ready(host: Host) -> bool:
    return host.control is not None and host.ready[-1:] == [host.control.key]


def test_first_paths_are_ready_at_once() -> None:
    world = World()
    hosts = world.cluster(3)
    for host in hosts:
        assert is_ready(host) and len(host.ready) == 1
        assert not host.said(FenceAsked)
    opened = hosts[2].when(OpenPaths)[-1]
    assert hosts[2].when(PathsReady)[-1] - opened < 0.01


def test_lost_paths_are_fenced_before_new_ones_are_used() -> None:
    world = World()
    hosts = world.cluster(3)
    before = keys_of(hosts[2])
    begin = world.t
    world.break_session(hosts[2])
    took = world.run_until(lambda: is_ready(hosts[2]) and len(hosts[2].ready) == 2, 2)
    assert took < 0.2
    (asked,) = hosts[2].said(FenceAsked)
    assert asked[1:] == (hosts[0].node, FenceAsked(before))
    opened, ready = hosts[2].when(OpenPaths)[-1], hosts[2].when(PathsReady)[-1]
    assert begin < opened < asked[0] < ready
    assert asked[0] - opened < 0.01  # not with the next tick only
    assert len(fences(hosts[0], before)) == 1
    world.run(5)
    assert len(hosts[2].ready) == 2
    assert len(hosts[2].said(FenceAsked)) == 1


def test_those_that_ask_together_share_a_fence() -> None:
    world = World()
    hosts = world.cluster(4)
    before = len(hosts[0].when(Fence))
    for host in hosts[1:]:
        world.break_session(host)
    world.run_until(lambda: all(len(host.ready) == 2 for host in hosts[1:]), 2)
    assert len(hosts[0].when(Fence)) == before + 2


def test_short_network_cut_asks_for_no_proof() -> None:
    world = World()
    hosts = world.cluster(3)
    world.isolate(hosts[2])
    world.run(5)
    world.cuts.clear()
    world.run(5)
    assert all(len(host.ready) == 1 and not host.said(FenceAsked) for host in hosts)


def test_coordinators_own_lost_paths() -> None:
    world = World()
    hosts = world.cluster(3)
    before = keys_of(hosts[0])
    world.break_session(hosts[0])
    world.run_until(lambda: len(hosts[0].ready) == 2, 2)
    assert fences(hosts[0], before)
    assert hosts[0].when(PathsReady)[-1] - hosts[0].when(Fence)[0] >= FENCE_S
    assert not hosts[0].said(FenceAsked)
    world.run(3)
    assert hosts[0].member.is_coordinator


def test_coordinator_dies_between_fence_and_fenced() -> None:
    world = World()
    hosts = world.cluster(3)
    before = keys_of(hosts[2])
    world.break_session(hosts[2])
    world.run_until(lambda: bool(fences(hosts[0], before)), 2)
    world.run(FENCE_S * 0.75)  # it has landed, and is not answered
    assert not [s for s in world.lun.registered if s.key in before]
    power_off(world, hosts[0])
    world.run(5)
    assert len(hosts[2].ready) == 1
    assert len(hosts[2].said(FenceAsked)) >= 9  # with every tick
    world.run_until(lambda: is_ready(hosts[2]), 5)
    assert fences(hosts[1], before)
    assert hosts[2].said(FenceAsked)[-1][1] == hosts[1].node


def test_lost_word_is_said_again() -> None:
    world = World()
    hosts = world.cluster(3)
    before = keys_of(hosts[2])
    world.break_session(hosts[2])
    world.run_until(lambda: bool(fences(hosts[0], before)), 2)
    world.isolate(hosts[2])
    world.run(2)
    assert len(hosts[0].said(Fenced)) == 1
    assert len(hosts[2].ready) == 1
    world.cuts.clear()
    took = world.run_until(lambda: is_ready(hosts[2]), 2)
    assert took <= world.settings.heartbeat_s + 0.01
    assert len(fences(hosts[0], before)) == 1


def test_paths_lost_again_while_asking() -> None:
    world = World()
    hosts = world.cluster(3)
    first = keys_of(hosts[2])
    world.break_session(hosts[2])
    world.run_until(lambda: bool(fences(hosts[0], first)), 2)
    second = keys_of(hosts[2])
    assert second and not set(first) & set(second)
    world.break_session(hosts[2])
    world.run_until(lambda: is_ready(hosts[2]), 2)
    world.run(3)
    third = keys_of(hosts[2])
    assert hosts[2].ready == [first[0], third[0]]
    answered = [m.keys for _, _, m in hosts[0].said(Fenced) if isinstance(m, Fenced)]
    assert set(second) <= {key for keys in answered for key in keys}


def test_fenced_of_an_older_set_is_true_and_not_enough() -> None:
    world = World()
    hosts = world.cluster(3)
    world.cut((hosts[0], hosts[2]))
    first = keys_of(hosts[2])
    lose(hosts[2])
    world.run(0.1)
    second = keys_of(hosts[2])
    lose(hosts[2])
    assert hosts[0].control is not None
    world.lun.fence(hosts[0].control, first, ())
    hosts[2].give(Received(hosts[0].node, Fenced(first)))  # its word had left before the cut
    world.run(0.1)
    assert len(hosts[2].ready) == 1
    asked = hosts[2].said(FenceAsked)[-1][2]
    assert asked == FenceAsked(second)
    world.cuts.clear()
    world.run_until(lambda: is_ready(hosts[2]), 2)


def test_office_changes_hands_while_a_member_asks() -> None:
    world = World()
    hosts = world.cluster(3)
    before = keys_of(hosts[2])
    world.cut_san(hosts[0])
    world.run(0.3)
    world.break_session(hosts[2])
    world.run(1.5)
    assert fences(hosts[0], before)  # has no answer
    assert len(hosts[2].ready) == 1
    world.run_until(lambda: is_ready(hosts[2]), 5)
    assert hosts[1].member.is_coordinator
    assert fences(hosts[1], before)
    assert listed(hosts[1]) == names(*hosts)
    # The former coordinator comes back as a member, and asks its successor.
    world.heal_san(hosts[0])
    world.run_until(lambda: is_ready(hosts[0]) and len(hosts[0].ready) == 2, 5)
    assert hosts[0].said(FenceAsked)[-1][1] == hosts[1].node


def test_asker_takes_office_itself() -> None:
    world = World()
    hosts = world.cluster(2)
    before = keys_of(hosts[1])
    power_off(world, hosts[0])
    world.run(1)
    world.break_session(hosts[1])
    world.run_until(lambda: is_ready(hosts[1]) and len(hosts[1].ready) == 2, 20)
    assert fences(hosts[1], before)
    assert hosts[1].member.state.holds


def test_target_restart_proves_the_paths_anew() -> None:
    world = World()
    hosts = world.cluster(3)
    world.restart_target()
    began = world.t
    world.run_until(lambda: world.lun.holder is not None, 10)
    assert all(len(host.ready) == 1 and not host.said(FenceAsked) for host in hosts)
    world.run_until(lambda: all(len(host.ready) == 2 for host in hosts), 5)
    world.run(3)
    assert all(len(host.ready) == 2 for host in hosts)
    fence = next(t for t in hosts[0].when(Fence) if t > began)
    assert all(host.when(PathsReady)[-1] >= fence + FENCE_S for host in hosts)


def test_evicted_asker_gets_nothing() -> None:
    world = World()
    hosts = world.cluster(3)
    before = len(hosts[0].said(Fenced))
    world.break_session(hosts[2])
    world.run_until(lambda: hosts[2].said(FenceAsked) != [], 2)
    hosts[0].give(EvictWanted(hosts[2].node, "test"))
    world.run_until(lambda: hosts[2].stopped is not None, 5)
    assert len(hosts[2].ready) == 1
    assert len(hosts[0].said(Fenced)) == before


def test_nobody_has_the_keys_of_others_fenced() -> None:
    world = World()
    hosts = world.cluster(3)
    theirs = keys_of(hosts[1])
    before = len(hosts[0].when(Fence))
    own = KEYS.path(hosts[2].node, 999)
    hosts[0].give(Received(hosts[2].node, FenceAsked(theirs)))
    world.run(1)
    assert len(hosts[0].when(Fence)) == before
    hosts[0].give(Received(hosts[2].node, FenceAsked((*theirs, own))))
    world.run(1)
    assert fences(hosts[0], (own,))
    assert not fences(hosts[0], theirs)
    assert keys_of(hosts[1]) == theirs
    # Only the coordinator fences.
    hosts[1].give(Received(hosts[2].node, FenceAsked((own,))))
    world.run(1)
    assert not fences(hosts[1], (own,))


def test_many_lost_paths_are_asked_for_in_parts() -> None:
    world = World()
    hosts = world.cluster(2)
    world.cut((hosts[0], hosts[1]))
    for _ in range(40):
        lose(hosts[1])
        world.run(0.02)
    world.cuts.clear()
    world.run_until(lambda: is_ready(hosts[1]), 3)
    asked = [m.keys for _, _, m in hosts[1].said(FenceAsked) if isinstance(m, FenceAsked)]
    assert max(len(keys) for keys in asked) == KEYS_PER_MESSAGE
    assert len({key for keys in asked for key in keys}) == 80


def test_paths_lost_while_they_are_opened_are_proven_too() -> None:
    """Keys of paths that were not opened to the end."""
    world = World()
    hosts = world.cluster(2)
    lose(hosts[1])
    half_open = KEYS.path(hosts[1].node, 500)
    hosts[1].give(PathLost((half_open,)))
    world.run_until(lambda: len(hosts[1].ready) == 2, 2)
    assert fences(hosts[0], (half_open,))


def test_path_lost_that_is_said_too_late_closes_the_next_one() -> None:
    """No correct shell does that; new paths are opened, for these were ready too early."""
    world = World()
    hosts = world.cluster(2)
    unheard_of = KEYS.path(hosts[1].node, 500)
    hosts[1].give(PathLost((unheard_of,)))
    world.run_until(lambda: len(hosts[1].ready) == 2, 2)
    assert fences(hosts[0], (unheard_of,))


def test_new_paths_without_a_word_about_the_old_ones() -> None:
    """The data session's key would not be known: a broken shell."""
    world = World()
    hosts = world.cluster(2)
    member = hosts[1].member
    due = member.next_timer()
    assert due is not None
    effects = member.step(Tick(), due)
    beat = next(effect for effect in effects if isinstance(effect, Beat))
    effects = member.step(HeartbeatFailed(beat.key), due)
    opening = next(e for e in effects if isinstance(e, OpenPaths))
    outcome = world.open_without_a_word(hosts[1], hosts[1].node)
    with pytest.raises(MembershipViolation, match="before PathLost has named"):
        member.step(Done(opening.op, outcome), due)
