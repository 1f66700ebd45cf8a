"""What members hear from each other, and what they say again until the view shows it.

A message changes what this node believes, never what is on the LUN: whoever believes wrongly finds
that out there. Messages of nodes that cannot know what they say are dropped: an announcement of
who does not hold, a hand-over of somebody else's key, a replay that another node was told to do.
"""

from __future__ import annotations

from lockmgr.cluster import proof
from lockmgr.cluster.beating import Beating
from lockmgr.cluster.coordinator import is_serving, may_renew
from lockmgr.cluster.effects import StopReason
from lockmgr.cluster.install import install
from lockmgr.cluster.messages import (
    Announce,
    AskLease,
    DeathReported,
    EvictAsked,
    FenceAsked,
    Fenced,
    JoinRefused,
    LeaseGiven,
    Leave,
    Message,
    Ready,
    ReplayDone,
    TakeOver,
    Thawed,
    YouHold,
)
from lockmgr.cluster.state import NodeState, Stopped
from lockmgr.cluster.view import NodeId, SlotState


def receive(st: NodeState, beating: Beating, peer: NodeId, message: Message) -> None:
    """``peer`` has said something. Raises `Stopped`."""
    if isinstance(message, JoinRefused):
        if st.me is None:
            raise Stopped(StopReason.REFUSED, message.words)
        return
    if st.me is None or st.judge is None:
        return
    match message:
        case Announce(view, cleared):
            if st.keys.owner(view.holder_key) == peer:
                install(st, view, cleared)
        case AskLease(stamp):
            if may_renew(st, peer):
                st.given.answered(peer, st.now)
                st.send(peer, LeaseGiven(stamp))
        case LeaseGiven(stamp):
            if stamp <= st.now and st.coordinator == peer:
                beating.renew(stamp)
        case TakeOver(holder_key):
            if st.keys.owner(holder_key) == peer:
                st.named, st.named_at = message, st.now
        case YouHold(key):
            st.told_holding = st.keys.owner(key) == st.me
        case FenceAsked(keys):
            proof.asked(st, peer, keys)
        case Fenced(keys):
            proof.proven(st, keys)
        case Leave(clean):
            st.leavers[peer] = clean and st.leavers.get(peer, True)
            if is_serving(st) and st.view is not None and not st.view.lists(*peer):
                st.lagging.add(peer)
        case Ready():
            st.ready.add(peer)
        case Thawed(lock_epoch):
            st.thawed = max(st.thawed, lock_epoch)
        case ReplayDone(node):
            if st.view is not None and st.view.replayer_of(node) == peer.slot:
                st.replay_done.add(node)
        case EvictAsked(node, why):
            if st.known is not None and st.known.lists(*node):
                st.asked.setdefault(node, why)
        case DeathReported(node):
            if st.known is not None and node != st.me and st.known.state_of(node):
                st.dead.add(node)


def tell_coordinator(st: NodeState) -> None:
    """What the coordinator must know and the view does not show yet."""
    view, coordinator = st.known, st.coordinator
    if view is None or st.me is None:
        return
    ready = st.journal_ready and view.state_of(st.me) is SlotState.JOINING
    replayed = [node for node in view.to_replay if node in st.replayed_here]
    if coordinator == st.me:
        if ready:
            st.ready.add(st.me)
        st.replay_done.update(replayed)
        return
    if coordinator is None:
        return
    if ready:
        st.send(coordinator, Ready())
    if view.joining and st.thawed == view.lock_epoch and view.state_of(st.me) is SlotState.ACTIVE:
        st.send(coordinator, Thawed(st.thawed))
    for node in replayed:
        st.send(coordinator, ReplayDone(node))
    for node in sorted(st.dead):
        st.send(coordinator, DeathReported(node))
    for node, why in sorted(st.asked.items()):
        st.send(coordinator, EvictAsked(node, why))
    if st.unregistered is not None:
        st.send(coordinator, Leave(st.unregistered))
