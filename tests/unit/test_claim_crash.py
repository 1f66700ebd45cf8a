# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""Claim and release cut off anywhere: the next claim recovers, and nothing lands late."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs.membership.claim import (
    Claim,
    ClaimFailed,
    ClaimRefused,
    LeaveIncomplete,
)
from redirector.block.arbiter import Op
from redirector.block.device import (
    BlockError,
    OutcomeUnknown,
)
from redirector.block.keys import PathKey
from redirector.block.simulated import SimulatedLun
from redirector.block.simulated_faults import Command, Hold
from tests.unit.claim_nodes import (
    Node,
    assert_taken,
    copy_of,
    formatted,
    registered,
    release,
)


def at_command(lun: SimulatedLun, number: int, action: Callable[[Command], None]) -> None:
    """Do something when the ``number``-th command from now arrives."""
    left = number

    def match(command: Command) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            action(command)
        return False

    lun.inject(match, OutcomeUnknown)


async def prepared(kind: str) -> tuple[SimulatedLun, Node]:
    """A LUN just before a claim of that kind, and who will claim."""
    node = Node()
    lun = await formatted(parked=kind != "first")
    if kind in ("parked", "dead"):
        claim = await node.claim(lun)
        if kind == "parked":
            await release(claim)
        else:
            claim.abort()
    return copy_of(lun), node


async def commands_of(kind: str) -> int:
    lun, node = await prepared(kind)
    count = 0

    def tally(_: Command) -> bool:
        nonlocal count
        count += 1
        return False

    lun.inject(tally, OutcomeUnknown)
    claim = await node.claim(lun)
    await release(claim)
    return count


async def life(lun: SimulatedLun, node: Node) -> None:
    await release(await node.claim(lun))


ANY_END = (BlockError, ClaimFailed, ClaimRefused, LeaveIncomplete)


@pytest.mark.parametrize("kind", ["first", "parked", "dead"])
@pytest.mark.parametrize("landed", [True, False])
async def test_the_host_dies_at_any_command(
    kind: str, landed: bool, autojump_clock: MockClock
) -> None:
    """The next claim of the same host succeeds, soon, under a number never used before."""
    total = await commands_of(kind)
    assert total > 30
    for number in range(1, total + 1):
        lun, node = await prepared(kind)

        def die(command: Command, lun: SimulatedLun = lun) -> None:
            if not landed:
                lun.lose_answer(lambda other: other is command, landed=False)
            lun.disconnect()

        at_command(lun, number, die)
        with pytest.raises(ANY_END):
            await life(lun, node)
        lun.reconnect()
        before = {key for key in registered(lun) if PathKey.parse(key)}
        started = trio.current_time()
        claim = await node.claim(lun)
        assert trio.current_time() - started < 8
        await assert_taken(lun, claim)
        assert not before & set(registered(lun))
        await life_goes_on(lun, node, claim)


async def life_goes_on(lun: SimulatedLun, node: Node, claim: Claim) -> None:
    await release(claim)
    again = await node.claim(lun)
    assert again.incarnation == claim.incarnation + 1
    again.abort()


@pytest.mark.parametrize("kind", ["first", "parked", "dead"])
@pytest.mark.parametrize("landed", [True, False])
async def test_a_session_is_lost_at_any_command(
    kind: str, landed: bool, autojump_clock: MockClock
) -> None:
    """A claim begins again by itself; a release that fails is recovered by the next claim."""
    total = await commands_of(kind)
    for number in range(1, total + 1):
        lun, node = await prepared(kind)

        def lose(command: Command, lun: SimulatedLun = lun) -> None:
            lun.lose_answer(lambda other: other is command, landed=landed)

        at_command(lun, number, lose)
        claim = await node.claim(lun)
        await assert_taken(lun, claim)
        try:
            await release(claim)
        except LeaveIncomplete:
            pass
        again = await node.claim(lun)
        await assert_taken(lun, again)
        again.abort()


@pytest.mark.parametrize("kind", ["first", "parked", "dead"])
async def test_power_is_lost_after_any_write(kind: str, autojump_clock: MockClock) -> None:
    """The target forgets its registrations and any part of what it had not written back."""
    lun, node = await prepared(kind)
    await life(lun, node)
    for cut in range(lun.journal.writes + 1):
        for _ in range(3):
            after = lun.crashed(cut)
            claim = await Node(rng=Random(cut)).claim(after)
            await assert_taken(after, claim)
            await release(claim)


@pytest.mark.parametrize("kind", ["first", "parked", "dead"])
async def test_a_late_write_of_a_dead_claim_never_lands_later(
    kind: str, autojump_clock: MockClock
) -> None:
    """A write of the claim is held in the target, its host dies, and the next claim is made."""
    number = 0
    while True:
        number += 1
        lun, node = await prepared(kind)
        seen = 0

        def nth_write(command: Command, number: int = number) -> bool:
            nonlocal seen
            seen += command.op is Op.WRITE
            return command.op is Op.WRITE and seen == number

        hold = lun.hold(nth_write)
        with trio.move_on_after(20):
            async with trio.open_nursery() as nursery:

                async def run(lun: SimulatedLun = lun, node: Node = node) -> None:
                    try:
                        await life(lun, node)
                    except ANY_END:
                        pass
                    nursery.cancel_scope.cancel()

                async def cut(lun: SimulatedLun = lun, hold: Hold = hold) -> None:
                    await hold.wait_held()
                    lun.disconnect()

                nursery.start_soon(run)
                nursery.start_soon(cut)
        if not hold.commands:
            break
        lun.reconnect()
        claim = await node.claim(lun)
        assert not hold.commands, "it is still on its way"
        await assert_taken(lun, claim)
        claim.abort()
    assert number > 5


async def test_a_cancelled_claim_leaves_the_volume_to_the_next(autojump_clock: MockClock) -> None:
    for steps in range(0, 60, 3):
        lun, node = await formatted(parked=True), Node()
        with trio.CancelScope() as scope:

            def cancel(_: Command, scope: trio.CancelScope = scope) -> None:
                scope.cancel()

            at_command(lun, steps + 1, cancel)
            (await node.claim(lun)).abort()
        assert not lun.sessions
        claim = await node.claim(lun)
        await assert_taken(lun, claim)
