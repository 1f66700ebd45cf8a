"""Many seeds, over all cores: the summary, and what must have been reached."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import combinations_with_replacement
from multiprocessing import get_context

from tests.sim.coverage import Coverage
from tests.sim.expected import EXPECTED, RARE
from tests.sim.faults import FAULTS
from tests.sim.mutants import MUTANTS
from tests.sim.run import Result, run_seed

ENOUGH_SEEDS = 300
"""A run of so many in a row must reach every pair of faults, and every transition but a few."""
ENOUGH_FOR_RARE = 1000
"""And a run of so many those few, too."""


def results(seeds: Iterable[int], jobs: int, mutant: str | None = None) -> Iterator[Result]:
    """Run them; in the order in which they finish."""
    run = partial(run_one, mutant=mutant)
    if jobs == 1:
        yield from map(run, seeds)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, seeds, chunksize=4)


def run_one(seed: int, mutant: str | None = None) -> Result:
    """One seed, perhaps with something broken on purpose."""
    if mutant is None:
        return run_seed(seed)
    with MUTANTS[mutant]():
        return run_seed(seed)


def run_campaign(start: int, count: int, jobs: int) -> int:
    """Run ``count`` seeds and print the summary; 1: a seed failed, or something was not reached."""
    began = time.monotonic()
    coverage = Coverage()
    failed: list[Result] = []
    simulated_s = steps = acknowledged = answered = 0.0
    slowest = 0.0
    for result in results(range(start, start + count), jobs):
        coverage.merge(result.coverage)
        simulated_s += result.simulated_s
        steps += result.steps
        acknowledged += result.acknowledged
        answered += result.answered
        slowest = max(slowest, result.settled_s)
        if result.failure:
            failed.append(result)
            print(f"seed {result.seed} FAILED {result.failure.splitlines()[0][:300]}", flush=True)
    missing = list(missed(coverage, rare=count >= ENOUGH_FOR_RARE))
    print_summary(coverage, missing)
    took_s = time.monotonic() - began
    print(
        f"{count} seeds, {len(failed)} failed; {simulated_s:.0f} s simulated in {took_s:.0f} s,"
        f" {steps:.0f} steps, {acknowledged:.0f} writes acknowledged, {answered:.0f} answers;"
        f" settled {slowest:.0f} s after the last fault at the latest"
    )
    for result in sorted(failed, key=lambda failure: failure.seed)[:20]:
        print(f"to see it: python -m tests.sim --seed {result.seed} --trace")
    return bool(failed) or (count >= ENOUGH_SEEDS and bool(missing))


def missed(coverage: Coverage, *, rare: bool) -> Iterator[str]:
    """What was never reached; ``rare``: even if one must not count on it."""
    for name in sorted(EXPECTED if rare else EXPECTED - RARE):
        if not coverage.reached[name]:
            yield name
    for one, other in combinations_with_replacement(sorted(FAULTS), 2):
        if not coverage.pairs[f"{one} + {other}"]:
            yield f"pair: {one} + {other}"


def print_summary(coverage: Coverage, missing: list[str]) -> None:
    """What was reached, how often; and what was not."""
    width = max((len(name) for name in coverage.reached), default=0)
    for name in sorted(coverage.reached):
        mark = " " if name in EXPECTED or name.startswith("fault: ") else "+"
        print(f"  {mark} {name:{width}} {coverage.reached[name]:9}")
    pairs = len(FAULTS) * (len(FAULTS) + 1) // 2
    print(f"pairs of faults: {len(coverage.pairs)} of {pairs}")
    rarest = sorted(coverage.pairs.items(), key=lambda item: item[1])[:5]
    print("  rarest: " + ", ".join(f"{name} ({count})" for name, count in rarest))
    if missing:
        print(f"never reached ({len(missing)}): " + ", ".join(missing))


def hunt_mutants(start: int, count: int, jobs: int, only: list[str] | None) -> int:
    """Run each mutant until a seed finds it; 1: one was not found."""
    lost = []
    for name in only or MUTANTS:
        began = time.monotonic()
        tried = 0
        found = None
        for result in results(range(start, start + count), jobs, name):
            tried += 1
            if result.failure and not run_seed(result.seed).failure:
                found = result  # and not something that fails without the mistake too
                break
        took_s = time.monotonic() - began
        if found is None:
            lost.append(name)
            print(f"{name}: NOT FOUND in {tried} seeds ({took_s:.0f} s)", flush=True)
        else:
            words = found.failure.splitlines()[0][:200]
            print(f"{name}: seed {found.seed} ({took_s:.0f} s): {words}", flush=True)
    return bool(lost)
