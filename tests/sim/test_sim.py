"""Whole clusters in simulation: a few hundred seeds, and that a seed is one history."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.run import run_seed

SEEDS = 300
TREE = Path(__file__).parents[2]


def test_seeds() -> None:
    """Over all cores, and as `make sim` does it; what it printed tells how to see a failure."""
    command = [sys.executable, "-m", "tests.sim", "--seeds", str(SEEDS)]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{SEEDS} seeds, 0 failed" in done.stdout


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
    assert traced.simulated_s >= 60.0
    assert traced.digest == run_seed(12).digest
    assert len(traced.lines) > 100


SEEDS_OF = {"retry reordered": 100}
"""Of the 1,000 that a mistake may take; 20 find the others."""


@pytest.mark.parametrize(
    "name",
    [
        "incarnation reused",
        "lease not awaited",
        "ready without asking",
        "retry reordered",
        "drain skipped",
        "beats for a hung loop",
    ],
)
def test_a_mistake_made_on_purpose_is_found(name: str) -> None:
    with MUTANTS[name]():
        assert any(run_seed(seed).failure for seed in range(SEEDS_OF.get(name, 20)))
