"""The next view, and what must hold from one view to the next."""

from __future__ import annotations

from random import Random

import pytest

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.change import Changes, assign, needs_replayer, next_incarnation, next_view
from lockmgr.cluster.errors import EpochsExhausted, IncarnationsExhausted
from lockmgr.cluster.view import (
    MAX_EPOCH,
    MAX_INCARNATION,
    NOBODY,
    NodeId,
    SlotState,
    View,
    ViewSlot,
)
from tests.unit.cluster_lun import KEYS


def request(slot: int, name: str) -> JoinRequest:
    print32 = name.encode().ljust(32, b"-")
    return JoinRequest(slot, 255 << 40 | slot, 1, name, bytes(16), bytes(16), print32)


def view_of(*states: SlotState) -> View:
    slots = tuple(
        ViewSlot(3, state, fingerprint=bytes([n + 1] * 32), node_name=f"host{n}")
        for n, state in enumerate(states)
    )
    return View(9, 1, slots, lock_epoch=5)


FREE, JOINING, ACTIVE, NEEDS = SlotState


def test_eviction_assigns_each_journal_to_one_survivor() -> None:
    view = view_of(ACTIVE, ACTIVE, ACTIVE, ACTIVE, FREE)
    gone = frozenset({NodeId(1, 3), NodeId(3, 3)})
    after = next_view(view, 7, Changes(evict=gone), [0, 2], 0)
    assert after.to_replay == (NodeId(1, 3), NodeId(3, 3))
    assert sorted(after.slots[n].replay_by for n in (1, 3)) == [0, 2]
    assert (after.epoch, after.lock_epoch, after.holder_key) == (10, 10, 7)


def test_journals_of_a_departed_replayer_go_to_another() -> None:
    view = view_of(ACTIVE, ACTIVE, ACTIVE, ACTIVE)
    view = next_view(view, 7, Changes(evict=frozenset({NodeId(3, 3)})), [1], 0)
    assert view.replayer_of(NodeId(3, 3)) == 1
    view = next_view(view, 7, Changes(evict=frozenset({NodeId(1, 3)})), [2], 0)
    assert view.replayer_of(NodeId(3, 3)) == view.replayer_of(NodeId(1, 3)) == 2
    # Who goes on replaying is not disturbed by who is idle.
    assert assign(view, [0, 2]) == {}


def test_nobody_fit_to_replay() -> None:
    view = view_of(ACTIVE, ACTIVE)
    view = next_view(view, 7, Changes(evict=frozenset({NodeId(1, 3)})), [], 0)
    assert view.replayer_of(NodeId(1, 3)) == NOBODY
    assert not needs_replayer(view, [])
    assert needs_replayer(view, [0])


def test_joining_and_replaying_leave_the_lock_epoch_alone() -> None:
    view = view_of(ACTIVE, NEEDS, FREE)
    view = next_view(view, 7, Changes(admit=((request(2, "new"), 4),)), [0], 0)
    assert view.lock_epoch == 5
    view = next_view(view, 7, Changes(freed=frozenset({NodeId(1, 3)})), [0], 0)
    assert view.lock_epoch == 5
    view = next_view(view, 7, Changes(activate=frozenset({NodeId(2, 4)})), [0], 0)
    assert view.lock_epoch == view.epoch == 12


def test_incarnation_is_above_all_that_were_used() -> None:
    view = view_of(FREE, FREE)
    assert next_incarnation(view, 0, (), KEYS) == 4
    keys = (KEYS.path(NodeId(0, 9), 1), KEYS.path(NodeId(1, 20), 1), 255 << 40 | 77)
    assert next_incarnation(view, 0, keys, KEYS) == 10


def test_counters_do_not_wrap() -> None:
    keys = (KEYS.path(NodeId(0, MAX_INCARNATION), 1),)
    with pytest.raises(IncarnationsExhausted):
        next_incarnation(view_of(FREE), 0, keys, KEYS)
    last = View(MAX_EPOCH, 0, (ViewSlot(),))
    with pytest.raises(EpochsExhausted):
        next_view(last, 7, Changes(), [], 0)


def test_incarnation_that_comes_again_is_noticed() -> None:
    before = view_of(ACTIVE, NEEDS)
    after = View(10, 1, view_of(ACTIVE, ACTIVE).slots, lock_epoch=10)
    with pytest.raises(AssertionError, match="came again"):
        after.follows(before)


def pick(rng: Random, nodes: tuple[NodeId, ...]) -> frozenset[NodeId]:
    return frozenset(node for node in nodes if rng.random() < 0.3)


def random_changes(rng: Random, view: View, number: int) -> Changes:
    evict = pick(rng, view.listed)
    left = pick(rng, view.listed) - evict
    free = [n for n, slot in enumerate(view.slots) if slot.state is FREE]
    return Changes(
        evict,
        left,
        pick(rng, view.to_replay),
        pick(rng, view.joining) - evict - left,
        tuple(
            (request(slot, f"host{number}.{slot}"), next_incarnation(view, slot, (), KEYS))
            for slot in free
            if rng.random() < 0.5
        ),
    )


@pytest.mark.parametrize("seed", range(30))
def test_views_follow_each_other(seed: int) -> None:
    rng = Random(seed)
    first = view = View.empty(8)
    for number in range(60):
        changes = random_changes(rng, view, number)
        replayers = [n.slot for n in view.active if n not in changes.evict | changes.left]
        after = next_view(view, 7, changes, replayers, number)
        after.check()
        after.follows(view)
        after.follows(first)
        assert not needs_replayer(after, replayers)
        assert set(after.to_replay) == (set(view.to_replay) - changes.freed) | changes.evict
        assert not (changes.evict | changes.left) & set(after.listed)
        view = after
