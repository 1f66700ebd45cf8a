"""The lease of a node, as its users see it, and what it tells of itself."""

from __future__ import annotations

from time import CLOCK_BOOTTIME, clock_gettime

from lockmgr.cluster.lease_watch import LeaseWatch


def test_counts_leases_that_were_over_when_they_were_renewed() -> None:
    lease, now = LeaseWatch(), clock_gettime(CLOCK_BOOTTIME)
    lease.renewed(now + 2.0)
    assert lease.lost == 0  # the first one renews nothing
    lease.renewed(now + 60.0)
    assert lease.valid() and lease.lost == 0
    assert 0 < lease.least_left_s <= 2.0

    late = LeaseWatch()
    late.renewed(now - 1.0)
    assert not late.valid()
    late.renewed(now + 60.0)
    assert late.valid() and late.lost == 1
    assert late.least_left_s <= -1.0
