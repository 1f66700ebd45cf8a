"""Power loss at every write of a store's life, several lives one after the other."""

from __future__ import annotations

from random import Random

import pytest

from redirector.block.simulated import SimulatedLun
from tests.crash import CrashReport, cut_everywhere, make_cut, record_workload, show
from tests.small_store import LUN_BYTES
from tests.store_workload import Model, StoreVerifier, StoreWorkload, next_life

TYPES = {
    "create",
    "data written where metadata was",
    "edit",
    "edited by another node",
    "free",
    "free and create",
    "freed by another node",
}


def live_and_die(seed: int, *, lives: int, steps: int, every: int, images: int = 1) -> CrashReport:
    """Run a workload, verify its cuts, and let the next life begin on one of them."""
    total = CrashReport()
    lun, model = SimulatedLun(LUN_BYTES, record=True), Model()
    for life in range(1, lives + 1):
        workload = StoreWorkload(model, life, tasks=6, steps=steps)
        run = record_workload(lun, workload, seed=seed * lives + life)
        verifier = StoreVerifier(model, life)
        total.add(cut_everywhere(run, verifier, every=every, images=images))
        writes = Random(seed).randrange(10, lun.journal.writes)
        at = lun.journal.position_after(writes)
        model, lun = next_life(make_cut(run, writes, 0, at, at), verifier)
    return total


def assert_covered(report: CrashReport) -> None:
    assert set(report.types) >= TYPES
    assert report.outcomes["replayed, with revokes"] and report.outcomes["replayed"]


def test_a_seed_gives_the_same_run_again() -> None:
    events = []
    for _ in range(2):
        lun = SimulatedLun(LUN_BYTES, record=True)
        record_workload(lun, StoreWorkload(Model(), 1, tasks=6, steps=15), seed=8)
        events.append(lun.journal.events)
    assert events[0] == events[1]


def test_every_promise_survives_power_loss() -> None:
    total = CrashReport()
    for seed in range(4):
        total.add(live_and_die(seed, lives=3, steps=30, every=10))
    show(total)
    assert_covered(total)


@pytest.mark.full
def test_every_promise_survives_power_loss_after_every_write() -> None:
    total = CrashReport()
    for seed in range(100, 110):
        total.add(live_and_die(seed, lives=4, steps=60, every=1))
    show(total)
    assert_covered(total)
