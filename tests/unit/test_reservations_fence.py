"""Registrations, succession and the fence of a path, on the simulated LUN."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from random import Random

import pytest
import trio
from trio.testing import MockClock

from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import (
    InitiatorPort,
    LostAfterLogin,
    OutcomeUnknown,
    RegisteredKeys,
    ReservationConflict,
    TargetBusy,
    UnitAttention,
)
from redirector.block.keys import PathKey, choose_port, newcomer_key
from redirector.block.reservations import (
    AttentionMeans,
    FenceFailed,
    KeyInUse,
    NobodyHolds,
    PathClosed,
    Registration,
    TakeoverLost,
    TargetRestarted,
    Victim,
    attention_means,
    drain,
    fence,
    keys_verdict,
    survey,
    victims_of,
)
from redirector.block.simulated import Command, Faults, SimulatedDevice, SimulatedLun

BLOCK = 4096
NAME = "iqn.2026-11.test:host"
A, B, C = (PathKey(1, 7, generation).pack() for generation in (1, 2, 3))


def port(number: int) -> InitiatorPort:
    return InitiatorPort(f"{NAME}{number}", 0x8000_0000_0000 + number)


async def registered(lun: SimulatedLun, number: int, key: int) -> Registration:
    return await Registration.register(await lun.login(port(number)), key)


@contextlib.asynccontextmanager
async def holder_and_victim(
    lun: SimulatedLun,
) -> AsyncIterator[tuple[Registration, Registration]]:
    holder, victim = await registered(lun, 1, A), await registered(lun, 2, B)
    await holder.reserve()
    yield holder, victim
    lun.check()


# -- decisions -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "means"),
    [
        (0x2900, AttentionMeans.ASK_KEYS),
        (0x2903, AttentionMeans.ASK_KEYS),
        (0x2A03, AttentionMeans.CLOSED),
        (0x2A05, AttentionMeans.CLOSED),
        (0x2A04, AttentionMeans.GO_ON),
        (0x2A09, AttentionMeans.GO_ON),
        (0x3F0E, AttentionMeans.GO_ON),
    ],
)
def test_attentions(code: int, means: AttentionMeans) -> None:
    assert attention_means(code) is means


def test_keys_verdict() -> None:
    assert keys_verdict(A, 5, RegisteredKeys(5, (B, A))) is None
    assert type(keys_verdict(A, 5, RegisteredKeys(6, (B,)))) is PathClosed
    assert type(keys_verdict(A, 5, RegisteredKeys(4, (A,)))) is TargetRestarted
    assert type(keys_verdict(A, 5, RegisteredKeys(0, ()))) is TargetRestarted


# -- registering -----------------------------------------------------------------------------------
async def test_a_key_is_registered_once() -> None:
    lun = SimulatedLun(1 << 20)
    await registered(lun, 1, A)
    with pytest.raises(KeyInUse, match="slot 1, incarnation 7, path generation 1"):
        await registered(lun, 2, A)
    assert lun.arbiter.read_keys().keys == (A,)


async def test_two_at_a_time_with_one_key_both_learn_of_it_or_one_does() -> None:
    lun = SimulatedLun(1 << 20)
    first, second = await lun.login(port(1)), await lun.login(port(2))
    hold = lun.hold(lambda command: command.op is Op.REGISTER, limit=2)
    refused = []

    async def turn(device: SimulatedDevice) -> None:
        try:
            await Registration.register(device, A)
        except KeyInUse:
            refused.append(device)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn, first)
        nursery.start_soon(turn, second)
        await hold.wait_held(2)
        hold.lift()
    assert refused
    assert lun.arbiter.read_keys().keys.count(A) <= 1


async def test_survey_shows_one_moment() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun):
        other = await lun.login(port(3))
        standing = await survey(other)
        assert standing.holder_key == A
        assert standing.of_incarnation(1, 7) == (A, B)
        assert standing.of_incarnation(1, 8) == ()
        assert not standing.strange_reservation()


# -- reading answers -------------------------------------------------------------------------------
async def test_reset_attention_asks_for_the_keys_and_goes_on() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        await lun.reset()
        await holder.ask(lambda: holder.device.write(0, b"x" * BLOCK))
        assert await holder.device.read(0, BLOCK) == b"x" * BLOCK


async def test_preempted_path_is_closed() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, victim):
        await holder.preempt(B)
        for _ in range(2):
            with pytest.raises(PathClosed):
                await victim.ask(lambda: victim.device.write(0, bytes(BLOCK)))


async def test_conflict_with_the_own_key_registered_is_a_strangers() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        stranger = await lun.login(port(9))
        lun.arbiter.reserve_legacy(stranger.nexus)
        with pytest.raises(ReservationConflict):
            await holder.ask(lambda: holder.device.write(0, bytes(BLOCK)))
        await lun.reset()
        await holder.ask(lambda: holder.device.write(0, bytes(BLOCK)))


async def test_busy_is_asked_again(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        lun.inject(lambda c: c.op is Op.WRITE, lambda what: TargetBusy(what, status=0x28), times=9)
        await holder.ask(lambda: holder.device.write(0, b"x" * BLOCK))


async def test_generation_that_went_back_is_a_restart() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        lun.arbiter.generation = 0
        with pytest.raises(TargetRestarted):
            await holder.confirm()


# -- succession ------------------------------------------------------------------------------------
async def test_of_two_successors_one_wins() -> None:
    lun = SimulatedLun(1 << 20)
    await (await registered(lun, 1, A)).reserve()
    outcome: dict[int, str] = {}
    told: set[int] = set()

    async def succeed(number: int) -> None:
        candidate = await registered(lun, number, PathKey(number, 1, 1).pack())
        try:
            await candidate.take(A)
            outcome[number] = "won"
        except TakeoverLost as lost:
            outcome[number] = "lost"
            told.add(lost.holder_key)

    async with trio.open_nursery() as nursery:
        for number in range(2, 8):
            nursery.start_soon(succeed, number)
    assert sorted(outcome.values()) == ["lost"] * 5 + ["won"]
    winner = next(number for number, what in outcome.items() if what == "won")
    assert lun.arbiter.read_reservation().key == PathKey(winner, 1, 1).pack()
    assert told == {PathKey(winner, 1, 1).pack()}


async def test_preempt_of_a_non_holder_is_no_succession() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (_, victim):
        candidate = await registered(lun, 3, C)
        with pytest.raises(TakeoverLost) as lost:
            await candidate.take(victim.key)
        assert lost.value.holder_key == A


async def test_take_where_nobody_holds() -> None:
    lun = SimulatedLun(1 << 20)
    a, b = await registered(lun, 1, A), await registered(lun, 2, B)
    with pytest.raises(NobodyHolds):
        await b.take(A)
    await b.reserve()
    with pytest.raises(PathClosed):
        await a.reserve()


async def test_targets_that_preempt_what_nobody_registered_do_not_fool_a_successor() -> None:
    lun = SimulatedLun(1 << 20, faults=Faults(ArbiterHabits(preempts_unregistered=True)))
    async with holder_and_victim(lun):
        candidate = await registered(lun, 3, C)
        with pytest.raises(TakeoverLost):
            await candidate.take(newcomer_key(Random(1)))


@pytest.mark.parametrize("landed", [False, True])
async def test_succession_of_unknown_outcome_is_asked_for_not_repeated(landed: bool) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun):
        candidate = await registered(lun, 3, C)
        lun.lose_answer(lambda command: command.op is Op.PREEMPT, landed=landed)
        with pytest.raises(OutcomeUnknown):
            await candidate.take(A)
        standing = await survey(await lun.login(port(4)))
        assert standing.holder_key == (C if landed else A)


# -- the fence -------------------------------------------------------------------------------------
def is_slow(command: Command) -> bool:
    return command.op is Op.WRITE and command.data.startswith(b"SLOW")


async def late_write(victim: Registration, at: int = 0) -> None:
    """Write until the path is no more."""
    with contextlib.suppress(OutcomeUnknown, PathClosed):
        while True:
            await victim.ask(lambda: victim.device.write(at, b"SLOW" * (BLOCK // 4)))


@pytest.mark.parametrize("with_port", [False, True])
async def test_nothing_of_the_victim_lands_after_its_fence(with_port: bool) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, victim):
        lun.hold(is_slow)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(late_write, victim, number * BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            await fence(lun, holder, [Victim(B, port(2) if with_port else None)])
            assert not lun.parked
            await holder.device.write(0, b"n" * BLOCK)
        assert await holder.device.read(0, BLOCK) == b"n" * BLOCK
        assert lun.arbiter.read_keys().keys == (A,)
        assert victim.device.lost is with_port


async def test_fence_of_a_frozen_reader_needs_its_port(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, victim):
        assert isinstance(victim.device, SimulatedDevice)
        lun.hold(lambda command: command.op is Op.READ)
        victim.device.freeze()

        async def read() -> None:
            with pytest.raises(OutcomeUnknown):
                await victim.device.read(0, BLOCK)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(FenceFailed, match="resets"):
                await fence(lun, holder, [Victim(B)])
            await fence(lun, holder, [Victim(B, port(2))])


async def test_stragglers_are_fenced_when_a_reset_hangs(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        straggler = await registered(lun, 3, C)
        assert isinstance(straggler.device, SimulatedDevice)
        lun.hold(lambda command: command.op is Op.READ)
        straggler.device.freeze()

        async def read() -> None:
            with pytest.raises(OutcomeUnknown):
                await straggler.device.read(0, BLOCK)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            start = trio.current_time()
            await fence(lun, holder, [Victim(B)], stragglers=lambda: [Victim(C, port(3))])
            assert trio.current_time() - start == pytest.approx(2.0)
        assert lun.arbiter.read_keys().keys == (A,)


async def test_of_two_resets_at_a_time_the_unanswered_one_is_issued_again(
    autojump_clock: MockClock,
) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, victim):
        lun.drains_wait()
        hold = lun.hold(is_slow)
        done = []

        async def one_drain() -> None:
            await drain(lun, holder)
            done.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim.device.write, 0, b"SLOW" * (BLOCK // 4))
            await hold.wait_held()
            nursery.start_soon(one_drain)
            await trio.sleep(0.5)
            nursery.start_soon(one_drain)
            await trio.sleep(0.5)
            assert not done
            hold.lift()
        assert len(done) == 2


async def test_reinstatement_is_tried_again_and_then_reported(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        lun.disconnect(lambda login: login == port(2))

        async def come_back() -> None:
            await trio.sleep(0.03)
            lun.reconnect()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            await fence(lun, holder, [Victim(B, port(2))])
        lun.disconnect(lambda login: login == port(5))
        with pytest.raises(FenceFailed, match="cannot be closed"):
            await fence(lun, holder, [Victim(0, port(5))])


class Contested(SimulatedLun):
    """The owner of a port lives: it logs in again as soon as somebody else has."""

    logins = 0

    async def login(self, port_: InitiatorPort, *, timeout_s: float = 10.0) -> SimulatedDevice:
        device = await super().login(port_, timeout_s=timeout_s)
        if port_ != port(2):
            return device
        self.logins += 1
        if self.logins == 1:
            return device
        await super().login(port_, timeout_s=timeout_s)
        assert device.lost
        raise LostAfterLogin("its owner was quicker")


async def test_who_logs_in_again_at_once_is_closed_all_the_same() -> None:
    lun = Contested(1 << 20)
    async with holder_and_victim(lun) as (holder, victim):
        await fence(lun, holder, [Victim(B, port(2))])
        assert victim.device.lost
        assert lun.logins == 2, "nobody fights for it"
        assert lun.arbiter.read_keys().keys == (A,)


async def test_fence_of_what_is_gone_already_is_done() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        await fence(lun, holder, [Victim(B), Victim(B), Victim(C, port(7))])
        await fence(lun, holder, [Victim(B)])
        assert lun.arbiter.read_keys().keys == (A,)


async def test_only_the_holder_fences() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, other):
        with pytest.raises(TakeoverLost):
            await fence(lun, other, [Victim(A)])
        await holder.device.release(A)
        with pytest.raises(NobodyHolds):
            await fence(lun, holder, [Victim(B)])
        with pytest.raises(ValueError, match="itself"):
            await holder.preempt(A)
        await holder.reserve()
        with pytest.raises(ValueError, match="own session"):
            await fence(lun, holder, [Victim(0, port(1))])


async def test_a_restart_in_the_middle_of_a_fence_is_noticed() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        reset = lun.reset

        async def restarting(*, timeout_s: float = 2.0) -> None:
            lun.arbiter.registrations.clear()
            lun.arbiter.holder, lun.arbiter.generation = None, 0
            await reset(timeout_s=timeout_s)

        lun.reset = restarting  # type: ignore[method-assign]  # a fault of its own
        with pytest.raises(TargetRestarted):
            await fence(lun, holder, [Victim(B)])


async def test_abort_is_used_where_it_is_known() -> None:
    lun = SimulatedLun(1 << 20, faults=Faults(ArbiterHabits(knows_abort=True)))
    async with holder_and_victim(lun) as (holder, victim):
        hold = lun.hold(is_slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late_write, victim)
            await hold.wait_held()
            await fence(lun, holder, [Victim(B)], abort=True)
        assert await holder.device.read(0, BLOCK) == bytes(BLOCK)


async def test_a_dead_incarnation_is_fenced_with_all_it_had() -> None:
    """The own dead predecessor: its key holds, other keys and ports are recorded."""
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (_, data):
        hold = lun.hold(is_slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late_write, data)
            await hold.wait_held()
            newcomer = await Registration.register(
                await lun.login(choose_port(NAME, Random(3))), newcomer_key(Random(4))
            )
            standing = await survey(newcomer.device)
            assert standing.holder_key in standing.of_incarnation(1, 7)
            await newcomer.take(standing.holder_key)
            keys = standing.of_incarnation(1, 7)
            await fence(lun, newcomer, victims_of(keys, [port(1), port(2)]))
        assert lun.arbiter.read_keys().keys == (newcomer.key,)
        assert (await survey(newcomer.device)).holder_key == newcomer.key


async def test_attention_of_a_reset_by_somebody_else_while_preempting() -> None:
    lun = SimulatedLun(1 << 20)
    async with holder_and_victim(lun) as (holder, _):
        lun.inject(
            lambda command: command.op is Op.PREEMPT,
            lambda what: UnitAttention(what, sense_key=6, asc_ascq=0x2900),
            times=3,
        )
        await fence(lun, holder, [Victim(B)])
        assert lun.arbiter.read_keys().keys == (A,)
