"""`python -m tests.sim`: many seeds with a summary, or one with its history.

python -m tests.sim --seeds 1000 [--start 0] [--jobs 2]
python -m tests.sim --seed 17 [--trace]
python -m tests.sim --mutants [--seeds 1000]
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.sim.campaign import hunt_mutants, run_campaign
from tests.sim.run import run_seed


def main() -> int:
    """Run what the command line asks for; 1: something was found (or a mutant was not)."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed only")
    parser.add_argument("--trace", action="store_true", help="print its history")
    parser.add_argument("--only", default="", help="trace only lines with this word")
    parser.add_argument("--nodes", type=int, help="so many hosts, whatever the seed says")
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mutants", action="store_true", help="find what was broken on purpose")
    parser.add_argument("--mutant", help="only this one")
    arguments = parser.parse_args()
    if arguments.mutants:
        only = [arguments.mutant] if arguments.mutant else None
        return hunt_mutants(arguments.start, arguments.seeds, arguments.jobs, only)
    if arguments.seed is None:
        return run_campaign(arguments.start, arguments.seeds, arguments.jobs)
    result = run_seed(arguments.seed, tracing=arguments.trace, nodes=arguments.nodes)
    for line in result.lines:
        if arguments.only in line:
            print(line)
    print(
        f"seed {result.seed}: {result.nodes} hosts, {result.simulated_s:.0f} s simulated,"
        f" {result.steps} steps, {result.events} events, {result.acknowledged} writes acknowledged,"
        f" {result.answered} answers, settled {result.settled_s:.0f} s after the last fault,"
        f" history {result.digest}"
    )
    if result.failure:
        print(result.detail)
        print(f"FAILED {result.failure}")
    return bool(result.failure)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The same order of sets of strings everywhere, so that a seed is one history everywhere.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
