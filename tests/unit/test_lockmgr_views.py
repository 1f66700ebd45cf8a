"""Random histories of clusters whose view changes: nodes die and join, journals are replayed.

`tests.unit.lockmgr_changing` asserts after every step; at the end nothing fails any more, and
everybody who waits must be served.
"""

from __future__ import annotations

import random

import pytest

from lockmgr.claim import ClaimState
from lockmgr.events import Patience
from lockmgr.mastering import rendezvous
from lockmgr.messages import Resource
from lockmgr.modes import WRITES_VALUE, Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_changing import ChangingCluster
from tests.unit.lockmgr_cluster import by_first_byte

STEPS = 150
MODES = (
    tuple(Mode),
    (Mode.PR, Mode.EX),
    (Mode.CR, Mode.CW, Mode.PR, Mode.PW),
)


class ChangingHistory:
    """One cluster and one random history of it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        nodes = rng.choice([2, 3, 3, 4, 5])
        self.resources = [
            Resource(b"r%d" % number, bytes([number])) for number in range(rng.choice([1, 3, 6]))
        ]
        self.modes = rng.choice(MODES)
        settings = Settings(cache_limit=rng.choice([0, 2, 50]), min_hold_s=rng.choice([0.0, 0.2]))
        self.cluster = ChangingCluster(nodes, settings, rng.choice([by_first_byte, rendezvous]))
        self.trace = [f"seed {seed}: {nodes} nodes, {settings}"]
        self.versions = 0
        self.deaths = 0
        self.early_joins = rng.random() < 0.5

    def run(self) -> None:
        actions = [
            *[self._acquire] * 6,
            self._convert,
            *[self._release] * 5,
            self._withdraw,
            self._write,
            *[self._deliver] * 14,
            *[self._owner] * 4,
            self._glimpse,
            self._sleep,
            self._kill,
            *[self._view] * 2,
            *[self._install] * 5,
            *[self._settled] * 2,
            *[self._join] * 2,
            self._hand_over,
        ]
        for _ in range(STEPS):
            said = self.rng.choice(actions)()
            if said is not None:
                self.trace.append(f"{self.cluster.now:6.2f} {said}")
        self.trace.append("no more failures")
        self.cluster.recover_all()
        self.cluster.drain_everything()

    def _node(self) -> int:
        return self.rng.choice(sorted(self.cluster.alive))

    def _member(self) -> int:
        return self.rng.choice(sorted(self.cluster.present))

    def _acquire(self) -> str:
        patience = self.rng.choice([*Patience, *[Patience.QUEUE] * 4])
        claim = self.cluster.acquire(
            self._node(),
            self.rng.choice(self.resources),
            self.rng.choice(self.modes),
            shared=self.rng.random() < 0.3,
            patience=patience,
            timeout_s=self.rng.choice([None, 0.5, 5.0]),
        )
        return f"acquire {claim} {patience.name}"

    def _convert(self) -> str | None:
        held = [claim for claim in self.cluster.held if claim.state is ClaimState.HELD]
        if not held:
            return None
        claim, mode = self.rng.choice(held), self.rng.choice(self.modes)
        self.cluster.convert(claim, mode, patience=self.rng.choice([*Patience]), timeout_s=1.0)
        return f"convert {claim} to {mode}"

    def _release(self) -> str | None:
        held = [claim for claim in self.cluster.held if claim.state is ClaimState.HELD]
        if not held:
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
        node = self._node()
        asked = self.rng.sample(self.resources, self.rng.randint(1, len(self.resources)))
        self.cluster.glimpse_all(node, asked)
        return f"node {node} glimpses {[resource.name for resource in asked]}"

    def _sleep(self) -> str:
        duration_s = self.rng.choice([0.05, 0.2, 1.0])
        self.cluster.sleep(duration_s)
        return f"{duration_s} s pass"

    def _kill(self) -> str | None:
        if len(self.cluster.present) < 2 or self.deaths > 4:
            return None
        self.deaths += 1
        node, keep = self._member(), self.rng.choice([0, 0, 1, 3, 100])
        if self.rng.random() < 0.4:
            self.cluster.evict(node)
            return f"node {node} is evicted, and does not know"
        self.cluster.kill(node, keep)
        return f"node {node} dies, {keep} messages of it arrive"

    def _view(self) -> str | None:
        if set(self.cluster.members) == self.cluster.present:
            return None
        return str(self.cluster.change_view())

    def _install(self) -> str | None:
        nodes = [node for node in sorted(self.cluster.alive) if self.cluster.views[node]]
        if not nodes:
            return None
        node, skip = self.rng.choice(nodes), self.rng.random() < 0.3
        self.cluster.install(node, skip)
        return f"node {node} is in epoch {self.cluster.cores[node].epoch}"

    def _settled(self) -> str | None:
        cluster = self.cluster
        dead = [dead for dead in cluster.dead.values() if dead.gone_in is not None]
        dead = [one for one in dead if not (one.replayed and one.cleared)]
        if not dead or cluster.coordinator not in cluster.present:
            return None
        one = self.rng.choice(dead)
        if not one.replayed and self.rng.random() < 0.5:
            cluster.replay(one.node)
            return f"node {one.node} is replayed"
        if not one.cleared:
            cluster.clear(one.node)
            return f"node {one.node} is cleared"
        cluster.retell()
        return "the view says again what is settled"

    def _hand_over(self) -> str | None:
        if set(self.cluster.members) != self.cluster.present:
            return None
        node = self._member()
        self.cluster.hand_over(node)
        return f"node {node} is coordinator of epoch {self.cluster.epoch}"

    def _join(self) -> str | None:
        if not self.cluster.may_join(self.early_joins) or len(self.cluster.alive) > 5:
            return None
        return f"node {self.cluster.join()} joins"


def _run(seeds: range) -> None:
    for seed in seeds:
        history = ChangingHistory(seed)
        try:
            history.run()
        except Exception as error:
            error.add_note("\n".join(history.trace))
            raise


def test_histories() -> None:
    _run(range(150))


@pytest.mark.full
def test_many_histories() -> None:
    _run(range(1000, 6000))
