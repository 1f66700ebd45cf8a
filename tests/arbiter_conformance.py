# ruff: noqa: ARG002 (the clock works by being asked for)
"""One suite for `LunArbiter`, on every kind of LUN: whole members live through their timelines.

A test module subclasses `ArbiterConformance` and provides the fixture ``stage``, and ``clock``: one
to run on (pytest-trio asks for it by the test's own argument), or None for the real one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, suppress

import trio
from trio.abc import Clock

from csvfs.format import SlotState
from lockmgr.cluster import events
from lockmgr.cluster.effects import StopReason
from lockmgr.cluster.outcomes import Good
from redirector.block.device import InitiatorPort, Lun, OutcomeUnknown
from redirector.block.keys import PathKey
from redirector.block.reservations import PathClosed, Registration, patiently
from tests.member_nodes import Cluster, MemberNode

AT = 32 << 20
SLOW = b"SLOW" * 1024
FAST = b"FAST" * 1024


class Stage(ABC):
    """What the suite needs of one kind of LUN, beyond its interface."""

    @abstractmethod
    def cluster(self) -> AbstractAsyncContextManager[Cluster]:
        """Around a fresh volume."""

    @abstractmethod
    def lun(self) -> Lun: ...

    @abstractmethod
    def hold_writes(self) -> None:
        """From now on a write that begins with ``SLOW`` is admitted, and kept from landing."""

    @abstractmethod
    async def wait_held(self) -> None:
        """Return when such a write is held."""

    @abstractmethod
    def release_writes(self) -> None:
        """Let it land."""

    @abstractmethod
    def restart(self) -> None:
        """The target forgets sessions and registrations."""


async def registered(lun: Lun) -> tuple[int, tuple[int, ...]]:
    """The holder's key, and all that are registered."""
    async with await lun.login(InitiatorPort("iqn.2026-11.test:look", 0x80 << 40 | 2)) as device:
        keys = (await patiently(device.read_keys)).keys
        return (await patiently(device.read_reservation)).key, tuple(sorted(keys))


def keys_of(*nodes: MemberNode) -> tuple[int, ...]:
    found = [
        registration.key
        for node in nodes
        for registration in (node.arbiter.control, node.arbiter.data)
        if registration is not None
    ]
    return tuple(sorted(found))


class ArbiterConformance:
    """The suite."""

    async def test_first_node_of_a_new_volume(self, stage: Stage, clock: Clock) -> None:
        async with stage.cluster() as cluster:
            (alpha,) = await cluster.active("alpha")
            assert alpha.member.is_coordinator
            holder, keys = await registered(stage.lun())
            assert keys == keys_of(alpha)
            assert alpha.arbiter.control is not None and holder == alpha.arbiter.control.key
            view = await alpha.view_on_lun()
            assert view == alpha.view
            assert view.slots[alpha.id.slot].addresses == ("alpha:7000",)
            assert alpha.told[:1] == ["opened"]

    async def test_a_second_node_joins_and_leaves(self, stage: Stage, clock: Clock) -> None:
        async with stage.cluster() as cluster:
            alpha, beta = await cluster.active("alpha", "beta")
            assert (await registered(stage.lun()))[1] == keys_of(alpha, beta)
            fingerprint = beta.member.state.identity.fingerprint
            assert alpha.arbiter.certificates[fingerprint] == b"certificate of beta 1"
            del alpha.arbiter.certificates[fingerprint]
            await alpha.arbiter.read_certificates([beta.id])
            assert alpha.arbiter.certificates[fingerprint] == b"certificate of beta 1"
            beta.give(events.LeaveWanted())
            await beta.stopped.wait()
            assert beta.stop.reason is StopReason.LEFT
            await alpha.until(lambda: len(alpha.active) == 1)
            assert (await registered(stage.lun()))[1] == keys_of(alpha)
            assert all(isinstance(outcome, Good) for _, outcome in alpha.outcomes)

    async def test_all_leave_and_one_comes_back_at_once(self, stage: Stage, clock: Clock) -> None:
        async with stage.cluster() as cluster:
            alpha, beta = await cluster.active("alpha", "beta")
            alpha.give(events.LeaveWanted())
            await alpha.stopped.wait()
            await beta.until(lambda: beta.member.is_coordinator and len(beta.active) == 1)
            beta.give(events.LeaveWanted())
            await beta.stopped.wait()
            holder, keys = await registered(stage.lun())
            assert keys == (holder,)
            began = trio.current_time()
            (gamma,) = await cluster.active("gamma")
            assert trio.current_time() - began < cluster.settings.silence_s + 1
            assert (await registered(stage.lun()))[1] == keys_of(gamma)

    async def test_a_frozen_node_with_a_late_write_is_evicted(
        self, stage: Stage, clock: Clock
    ) -> None:
        async with stage.cluster() as cluster:
            alpha, beta = await cluster.active("alpha", "beta")
            stage.hold_writes()
            async with trio.open_nursery() as nursery:
                answers: list[object] = []
                nursery.start_soon(_write, beta.data, SLOW, answers)
                await stage.wait_held()
                beta.freeze()
                gone = beta.id
                await beta.data.device.wait_lost()
                # By reinstatement; the fence waits for the write, and the view for the fence.
                assert gone in alpha.active
                stage.release_writes()
                await alpha.until(lambda: gone not in alpha.active)
            assert isinstance(answers[0], OutcomeUnknown)
            # Whatever landed has landed before the fence ended; nothing of it comes later.
            await alpha.data.ask(lambda: alpha.data.device.write(AT, FAST))
            await alpha.until(lambda: alpha.view is not None and not alpha.view.to_replay)
            assert (await registered(stage.lun()))[1] == keys_of(alpha)
            beta.thaw()
            await beta.stopped.wait()
            assert beta.stop.reason is StopReason.EVICTED
            found = await alpha.data.ask(lambda: alpha.data.device.read(AT, len(FAST)))
            assert found == FAST
            await alpha.until(lambda: alpha.member.is_coordinator)

    async def test_the_coordinator_dies(self, stage: Stage, clock: Clock) -> None:
        async with stage.cluster() as cluster:
            alpha, beta, gamma = await cluster.active("alpha", "beta", "gamma")
            gone = alpha.id
            alpha.kill()
            await beta.until(lambda: gone not in beta.active)
            await gamma.until(lambda: gone not in gamma.active)
            assert beta.member.is_coordinator or gamma.member.is_coordinator
            await beta.until(
                lambda: beta.view is not None and beta.view.slots[gone.slot].state is SlotState.FREE
            )
            assert (await registered(stage.lun()))[1] == keys_of(beta, gamma)
            again = await cluster.node("alpha")
            await again.until(lambda: len(again.active) == 3)
            assert again.id != gone

    async def test_a_lost_session_takes_both_paths_and_they_come_back(
        self, stage: Stage, clock: Clock
    ) -> None:
        async with stage.cluster() as cluster:
            alpha, beta = await cluster.active("alpha", "beta")
            before = keys_of(beta)
            data = beta.data
            stage.hold_writes()
            async with trio.open_nursery() as nursery:
                answers: list[object] = []
                nursery.start_soon(_write_and_tell, beta, answers)
                await stage.wait_held()
                assert beta.arbiter.control is not None
                del beta.told[:]
                beta.arbiter.control.device.abort()
                await beta.until(lambda: "lost" in beta.told)
                stage.release_writes()
            # Who waits for an answer hears that the paths are gone before it comes.
            assert answers == [["lost"]]
            assert data.device.lost
            await beta.until(lambda: "ready" in beta.told)
            assert beta.told == ["lost", "opened", "ready"]
            parsed = [PathKey.parse(key) for key in keys_of(beta)]
            first = [PathKey.parse(key) for key in before]
            assert [p.generation for p in parsed if p] == [p.generation + 2 for p in first if p]
            assert beta.data.device.port == data.device.port  # which closed the old one
            # The coordinator has fenced the old ones.
            await alpha.until(lambda: len(alpha.active) == 2)
            assert (await registered(stage.lun()))[1] == keys_of(alpha, beta)

    async def test_the_target_restarts(self, stage: Stage, clock: Clock) -> None:
        async with stage.cluster() as cluster:
            alpha, beta = await cluster.active("alpha", "beta")
            for node in (alpha, beta):
                del node.told[:]
            stage.restart()
            for node in (alpha, beta):
                await node.until(lambda node=node: "ready" in node.told)  # type: ignore[misc]
                assert next(word for word in node.told if word != "lost") == "restarted"
            assert (await registered(stage.lun()))[1] == keys_of(alpha, beta)
            for node in (alpha, beta):
                assert node.arbiter.control is not None
                node.arbiter.control.device.abort()
                del node.told[:]
            for node in (alpha, beta):
                await node.until(lambda node=node: "ready" in node.told)  # type: ignore[misc]
                assert "restarted" not in node.told


async def _write(path: Registration, data: bytes, answers: list[object]) -> None:
    try:
        await path.ask(lambda: path.device.write(AT, data))
    except (OutcomeUnknown, PathClosed) as error:
        answers.append(error)
    else:
        answers.append(data)


async def _write_and_tell(node: MemberNode, answers: list[object]) -> None:
    with suppress(OutcomeUnknown, PathClosed):  # or its answer was on its way
        await node.data.device.write(AT, SLOW)
    answers.append(list(node.told))
