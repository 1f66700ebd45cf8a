"""Whole members on a simulated LUN that does whatever a bad one can: in the end all is in order."""

# ruff: noqa: ARG001 (a clock does its work by being asked for)

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import trio
from trio.testing import MockClock

from csvfs.membership.path_keys import owner_of
from lockmgr.cluster.effects import StopReason
from redirector.block.arbiter import UA_RESET, Op
from redirector.block.device import TargetBusy, UnitAttention
from redirector.block.simulated import Command, SimulatedLun
from tests.arbiter_conformance import keys_of, registered
from tests.member_nodes import Cluster, MemberNode, open_cluster

SIZE = 64 << 20
NAMES = ("alpha", "beta", "gamma")
TROUBLES = 40


class Chaos:
    def __init__(self, lun: SimulatedLun, cluster: Cluster, rng: Random) -> None:
        self.lun = lun
        self.cluster = cluster
        self.rng = rng

    def one(self) -> None:
        """One thing goes wrong."""
        self.rng.choice(
            (self.close, self.close, self.lose_answer, self.refuse, self.reset, self.restart)
        )()

    def _some(self) -> Callable[[Command], bool]:
        op, name = self.rng.choice(list(Op)), self.rng.choice(NAMES)
        return lambda command: command.op is op and command.port.name.endswith(name)

    def close(self) -> None:
        sessions = list(self.lun.sessions.values())
        if sessions:
            self.lun.close_session(self.rng.choice(sessions))

    def lose_answer(self) -> None:
        self.lun.lose_answer(self._some(), landed=self.rng.random() < 0.5)

    def refuse(self) -> None:
        def error(what: str) -> TargetBusy | UnitAttention:
            if self.rng.random() < 0.5:
                return TargetBusy(what, status=8)
            return UnitAttention(what, sense_key=6, asc_ascq=UA_RESET)

        self.lun.inject(self._some(), error, times=self.rng.randrange(1, 4))

    def reset(self) -> None:
        self.lun.arbiter.reset()

    def restart(self) -> None:
        if self.rng.random() < 0.3:
            self.lun.restart()

    async def freeze(self, node: MemberNode) -> None:
        node.freeze()
        await trio.sleep(self.rng.choice((0.5, 2.0, 9.0)))
        node.thaw()


def in_order(node: MemberNode) -> bool:
    """Listed, its paths open, and data flows."""
    return node.arbiter.data is not None and node.told[-1:] == ["ready"]


@pytest.mark.parametrize("seed", range(12))
async def test_after_all_kinds_of_trouble_all_is_in_order(
    seed: int, autojump_clock: MockClock
) -> None:
    rng = Random(seed)
    lun = SimulatedLun(SIZE, seed=seed)
    async with open_cluster(lambda: lun) as cluster:
        nodes = await cluster.active(*NAMES)
        chaos = Chaos(lun, cluster, rng)
        async with trio.open_nursery() as nursery:
            for _ in range(TROUBLES):
                await trio.sleep(rng.choice((0.01, 0.3, 2.0)))
                chaos.one()
                frozen = [node for node in nodes if node._frozen is not None]
                if not frozen and rng.random() < 0.1:
                    nursery.start_soon(chaos.freeze, rng.choice(nodes))
        lun._injections.clear()
        left = [node for node in nodes if node in cluster.nodes]
        for node in left:
            await node.until(
                lambda node=node: node not in cluster.nodes or in_order(node),  # type: ignore[misc]
                within_s=120,
            )
        await trio.sleep(30)
        left = [node for node in nodes if node in cluster.nodes]
        for node in set(nodes) - set(left):
            assert node.stop.reason is StopReason.EVICTED
        for node in left:
            assert in_order(node)
            assert node.active == tuple(sorted(each.id for each in left))
            check_story(node.told)
        keys = set((await registered(lun))[1])
        assert keys >= set(keys_of(*left))
        # Who was evicted may have registered once more before it knew; the next holder clears up.
        stale = {owner_of(key) for key in keys - set(keys_of(*left))}
        assert stale <= {node.id for node in set(nodes) - set(left)}
        lun.check()


def check_story(told: list[str]) -> None:
    """What a data path is told: new sessions, perhaps that data flows, then their loss."""
    state = "lost"
    for word in told:
        allowed = {
            "lost": ("opened", "restarted", "lost"),  # also of paths that came to nothing
            "opened": ("ready", "lost"),
            "restarted": ("ready", "lost"),
            "ready": ("lost",),
        }[state]
        assert word in allowed, told
        state = word
