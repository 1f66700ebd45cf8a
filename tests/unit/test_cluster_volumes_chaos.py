"""Programs on several nodes at the same names, with nodes that die: `tests.cluster_users`."""

from __future__ import annotations

import pytest

from lockmgr.settings import Settings
from tests.cluster_users import everybody
from tests.cluster_volumes import cluster_volumes
from tests.crash import deterministic_run


def run(seed: int, *, deaths: int, settings: Settings | None = None, nodes: int = 3) -> None:
    async def main() -> None:
        async with cluster_volumes(nodes, seed=seed, settings=settings) as cluster:
            await everybody(cluster, seed, deaths=deaths)

    deterministic_run(main, seed)


@pytest.mark.parametrize("seed", range(4))
def test_programs_that_get_in_each_others_way(seed: int) -> None:
    run(seed, deaths=0)


@pytest.mark.parametrize("seed", range(4))
def test_programs_on_nodes_that_die(seed: int) -> None:
    run(seed, deaths=3)


@pytest.mark.parametrize("seed", range(2))
def test_locks_that_never_stay(seed: int) -> None:
    run(seed, deaths=1, settings=Settings(cache_limit=0, min_hold_s=0))
