"""What the coordinator does, and in which order.

    publish   1  write the view, without those who go            (from here they get no lease)
              2  READ KEYS; fence every key of those who go      (a new holder: of all not listed)
              3  read the heartbeat blocks again                 (when were their last renewals?)
              4  install it, announce it
    later     5  their leases are over, or their deaths proven: say so to all
              6  their journals are replayed: the next view frees their slots

Wherever it stops, who holds next reads the view and begins at 2, for everything that is not listed.
A coordinator outside the judge's verdict yields: it does none of this.
"""

from __future__ import annotations

from dataclasses import replace

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.change import (
    Changes,
    needs_replayer,
    next_incarnation,
    next_view,
)
from lockmgr.cluster.effects import Fence, ReadBlocks, Survey, WriteView
from lockmgr.cluster.errors import IncarnationsExhausted
from lockmgr.cluster.install import announce, clear, install
from lockmgr.cluster.messages import JoinRefused
from lockmgr.cluster.outcomes import Blocks, Surveyed
from lockmgr.cluster.state import NodeState, Steps
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, SlotState, View, ViewSlotFlag


def is_serving(st: NodeState) -> bool:
    """In office and among those who stay."""
    return st.in_office and st.me in st.best


def may_renew(st: NodeState, asker: NodeId) -> bool:
    """Whether a lease may be given to that node now."""
    return (
        is_serving(st)
        and st.view is not None
        and st.current is not None
        and st.view.lists(*asker)
        and st.current.lists(*asker)
        and asker not in st.condemned
        and st.given.may_answer(st.now)
    )


def must_go(st: NodeState, view: View) -> frozenset[NodeId]:
    """Listed nodes that are to be evicted."""
    unclean = {node for node, clean in st.leavers.items() if not clean}
    gone = {
        node
        for node in view.listed
        if node not in st.best or node in st.dead or node in st.asked or node in unclean
    }
    return frozenset(gone - {st.me})


def duties(st: NodeState, view: View) -> Changes:
    """What the next view is to change, admissions' incarnations aside."""
    assert st.judge is not None and st.me is not None
    evict = must_go(st, view)
    left = {node for node, clean in st.leavers.items() if clean and view.lists(*node)} - evict
    waiting = frozenset(view.to_replay)
    freed = frozenset(node for node in waiting if node in st.replay_done and node in st.cleared)
    verdict = st.admissions.judge(view, st.judge, st.now)
    evict |= verdict.replaced - {st.me}
    activate: frozenset[NodeId] = frozenset()
    if not evict and waiting == freed and _is_thawed(st, view) and _is_in_order(st, view):
        activate = frozenset(node for node in view.joining if _may_activate(st, view, node))
    return Changes(
        evict=evict,
        left=frozenset(left),
        freed=freed,
        activate=activate - left,
        admit=tuple((request, 0) for request in verdict.admit),
        reassign=needs_replayer(view, replayers(st, view, evict | left)),
    )


def _is_thawed(st: NodeState, view: View) -> bool:
    """Joins wait until the locks are recovered; with no lock there is nothing to recover."""
    return not view.active or st.thawed == view.lock_epoch


def _is_in_order(st: NodeState, view: View) -> bool:
    """Whether no newcomer has taken over a journal that nobody has replayed: who finds no free slot
    moves into a dead node's (`newcomer`), and the view does not say so. Only the first can, and
    then nobody is active; later ones get slots that are free."""
    return bool(view.active) or all(
        node in st.ready or not view.slots[node.slot].flags & ViewSlotFlag.JOURNAL_USED
        for node in view.joining
    )


def _may_activate(st: NodeState, view: View, node: NodeId) -> bool:
    assert st.judge is not None
    others = {*view.active, st.coordinator or node}
    return node in st.ready and st.judge.has_met(node, others, st.now)


def replayers(st: NodeState, view: View, without: frozenset[NodeId] | set[NodeId]) -> list[int]:
    """Slots of those who may be told to replay: active members with a path, this one last."""
    assert st.judge is not None and st.me is not None
    fit = [
        node.slot
        for node in view.active
        if node not in without and node != st.me and st.judge.is_direct(node)
    ]
    if view.state_of(st.me) is SlotState.ACTIVE or not fit:
        fit.append(st.me.slot)
    return fit


def serve(st: NodeState, changes: Changes) -> Steps[None]:
    """One change of the view, from writing to announcing."""
    assert st.current is not None
    view = st.current
    if changes.admit:
        survey = yield from st.ask(Survey(st.op()), Surveyed)
        changes = replace(changes, admit=_admitted(st, view, changes, survey.keys))
    if not changes:
        return
    fit = replayers(st, view, changes.evict | changes.left)
    after = next_view(view, st.path_key, changes, fit, st.wall_ns)
    yield from publish(st, view, after, everything=False)


def _admitted(
    st: NodeState, view: View, changes: Changes, keys: tuple[int, ...]
) -> tuple[tuple[JoinRequest, int], ...]:
    """Those whose keys are registered, with their incarnations."""
    admit = []
    for request, _ in changes.admit:
        try:
            incarnation = next_incarnation(view, request.slot, keys, st.keys)
        except IncarnationsExhausted:
            st.admissions.drop(request)
            continue
        if request.key in keys:
            admit.append((request, incarnation))
        else:
            st.admissions.drop(request)
    return tuple(admit)


def publish(st: NodeState, before: View, after: View, *, everything: bool) -> Steps[None]:
    """Steps 1 to 4. ``everything``: this is a new holder's first view."""
    assert st.judge is not None
    after.check()
    after.follows(before)
    departing = frozenset(
        node for node in before.listed if after.state_of(node) is SlotState.NEEDS_REPLAY
    )
    st.condemned |= departing
    yield from st.do(WriteView(st.op(), after))
    st.current = after
    gone = frozenset(before.listed) - frozenset(after.listed)
    fenced = frozenset(after.to_replay) if everything else departing
    if everything or gone:
        survey = yield from st.ask(Survey(st.op()), Surveyed)
        keys = tuple(key for key in survey.keys if _is_to_fence(st, after, key, gone, everything))
        # Also who leaves cleanly may have left keys behind, of sessions that it lost earlier.
        if everything or departing or keys:
            yield from st.do(Fence(st.op(), keys, tuple(sorted(fenced)), silent(st, after)))
            yield from look(st)
        for node in fenced - st.cleared:
            last_change = st.judge.changed_at(node, st.now)
            st.over_at[node] = st.given.over_at(node, last_change)
    install(st, after, ())
    announce(st, frozenset(before.listed) | frozenset(after.listed))
    keep_books(st)


def _is_to_fence(
    st: NodeState, view: View, key: int, gone: frozenset[NodeId], everything: bool
) -> bool:
    if key == st.path_key:
        return False
    owner = st.keys.owner(key)
    if everything:
        return owner is None or not view.lists(*owner)
    return owner in gone


def silent(st: NodeState, view: View) -> tuple[NodeId, ...]:
    """Nodes that may block a drain: gone, or without a sign of life for as long as a path takes to
    be lost. If they live, they open new paths."""
    assert st.judge is not None
    latest = st.now - st.settings.path_loss_s
    quiet = (n for n in view.listed if n != st.me and st.judge.last_sign(n) < latest)
    return (*view.to_replay, *quiet)


def look(st: NodeState) -> Steps[None]:
    """Read the heartbeat blocks."""
    assert st.judge is not None
    blocks = yield from st.ask(ReadBlocks(st.op()), Blocks)
    st.judge.take_blocks(blocks.heartbeats, st.now)


def refuse(st: NodeState) -> None:
    """Tell newcomers that will not be let in."""
    if is_serving(st):
        assert st.current is not None and st.judge is not None
        for request, words in st.admissions.judge(st.current, st.judge, st.now).refuse:
            st.send(NodeId(NEWCOMER_SLOT, request.key), JoinRefused(words))


def keep_books(st: NodeState) -> None:
    """Step 5, and views for those who do not have them."""
    if not is_serving(st):
        return
    over = [node for node, at in st.over_at.items() if st.now >= at or node in st.dead]
    news = False
    for node in over:
        del st.over_at[node]
        news = True
        clear(st, node)
    assert st.view is not None
    behind = frozenset(st.view.listed) if news else frozenset(st.lagging)
    st.lagging.clear()
    announce(st, behind)
