"""`LunArbiter`, effect by effect: what `lockmgr.cluster.effects` says of each."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from csvfs.format import SessionKind, View
from csvfs.membership.fixed_area import read_view
from csvfs.membership.path_keys import PathKeys
from lockmgr.cluster import effects, outcomes
from lockmgr.cluster.blocks import Heartbeat, JoinRequest
from lockmgr.cluster.outcomes import Good, Outcome, Refused, Unknown, Why
from lockmgr.cluster.view import NodeId
from redirector.block.arbiter import Op
from redirector.block.device import OutcomeUnknown, ReservationConflict, TargetBusy, UnitAttention
from redirector.block.keys import KeysExhausted, PathKey
from redirector.block.reservations import PathClosed
from redirector.block.simulated import Faults
from tests.unit.arbiter_bench import NODE, OFFICER, open_bench

BEAT = Heartbeat(NODE.slot, NODE.incarnation, 3, 2, 0b11)


def key(generation: int, node: NodeId = NODE) -> int:
    return PathKey(*node, generation).pack()


# -- keys ----------------------------------------------------------------------------------------
def test_keys() -> None:
    keys = PathKeys()
    assert keys.owner(key(3)) == NODE
    assert keys.owner(keys.newcomer(1)) is None
    assert keys.is_newcomer(keys.newcomer(1))
    assert not keys.is_newcomer(key(3))
    assert keys.newcomer(1) != keys.newcomer(2)


# -- OpenNewcomer, DropNewcomer --------------------------------------------------------------------
async def test_a_newcomer_registers_and_surveys() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        answer = await node.open_newcomer()
        assert answer.key == PathKeys().newcomer(5)
        assert answer.survey.holder_key == OFFICER
        assert set(answer.survey.keys) == {OFFICER, answer.key}
        assert answer.survey.view.lists(*NODE)
        ops = bench.ops()
        assert ops.index(Op.REGISTER) < ops.index(Op.READ) < ops.index(Op.READ_RESERVATION)
        assert node.told == []
        first = next(c.port for c in bench.commands if c.op is Op.REGISTER)
        second = await node.open_newcomer(6)
        assert {c.port for c in bench.commands} == {first}  # which has closed the one before
        assert set(bench.registered) == {OFFICER, answer.key, second.key}


@pytest.mark.parametrize("case", ["registered", "holds", "fenced", "lost", "none"])
async def test_dropping_a_newcomer(case: str) -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        left = [OFFICER]
        if case != "none":
            newcomer = (await node.open_newcomer()).key
        if case == "holds":
            await node.take_office()
            left = [newcomer]
        elif case == "fenced":
            await bench.officer.preempt(newcomer)
        elif case == "lost":
            bench.lun.disconnect(lambda port: port.name.endswith("alpha"))
            left = sorted([OFFICER, newcomer])
        assert await node.do(effects.DropNewcomer(2)) == Good(None)
        assert bench.registered == left
        assert await node.do(effects.Survey(3)) == Unknown()
        assert node.told == []


# -- OpenPaths -------------------------------------------------------------------------------------
async def test_paths_are_opened_in_order() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        answer = await node.open_paths()
        assert answer.key == key(1) == node.control.key
        assert answer.survey.view.lists(*NODE)
        assert node.data.key == key(2)
        assert node.told == [("opened", (key(1), key(2)))]
        control, data = node.control.device.port, node.data.device.port
        assert control != data
        steps = [
            (c.port, c.op)
            for c in bench.commands
            if c.op in (Op.REGISTER, Op.READ_RESERVATION, Op.WRITE)
            or (c.op is Op.READ and c.length_bytes == 65536)
        ]
        assert steps == [
            (control, Op.REGISTER),
            (control, Op.READ),
            (control, Op.READ),
            (control, Op.READ_RESERVATION),
            (control, Op.WRITE),
            (data, Op.REGISTER),
            (data, Op.READ),
            (data, Op.READ),
        ]
        block = await bench.slot_block(NODE.slot)
        assert block.identity.incarnation == NODE.incarnation
        assert block.identity.generation == 2
        assert block.identity.certificate == node.identity.certificate
        assert [(s.kind, s.key, s.isid) for s in block.sessions] == [
            (SessionKind.CONTROL, key(1), control.isid),
            (SessionKind.DATA, key(2), data.isid),
        ]


async def test_the_next_paths_have_the_same_ports_and_the_next_generations() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        before = node.control.device, node.data.device
        await node.open_paths()
        assert (node.control.key, node.data.key) == (key(3), key(4))
        assert (node.control.device.port, node.data.device.port) == tuple(d.port for d in before)
        assert all(device.lost for device in before)
        assert node.told == [
            ("opened", (key(1), key(2))),
            ("lost", (key(1), key(2))),
            ("opened", (key(3), key(4))),
        ]
        assert [s.key for s in (await bench.slot_block(NODE.slot)).sessions] == [key(3), key(4)]


async def test_who_is_not_listed_writes_nothing() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        view = await bench.admit()
        answer = await node.open_paths()
        assert answer.survey.view == view
        assert Op.WRITE not in bench.ops()[3:]
        assert node.arbiter.data is None
        assert node.told == []
        assert bench.registered == [OFFICER]  # nor leaves its keys behind


async def test_who_is_evicted_while_it_opens_does_not_use_the_data_session() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        hold = bench.lun.hold(lambda c: c.op is Op.REGISTER, limit=2)
        async with trio.open_nursery() as nursery:
            answers: list[outcomes.Opened] = []

            async def open_paths() -> None:
                answers.append(await node.open_paths())

            nursery.start_soon(open_paths)
            await hold.wait_held()
            hold.land()
            await hold.wait_held()
            view = await bench.admit()
            hold.land()
        assert answers[0].survey.view == view
        assert node.arbiter.data is None
        assert node.told == []
        assert bench.registered == [OFFICER]


async def test_all_of_it_is_done_also_when_nobody_holds() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await bench.officer.device.register(0, old_key=OFFICER)
        answer = await node.open_paths()
        assert answer.survey.holder_key == 0
        assert node.data.key == key(2)


async def test_a_control_session_that_is_fenced_before_the_slot_block_writes_none() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        hold = bench.lun.hold(lambda c: c.op is Op.READ_RESERVATION, limit=1)
        async with trio.open_nursery() as nursery:
            answers: list[Outcome] = []

            async def open_paths() -> None:
                answers.append(await node.do(effects.OpenPaths(1, *NODE)))

            nursery.start_soon(open_paths)
            await hold.wait_held()
            hold.land()
            await bench.officer.preempt(key(1))
        assert answers == [Unknown()]
        assert node.told == [("lost", (key(1),))]
        assert Op.WRITE not in bench.ops()
        await node.open_paths()  # on another one
        assert [s.key for s in (await bench.slot_block(NODE.slot)).sessions] == [key(3), key(4)]
        assert bench.registered == sorted([OFFICER, key(3), key(4)])


@pytest.mark.parametrize("lost_at", range(14))
async def test_paths_that_are_lost_while_they_are_opened(lost_at: int) -> None:
    """At whatever command: what may be registered is told, and the next ones are good."""
    async with open_bench() as bench, bench.arbiter() as node:
        seen = 0

        def is_it(command: object) -> bool:
            nonlocal seen
            seen += 1
            return seen == lost_at + 1

        bench.lun.lose_answer(is_it, landed=lost_at % 2 == 0)
        assert await node.do(effects.OpenPaths(1, *NODE)) == Unknown()
        assert [what for what, _ in node.told] == ["lost"] * len(node.told)
        told = {each for _, keys in node.told for each in keys}
        assert set(bench.registered) - {OFFICER} <= told <= {key(1), key(2)}
        assert node.arbiter.data is None and node.arbiter.control is None
        node.told.clear()
        await node.open_paths()
        assert node.told == [("opened", (key(3), key(4)))]


async def test_generations_end_clearly() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        node.arbiter._sessions._generation = (1 << 16) - 2
        with pytest.raises(KeysExhausted, match="all 65535 path generations"):
            await node.do(effects.OpenPaths(1, *NODE))


async def test_a_key_that_follows_its_port_is_replaced() -> None:
    async with open_bench(Faults(registrations_follow_port=True)) as bench, bench.arbiter() as node:
        await node.open_paths()
        node.control.device.abort()
        await node.open_paths()
        assert bench.registered == sorted([OFFICER, key(3), key(4)])


async def test_another_lun_in_its_place_is_not_used() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        bench.lun.identity = replace(bench.lun.identity, serial="other")
        assert await node.do(effects.OpenPaths(1, *NODE)) == Unknown()
        assert "another LUN" in node.arbiter.trouble


# -- a target that restarts ------------------------------------------------------------------------
@pytest.mark.parametrize("attempts", [0, 1])
async def test_a_restart_is_told_once(attempts: int) -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        assert not node.arbiter.restarted
        bench.lun.restart()
        for _ in range(attempts):
            bench.lun.lose_answer(lambda c: c.op is Op.WRITE, landed=True)
            assert await node.do(effects.OpenPaths(1, *NODE)) == Unknown()
        await node.open_paths()
        assert node.arbiter.restarted
        await node.open_paths()
        assert not node.arbiter.restarted


# -- reading and writing ---------------------------------------------------------------------------
async def test_a_heartbeat_and_a_request_come_back() -> None:
    async with open_bench() as bench, bench.arbiter() as node, bench.arbiter("beta") as beta:
        await node.open_paths()
        newcomer = (await beta.open_newcomer()).key
        me = beta.identity
        request = JoinRequest(
            3,
            newcomer,
            41,
            me.node_name,
            me.machine_id,
            me.boot_id,
            me.fingerprint,
            me.addresses,
            me.certificate,
        )
        assert await node.do(effects.WriteHeartbeat(2, BEAT)) == Good(None)
        assert await beta.do(effects.WriteJoin(3, request)) == Good(None)
        for reader in (node, beta):
            seen = await reader.do(effects.ReadBlocks(4))
            assert seen == Good(outcomes.Blocks((BEAT,), (request,)))
            assert reader.arbiter.certificates[me.fingerprint] == me.certificate
        await node.open_newcomer(8)  # the control session is used all the same
        bench.commands.clear()
        await node.do(effects.Survey(5))
        assert {c.port for c in bench.commands} == {node.control.device.port}


async def test_each_write_has_its_session() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_newcomer()
        assert await node.do(effects.WriteHeartbeat(1, BEAT)) == Unknown()
        assert isinstance(await node.do(effects.Survey(2)), Good)


async def test_a_view_is_stable_and_read_by_all() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        await node.take_office()
        before = await read_view(node.data.device, bench.superblock.volume_id)
        view = before.next(node.control.key, {}, 9)
        assert await node.do(effects.WriteView(2, view)) == Good(None)
        assert bench.ops()[-2:] == [Op.WRITE, Op.SYNCHRONIZE_CACHE]
        crashed = bench.lun.crashed(keep=lambda _: False)
        device = await crashed.login(node.data.device.port)
        assert await read_view(device, bench.superblock.volume_id) == view
        survey = await node.do(effects.Survey(3))
        assert isinstance(survey, Good) and isinstance(survey.value, outcomes.Surveyed)
        assert survey.value.view == view


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNCHRONIZE_CACHE])
async def test_a_view_of_which_nobody_knows(op: Op) -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        await node.take_office()
        view: View = (await read_view(node.data.device, bench.superblock.volume_id)).next(1, {}, 9)
        bench.lun.lose_answer(lambda c: c.op is op, landed=True)
        assert await node.do(effects.WriteView(2, view)) == Unknown()
        assert [c.op for c in bench.commands].count(Op.WRITE) <= 1


# -- what answers mean -----------------------------------------------------------------------------
@pytest.mark.parametrize("told", [True, False])
async def test_who_is_fenced_is_refused_and_all_is_closed(told: bool) -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        data = node.data
        await bench.officer.preempt(node.control.key)
        if not told:  # another command has fetched the unit attention
            with pytest.raises(UnitAttention):
                await node.control.device.test_unit_ready()
        outcome = await node.do(effects.WriteHeartbeat(2, BEAT))
        assert outcome == Refused(Why.PREEMPTED if told else Why.CONFLICT)
        assert node.told[1:] == [("lost", (key(1), key(2)))]
        assert data.device.lost
        for effect in (
            effects.Survey(3),
            effects.ReadBlocks(4),
            effects.WriteHeartbeat(5, BEAT),
            effects.Take(6, OFFICER),
            effects.Reserve(7),
            effects.Fence(8, ()),
            effects.Unregister(9, 0),
        ):
            assert await node.do(effect) == Unknown()
        assert len(node.told) == 2


async def test_a_session_that_is_silent_or_gone_is_unknown() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        bench.lun.lose_answer(lambda c: c.op is Op.WRITE, landed=True)
        assert await node.do(effects.WriteHeartbeat(2, BEAT)) == Unknown()
        assert node.told[1:] == [("lost", (key(1), key(2)))]


async def test_the_data_session_takes_the_control_session_with_it() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        data, control = node.data, node.control
        node.arbiter.lose(data, PathClosed("its user has found a conflict"))
        assert data.device.lost and control.device.lost
        assert node.told[1:] == [("lost", (key(1), key(2)))]
        node.arbiter.lose(data, PathClosed("and again"))
        assert len(node.told) == 2


async def test_resets_and_a_busy_target_change_nothing() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        await bench.lun.reset()
        bench.lun.inject(lambda c: c.op is Op.WRITE, lambda what: TargetBusy(what, status=8))
        assert await node.do(effects.WriteHeartbeat(2, BEAT)) == Good(None)
        assert len(node.told) == 1


async def test_a_stranger_s_reserve_is_reset_away() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        stranger = await bench.lun.login(replace(node.data.device.port, name="iqn.x:stranger"))
        bench.lun.arbiter.reserve_legacy(stranger.nexus)
        assert await node.do(effects.WriteHeartbeat(2, BEAT)) == Good(None)
        bench.lun.arbiter.reserve_legacy(stranger.nexus)
        with pytest.raises(ReservationConflict):
            await node.data.ask(lambda: node.data.device.write(1 << 25, bytes(512)))
        for _ in range(3):
            node.arbiter.stranger()
        await trio.testing.wait_all_tasks_blocked()
        await node.data.ask(lambda: node.data.device.write(1 << 25, bytes(512)))
        assert len(node.told) == 1


async def test_whoever_waits_for_an_answer_hears_of_the_loss_first() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        control = node.control
        hold = bench.lun.hold(lambda c: c.op is Op.WRITE)
        before: list[int] = []

        async def write(number: int) -> None:
            with pytest.raises(OutcomeUnknown):
                await node.data.device.write((1 << 25) + 512 * number, bytes(512))
            before.append(len(node.told))

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(write, number)
            await hold.wait_held(5)
            bench.lun.close_session(control.device)  # type: ignore[arg-type]
        assert before == [2] * 5
        hold.lift()


# -- the reservation -------------------------------------------------------------------------------
async def test_take() -> None:
    async with open_bench() as bench, bench.arbiter() as node, bench.arbiter("beta") as beta:
        other = NodeId(2, 1)
        await bench.admit(NODE, other)
        await node.open_paths()
        await beta.open_paths(other)
        assert await node.do(effects.Take(2, OFFICER)) == Good(outcomes.Won())
        assert await beta.do(effects.Take(2, OFFICER)) == Good(outcomes.Lost(key(1)))
        # A key that is registered, but does not hold: nothing is taken.
        assert await beta.do(effects.Take(2, key(2))) == Good(outcomes.Lost(key(1)))
        assert await beta.do(effects.Reserve(3)) == Good(outcomes.Lost(key(1)))
        await node.control.device.register(0, old_key=key(1))
        assert await beta.do(effects.Take(4, key(1))) == Good(outcomes.NobodyHolds())
        assert await beta.do(effects.Reserve(5)) == Good(outcomes.Won())
        assert bench.holder == beta.control.key


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize(
    ("effect", "op"),
    [
        (effects.Take(2, OFFICER), Op.PREEMPT),
        (effects.Reserve(2), Op.RESERVE),
        (effects.Unregister(2, 0), Op.REGISTER),
        (effects.Fence(2, (key(4, NodeId(2, 1)),)), Op.PREEMPT),
    ],
)
async def test_what_changes_registrations_is_never_sent_again(
    effect: effects.AnyIo, op: Op, landed: bool
) -> None:
    async with open_bench() as bench, bench.arbiter() as node, bench.arbiter("beta") as beta:
        await bench.admit(NODE, NodeId(2, 1))
        await node.open_paths()
        for _ in range(2):
            await beta.open_paths(NodeId(2, 1))
        if isinstance(effect, effects.Fence):
            await node.take_office()
        if isinstance(effect, effects.Reserve):
            await bench.officer.device.register(0, old_key=OFFICER)
            await node.do(effects.Survey(2))  # hears of it
        bench.commands.clear()
        bench.lun.lose_answer(lambda c: c.op is op, landed=landed)
        assert await node.do(effect) == Unknown()
        assert bench.ops().count(op) == 0  # that one was lost on its way, and was the only one
        assert node.told[-1] == ("lost", (key(1), key(2)))


# -- leaving -----------------------------------------------------------------------------------
async def test_unregister() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        devices = node.control.device, node.data.device
        await bench.officer.preempt(node.data.key)
        assert await node.do(effects.Unregister(2, 0)) == Good(None)
        assert bench.registered == [OFFICER]
        assert all(device.lost for device in devices)
        assert len(node.told) == 1


async def test_the_holder_s_key_is_kept() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        await node.take_office()
        assert await node.do(effects.Unregister(2, node.control.key)) == Good(None)
        assert bench.registered == [key(1)]
        assert isinstance(await node.do(effects.Survey(3)), Good)
        await node.arbiter.aclose()
        assert (bench.holder, bench.registered) == (key(1), [key(1)])
        assert not [s for s in bench.lun.sessions.values() if "alpha" in s.port.name]


async def test_the_holder_s_key_is_never_unregistered() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        await node.take_office()
        assert await node.do(effects.Unregister(2, 0)) == Unknown()
        assert bench.registered == sorted([key(1), key(2)])


async def test_nothing_is_opened_after_the_end() -> None:
    async with open_bench() as bench, bench.arbiter() as node:
        await node.open_paths()
        node.arbiter.abort()
        assert node.told[1:] == [("lost", (key(1), key(2)))]
        assert await node.do(effects.OpenPaths(2, *NODE)) == Unknown()
        assert await node.do(effects.OpenNewcomer(3, PathKeys().newcomer(1))) == Unknown()


# -- certificates ----------------------------------------------------------------------------------
async def test_certificates_stand_in_slot_blocks() -> None:
    async with open_bench() as bench, bench.arbiter() as node, bench.arbiter("beta") as beta:
        other = NodeId(2, 1)
        await bench.admit(NODE, other)
        await node.open_paths()
        await beta.open_paths(other)
        own = node.identity.fingerprint
        assert node.arbiter.certificates == {own: node.identity.certificate}
        await node.arbiter.read_certificates([NodeId(2, 2), NodeId(9, 1)])  # of another life: no
        assert node.arbiter.certificates.keys() == {own}
        await node.arbiter.read_certificates([other])
        assert node.arbiter.certificates[beta.identity.fingerprint] == beta.identity.certificate


def test_an_identity_that_does_not_fit_is_refused_at_once() -> None:
    async def attempt() -> None:
        async with open_bench() as bench, bench.arbiter("n" * 65):
            pass

    with pytest.raises(ValueError, match="node name"):
        trio.run(attempt)
