"""What must come before what, and what must not be counted: the sentences of PROTOCOL.md's rules
that no timeline alone would miss.
"""

from __future__ import annotations

from math import inf

from lockmgr.cluster.effects import (
    Fence,
    OpenPaths,
    ReadBlocks,
    SendTo,
    Survey,
    Take,
    ViewInstalled,
    WriteHeartbeat,
    WriteView,
)
from lockmgr.cluster.events import DeathProven, EvictWanted, PathLost, Received, Tick
from lockmgr.cluster.messages import Announce, AskLease, LeaseGiven, ReplayDone, TakeOver
from lockmgr.cluster.view import NodeId
from tests.unit.cluster_host import Host
from tests.unit.cluster_world import World


def procedure(host: Host, begin: float) -> list[type]:
    """What the host's procedures did since then, heartbeats and block reads beside them aside."""
    own = (Survey, Fence, WriteView, Take, OpenPaths, ViewInstalled)
    return [type(effect) for t, effect in host.log if t >= begin and isinstance(effect, own)]


def test_order_of_an_eviction() -> None:
    world = World()
    hosts = world.cluster(3)
    begin = world.now
    hosts[0].give(EvictWanted(hosts[2].node, "test"))
    world.run(0.3)
    assert procedure(hosts[0], begin) == [WriteView, Survey, Fence, ViewInstalled]
    kinds = [type(effect) for t, effect in hosts[0].log if t >= begin]
    assert ReadBlocks in kinds[kinds.index(Fence) : kinds.index(ViewInstalled)]


def test_order_of_a_succession() -> None:
    world = World()
    hosts = world.cluster(3)
    world.kill(hosts[0])
    begin = world.now
    for host in hosts[1:]:
        host.give(DeathProven(hosts[0].node))
    world.run(0.4)
    winner = next(host for host in hosts[1:] if WriteView in procedure(host, begin))
    assert procedure(winner, begin)[:8] == [
        *(Survey, Take, Fence, Survey, WriteView, Survey, Fence, ViewInstalled)
    ]


def test_lease_counts_from_sending_however_late_the_answer_is_read() -> None:
    world = World()
    hosts = world.cluster(2)
    writes = len(hosts[1].when(WriteHeartbeat))
    world.run_until(lambda: len(hosts[1].when(WriteHeartbeat)) > writes, 2)
    sent = world.now
    world.freeze(hosts[1])
    world.run(5.0)
    world.thaw(hosts[1])
    # The answer was waiting; what has been sent since then is not answered yet.
    assert hosts[1].member.lease_until <= sent + world.settings.lease_s


def test_judge_that_napped_starts_afresh() -> None:
    world = World()
    hosts = world.cluster(3)
    world.kill(hosts[2])
    world.isolate(hosts[2])
    begin = world.t
    world.run(5.0)
    world.freeze(hosts[0])
    world.run(1.3)
    world.thaw(hosts[0])
    world.run_until(lambda: len(world.lun.view.listed) == 2, 20)
    assert world.t - begin >= 6.3 + world.settings.evict_after_s - 0.5


def test_coordinator_outside_the_verdict_gives_no_lease() -> None:
    world = World()
    hosts = world.cluster(5)
    world.cut_san(hosts[4])
    world.run(5)
    for a in (hosts[0], hosts[4]):
        world.cut(*((a, b) for b in hosts[1:4]))
    for host in hosts[1:4]:
        host.member.state.backoff_until = inf
    epoch = world.lun.view.epoch
    world.run(9)
    yielded = world.now
    world.run(6)
    assert hosts[0].member.is_coordinator  # nobody has deposed it
    assert world.lun.view.epoch == epoch
    assert hosts[4].member.lease_until <= yielded + world.settings.lease_s


def lease_answers(host: Host, asker: NodeId, now: float) -> int:
    effects = host.member.step(Received(asker, AskLease(now)), now)
    return sum(isinstance(e, SendTo) and isinstance(e.message, LeaseGiven) for e in effects)


def test_no_lease_for_who_is_about_to_be_evicted_or_is_not_listed() -> None:
    world = World()
    hosts = world.cluster(2)
    assert lease_answers(hosts[0], hosts[1].node, world.now) == 1
    assert lease_answers(hosts[1], hosts[0].node, world.now) == 0  # not the coordinator
    stranger = NodeId(hosts[1].node.slot, hosts[1].node.incarnation + 1)
    assert lease_answers(hosts[0], stranger, world.now) == 0
    hosts[0].give(EvictWanted(hosts[1].node, "test"))  # the view write is on its way
    assert world.lun.view.lists(*hosts[1].node)
    assert lease_answers(hosts[0], hosts[1].node, world.now) == 0


def test_loser_backs_off() -> None:
    world = World()
    hosts = world.cluster(4)
    world.kill(hosts[0])
    for host in hosts[1:]:
        host.give(DeathProven(hosts[0].node))
    world.run(0.5)
    losers = [host for host in hosts[1:] if not host.member.is_coordinator]
    assert len(losers) == 2
    tried = [host for host in losers if host.member.state.backoff_until > world.now + 5]
    assert tried
    assert all(len(host.when(Take)) == 1 for host in tried)


def test_no_lease_from_a_coordinator_whose_own_writes_are_old() -> None:
    world = World()
    hosts = world.cluster(2)
    world.freeze(hosts[0])
    world.run(1.6)
    assert lease_answers(hosts[0], hosts[1].node, world.now) == 0


def test_takeover_is_believed_of_the_key_s_owner_only() -> None:
    world = World()
    hosts = world.cluster(3)
    takes = len(hosts[1].when(Take))
    holder = world.lun.view.holder_key
    hosts[1].give(Received(hosts[2].node, TakeOver(holder)))
    world.run(1)
    assert len(hosts[1].when(Take)) == takes
    hosts[1].give(Received(hosts[0].node, TakeOver(holder)))
    world.run(1)
    assert hosts[1].member.is_coordinator


def test_announcement_is_believed_of_the_holder_only() -> None:
    world = World()
    hosts = world.cluster(3)
    view = world.lun.view
    forged = view.next(view.holder_key, {}, 0)
    hosts[1].give(Received(hosts[2].node, Announce(forged)))
    assert hosts[1].epoch == view.epoch


def test_old_announcement_changes_nothing() -> None:
    world = World()
    hosts = world.cluster(2)
    old = hosts[1].member.view
    assert old is not None
    hosts[0].give(EvictWanted(NodeId(7, 1), "nobody"))
    third = world.host("host9")
    world.run_until(lambda: third.member.view is not None, 5)
    world.run(2)
    epoch = hosts[1].epoch
    assert epoch > old.epoch
    hosts[1].give(Received(hosts[0].node, Announce(old)))
    assert hosts[1].epoch == epoch


def test_replay_is_done_when_the_replayer_says_so() -> None:
    world = World()
    hosts = world.cluster(3)
    world.replays = False
    world.kill(hosts[2])
    for host in hosts[:2]:
        host.give(DeathProven(hosts[2].node))
    world.run(2)
    (dead,) = world.lun.view.to_replay
    replayer = world.lun.view.replayer_of(dead)
    other = next(h for h in hosts[:2] if h.node.slot != replayer)
    hosts[0].give(Received(other.node, ReplayDone(dead)))
    hosts[0].give(Received(other.node, ReplayDone(NodeId(200, 1))))
    world.run(1)
    assert world.lun.view.to_replay == (dead,)


def test_joining_coordinator_learns_that_the_locks_are_thawed() -> None:
    world = World()
    hosts = world.cluster(2)
    late = world.host("host9")
    world.run_until(lambda: late.control is not None, 5)
    for host in hosts:  # the members lose their paths, the newcomer has one
        world.cut_san(host)
    world.run_until(lambda: late.member.is_coordinator, 20)
    world.run(5)
    view = late.member.view
    assert view is not None
    assert late.node in view.active


def test_path_that_is_said_late_to_be_lost_does_not_close_the_next_one() -> None:
    world = World()
    hosts = world.cluster(2)
    assert hosts[1].control is not None
    old = hosts[1].control.key
    hosts[1].give(PathLost((old,)))
    hosts[1].give(PathLost((old,)))
    world.run(1)
    opened = len(hosts[1].when(OpenPaths))
    hosts[1].give(PathLost((old,)))
    world.run(1)
    assert len(hosts[1].when(OpenPaths)) == opened
    assert hosts[1].member.state.path_key not in (0, old)


def test_steps_after_the_end_do_nothing() -> None:
    world = World()
    hosts = world.cluster(2)
    hosts[0].give(EvictWanted(hosts[1].node, "test"))
    world.run_until(lambda: hosts[1].stopped is not None, 5)
    assert hosts[1].member.step(Tick(), world.now) == []
    assert hosts[1].member.next_timer() is None
