"""The decisions of a recovery: against a model of the target, with losses at every point."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redirector.block.keys import MAX_GENERATION, KeysExhausted, PathKey
from redirector.recovery import Do, Kind, Recovery, Step

CONTROL, DATA = (PathKey(3, 9, generation).pack() for generation in (1, 2))


def steps_until_done(recovery: Recovery, world: World) -> list[Step]:
    steps = []
    while (step := recovery.next_step()).do is not Do.DONE:
        steps.append(step)
        world.carry_out(step)
        assert len(steps) < 50
    return steps


class World:
    """What the target would know: who is registered, who holds, whose commands may still land."""

    def __init__(self, recovery: Recovery) -> None:
        self.recovery = recovery
        self.registered = {CONTROL, DATA}
        self.given = {CONTROL, DATA}
        self.holder = CONTROL
        self.stray: set[int] = set()
        """Keys of lost data sessions whose writes may still land."""
        self.late: set[int] = set()
        """Keys whose REGISTER is still on its way, from a session that was lost."""

    def lose(self, kind: Kind) -> None:
        if kind is Kind.DATA and kind in self.recovery.live:
            self.stray.add(self.recovery.live[kind])
        self.recovery.lost(kind)
        self.check()

    def restart(self) -> None:
        self.registered.clear()
        self.late.clear()
        self.stray.clear()
        self.holder = 0
        for kind in Kind:
            self.recovery.lost(kind)
        self.check()

    def carry_out(self, step: Step, *, lost_after_register: bool = False) -> None:
        recovery = self.recovery
        match step.do:
            case Do.OPEN:
                assert step.kind is not None
                key = recovery.take_generation().pack()
                assert key not in self.given
                self.given.add(key)
                recovery.registering()
                if lost_after_register:
                    self.late.add(key)
                else:
                    self.registered.add(key)
                    recovery.opened(step.kind, key)
            case Do.TAKE:
                control = recovery.live[Kind.CONTROL]
                if not self.holder:
                    recovery.lost(Kind.DATA)
                    recovery.forgot()
                else:
                    assert recovery.is_own(self.holder)
                    self.registered.discard(self.holder)
                    recovery.preempted(self.holder)
                self.holder = control
                recovery.took(recovery.next_step())
            case Do.PREEMPT:
                assert self.holder == recovery.live[Kind.CONTROL] != step.key
                self.registered.discard(step.key)
                recovery.preempted(step.key)
            case Do.DRAIN:
                assert not recovery.unfenced
                self.stray &= self.registered
                self.registered |= self.late
                self.late.clear()
                recovery.drained(step, self.registered)
            case Do.VIEW:
                recovery.saw_view(step)
            case Do.REISSUE:
                recovery.reissued(step)
            case Do.ANNOUNCE:
                recovery.told(step)
            case Do.DONE:
                raise AssertionError
        self.check()

    def check(self) -> None:
        self.recovery.check()
        if self.recovery.data_flows:
            assert not self.stray, "data flows while older writes may land"
            assert self.recovery.live[Kind.DATA] in self.registered


def fresh() -> tuple[Recovery, World]:
    recovery = Recovery.of(CONTROL, DATA)
    return recovery, World(recovery)


def test_nothing_to_do() -> None:
    recovery, _ = fresh()
    assert recovery.next_step() == Step(Do.DONE)
    assert recovery.data_flows


def test_loss_of_data() -> None:
    recovery, world = fresh()
    world.lose(Kind.DATA)
    assert not recovery.data_flows
    assert [(step.do, step.kind) for step in steps_until_done(recovery, world)] == [
        (Do.OPEN, Kind.DATA),
        (Do.PREEMPT, Kind.CONTROL),
        (Do.DRAIN, Kind.CONTROL),
        (Do.VIEW, Kind.DATA),
        (Do.ANNOUNCE, Kind.CONTROL),
    ]
    assert recovery.live == {Kind.CONTROL: CONTROL, Kind.DATA: PathKey(3, 9, 3).pack()}


def test_loss_of_control_lets_data_flow() -> None:
    recovery, world = fresh()
    world.lose(Kind.CONTROL)
    while (step := recovery.next_step()).do is not Do.DONE:
        assert recovery.data_flows
        world.carry_out(step)
    assert world.holder == recovery.live[Kind.CONTROL] == PathKey(3, 9, 3).pack()


def test_loss_of_both() -> None:
    recovery, world = fresh()
    world.lose(Kind.DATA)
    world.lose(Kind.CONTROL)
    assert [step.do for step in steps_until_done(recovery, world)] == [
        Do.OPEN,
        Do.TAKE,
        Do.OPEN,
        Do.PREEMPT,
        Do.DRAIN,
        Do.VIEW,
        Do.VIEW,
        Do.ANNOUNCE,
    ]
    assert world.registered == set(recovery.live.values())


def test_restart_of_the_target() -> None:
    recovery, world = fresh()
    world.restart()
    done = [step.do for step in steps_until_done(recovery, world)]
    assert done.index(Do.REISSUE) > max(i for i, do in enumerate(done) if do is Do.VIEW)
    assert recovery.data_flows


def test_a_generation_whose_register_was_not_sent_is_kept() -> None:
    recovery, _ = fresh()
    assert recovery.take_generation() == recovery.take_generation() == PathKey(3, 9, 3)
    recovery.registering()
    assert recovery.take_generation() == PathKey(3, 9, 4)
    assert recovery.unfenced == [PathKey(3, 9, 3).pack()]


def test_generations_do_not_wrap() -> None:
    recovery = Recovery.of(CONTROL, PathKey(3, 9, MAX_GENERATION).pack())
    with pytest.raises(KeysExhausted):
        recovery.take_generation()


def test_keys_of_two_lives_are_refused() -> None:
    with pytest.raises(ValueError, match="one incarnation"):
        Recovery.of(CONTROL, PathKey(3, 10, 2).pack())


events = st.lists(
    st.sampled_from(
        ["step", "step", "step", "step", "burn", "late", "data", "control", "restart", "2900"]
    ),
    max_size=60,
)


@given(events)
@settings(max_examples=400)
def test_any_course_is_safe_and_ends_well(course: list[str]) -> None:
    recovery, world = fresh()
    for event in course:
        step = recovery.next_step()
        match event:
            case "step" if step.do is not Do.DONE:
                world.carry_out(step)
            case "burn" if step.do is Do.OPEN:
                world.carry_out(step, lost_after_register=True)
            case "data":
                world.lose(Kind.DATA)
            case "control":
                world.lose(Kind.CONTROL)
            case "late":
                world.registered |= world.late
                world.late.clear()
            case "restart":
                world.restart()
            case "2900":
                recovery.disturbed()
    steps_until_done(recovery, world)
    assert recovery.data_flows
    assert world.holder == recovery.live[Kind.CONTROL]
    assert not recovery.unfenced
    # A REGISTER may still be on its way where no write was: it disturbs nobody.
    assert set(recovery.live.values()) <= world.registered
    recovery.disturbed()
    steps_until_done(recovery, world)
    assert world.registered == set(recovery.live.values())


@pytest.mark.parametrize("lost", list(Kind))
def test_a_step_that_ends_after_a_loss_proves_nothing(lost: Kind) -> None:
    recovery, world = fresh()
    world.lose(Kind.CONTROL)
    while (step := recovery.next_step()).do is not Do.DONE:
        late = fresh_copy(recovery)
        late.lost(lost)
        before = (late.holding, late.undrained, set(late.viewed), late.announced)
        match step.do:
            case Do.TAKE:
                late.took(step)
            case Do.DRAIN:
                late.drained(step, ())
            case Do.VIEW:
                late.saw_view(step)
            case Do.ANNOUNCE:
                late.told(step)
        if lost in recovery.live:
            assert before == (late.holding, late.undrained, set(late.viewed), late.announced)
        late.check()
        world.carry_out(step)


def fresh_copy(recovery: Recovery) -> Recovery:
    return copy.deepcopy(recovery)
