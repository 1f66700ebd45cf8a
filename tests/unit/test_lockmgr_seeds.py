"""Whole clusters from a seed: a failing one prints what happened and replays exactly.

Where hypothesis looks for short histories, this runs long ones, with modes and settings that
favour what is rare. `tests.unit.lockmgr_cluster` asserts after every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lockmgr.claim import Claim, ClaimState
from lockmgr.events import Patience
from lockmgr.messages import Resource
from lockmgr.modes import WRITES_VALUE, Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_cluster import Cluster

STEPS = 120
MODES = (
    tuple(Mode),
    (Mode.PR, Mode.EX),
    (Mode.CW, Mode.PR, Mode.EX),
    (Mode.CR, Mode.CW, Mode.PR, Mode.PW),
)


class History:
    """One cluster and one random history of it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.nodes = nodes = rng.choice([1, 2, 3])
        self.resources = [Resource(b"a", b"\0"), Resource(b"b", b"\1")][: rng.choice([1, 2])]
        self.modes = rng.choice(MODES)
        settings = Settings(
            cache_limit=rng.choice([0, 1, 5]), shed_at_once=1, min_hold_s=rng.choice([0.0, 0.2])
        )
        self.cluster = Cluster(nodes, settings)
        self.trace = [f"seed {seed}: {nodes} nodes, {settings}"]
        self.versions = 0

    def run(self) -> None:
        actions: list[Callable[[], str | None]] = [
            self._acquire,
            self._convert,
            *[self._release] * 2,
            self._withdraw,
            self._write,
            *[self._deliver] * 3,
            *[self._owner] * 2,
            self._glimpse,
            self._sleep,
        ]
        for _ in range(STEPS):
            said = self.rng.choice(actions)()
            if said is not None:
                self.trace.append(f"{self.cluster.now:6.2f} {said}")
        self.trace.append("everything is released")
        self.cluster.drain_everything()

    def _held(self) -> list[Claim]:
        return [claim for claim in self.cluster.held if claim.state is ClaimState.HELD]

    def _acquire(self) -> str:
        patience = self.rng.choice([*Patience, *[Patience.QUEUE] * 3])
        claim = self.cluster.acquire(
            self.rng.randrange(self.nodes),
            self.rng.choice(self.resources),
            self.rng.choice(self.modes),
            shared=self.rng.random() < 0.4,
            patience=patience,
            timeout_s=self.rng.choice([None, 0.5, 2.0]),
        )
        return f"acquire {claim} {patience.name}"

    def _convert(self) -> str | None:
        if not (held := self._held()):
            return None
        claim, mode = self.rng.choice(held), self.rng.choice(self.modes)
        patience = self.rng.choice([*Patience])
        self.cluster.convert(claim, mode, patience=patience, timeout_s=1.0)
        return f"convert {claim} to {mode} {patience.name}"

    def _release(self) -> str | None:
        if not (held := self._held()):
            return None
        claim = self.rng.choice(held)
        self.cluster.release(claim)
        return f"release {claim}"

    def _withdraw(self) -> str | None:
        if not self.cluster.waiting:
            return None
        claim = self.rng.choice(list(self.cluster.waiting))
        self.cluster.withdraw(claim)
        return f"withdraw {claim}"

    def _write(self) -> str | None:
        writers = [claim for claim in self.cluster.held if WRITES_VALUE[claim.mode]]
        if not writers:
            return None
        self.versions += 1
        claim = self.rng.choice(writers)
        self.cluster.set_value(claim, self.versions.to_bytes(64, "big"))
        return f"value {self.versions} by {claim}"

    def _deliver(self) -> str | None:
        if not (channels := self.cluster.busy_channels):
            return None
        source, to = self.rng.choice(channels)
        message = self.cluster.channels[source, to][0]
        self.cluster.deliver(source, to)
        return f"{source} to {to}: {message}"

    def _owner(self) -> str | None:
        if self.cluster.answering:
            self.cluster.answer(0, b"size")
            return "answer a glimpse"
        demoting = sorted(self.cluster.demoting.keys() - self.cluster.draining, key=repr)
        if not demoting:
            return None
        node, resource = self.rng.choice(demoting)
        if self.rng.random() < 0.3:
            self.cluster.drain(node, resource)
            return f"node {node} drains {resource.name!r}"
        self.cluster.demoted(node, resource)
        return f"node {node} has demoted {resource.name!r}"

    def _glimpse(self) -> str:
        node = self.rng.randrange(self.nodes)
        asked = self.rng.sample(self.resources, self.rng.randint(1, len(self.resources)))
        self.cluster.glimpse_all(node, asked)
        return f"node {node} glimpses {[resource.name for resource in asked]}"

    def _sleep(self) -> str:
        duration_s = self.rng.choice([0.05, 0.2, 1.0])
        self.cluster.sleep(duration_s)
        return f"{duration_s} s pass"


def _run(seeds: range) -> None:
    for seed in seeds:
        history = History(seed)
        try:
            history.run()
        except AssertionError as error:
            pytest.fail("\n".join([*history.trace, f"then: {error}"]))


def test_seeds() -> None:
    _run(range(400))


@pytest.mark.full
def test_many_seeds() -> None:
    _run(range(1000, 6000))
