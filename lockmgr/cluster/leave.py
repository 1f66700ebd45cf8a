"""Going, in order; and naming a successor.

    member       1  Unregister every own key: nothing of this node can come any more
                 2  `Leave` to the coordinator, until a view without this node is announced
    coordinator  1  `TakeOver` to a member with a path; its PREEMPT is the hand-over: nobody
                    releases or unregisters the holder's key
                 2  goes on as a member
    last node    1  Unregister every key but the holder's
                 2  write a view without itself: *parked*
                 3  log out, still registered

A member whose keys may still be registered says so, and is evicted. So is who takes too long, and
who leaves before its journal was in order: its slot may be one that it took over from a dead node.
"""

from __future__ import annotations

from lockmgr.cluster.change import Changes, next_view
from lockmgr.cluster.effects import CloseSessions, StopReason, Unregister, WriteView
from lockmgr.cluster.messages import KEYS_PER_MESSAGE, EvictAsked, TakeOver
from lockmgr.cluster.outcomes import Good
from lockmgr.cluster.state import NodeState, Steps, Stopped
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlotFlag


def is_late(st: NodeState) -> bool:
    return st.leaving_since is not None and (
        st.now - st.leaving_since >= st.settings.leave_within_s
    )


def stop_late() -> Stopped:
    return Stopped(
        StopReason.LEFT,
        "no other node has confirmed that this one has left; they will evict it. Nothing is lost",
    )


def leave_as_member(st: NodeState) -> Steps[None]:
    """Step 1; step 2 goes with every tick."""
    outcome = yield Unregister(st.op(), 0)
    st.unregistered = isinstance(outcome, Good) and _is_in_order(st)
    st.lose_path()


def _is_in_order(st: NodeState) -> bool:
    """Whether the own journal has nothing that somebody must replay."""
    view = st.known
    assert st.me is not None and view is not None
    used = bool(view.slots[st.me.slot].flags & ViewSlotFlag.JOURNAL_USED)
    return st.journal_ready or not used or view.state_of(st.me) is SlotState.ACTIVE


def others(st: NodeState, view: View) -> tuple[NodeId, ...]:
    return tuple(node for node in view.listed if node != st.me)


def park(st: NodeState) -> Steps[None]:
    """The last node's leaving. Raises `Stopped`, `PathGone`."""
    assert st.me is not None and st.current is not None
    yield from st.do(Unregister(st.op(), st.path_key))
    gone = frozenset({st.me})
    changes = Changes(left=gone) if _is_in_order(st) else Changes(evict=gone)
    view = next_view(st.current, st.path_key, changes, (), st.wall_ns)
    yield from st.do(WriteView(st.op(), view))
    st.emit(CloseSessions())
    raise Stopped(StopReason.LEFT, "the last node has left; its key stays parked on the target")


def name_successor(st: NodeState) -> None:
    """Ask the next member with a path to take over, if this coordinator cannot or will not go on.

    Each is given ``path_loss_s`` before the next one is asked.
    """
    if not _hands_over(st):
        return
    assert st.judge is not None and st.view is not None
    candidates = [
        node
        for node in others(st, st.view)
        if st.judge.is_direct(node)
        and st.now - st.judge.last_sign(node) <= st.settings.path_loss_s
        and node not in st.dead
    ]
    if not candidates:
        return
    candidates.sort(key=lambda node: (_is_joining(st.view, node), node))
    turn = int((st.now - _handing_since(st)) / st.settings.path_loss_s)
    successor = candidates[turn % len(candidates)]
    st.send(successor, TakeOver(st.view.holder_key, tuple(st.unproven)[-KEYS_PER_MESSAGE:]))
    if st.me in st.asked:
        st.send(successor, EvictAsked(st.me, st.asked[st.me]))


def _is_joining(view: View | None, node: NodeId) -> bool:
    return view is not None and view.state_of(node) is SlotState.JOINING


def _hands_over(st: NodeState) -> bool:
    if st.view is None or st.coordinator != st.me:
        return False
    if st.path_key == 0:
        return st.now - st.lost_at >= st.settings.heartbeat_s
    return st.in_office and (st.leaving_since is not None or st.me in st.asked)


def _handing_since(st: NodeState) -> float:
    if st.path_key == 0:
        return st.lost_at
    return st.leaving_since if st.leaving_since is not None else st.opened_at
