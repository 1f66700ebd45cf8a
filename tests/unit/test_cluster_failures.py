"""Timelines of failures (lockmgr/PROTOCOL.md, Membership)."""

from __future__ import annotations

import pytest

from lockmgr.cluster.effects import (
    DepartedMayBeGranted,
    Fence,
    OpenPaths,
    ReplayWanted,
    Reserve,
    StopReason,
    Take,
    ViewInstalled,
    WriteHeartbeat,
    WriteView,
)
from lockmgr.cluster.events import DeathProven, EvictWanted, LeaveWanted, PathLost, Replayed
from tests.unit.cluster_host import Host
from tests.unit.cluster_world import World


def listed(host: Host) -> set[str]:
    """Names of those that the host's view lists."""
    view = host.member.view
    return {view.slots[node.slot].node_name for node in view.listed} if view else set()


def names(*hosts: Host) -> set[str]:
    return {host.name for host in hosts}


def power_off(world: World, host: Host) -> None:
    world.kill(host)
    world.isolate(host)


def since(world: World, times: list[float], begin: float) -> float:
    del world
    return times[-1] - begin


# -- power off -----------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", [0, 2], ids=["coordinator", "member"])
def test_power_off(victim: int) -> None:
    world = World()
    hosts = world.cluster(3)
    begin = world.t
    dead, rest = hosts[victim], [host for host in hosts if host is not hosts[victim]]
    power_off(world, dead)
    took = world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 20)
    assert 5.4 < took < 7.5
    world.run_until(lambda: all(host.when(DepartedMayBeGranted, dead.node) for host in rest), 10)
    assert world.t - begin < 8
    replayed_by = [host for host in rest if host.when(ReplayWanted, dead.node)]
    assert len(replayed_by) == 1
    world.run(2)
    assert not world.lun.view.to_replay
    assert sum(host.member.is_coordinator for host in rest) == 1


@pytest.mark.parametrize("victim", [0, 2], ids=["coordinator", "member"])
def test_proven_death(victim: int) -> None:
    world = World()
    hosts = world.cluster(3)
    dead, rest = hosts[victim], [host for host in hosts if host is not hosts[victim]]
    world.kill(dead)
    world.run(0.05)
    for host in rest:
        host.give(DeathProven(dead.node))
    took = world.run_until(
        lambda: all(host.when(DepartedMayBeGranted, dead.node) for host in rest), 5
    )
    assert took < 0.5


# -- frozen --------------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "member"])
def test_frozen_and_thawed(victim: int) -> None:
    world = World()
    hosts = world.cluster(3)
    frozen, rest = hosts[victim], [host for host in hosts if host is not hosts[victim]]
    world.freeze(frozen)
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 20)
    world.run(10)
    epoch = world.lun.view.epoch
    writes = len(frozen.when(WriteView))
    world.thaw(frozen)
    world.run_until(lambda: frozen.stopped is not None, 5)
    assert frozen.stopped is not None
    assert frozen.stopped.reason is StopReason.EVICTED
    assert len(frozen.when(WriteView)) == writes
    world.run(1)
    assert world.lun.view.epoch == epoch
    again = world.host(frozen.name)
    world.run_until(lambda: listed(rest[0]) == names(*hosts), 10)
    world.run(3)
    assert again.node != frozen.node


def test_short_freeze_costs_nothing() -> None:
    world = World()
    hosts = world.cluster(3)
    epoch = world.lun.view.epoch
    for host in hosts:
        world.freeze(host)
        world.run(4.5)
        world.thaw(host)
        world.run(3)
    assert world.lun.view.epoch == epoch


def test_everybody_was_frozen_longer_than_evict_after() -> None:
    """A judge that slept has observed nothing, so nobody is evicted when all wake up."""
    world = World()
    hosts = world.cluster(4)
    epoch = world.lun.view.epoch
    for host in hosts:
        world.freeze(host)
    world.run(30)
    for n in (2, 0, 1, 3):
        world.thaw(hosts[n])
        world.run(0.7)
    world.run(10)
    assert world.lun.view.epoch == epoch


def test_coordinator_frozen_with_a_view_write_on_its_way() -> None:
    world = World()
    hosts = world.cluster(3)
    hosts[0].hold_view = True
    late = world.host("host9")
    world.run_until(lambda: not hosts[0].hold_view, 5)
    world.freeze(hosts[0])
    # The write lands while the successor fences; only then it reads the view, and goes on from it.
    world.run_until(lambda: listed(hosts[1]) == names(hosts[1], hosts[2], late), 20)
    world.thaw(hosts[0])
    world.run_until(lambda: hosts[0].stopped is not None, 5)


def test_newcomer_whose_view_write_is_late() -> None:
    world = World()
    first = world.host("host0")
    first.hold_view = True
    world.run_until(lambda: not first.hold_view, 10)
    world.kill(first)
    second = world.host("host1")
    world.run_until(lambda: second.member.is_coordinator, 20)
    world.run(5)
    assert listed(second) == {"host1"}


# -- the network ---------------------------------------------------------------------------------
def test_partition_the_larger_part_stays() -> None:
    world = World()
    hosts = world.cluster(3)
    alone, rest = hosts[0], hosts[1:]  # the coordinator
    world.isolate(alone)
    views = len(alone.when(WriteView))
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 20)
    assert len(alone.when(WriteView)) == views
    world.run_until(lambda: alone.stopped is not None, 20)
    assert alone.stopped is not None
    assert alone.stopped.reason is StopReason.EVICTED


@pytest.mark.parametrize("swap", [False, True])
def test_two_nodes_that_do_not_hear_each_other(swap: bool) -> None:
    """Both live on the LUN: the lower slot stays, whoever is coordinator."""
    world = World()
    hosts = world.cluster(2)
    if swap:
        hosts[0].give(EvictWanted(hosts[0].node, "test"))
        world.run_until(lambda: hosts[1].member.is_coordinator, 5)
        hosts[0] = world.host("host0")
        world.run_until(lambda: listed(hosts[1]) == names(*hosts), 10)
        world.run(3)
    low, high = sorted(hosts, key=lambda host: host.node)
    world.isolate(high)
    world.run_until(lambda: listed(low) == {low.name}, 20)
    world.run_until(lambda: high.stopped is not None, 10)


def test_one_way_cut_counts_as_none() -> None:
    world = World()
    hosts = world.cluster(3)
    for other in hosts[:2]:
        world.cuts.add((hosts[2].name, other.name))
    world.run_until(lambda: listed(hosts[0]) == names(*hosts[:2]), 20)


def test_two_that_do_not_hear_each_other_among_four() -> None:
    world = World()
    hosts = world.cluster(4)
    world.cut((hosts[1], hosts[2]))
    gone = max(hosts[1:3], key=lambda host: host.node)
    rest = [host for host in hosts if host is not gone]
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 20)
    world.run(5)
    assert listed(hosts[0]) == names(*rest)


def test_short_cut_costs_nothing() -> None:
    world = World()
    hosts = world.cluster(3)
    epoch = world.lun.view.epoch
    world.isolate(hosts[1])
    world.run(5)
    world.cuts.clear()
    world.run(10)
    assert world.lun.view.epoch == epoch


# -- the SAN -------------------------------------------------------------------------------------
def test_member_without_a_path_keeps_its_lease_and_comes_back() -> None:
    world = World()
    hosts = world.cluster(3)
    epoch = world.lun.view.epoch
    world.cut_san(hosts[2])
    for _ in range(60):
        world.run(0.5)
        assert hosts[2].member.lease_until > world.now
    opened = len(hosts[2].when(OpenPaths))
    world.heal_san(hosts[2])
    world.run(3)
    assert len(hosts[2].when(OpenPaths)) >= opened
    assert world.lun.view.epoch == epoch
    assert hosts[2].control is not None


def test_coordinator_without_a_path_names_a_successor() -> None:
    world = World()
    hosts = world.cluster(3)
    world.cut_san(hosts[0])
    took = world.run_until(lambda: any(host.member.is_coordinator for host in hosts[1:]), 10)
    assert took < 4
    world.run(10)
    assert listed(hosts[1]) == names(*hosts)
    assert hosts[0].member.lease_until > world.now
    world.heal_san(hosts[0])
    world.run(3)
    assert sum(host.member.is_coordinator for host in hosts) == 1
    assert hosts[0].control is not None


def test_lun_is_away_for_everybody() -> None:
    world = World()
    hosts = world.cluster(3)
    for host in hosts:
        world.cut_san(host)
    world.run(60)
    assert all(host.member.lease_until < world.now for host in hosts)
    for host in reversed(hosts):
        world.heal_san(host)
        world.run(1)
    world.run(10)
    assert all(listed(host) == names(*hosts) for host in hosts)
    assert sum(host.member.is_coordinator for host in hosts) == 1


def test_member_loses_everything() -> None:
    world = World()
    hosts = world.cluster(3)
    begin = world.t
    world.cut_san(hosts[2])
    world.isolate(hosts[2])
    world.run_until(lambda: listed(hosts[0]) == names(*hosts[:2]), 20)
    world.run_until(lambda: hosts[1].when(DepartedMayBeGranted, hosts[2].node) != [], 10)
    assert world.t - begin < 8
    assert hosts[2].stopped is None  # it cannot know; its lease is over
    world.heal_san(hosts[2])
    world.run_until(lambda: hosts[2].stopped is not None, 5)


def test_tie_of_two_parts_of_which_one_has_a_single_path() -> None:
    """host0 and host2 against host1 and host3, and host2 has no path.

    To host1 and host3 host0 is alone: that somebody without a path lives shows only on the network.
    To host0 the parts are as big, and its own has the lower slots. Both may stay: whoever is first.
    """
    world = World()
    hosts = world.cluster(4)
    world.cut_san(hosts[2])
    world.run(10)
    for a in (hosts[0], hosts[2]):
        world.cut((a, hosts[1]), (a, hosts[3]))
    parts = ((hosts[0], hosts[2]), (hosts[1], hosts[3]))

    def stays(part: tuple[Host, ...]) -> bool:
        return all(listed(host) == names(*part) for host in part)

    world.run_until(lambda: any(map(stays, parts)), 15)
    gone = parts[0] if stays(parts[1]) else parts[1]
    world.run_until(lambda: all(host.stopped for host in gone if host is not hosts[2]), 5)
    assert any(map(stays, parts))


def test_lease_given_by_a_deposed_coordinator_is_waited_for() -> None:
    """host2 has no path and lives on leases from host0; both are evicted by the others."""
    world = World()
    hosts = world.cluster(5)
    world.cut_san(hosts[2])
    world.run(10)
    for a in (hosts[0], hosts[2]):
        world.cut(*((a, b) for b in (hosts[1], hosts[3], hosts[4])))
    rest = (hosts[1], hosts[3], hosts[4])
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 20)
    # The world asserts that no lease of the departed is valid when they may be granted.
    world.run_until(
        lambda: all(host.when(DepartedMayBeGranted, hosts[2].node) for host in rest), 20
    )


# -- the target ----------------------------------------------------------------------------------
def test_target_restart() -> None:
    world = World()
    hosts = world.cluster(3)
    world.restart_target()
    took = world.run_until(lambda: hosts[0].member.is_coordinator, 5)
    assert took < 2
    world.run(3)
    assert len(hosts[0].when(Reserve)) == 2  # the first as a newcomer
    assert not hosts[1].when(Reserve)
    assert all(listed(host) == names(*hosts) for host in hosts)
    assert all(host.control is not None for host in hosts)


def lose(host: Host) -> None:
    """The host's sessions are gone, as it learns now."""
    keys = tuple(session.key for session in (host.control, host.data) if session is not None)
    host.drop_paths()
    host.give(PathLost(keys))


@pytest.mark.parametrize("delay_ms", range(20))
def test_target_restart_while_another_reserves(delay_ms: int) -> None:
    """Somebody reserves between the survey that said "nobody" and the next (a simulator's find)."""
    world = World()
    hosts = world.cluster(2)
    world.lun.restart()
    lose(hosts[0])
    world.run(delay_ms / 1000)
    lose(hosts[1])
    world.run(3)
    begin = world.t
    power_off(world, hosts[0])
    world.run_until(lambda: hosts[1].member.is_coordinator, 20)
    assert [t for t in hosts[1].when(WriteHeartbeat) if begin - 1 < t < begin]


def test_target_restart_without_the_coordinator() -> None:
    world = World()
    hosts = world.cluster(3)
    power_off(world, hosts[0])
    world.restart_target()
    begin = world.t
    world.run_until(lambda: any(h.member.is_coordinator for h in hosts[1:]), 10)
    reserved = [t for host in hosts[1:] for t in host.when(Reserve)]
    assert len(reserved) == 1
    assert reserved[0] - begin >= world.settings.restart_grace_s
    beats = [t for host in hosts[1:] for t in host.when(WriteHeartbeat)]
    assert not [t for t in beats if begin < t < reserved[0]]
    world.run_until(lambda: listed(hosts[1]) == names(*hosts[1:]), 20)


# -- succession ----------------------------------------------------------------------------------
def test_successor_dies_between_taking_and_its_view() -> None:
    world = World()
    hosts = world.cluster(4)
    world.kill(hosts[0])
    world.run_until(lambda: any(host.when(Take) for host in hosts[2:] + hosts[1:2]), 20)
    successor = next(host for host in hosts[1:] if host.when(Take))
    world.run(0.01)
    assert world.lun.holder is successor.control
    world.kill(successor)
    rest = [host for host in hosts[1:] if host is not successor]
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 30)
    world.run_until(
        lambda: all(
            host.when(DepartedMayBeGranted, dead.node)
            for host in rest
            for dead in (hosts[0], successor)
        ),
        20,
    )


def test_loser_of_a_succession_goes_on_as_a_member() -> None:
    world = World()
    hosts = world.cluster(4)
    power_off(world, hosts[0])
    world.run(20)
    rest = hosts[1:]
    assert all(listed(host) == names(*rest) for host in rest)
    assert sum(host.member.is_coordinator for host in rest) == 1


def test_replayer_departs() -> None:
    world = World()
    hosts = world.cluster(4)
    world.replays = False
    power_off(world, hosts[3])
    world.run_until(lambda: any(host.when(ReplayWanted, hosts[3].node) for host in hosts[:3]), 20)
    replayer = next(host for host in hosts[:3] if host.when(ReplayWanted, hosts[3].node))
    world.replays = True
    power_off(world, replayer)
    rest = [host for host in hosts[:3] if host is not replayer]
    world.run_until(lambda: any(host.when(ReplayWanted, hosts[3].node) for host in rest), 20)
    world.run(10)
    assert not world.lun.view.to_replay


# -- datagrams pass, and nothing else --------------------------------------------------------------
@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_two_that_cannot_talk_to_each_other_do_not_both_stay(pair: tuple[int, int]) -> None:
    world = World()
    hosts = world.cluster(4)
    one, other = hosts[pair[0]], hosts[pair[1]]
    world.cut_connections((one, other))
    loser = max(one, other, key=lambda host: host.node)
    took_s = world.run_until(lambda: loser.stopped is not None, 20)
    assert 8.0 <= took_s < 12.0
    world.run(8)
    rest = [host for host in hosts if host is not loser]
    assert all(listed(host) == names(*rest) for host in rest)
    assert not world.lun.view.to_replay


def test_a_newcomer_that_one_member_cannot_talk_to_is_never_active() -> None:
    world = World()
    hosts = world.cluster(3)
    late = world.host("host9")
    world.cut_connections((late, hosts[1]))
    world.run_until(lambda: late.member.node is not None, 5)
    epoch = hosts[0].member.view.lock_epoch if hosts[0].member.view else 0
    world.run_until(lambda: late.stopped is not None, 12)
    world.run(8)
    for host in hosts:
        assert host.member.view is not None
        assert host.member.view.lock_epoch == epoch, "nobody had to recover a lock"
        assert listed(host) == names(*hosts)


def test_a_connection_that_comes_back_in_a_moment_is_nothing() -> None:
    world = World()
    hosts = world.cluster(3)
    epoch = hosts[0].epoch
    for _ in range(10):
        world.cut_connections((hosts[0], hosts[1]), (hosts[1], hosts[2]))
        world.run(0.3)
        world.tcp_cuts.clear()
        world.run(4)
    assert hosts[0].epoch == epoch


# -- on request ----------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("asker", [0, 2])
def test_eviction_on_request(victim: int, asker: int) -> None:
    world = World()
    hosts = world.cluster(3)
    rest = [host for host in hosts if host is not hosts[victim]]
    hosts[asker].give(EvictWanted(hosts[victim].node, "an administrator says so"))
    world.run_until(lambda: all(listed(host) == names(*rest) for host in rest), 10)
    world.run_until(lambda: hosts[victim].stopped is not None, 5)
    world.run(8)
    assert not world.lun.view.to_replay


def test_who_replays_again_what_somebody_replayed_is_waited_for() -> None:
    """Its late writes would go to the journal of whoever has the slot by then."""
    world = World()
    hosts = world.cluster(4)
    world.replays = False
    victim = hosts[3].node
    assert victim is not None
    hosts[0].give(EvictWanted(victim, "test"))
    rest = hosts[:3]
    world.run_until(lambda: any(host.when(ReplayWanted, victim) for host in rest), 5)
    (first,) = (host for host in rest if host.when(ReplayWanted, victim))
    first.give(Replayed(victim))
    first.give(LeaveWanted())
    world.run_until(lambda: first.stopped is not None, 5)
    others = [host for host in rest if host is not first]
    world.run_until(lambda: any(host.when(ReplayWanted, victim) for host in others), 5)
    (second,) = (host for host in others if host.when(ReplayWanted, victim))
    world.run(10)
    assert victim in world.lun.view.to_replay
    second.give(Replayed(victim))
    world.run(2)
    assert not world.lun.view.to_replay


# -- answers that never come -----------------------------------------------------------------------
@pytest.mark.parametrize("effect", [Take, Fence, WriteView])
def test_session_dies_in_the_middle_of_a_succession(effect: type) -> None:
    world = World()
    hosts = world.cluster(3)
    power_off(world, hosts[0])
    before = {host.name: len(host.when(effect)) for host in hosts}
    world.run_until(
        lambda: any(len(host.when(effect)) > before[host.name] for host in hosts[1:]), 20
    )
    actor = next(host for host in hosts[1:] if len(host.when(effect)) > before[host.name])
    world.break_session(actor)
    world.run_until(lambda: all(listed(host) == names(*hosts[1:]) for host in hosts[1:]), 20)
    world.run(5)
    assert not world.lun.view.to_replay
    assert sum(host.member.is_coordinator for host in hosts[1:]) == 1
    assert actor.when(ViewInstalled)
