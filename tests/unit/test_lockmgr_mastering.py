"""Rendezvous hashing: even, stable, and little moves when a member comes or goes."""

from __future__ import annotations

from collections import Counter

import pytest

from lockmgr.mastering import (
    NOBODY,
    Mastering,
    node_number,
    rendezvous,
    slot_and_incarnation,
)
from lockmgr.messages import Resource

PLACEMENTS = [b"group %d" % number for number in range(2000)]


@pytest.mark.parametrize("count", [2, 3, 16, 64])
def test_masters_share_evenly(count: int) -> None:
    members = [node_number(slot, slot % 3 + 1) for slot in range(count)]
    shares = Counter(rendezvous(placement, members) for placement in PLACEMENTS)
    even = len(PLACEMENTS) / count
    assert set(shares) == set(members)
    assert max(shares.values()) < even + 5 * even**0.5


def test_only_what_the_departed_had_moves() -> None:
    members = [node_number(slot, 7) for slot in range(8)]
    before, after = Mastering(members), Mastering(members[:3] + members[4:])
    for placement in PLACEMENTS:
        had = before.of(placement)
        assert after.of(placement) == had or had == members[3]


def test_the_order_of_members_does_not_matter() -> None:
    members = [node_number(slot, 1) for slot in range(8)]
    for placement in PLACEMENTS[:100]:
        assert rendezvous(placement, members) == rendezvous(placement, members[::-1])


def test_every_node_computes_the_same_for_ever() -> None:
    """A change of these breaks clusters whose nodes run different versions."""
    members = [node_number(slot, slot + 1) for slot in range(6)]
    masters = [slot_and_incarnation(rendezvous(b"%d" % n, members))[0] for n in range(12)]
    assert masters == GOLDEN


def test_placement_decides_not_the_name() -> None:
    mastering = Mastering([node_number(slot, 1) for slot in range(8)])
    masters = {mastering.master_of(Resource(b"%d" % n, b"group")) for n in range(50)}
    assert len(masters) == 1


def test_nobody_masters_without_members() -> None:
    assert Mastering(()).of(b"x") == NOBODY


def test_numbers_name_incarnations() -> None:
    assert slot_and_incarnation(node_number(63, 5)) == (63, 5)
    with pytest.raises(ValueError, match="incarnation"):
        node_number(0, 1 << 24)


GOLDEN = [3, 4, 4, 2, 1, 5, 2, 5, 2, 2, 3, 3]
