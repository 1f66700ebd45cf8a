"""Whole members over real sockets, and a directory for a LUN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lockmgr.cluster import effects
from lockmgr.cluster.directory_arbiter import DirectoryArbiter
from lockmgr.cluster.effects import StopReason
from lockmgr.cluster.errors import ClusterStopped
from lockmgr.cluster.obituary import read_obituary, report_death_from
from lockmgr.cluster.outcomes import Blocks
from lockmgr.cluster.view import SlotState
from tests.unit.cluster_services import QUICK, Host, open_world, until


class Blind(DirectoryArbiter):
    """Sees no heartbeat blocks."""

    def _blocks(self) -> Blocks:
        return Blocks((), super()._blocks().joins)


def coordinator_of(*hosts: Host) -> Host:
    (one,) = [host for host in hosts if host.cluster.is_coordinator]
    return one


async def test_three_join(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        assert len({host.view.epoch for host in hosts}) == 1
        assert len({host.node.slot for host in hosts}) == 3
        coordinator = coordinator_of(*hosts)
        await until(lambda: all(_hears_all(host, hosts) for host in hosts))
        for host in hosts:
            assert await host.cluster.wait_listed() == host.node
            assert (await host.cluster.wait_active()) == host.view
            await host.cluster.lease.wait_valid()
            assert host.of(effects.PathsReady)
            status = host.cluster.status()
            assert status.coordinator == coordinator.node
            assert status.node_named("b") == hosts[1].node
            assert status.lease_left_s is not None and status.lease_left_s <= QUICK.lease_s
            assert status.has_path and not status.unproven_keys
            assert status.pulse.sent and status.pulse.written and not status.pulse.failed


def _hears_all(host: Host, hosts: list[Host]) -> bool:
    everybody = {other.node.slot for other in hosts}
    nodes = host.cluster.status().nodes
    return len(nodes) == len(hosts) and all(
        set(one.hears) == everybody
        and one.has_path
        and one.heard_s is not None
        and one.block_changed_s is not None
        and (one.is_this_node or (one.connection is not None and one.connection.number > 0))
        for one in nodes
    )


async def test_newcomers_at_once_on_an_unused_volume(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = [await world.begin(name) for name in ("a", "b", "c")]
        await until(lambda: all(host.sees_active(*hosts) for host in hosts))
        coordinator_of(*hosts)


async def test_a_member_leaves(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        leaver = next(host for host in hosts if not host.cluster.is_coordinator)
        node, stay = leaver.node, [host for host in hosts if host is not leaver]
        stop = await leaver.cluster.leave()
        assert stop.reason is StopReason.LEFT
        await until(lambda: all(host.sees_active(*stay) for host in stay))
        assert all(host.view.state_of(node) is SlotState.FREE for host in stay)
        with pytest.raises(ClusterStopped, match="left"):
            await leaver.cluster.lease.wait_valid()
        with pytest.raises(ClusterStopped):
            await leaver.cluster.wait_active()
        assert not leaver.cluster.lease.valid()
        await until(lambda: not leaver.obituary.exists())


async def test_all_leave_one_after_the_other_and_one_comes_back(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b")
        for host in hosts:  # the coordinator, then the last
            assert (await host.cluster.leave()).reason is StopReason.LEFT
        assert hosts[1].of(effects.CloseSessions)
        world.settings = replace(QUICK, silence_s=1000.0)
        await world.start("c")  # at once: it waits for no silence


@pytest.mark.parametrize("whom", ["coordinator", "member"])
async def test_killed(tmp_path: Path, whom: str) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        coordinator = coordinator_of(*hosts)
        victim = (
            coordinator
            if whom == "coordinator"
            else next(host for host in hosts if host is not coordinator)
        )
        stay = [host for host in hosts if host is not victim]
        node = victim.node
        victim.kill()
        began = trio.current_time()
        await until(lambda: all(host.sees_active(*stay) for host in stay))
        assert trio.current_time() - began > QUICK.evict_after_s / 2
        await until(lambda: all(_has_buried(host, node) for host in stay))
        await until(lambda: all(host.view.state_of(node) is SlotState.FREE for host in stay))
        assert sum(effect.node == node for h in stay for effect in h.of(effects.ReplayWanted)) == 1
        coordinator_of(*stay)


def _has_buried(host: Host, node: object) -> bool:
    return any(effect.node == node for effect in host.of(effects.DepartedMayBeGranted))


@pytest.mark.parametrize("whom", ["coordinator", "member"])
async def test_a_death_that_is_proven_waits_for_nothing(tmp_path: Path, whom: str) -> None:
    patient = replace(QUICK, evict_after_s=1000.0, lease_over_s=1000.0)
    async with open_world(tmp_path, patient) as world:
        hosts = await world.start("a", "b", "c")
        coordinator = coordinator_of(*hosts)
        victim = (
            coordinator
            if whom == "coordinator"
            else next(host for host in hosts if host is not coordinator)
        )
        stay = [host for host in hosts if host is not victim]
        node = victim.node
        await until(lambda: len(read_obituary(victim.obituary).peers) == 2)
        victim.kill()
        noted = await report_death_from(victim.obituary, victim.credentials)
        assert noted == {host.node for host in stay}
        assert not victim.obituary.exists()
        await until(lambda: all(_has_buried(host, node) for host in stay))
        assert all(host.sees_active(*stay) for host in stay)


async def test_who_is_cut_off_goes(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        alone = coordinator_of(*hosts)
        stay = [host for host in hosts if host is not alone]
        await until(lambda: _hear_each_other(alone, *stay))
        alone.cable.cut()
        node = alone.node
        await until(lambda: not any(alone.cluster.hears(host.node) for host in stay))
        await until(lambda: not any(host.cluster.hears(node) for host in stay))
        assert _hear_each_other(*stay)
        await until(lambda: alone.stopped is not None)
        assert alone.stopped is not None and alone.stopped.reason is StopReason.EVICTED
        assert not alone.cluster.lease.valid()
        alone.kill()
        await until(lambda: not alone.obituary.exists())  # the others know already
        await until(lambda: all(host.sees_active(*stay) for host in stay))
        coordinator_of(*stay)


def _hear_each_other(*hosts: Host) -> bool:
    return all(
        host.cluster.hears(other.node) for host in hosts for other in hosts if other is not host
    )


async def test_a_short_cut_costs_nothing(tmp_path: Path) -> None:
    async with open_world(tmp_path, replace(QUICK, evict_after_s=10.0)) as world:
        hosts = await world.start("a", "b", "c")
        epoch = hosts[0].view.epoch
        hosts[0].cable.cut()
        await until(lambda: not _hears_all(hosts[1], hosts))
        hosts[0].cable.mend()
        await until(lambda: all(_hears_all(host, hosts) for host in hosts))
        assert {host.view.epoch for host in hosts} == {epoch}


async def test_who_has_the_name_of_another_is_refused_in_words(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.start("a", "b")
        second = await world.begin("a", machine="another")
        await until(lambda: second.stopped is not None)
        assert second.stopped is not None and second.stopped.reason is StopReason.REFUSED
        assert "a node named a is a member already" in second.stopped.words
        assert "127.0.0.1:" in second.stopped.words


async def test_a_coordinator_tells_a_newcomer_that_it_is_refused(tmp_path: Path) -> None:
    """The message itself: the newcomer is made blind to the heartbeat blocks."""
    async with open_world(tmp_path) as world:
        await world.start("a", "b")
        second = Host(world, "a", "another")
        second.arbiter = Blind(second.arbiter.directory, second.identity, second.arbiter.on_lost)
        await world.nursery.start(second.run)
        await until(lambda: second.stopped is not None)
        assert second.stopped is not None and second.stopped.reason is StopReason.REFUSED
        assert "is a member already" in second.stopped.words


async def test_a_host_that_was_killed_comes_back(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b")
        first, other = hosts
        node = first.node
        first.kill()
        again = await world.begin("a")
        await until(lambda: again.sees_active(again, other) and other.sees_active(again, other))
        assert again.node != node


async def test_a_member_without_storage_keeps_its_lease(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b")
        coordinator = coordinator_of(*hosts)
        member = next(host for host in hosts if host is not coordinator)
        ready = len(member.of(effects.PathsReady))
        member.lose_storage()
        await until(lambda: not member.cluster.status().has_path)
        await trio.sleep(QUICK.lease_s)
        await until(member.cluster.lease.valid)  # whoever gave it, it was not the storage
        member.find_storage()
        await until(lambda: len(member.of(effects.PathsReady)) > ready)
        assert not member.cluster.status().unproven_keys
        assert member.sees_active(*hosts)


async def test_a_coordinator_without_storage_hands_over(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        coordinator = coordinator_of(*hosts)
        others = [host for host in hosts if host is not coordinator]
        coordinator.lose_storage()
        await until(lambda: any(host.cluster.is_coordinator for host in others))
        await until(lambda: coordinator.cluster.lease.valid())
        coordinator.find_storage()
        await until(lambda: coordinator.cluster.status().has_path)
        assert all(host.sees_active(*hosts) for host in hosts)


async def test_eviction_that_is_asked_for(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        hosts[0].cluster.evict(hosts[2].node, "the test wants it")
        await until(lambda: hosts[2].stopped is not None)
        assert hosts[2].stopped is not None and hosts[2].stopped.reason is StopReason.EVICTED
        await until(lambda: all(host.sees_active(*hosts[:2]) for host in hosts[:2]))
