"""One seed, from the first boot to the last check."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field

from tests.sim.cluster import Cluster
from tests.sim.coverage import Coverage
from tests.sim.faults import Plan
from tests.sim.oracle import Violation
from tests.sim.target import simulated_sleep

HEAL_AT_S = 42.0
SETTLE_S = 45.0
"""How long after the last fault every live host must be a member again, and every lock granted."""
LEAST_S = 60.0


@dataclass
class Result:
    """What became of a seed."""

    seed: int
    failure: str = ""
    """Empty: everything held."""
    detail: str = ""
    lines: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    nodes: int = 0
    simulated_s: float = 0.0
    steps: int = 0
    events: int = 0
    acknowledged: int = 0
    answered: int = 0
    settled_s: float = 0.0
    digest: str = ""
    """The same for the same history."""


def run_seed(seed: int, *, tracing: bool = False, nodes: int | None = None) -> Result:
    """Run it. Never raises: what went wrong stands in the result."""
    result = Result(seed)
    cluster = Cluster(seed, tracing=tracing, nodes=nodes)
    world = cluster.world
    with simulated_sleep(world):
        try:
            _run(cluster, result)
        except Violation as violation:
            result.failure = str(violation)
        except Exception as error:
            result.failure = f"at {world.now:.4f}: {type(error).__name__}: {error}"
            result.detail = traceback.format_exc()
    for (before, after), count in cluster.oracle.states.items():
        cluster.coverage.state(before, after, count)
    result.coverage = cluster.coverage
    result.lines = world.lines
    result.nodes = len(cluster.machines)
    result.simulated_s = world.now
    result.steps = cluster.steps
    result.events = world.events
    result.acknowledged = cluster.oracle.acknowledged
    result.answered = cluster.oracle.answered
    result.digest = f"{world.events}/{cluster.steps}/{world.rng.getrandbits(64):016x}"
    return result


def _run(cluster: Cluster, result: Result) -> None:
    world = cluster.world
    plan = Plan(cluster)
    plan.begin()
    world.run(HEAL_AT_S)
    plan.heal_all()
    deadline = HEAL_AT_S + SETTLE_S
    calm_since: float | None = None
    while world.now < deadline:
        world.run(min(deadline, world.now + 1.0))
        if cluster.unsettled():
            calm_since = None
        elif calm_since is None:
            calm_since = world.now
        if calm_since is not None and world.now >= max(LEAST_S, calm_since + 3.0):
            break
    cluster.check_all()
    cluster.check_settled()
    assert calm_since is not None
    result.settled_s = calm_since - HEAL_AT_S
    cluster.quiet = True
    world.run(world.now + 3.0)
    cluster.check_everybody_reads()
