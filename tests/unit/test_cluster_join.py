"""Timelines of joining and leaving (lockmgr/PROTOCOL.md, Membership)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.effects import (
    DepartedMayBeGranted,
    Knock,
    ReadBlocks,
    ReplayWanted,
    Stop,
    StopReason,
    Take,
    ViewInstalled,
    WriteHeartbeat,
    WriteJoin,
    WriteView,
)
from lockmgr.cluster.events import LeaveWanted, Replayed, StrangerCame
from lockmgr.cluster.view import NodeId, SlotState
from tests.unit.cluster_host import Host
from tests.unit.cluster_lun import KEYS
from tests.unit.cluster_world import World


def is_active(host: Host) -> bool:
    view = host.member.view
    return view is not None and host.node in view.active


# -- nobody is there -----------------------------------------------------------------------------
def test_first_node_of_a_new_volume() -> None:
    world = World()
    host = world.host("host0")
    world.run_until(lambda: is_active(host), 10)
    assert host.when(Take) == [host.when(Take)[0]]  # only of its own temporary key
    assert world.settings.silence_s <= host.when(WriteView)[0] < 6.0
    assert host.when(ReplayWanted, host.node)
    assert host.member.is_coordinator
    assert [KEYS.owner(s.key) for s in world.lun.registered] == [host.node] * 2


def test_parked_volume_is_taken_at_once() -> None:
    world = World()
    (first,) = world.cluster(1)
    first.give(LeaveWanted())
    world.run(0.5)
    assert first.stopped is not None
    assert first.stopped.reason is StopReason.LEFT
    assert not world.lun.view.members
    assert world.lun.holder_key == world.lun.view.holder_key
    second = world.host("host1")
    assert world.run_until(lambda: is_active(second), 10) < 1.5
    # It takes the first free slot; an incarnation never comes again.
    assert second.node == NodeId(0, 2)


def test_own_dead_only_member_is_succeeded_at_once() -> None:
    world = World()
    (first,) = world.cluster(1)
    world.kill(first)
    second = world.host("host0")
    assert world.run_until(lambda: is_active(second), 10) < 1.5
    assert second.when(ReplayWanted, NodeId(0, 1))
    assert second.when(DepartedMayBeGranted, NodeId(0, 1))  # its host says that it is dead


def test_own_dead_of_another_boot_is_looked_at_first() -> None:
    world = World()
    (first,) = world.cluster(1)
    world.kill(first)
    second = world.host("host0", boot=1)
    assert 2.0 <= world.run_until(lambda: is_active(second), 10) < 4.0
    assert second.when(DepartedMayBeGranted, NodeId(0, 1))


def test_copy_of_a_living_host_takes_nothing() -> None:
    """Name and machine id came with the copy of a system disk; its lock file is its own."""
    world = World()
    (first,) = world.cluster(1)
    copy = world.host("host0", boot=1)
    world.run_until(lambda: copy.stopped is not None, 10)
    assert copy.stopped is not None
    assert copy.stopped.reason is StopReason.REFUSED
    assert "member already" in copy.stopped.words
    assert not copy.when(Take)
    world.run(5)
    assert is_active(first) and first.member.is_coordinator


def test_dead_cluster_is_succeeded_after_silence() -> None:
    world = World()
    hosts = world.cluster(2)
    for host in hosts:
        world.kill(host)
    late = world.host("host9")
    took = world.run_until(lambda: late.member.is_coordinator, 20)
    assert 5.0 <= took < 6.5
    world.run_until(lambda: is_active(late), 20)
    assert late.member.view is not None
    assert late.member.view.active == (late.node,)
    for host in hosts:
        assert late.when(ReplayWanted, host.node)
        assert late.when(DepartedMayBeGranted, host.node)


def test_silent_disk_is_not_taken_from_nodes_that_answer() -> None:
    world = World()
    hosts = world.cluster(2)
    for host in hosts:
        world.cut_san(host)
    world.run(10)
    late = world.host("host9")
    world.run(20)
    assert late.member.node is None
    assert not late.stopped
    for host in hosts:
        world.heal_san(host)
    world.run_until(lambda: is_active(late), 10)
    assert all(is_active(host) for host in hosts)


def test_two_newcomers_take_an_empty_volume_at_the_same_time() -> None:
    world = World()
    hosts = [world.host("host0"), world.host("host1")]
    world.run_until(lambda: all(is_active(host) for host in hosts), 30)
    assert sum(host.member.is_coordinator for host in hosts) == 1


# -- being admitted ------------------------------------------------------------------------------
def test_admission_step_by_step() -> None:
    world = World()
    (first,) = world.cluster(1)
    epoch = first.epoch
    second = world.host("host1")
    world.run_until(lambda: second.member.node is not None, 5)
    assert second.when(WriteJoin)
    assert not second.when(WriteView)
    world.run_until(lambda: is_active(second), 5)
    assert second.epoch == epoch + 2  # joining, active
    views = [e.view for _, e in first.log if isinstance(e, ViewInstalled)][-2:]
    assert [view.state_of(second.node) for view in views] == [SlotState.JOINING, SlotState.ACTIVE]
    # Who joins does not freeze the locks; who becomes active does.
    assert views[0].lock_epoch < views[1].lock_epoch == views[1].epoch
    assert second.newcomer is None


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_a_newcomer_is_active_within_a_second_of_its_request(phase_s: float) -> None:
    """Neither side waits for its next heartbeat: half a second at most until the block is seen."""
    world = World()
    hosts = world.cluster(3)
    world.run(5 + phase_s)
    late = world.host("host9")
    world.run_until(lambda: late.when(WriteJoin) != [], 1)
    asked_at = world.now
    world.run_until(lambda: late.member.node is not None, 1)
    asked = [at for at, effect in late.log if isinstance(effect, WriteJoin)]
    assert all(b - a < 0.1 for a, b in itertools.pairwise(asked))
    world.run_until(lambda: is_active(late), 1)
    assert world.now - asked_at < 1.0
    assert all(is_active(host) for host in hosts)


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_a_newcomer_that_knocks_does_not_wait_for_the_coordinator_s_heartbeat(
    phase_s: float,
) -> None:
    world = World()
    world.cluster(3)
    world.run(5 + phase_s)
    late = world.host("host9")
    world.run_until(lambda: late.when(WriteJoin) != [], 1)
    assert world.run_until(lambda: late.member.node is not None, 1) < 0.25
    assert len(late.when(Knock)) == 1


def test_a_newcomer_whose_knock_nobody_hears_waits_for_a_heartbeat() -> None:
    world = World()
    world.cluster(3)
    late = world.host("host9")
    world.isolate(late)
    world.run_until(lambda: late.member.node is not None, 2)


def test_strangers_in_masses_cost_one_look_more_for_each_heartbeat() -> None:
    world = World()
    first, second, _ = world.cluster(3)
    world.run(5)
    looked = [len(host.when(ReadBlocks)) for host in (first, second)]
    for n in range(2000):
        world.at(world.now + n / 1000, partial(first.give, StrangerCame()))
        world.at(world.now + n / 1000, partial(second.give, StrangerCame()))
    world.run(2)
    first_looks, second_looks = (
        len(host.when(ReadBlocks)) - before
        for host, before in zip((first, second), looked, strict=True)
    )
    usual = 2 / world.settings.heartbeat_s
    assert usual < first_looks <= 2 * usual + 2
    assert second_looks <= usual + 1, "it admits nobody"


def test_join_waits_until_the_departed_are_replayed() -> None:
    world = World()
    hosts = world.cluster(3)
    world.replays = False
    world.kill(hosts[2])
    late = world.host("host9")
    world.run(20)
    view = hosts[0].member.view
    assert view is not None
    assert view.to_replay == (hosts[2].node,)
    assert view.state_of(late.node) is SlotState.JOINING
    world.replays = True
    world.kill(hosts[1])  # it was told to replay: somebody else is told, and does
    world.run_until(lambda: is_active(late), 20)


def test_who_dies_while_joining_is_evicted_and_its_slot_gets_another_incarnation() -> None:
    world = World(slots=2)
    (first,) = world.cluster(1)
    second = world.host("host1")
    world.run_until(lambda: second.member.node is not None, 5)
    world.kill(second)
    world.run_until(lambda: first.when(ReplayWanted, second.node) != [], 10)
    third = world.host("host2")
    world.run_until(lambda: is_active(third), 20)
    assert third.node == NodeId(second.node.slot, second.node.incarnation + 1)


def test_old_join_block_admits_nobody() -> None:
    world = World()
    (first,) = world.cluster(1)
    world.lun.joins[3] = JoinRequest(3, 255 << 40 | 1, 7, "ghost", bytes(16), bytes(16), b"g" * 32)
    world.run(10)
    assert first.member.view is not None
    assert first.member.view.listed == (first.node,)


def test_two_hosts_with_one_name() -> None:
    world = World()
    hosts = world.cluster(2)
    twin = world.host("host1")
    twin.member.state.identity = type(twin.member.state.identity)(
        "host1", b"other machine id", bytes(16), b"t" * 32
    )
    world.run_until(lambda: twin.stopped is not None, 10)
    assert twin.stopped is not None
    assert twin.stopped.reason is StopReason.REFUSED
    assert "host1" in twin.stopped.words
    world.run(10)
    assert all(is_active(host) for host in hosts)


def land_late(world: World, host: Host) -> None:
    """A heartbeat that was on its way when its host died."""
    beat = world.lun.heartbeats[host.node.slot]
    world.lun.heartbeats[host.node.slot] = replace(beat, sequence=beat.sequence + 1)


@pytest.mark.parametrize("boot", [0, 1])
def test_one_heartbeat_that_lands_late_is_no_life_for_who_comes_back_alone(boot: int) -> None:
    world = World()
    (first,) = world.cluster(1)
    world.kill(first)
    again = world.host("host0", boot=boot)
    world.run_until(lambda: bool(again.when(ReadBlocks)), 5)
    world.run(0.05)
    land_late(world, first)
    world.run_until(lambda: is_active(again), 10)
    assert again.node != first.node


@pytest.mark.parametrize("delay_s", [0.0, 0.15, 0.3, 0.6, 1.0, 1.5])
def test_one_heartbeat_that_lands_late_is_no_life_for_a_coordinator(delay_s: float) -> None:
    world = World()
    hosts = world.cluster(3)
    world.kill(hosts[1])
    again = world.host("host1")
    world.run_until(lambda: bool(again.when(WriteJoin)), 5)
    world.run(delay_s)
    land_late(world, hosts[1])
    world.run_until(lambda: is_active(again), 15)
    assert again.node != hosts[1].node


def test_killed_daemon_that_comes_back_at_once_replaces_its_dead_incarnation() -> None:
    world = World()
    hosts = world.cluster(3)
    world.kill(hosts[1])
    again = world.host("host1")
    took = world.run_until(lambda: is_active(again), 15)
    assert (
        took < 9
    )  # evicted as soon as it is silent; what it held waits for its lease all the same
    assert again.node != hosts[1].node


def test_all_slots_in_use() -> None:
    world = World(slots=1)
    world.cluster(1)
    late = world.host("host1")
    world.run_until(lambda: late.stopped is not None, 5)
    assert late.stopped is not None
    assert late.stopped.reason is StopReason.REFUSED


@pytest.mark.parametrize("back", [(0, 1, 2), (2,)])
def test_blackout_of_a_full_volume(back: tuple[int, ...]) -> None:
    world = World(slots=3)
    for host in world.cluster(3):
        world.kill(host)
    world.run(60)
    again = [world.host(f"host{n}") for n in back]
    world.run_until(lambda: all(is_active(host) for host in again), 60)
    assert not world.lun.view.to_replay


# -- leaving -------------------------------------------------------------------------------------
def hosts_of_a_full_volume_after_a_blackout(world: World) -> tuple[Host, Host]:
    """Both slots' journals are to be replayed; the first host back moves into its own old slot,
    the second into the other, once that is replayed."""
    first, second = world.cluster(2)
    for host in (first, second):
        world.kill(host)
        world.isolate(host)
    world.cuts.clear()
    world.brings_in_order = False
    first = world.host(first.name)
    world.run_until(lambda: first.member.is_coordinator, 15)
    second = world.host(second.name)
    world.run_until(lambda: second.member.view is not None, 15)
    return first, second


def test_nobody_is_active_before_a_journal_that_a_newcomer_took_over_is_in_order() -> None:
    """Its slot does not need replay any more, as the view says, and yet nothing may be granted (a
    simulator's find)."""
    world = World(slots=2)
    first, second = hosts_of_a_full_volume_after_a_blackout(world)
    assert not world.lun.view.to_replay
    second.give(Replayed(second.node))
    world.run(5)
    assert not world.lun.view.active
    first.give(Replayed(first.node))
    world.run_until(lambda: is_active(first) and is_active(second), 5)


@pytest.mark.parametrize("leaver", [0, 1], ids=["coordinator", "member"])
def test_who_leaves_before_its_journal_is_in_order_leaves_it_to_be_replayed(leaver: int) -> None:
    world = World(slots=2)
    hosts = hosts_of_a_full_volume_after_a_blackout(world)
    going, staying = hosts[leaver], hosts[1 - leaver]
    world.replays = False
    going.give(LeaveWanted())
    world.run_until(lambda: going.stopped is not None, 5)
    world.run(1)
    assert world.lun.view.to_replay == (going.node,)
    staying.give(Replayed(staying.node))
    world.run(1)
    assert not world.lun.view.active
    staying.give(Replayed(going.node))
    world.run_until(lambda: is_active(staying), 8)


def test_last_node_leaves_before_its_journal_is_in_order() -> None:
    world = World(slots=1)
    (host,) = world.cluster(1)
    world.kill(host)
    world.brings_in_order = False
    again = world.host(host.name)
    world.run_until(lambda: again.member.is_coordinator, 15)
    again.give(LeaveWanted())
    world.run_until(lambda: again.stopped is not None, 5)
    assert world.lun.view.to_replay == (again.node,)
    world.brings_in_order = True
    third = world.host(host.name)
    world.run_until(lambda: is_active(third), 15)
    assert third.when(ReplayWanted, third.node)


def test_lease_of_whose_slot_is_taken_over_is_waited_for() -> None:
    """A lease that the dead coordinator gave at the last moment: 5 s of silence are not enough."""
    world = World(slots=2)
    first, second = world.cluster(2)
    world.cut_san(second)
    world.run(5)
    for host in (first, second):
        world.kill(host)
        world.isolate(host)
    world.cuts.clear()
    until = second.member.lease_until
    late = world.host("host9")
    world.run_until(lambda: is_active(late), 15)
    assert until < world.now
    changed = max(t for t in first.when(WriteHeartbeat))
    bound = world.settings.answer_within_s + world.settings.lease_over_bound_s
    assert world.t >= changed + bound


def test_member_leaves() -> None:
    world = World()
    hosts = world.cluster(3)
    hosts[2].give(LeaveWanted())
    assert world.run_until(lambda: hosts[2].stopped is not None, 5) < 1.0
    world.run(1)
    view = hosts[0].member.view
    assert view is not None
    assert view.slots[hosts[2].node.slot].state is SlotState.FREE
    assert not hosts[0].when(ReplayWanted, hosts[2].node)
    assert not hosts[1].when(ReplayWanted, hosts[2].node)


def test_coordinator_leaves() -> None:
    world = World()
    hosts = world.cluster(3)
    hosts[0].give(LeaveWanted())
    world.run_until(lambda: hosts[0].stopped is not None, 5)
    assert hosts[0].stopped is not None
    assert hosts[0].stopped.reason is StopReason.LEFT
    world.run(1)
    assert sum(host.member.is_coordinator for host in hosts[1:]) == 1
    view = hosts[1].member.view
    assert view is not None
    assert view.slots[0].state is SlotState.FREE
    assert not world.lun.view.to_replay


def test_all_leave_one_after_the_other() -> None:
    world = World()
    hosts = world.cluster(4)
    for host in hosts:
        host.give(LeaveWanted())
        world.run_until(lambda host=host: host.stopped is not None, 20)  # type: ignore[misc]
    assert not world.lun.view.members
    assert world.lun.holder_key == world.lun.view.holder_key != 0
    assert [host.when(Stop) != [] for host in hosts] == [True] * 4


def test_leaver_that_nobody_hears_is_evicted() -> None:
    world = World()
    hosts = world.cluster(3)
    world.isolate(hosts[2])
    hosts[2].give(LeaveWanted())
    world.run(20)
    assert hosts[2].stopped is not None
    assert hosts[0].member.view is not None
    assert hosts[0].member.view.listed == tuple(sorted(h.node for h in hosts[:2]))
