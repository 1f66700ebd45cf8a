"""`Fence` of `LunArbiter`: whose sessions are closed, whose keys preempted, and whose are not."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from csvfs.format import VIEW_ADDRESSES, VIEW_BYTES, ProbeFlag, byte_offset
from lockmgr.cluster import effects
from lockmgr.cluster.outcomes import Good, Outcome, Unknown
from lockmgr.cluster.view import NodeId
from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import BlockError, InitiatorPort, OutcomeUnknown
from redirector.block.keys import PathKey
from redirector.block.simulated import Command, SimulatedDevice
from redirector.block.simulated_faults import Faults
from tests.portal_groups import PortalGroups
from tests.unit.arbiter_bench import NODE, OFFICER, Bench, Node, open_bench

VICTIM = NodeId(2, 3)
AT = 32 << 20


def key(generation: int, node: NodeId = VICTIM) -> int:
    return PathKey(*node, generation).pack()


@asynccontextmanager
async def holder_and_victim() -> AsyncIterator[tuple[Bench, Node, Node]]:
    """The one holds; both have their paths open."""
    async with open_bench() as bench, bench.arbiter() as holder, bench.arbiter("victim") as victim:
        await bench.admit(NODE, VICTIM)
        await holder.open_paths()
        await victim.open_paths(VICTIM)
        await holder.take_office()
        yield bench, holder, victim


def logins(bench: Bench, victim: Node) -> set[InitiatorPort]:
    """Ports of the victim whose session is gone, in the eyes of the target."""
    alive = {session.port for session in bench.lun.sessions.values()}
    return {victim.control.device.port, victim.data.device.port} - alive


def preempted(bench: Bench) -> int:
    return bench.ops().count(Op.PREEMPT)


async def read(node: Node) -> bytes:
    return bytes(await node.data.ask(lambda: node.data.device.read(AT, 512)))


async def test_what_is_on_its_way_is_aborted_where_the_target_can() -> None:
    """PREEMPT AND ABORT, if the probe at format has found it: no wait for what is slow."""
    async with open_bench(Faults(ArbiterHabits(knows_abort=True))) as bench:
        bench.superblock = replace(bench.superblock, probe=ProbeFlag.PREEMPT_ABORT_WORKS)
        async with bench.arbiter() as holder, bench.arbiter("victim") as victim:
            await bench.admit(NODE, VICTIM)
            await holder.open_paths()
            await victim.open_paths(VICTIM)
            await holder.take_office()
            bench.lun.drains_wait()
            hold = bench.lun.hold(lambda c: c.data == b"L" * 512)

            async def write() -> None:
                with pytest.raises(BlockError):
                    await victim.data.device.write(AT, b"L" * 512)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await hold.wait_held()
                assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Good(None)
            hold.lift()
            assert await read(holder) == bytes(512)


async def test_a_node_is_fenced_whole() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        sessions = victim.control.device, victim.data.device
        assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Good(None)
        assert bench.registered == sorted([holder.control.key, holder.data.key])
        assert all(device.lost for device in sessions)
        assert preempted(bench) == 2
        assert holder.arbiter.certificates[victim.identity.fingerprint]
        assert holder.told[1:] == []
        assert await holder.do(effects.Fence(3, (), (VICTIM,))) == Good(None)  # nothing is left


async def test_keys_that_the_slot_block_does_not_record_are_preempted_too() -> None:
    async with holder_and_victim() as (bench, holder, _):
        for generation in (7, 8):
            device = await bench.lun.login(InitiatorPort("iqn.x:y", 0x80 << 40 | generation))
            await device.register(key(generation))
        assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Good(None)
        assert bench.registered == sorted([holder.control.key, holder.data.key])


async def test_of_keys_only_the_sessions_that_have_them() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        control, data = victim.control, victim.data
        fence = effects.Fence(2, (data.key, key(99), OFFICER))  # one is registered
        assert await holder.do(fence) == Good(None)
        assert data.device.lost
        assert bench.registered == sorted([holder.control.key, holder.data.key, control.key])


async def test_an_old_path_whose_port_serves_a_new_one_is_not_reinstated() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        await victim.open_paths(VICTIM)
        assert {key(1), key(2), key(3), key(4)} <= set(bench.registered)
        assert await holder.do(effects.Fence(2, (key(1), key(2)))) == Good(None)
        assert not victim.control.device.lost
        assert not victim.data.device.lost
        assert {key(3), key(4)} <= set(bench.registered)
        assert not {key(1), key(2)} & set(bench.registered)


@pytest.mark.parametrize("other", [NodeId(2, 2), NodeId(2, 4)])
async def test_another_life_of_the_slot_is_left_alone(other: NodeId) -> None:
    async with holder_and_victim() as (bench, holder, victim):
        before = bench.registered
        assert await holder.do(effects.Fence(2, (key(1, other),), (other,))) == Good(None)
        assert bench.registered == before
        assert not victim.data.device.lost


async def test_a_slot_block_that_cannot_be_read_leaves_the_keys() -> None:
    async with holder_and_victim() as (bench, holder, _):
        address = bench.superblock.geometry.slot_block(VICTIM.slot)
        bench.lun.blocks[address] = b"\xee" * 4096
        assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Good(None)
        assert bench.registered == sorted([holder.control.key, holder.data.key])


async def test_the_own_sessions_are_never_fenced() -> None:
    async with holder_and_victim() as (bench, holder, _):
        own = holder.control.key, holder.data.key
        assert await holder.do(effects.Fence(2, own, (NODE,))) == Good(None)
        assert set(own) <= set(bench.registered)
        assert not holder.data.device.lost
        # Own earlier ones are: their sessions were closed when these logged in.
        await holder.open_paths()
        assert await holder.do(effects.Take(3, own[0])) != Unknown()
        assert await holder.do(effects.Fence(4, own, ())) == Good(None)
        assert not set(own) & set(bench.registered)
        assert not holder.data.device.lost


async def test_without_anybody_it_drains() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        hold = bench.lun.hold(lambda c: c.data == b"L" * 512)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim.data.device.write, AT, b"L" * 512)
            await hold.wait_held()
            assert await holder.do(effects.Fence(2, ())) == Good(None)
            assert await read(holder) == b"L" * 512
        assert preempted(bench) == 0


async def test_what_was_admitted_lands_before_the_fence_ends() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        bench.lun.drains_wait()
        hold = bench.lun.hold(lambda c: c.data == b"L" * 512)
        answers: list[Outcome] = []

        async def fence() -> None:
            answers.append(await holder.do(effects.Fence(2, (), (VICTIM,))))

        async def write() -> None:
            with pytest.raises(OutcomeUnknown):
                await victim.data.device.write(AT, b"L" * 512)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await hold.wait_held()
            nursery.start_soon(fence)
            await victim.data.device.wait_lost()
            await trio.testing.wait_all_tasks_blocked()
            assert not answers
            hold.lift()
        assert answers == [Good(None)]
        assert await read(holder) == b"L" * 512


async def test_a_straggler_is_fenced_when_it_blocks_the_drain(autojump_clock: MockClock) -> None:
    straggler = NodeId(3, 1)
    async with holder_and_victim() as (bench, holder, _), bench.arbiter("third") as third:
        await bench.admit_by(holder, NODE, VICTIM, straggler)
        await third.open_paths(straggler)
        device = third.data.device
        assert isinstance(device, SimulatedDevice)
        device.freeze()
        hold = bench.lun.hold(lambda c: c.op is Op.READ and c.port == device.port)

        async def hang() -> None:
            with pytest.raises(OutcomeUnknown):
                await device.read(AT, 1 << 20)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang)
            await hold.wait_held()
            began = trio.current_time()
            fence = effects.Fence(2, (), (VICTIM,), (straggler,))
            assert await holder.do(fence) == Good(None)
            assert trio.current_time() - began == pytest.approx(2.0)
        assert bench.registered == sorted([holder.control.key, holder.data.key])


async def test_who_does_not_hold_fences_nobody() -> None:
    async with holder_and_victim() as (bench, holder, victim):
        before = bench.registered
        fence = effects.Fence(2, (holder.data.key,), (NODE,), (NODE,))
        assert await victim.do(fence) == Unknown()
        assert bench.registered == before
        assert preempted(bench) == 0
        assert not holder.data.device.lost


async def test_a_target_that_does_not_let_a_session_be_closed(autojump_clock: MockClock) -> None:
    async with holder_and_victim() as (bench, holder, victim):
        away = victim.data.device.port
        bench.lun.disconnect(lambda port: port == away)
        assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Unknown()
        assert "cannot be closed" in holder.arbiter.trouble


async def test_many_are_fenced_at_once() -> None:
    async with holder_and_victim() as (bench, holder, _), bench.arbiter("third") as third:
        other = NodeId(3, 1)
        await bench.admit_by(holder, NODE, VICTIM, other)
        await third.open_paths(other)
        assert await holder.do(effects.Fence(2, (), (VICTIM, other))) == Good(None)
        assert bench.registered == sorted([holder.control.key, holder.data.key])
        address = byte_offset(bench.superblock.geometry.slot_block(VICTIM.slot))
        assert [c.offset_bytes for c in bench.commands if c.length_bytes == 4096 and c.op is Op.READ
                and c.port == holder.control.device.port].count(address) == 1  # fmt: skip


@pytest.mark.parametrize("reachable", [True, False])
async def test_a_frozen_reader_is_closed_in_its_own_portal_group(reachable: bool) -> None:
    """Another portal has another tag: a login there does not close the session, and the drain would
    wait for the reader. Where the fencing host cannot go there, the reset has to do."""
    async with open_bench() as bench:
        groups = PortalGroups(bench.lun)
        async with (
            bench.arbiter(lun=groups.at("east:3260")) as holder,
            bench.arbiter("victim", groups.at("west:3260")) as victim,
        ):
            await bench.admit(NODE, VICTIM)
            await holder.open_paths()
            await victim.open_paths(VICTIM)
            reader = victim.data.device
            block = await bench.slot_block(VICTIM.slot)
            assert {each.portal for each in block.sessions} == {"west:3260"}
            await holder.take_office()
            if not reachable:
                groups.unreachable.add(("east:3260", "west:3260"))
            assert await holder.do(effects.Fence(2, (), (VICTIM,))) == Good(None)
            assert reader.lost is reachable
            assert bench.registered == sorted([holder.control.key, holder.data.key])


async def test_a_fence_ends_with_the_session_that_wants_it() -> None:
    """Else a coordinator that lost its path would wait for logins that nobody answers."""
    async with holder_and_victim() as (bench, holder, victim):
        bench.lun.drains_wait()
        hold = bench.lun.hold(lambda c: c.data == b"L" * 512)
        answers: list[Outcome] = []

        async def fence() -> None:
            answers.append(await holder.do(effects.Fence(2, (), (VICTIM,))))

        async def write() -> None:
            with pytest.raises(OutcomeUnknown):
                await victim.data.device.write(AT, b"L" * 512)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await hold.wait_held()
            nursery.start_soon(fence)
            await victim.data.device.wait_lost()
            await trio.testing.wait_all_tasks_blocked()
            bench.lun.disconnect(lambda port: port.name.endswith("alpha"))
            await trio.testing.wait_all_tasks_blocked()
            assert answers == [Unknown()]
        hold.lift()


async def test_a_view_that_is_just_being_written_is_read_again() -> None:
    async with holder_and_victim() as (bench, holder, _):
        good = {at: bench.lun.blocks[at] for at in VIEW_ADDRESSES}
        for at in VIEW_ADDRESSES:
            bench.lun.blocks[at] = bytes(4096)
        reads = 0

        def mend(command: Command) -> bool:
            nonlocal reads
            reads += command.length_bytes == VIEW_BYTES
            if reads == 4:
                bench.lun.blocks.update(good)
            return False

        bench.lun.hold(mend)
        assert isinstance(await holder.do(effects.Survey(2)), Good)
        for at in VIEW_ADDRESSES:
            bench.lun.blocks[at] = bytes(4096)
        assert await holder.do(effects.Survey(3)) == Unknown()
        assert "view cannot be read" in holder.arbiter.trouble
