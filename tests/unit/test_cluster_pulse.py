"""Heartbeats that a pulse sends by itself, as a member takes them (PROTOCOL.md, Membership)."""

from __future__ import annotations

import pytest

from lockmgr.cluster.effects import LeaseUntil
from lockmgr.cluster.errors import MembershipViolation
from lockmgr.cluster.events import HeartbeatFailed, HeartbeatWritten, LeaveWanted
from lockmgr.cluster.messages import LeaseGiven
from tests.unit.cluster_world import World
from tests.unit.test_cluster_failures import lose

LEASE_S = 4.0


def test_written_between_ticks_renews_the_lease() -> None:
    world = World()
    host = world.cluster(2)[1]
    key = host.member.heartbeat_key
    sent_at = world.now
    world.run(0.2)
    host.give(HeartbeatWritten(key, sent_at))
    assert host.member.lease_until == sent_at + LEASE_S
    assert [e for _, e in host.log if isinstance(e, LeaseUntil)][-1].until_s == sent_at + LEASE_S
    host.give(HeartbeatWritten(key, sent_at - 0.1))
    assert host.member.lease_until == sent_at + LEASE_S, "it went back"


def test_written_on_another_session_counts_nothing() -> None:
    world = World()
    hosts = world.cluster(2)
    key = hosts[1].member.heartbeat_key
    lose(hosts[1])
    assert hosts[1].member.heartbeat_key == 0
    until = hosts[1].member.lease_until
    hosts[1].give(HeartbeatWritten(key, world.now))
    assert hosts[1].member.lease_until == until
    world.run(3)
    assert hosts[1].member.heartbeat_key not in (0, key)
    session = hosts[1].member.state.session
    hosts[1].give(HeartbeatFailed(key))
    assert hosts[1].member.state.session == session, "of the old session, and the new one is lost"


def test_failed_closes_the_session() -> None:
    world = World()
    host = world.cluster(2)[1]
    host.give(HeartbeatFailed(host.member.heartbeat_key))
    assert host.member.heartbeat_key == 0
    assert host.member.state.path_key == 0


def test_nothing_is_written_after_stop() -> None:
    world = World()
    hosts = world.cluster(2)
    key, until = hosts[1].member.heartbeat_key, hosts[1].member.lease_until
    hosts[1].give(LeaveWanted())
    world.run_until(lambda: hosts[1].stopped is not None, 5)
    assert hosts[1].member.heartbeat_key == 0
    before = hosts[1].member.lease_until
    hosts[1].give(HeartbeatWritten(key, world.now))
    assert hosts[1].member.lease_until == before >= until


def test_who_leaves_writes_no_heartbeat_once_it_is_unregistered() -> None:
    world = World()
    hosts = world.cluster(2)
    world.isolate(hosts[1])
    hosts[1].give(LeaveWanted())
    world.run_until(lambda: hosts[1].member.state.unregistered is not None, 5)
    assert hosts[1].member.heartbeat_key == 0


def test_written_before_it_was_sent_is_a_broken_shell() -> None:
    world = World()
    host = world.cluster(1)[0]
    with pytest.raises(MembershipViolation, match="to be sent"):
        host.member.step(HeartbeatWritten(host.member.heartbeat_key, world.now + 1), world.now)


def test_coordinator_answers_on_what_its_pulse_wrote() -> None:
    """Its own ticks do not write: only what the pulse says keeps it answering."""
    world = World()
    hosts = world.cluster(2)
    world.cut_san(hosts[1])
    world.run(3)
    hosts[0].writes_itself = False
    world.run(1.6)
    given = len(hosts[0].said(LeaseGiven))
    world.run(1.0)
    assert len(hosts[0].said(LeaseGiven)) == given, "more than a second after its last write"
    hosts[0].give(HeartbeatWritten(hosts[0].member.heartbeat_key, world.now))
    world.run(0.6)
    assert len(hosts[0].said(LeaseGiven)) > given


def test_what_was_sent_before_office_gives_no_leases() -> None:
    world = World()
    hosts = world.cluster(2)
    given = hosts[1].member.state.given
    key = hosts[1].member.heartbeat_key
    world.kill(hosts[0])
    world.run_until(lambda: hosts[1].member.is_coordinator, 20)
    assert hosts[1].member.heartbeat_key == key, "it took over on the session that it had"
    hosts[1].give(HeartbeatWritten(key, world.now - 0.01))
    assert not given.may_answer(world.now)
    world.run(0.6)
    assert given.may_answer(world.now)
