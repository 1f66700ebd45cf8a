"""Whole clusters in simulation: a few hundred seeds, and that a seed is one history."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.run import run_seed

SEEDS = 300
PORTIONS = 10
TREE = Path(__file__).parents[2]


@pytest.mark.parametrize("portion", range(PORTIONS))
def test_seeds(portion: int) -> None:
    failed = []
    for seed in range(portion, SEEDS, PORTIONS):
        result = run_seed(seed)
        if result.failure:
            failed.append(f"python -m tests.sim --seed {seed} --trace   {result.failure[:300]}")
        assert result.failure or result.simulated_s >= 60.0
    assert not failed, "\n".join(failed)


def _history(seed: int, hash_seed: int) -> str:
    command = [sys.executable, "-c", _PRINT_DIGEST.format(seed=seed)]
    environment = {"PYTHONHASHSEED": str(hash_seed), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=TREE, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


_PRINT_DIGEST = """
from tests.sim.run import run_seed
print(run_seed({seed}).digest)
"""


def test_a_seed_is_one_history_whatever_the_hashes_of_strings() -> None:
    histories = {_history(11, hash_seed) for hash_seed in (0, 1, 2)}
    assert len(histories) == 1


def test_tracing_changes_nothing() -> None:
    traced = run_seed(12, tracing=True)
    assert traced.digest == run_seed(12).digest
    assert len(traced.lines) > 100


@pytest.mark.parametrize("name", ["incarnation reused", "lease not awaited"])
def test_a_mistake_made_on_purpose_is_found(name: str) -> None:
    with MUTANTS[name]():
        assert any(run_seed(seed).failure for seed in range(20))
