"""``python -m tests.whole SEED [MUTANT]``: one run, and its trace."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from tests.whole.mutants import MUTANTS
from tests.whole.run import run


def main() -> None:
    seed = int(sys.argv[1])
    mutant = MUTANTS[sys.argv[2]] if len(sys.argv) > 2 else None
    with mutant.made() if mutant is not None else nullcontext():
        report = run(seed, mutant.kinds if mutant is not None else ())
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    sys.stdout.write(f"{report.trace}\nseed {seed}: {words}\n")


main()
