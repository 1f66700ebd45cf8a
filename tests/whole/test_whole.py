"""Whole hosts with faults: nothing that was acknowledged is lost, nothing stale is read, nothing of
an evicted host lands, everybody comes back, and the volume is in order.

One seed again, with its trace: ``python -m tests.whole SEED``.
"""

from __future__ import annotations

import pytest

from tests.whole.mutants import MUTANTS
from tests.whole.run import Failed, run


@pytest.mark.parametrize("seed", range(10))
def test_whole_hosts(seed: int) -> None:
    assert run(seed).counts["promises kept"]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 210))
def test_whole_hosts_at_length(seed: int) -> None:
    assert run(seed).counts["promises kept"]


def test_a_seed_replays_exactly() -> None:
    assert run(10).digest == run(10).digest


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_found(name: str) -> None:
    mutant = MUTANTS[name]

    def run_all() -> None:
        for seed in range(60):
            run(seed, mutant.kinds)

    with mutant.made(), pytest.raises(Failed):
        run_all()
