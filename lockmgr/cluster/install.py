"""A view takes effect on this node: what is told upwards, and what is forgotten."""

from __future__ import annotations

from lockmgr.cluster.effects import (
    Departed,
    DepartedMayBeGranted,
    ReplayWanted,
    StopReason,
    ViewInstalled,
)
from lockmgr.cluster.messages import Announce
from lockmgr.cluster.state import NodeState, Stopped
from lockmgr.cluster.view import NOBODY, NodeId, SlotState, View, ViewSlotFlag


def install(st: NodeState, view: View, cleared: tuple[NodeId, ...]) -> None:
    """``view`` is on the LUN, whom it does not list is fenced. Raises `Stopped`.

    A view that is not newer than the installed one changes nothing but who is cleared.
    """
    if st.view is None or view.epoch > st.view.epoch:
        if st.me is None or not view.lists(*st.me):
            raise Stopped(*_why_not_listed(st))
        _install(st, view, frozenset(cleared))
    if st.view is not None and view.epoch == st.view.epoch:
        for node in cleared:
            clear(st, node)


def _why_not_listed(st: NodeState) -> tuple[StopReason, str]:
    if st.leaving_since is not None:
        return StopReason.LEFT, "this node has left the cluster"
    return (
        StopReason.EVICTED,
        "the other nodes have evicted this one: they did not hear it, or were told to; its I/O "
        "is fenced at the target. Mount again to come back as a new incarnation",
    )


def _install(st: NodeState, view: View, cleared: frozenset[NodeId]) -> None:
    assert st.judge is not None and st.me is not None
    before = st.view
    view.check()
    if before is not None:
        view.follows(before)
    _note_other_holder(st, before, view)
    departed = _departed(st, before, view, cleared)
    st.view = view
    if st.current is None or st.current.epoch < view.epoch:
        st.current = view
    st.judge.set_nodes(view.listed, st.now, view.joining)
    st.best = st.judge.verdict(st.now, direct=bool(st.path_key))
    if before is None or frozenset(view.joining) - frozenset(before.joining):
        st.hurry()
    coordinator = st.coordinator
    assert coordinator is not None, "a view is announced by a listed holder"
    replayed = () if before is None else _replayed(before, view)
    st.emit(ViewInstalled(view, coordinator, departed, replayed))
    st.awaiting_clearance |= {one.node for one in departed if not one.cleared}
    for node in sorted(st.awaiting_clearance):
        if node in cleared or view.state_of(node) is not SlotState.NEEDS_REPLAY:
            clear(st, node)
    _want_replays(st, view)
    _forget(st, before, view)


def _note_other_holder(st: NodeState, before: View | None, view: View) -> None:
    """Leases that another coordinator may have given count for this one, should it succeed."""
    assert st.judge is not None
    if before is None:
        st.given.other_held(st.now, st.now)
        return
    held = st.keys.owner(before.holder_key)
    if held not in (st.me, st.keys.owner(view.holder_key)):
        changed = st.now if held is None else st.judge.changed_at(held, st.now)
        st.given.other_held(changed, st.now)


def _departed(
    st: NodeState, before: View | None, view: View, cleared: frozenset[NodeId]
) -> tuple[Departed, ...]:
    gone = view.to_replay if before is None else before.listed
    found = []
    for node in gone:
        if view.lists(*node):
            continue
        waits = view.state_of(node) is SlotState.NEEDS_REPLAY
        found.append(
            Departed(
                node,
                was_active=before is None or before.state_of(node) is SlotState.ACTIVE,
                replay_by=view.slots[node.slot].replay_by if waits else NOBODY,
                needs_replay=waits,
                cleared=not waits or node in cleared or node in st.cleared,
            )
        )
    return tuple(found)


def _replayed(before: View, view: View) -> tuple[NodeId, ...]:
    """Also of nodes that departed and were replayed between two views that this node saw."""
    waited = [*before.to_replay, *before.listed]
    return tuple(
        node
        for node in waited
        if not view.lists(*node) and view.state_of(node) is not SlotState.NEEDS_REPLAY
    )


def clear(st: NodeState, node: NodeId) -> None:
    """Its lease is over, or its death proven, and it is fenced."""
    st.cleared.add(node)
    if node in st.awaiting_clearance:
        st.awaiting_clearance.discard(node)
        st.emit(DepartedMayBeGranted(node))


def _want_replays(st: NodeState, view: View) -> None:
    assert st.me is not None
    wanted = {node for node in view.to_replay if view.slots[node.slot].replay_by == st.me.slot}
    if view.state_of(st.me) is SlotState.JOINING:
        wanted.add(st.me)
    for node in sorted(wanted - st.replaying):
        used = bool(view.slots[node.slot].flags & ViewSlotFlag.JOURNAL_USED)
        st.emit(ReplayWanted(node, used))
    st.replaying = wanted


def _forget(st: NodeState, before: View | None, view: View) -> None:
    """Books about who is not there any more, and about who replays it no more: as long as the next
    one is at it, the slot is nobody's, though its journal was replayed before."""
    if before is not None:
        st.replay_done = {
            node for node in st.replay_done if view.replayer_of(node) == before.replayer_of(node)
        }
    st.links.forget(st.now)
    listed, waiting = frozenset(view.listed), frozenset(view.to_replay)
    st.dead &= listed | waiting
    st.asked = {node: why for node, why in st.asked.items() if node in listed}
    st.leavers = {node: clean for node, clean in st.leavers.items() if node in listed}
    st.ready &= frozenset(view.joining)
    st.lagging &= listed
    st.to_fence = {node: keys for node, keys in st.to_fence.items() if node in listed}
    st.fenced_for = {node: keys for node, keys in st.fenced_for.items() if node in listed}
    st.replay_done &= waiting
    st.replayed_here &= waiting
    st.cleared &= waiting
    st.condemned &= waiting
    st.over_at = {node: at for node, at in st.over_at.items() if node in waiting}


def announce(st: NodeState, peers: frozenset[NodeId]) -> None:
    """Tell these what the coordinator goes by."""
    assert st.view is not None
    cleared = tuple(node for node in st.view.to_replay if node in st.cleared)
    for peer in sorted(peers):
        if peer != st.me:
            st.send(peer, Announce(st.view, cleared))
