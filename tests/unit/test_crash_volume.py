"""Power loss at every write of a volume's life."""

from __future__ import annotations

import sys

import pytest

from csvfs.data import reclaim
from csvfs.engine import change
from redirector.block.simulated import SimulatedLun
from tests.crash import cut_everywhere, record_workload, show
from tests.simulated_volume import LUN_BYTES
from tests.volume_workload import VolumeVerifier, VolumeWorkload

TYPES = {
    "append",
    "create",
    "exchange",
    "fdatasync",
    "fragment",
    "fsync",
    "last close of what has no name",
    "link",
    "lock taken away",
    "long symlink",
    "mkdir",
    "mknod",
    "open with truncation",
    "removexattr",
    "rename",
    "rename across directories",
    "rename of a directory",
    "rename of a directory across directories",
    "rename over a directory",
    "rename over a file",
    "rmdir",
    "setattr",
    "setxattr",
    "setxattr again",
    "symlink",
    "sync",
    "truncate",
    "truncate to more",
    "unlink",
    "unlink of what is open",
    "write",
    "write within the file",
    "writes at once",
}


@pytest.fixture(autouse=True)
def short_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a few extents out, or freeing a few units, takes several transactions."""
    monkeypatch.setattr(change, "CUT_ROUNDS", 4)
    monkeypatch.setattr(reclaim, "FREE_ITEMS", 5)


def live_and_die(seed: int, *, users: int, steps: int, every: int) -> None:
    """Run a workload and verify its cuts."""
    lun = SimulatedLun(LUN_BYTES, record=True)
    workload = VolumeWorkload(users, steps)
    run = record_workload(lun, workload, seed=seed)
    report = cut_everywhere(
        run, VolumeVerifier(workload), every=every, first_write=workload.first_write
    )
    show(report)
    sys.stdout.write(f"{workload.transactions} merged, {workload.units_reclaimed} units freed\n")
    assert set(report.types) >= TYPES, TYPES - set(report.types)
    assert workload.transactions >= 500 and workload.units_reclaimed >= 50
    assert report.outcomes["with orphans"] and report.outcomes["without orphans"]


def test_every_promise_survives_power_loss() -> None:
    live_and_die(1, users=3, steps=260, every=10)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
def test_every_promise_survives_power_loss_after_every_write(seed: int) -> None:
    live_and_die(seed, users=4, steps=260, every=1)
