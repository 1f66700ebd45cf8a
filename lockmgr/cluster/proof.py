"""Whether anything of a node's earlier paths can still come: its books, and the coordinator's.

Theory. A path that is lost may have commands on their way. What had no answer is issued again on
the next one, and must not be followed by its own first copy, nor may a newer write be. Only a fence
ends that, and only the holder of the reservation can fence. So a node keeps the keys of the paths
that it lost, and *asks* the coordinator, as soon as it has paths again; a coordinator has its own
keys in the fence with which it takes office. A key is registered once, ever: that it is fenced
stays true, whoever did it and whenever the word arrives, and of every set of keys each for itself.

    PathLost(keys)         they are unproven from now on
    FenceAsked(keys)       to the coordinator: at once when the paths are open, then with each tick
    Fence, Fenced(keys)    one fence for all that have asked; the keys are proven
    PathsReady(key)        nothing is unproven, and the view was read on these paths under a
                           reservation

invariants:
- `PathsReady` comes once for each key of a control session, and never while a key is unproven;
- a coordinator fences on request only keys of the very node that asks, and says so only when the
  fence is complete;
- whoever is being evicted gets no answer: the view alone decides about it.
"""

from __future__ import annotations

from collections.abc import Iterable

from lockmgr.cluster.coordinator import is_serving, must_go, silent
from lockmgr.cluster.effects import Fence, PathsReady
from lockmgr.cluster.messages import KEYS_PER_MESSAGE, FenceAsked, Fenced
from lockmgr.cluster.state import NodeState, Steps
from lockmgr.cluster.view import NodeId


def is_news(st: NodeState, keys: tuple[int, ...]) -> bool:
    """Whether some are own ones that are not known to be lost."""
    return any(key not in st.lost_keys for key in keys if st.keys.owner(key) == st.me)


def lost(st: NodeState, keys: tuple[int, ...]) -> None:
    """Something of these paths may be on its way."""
    for key in keys:
        if st.me is not None and st.keys.owner(key) == st.me and key not in st.lost_keys:
            st.lost_keys.add(key)
            st.unproven[key] = None
    st.unnamed.difference_update(keys)


def proven(st: NodeState, keys: Iterable[int]) -> None:
    """Nothing of the own paths with these keys is on its way, and nothing can come."""
    for key in keys:
        st.unproven.pop(key, None)


def tell(st: NodeState) -> None:
    """Say upwards that the paths are ready, or ask for what they wait for."""
    if st.me is None or not st.path_key or not st.may_write:
        st.asked_to_fence = None
        return
    if not st.unproven:
        st.asked_to_fence = None
        if st.ready_key != st.path_key:
            st.ready_key = st.path_key
            st.emit(PathsReady(st.path_key))
        return
    coordinator = st.coordinator
    if coordinator is None or coordinator == st.me or st.unregistered is not None:
        return
    keys = tuple(st.unproven)[:KEYS_PER_MESSAGE]
    if st.asked_to_fence != (coordinator, keys):
        st.asked_to_fence = (coordinator, keys)
        st.send(coordinator, FenceAsked(keys))


# -- the coordinator ---------------------------------------------------------------------------
def asked(st: NodeState, peer: NodeId, keys: tuple[int, ...]) -> None:
    """``peer`` wants these fenced."""
    own = tuple(key for key in keys if st.keys.owner(key) == peer)
    if not own or not is_serving(st) or not _is_entitled(st, peer):
        return
    if st.fenced_for.get(peer, frozenset()).issuperset(own):
        # The answer was lost, or crossed this question.
        st.send(peer, Fenced(own))
        return
    st.to_fence[peer] = own


def _is_entitled(st: NodeState, node: NodeId) -> bool:
    assert st.view is not None and st.current is not None
    return (
        st.view.lists(*node)
        and st.current.lists(*node)
        and node not in st.condemned
        and node not in must_go(st, st.current)
    )


def is_due(st: NodeState) -> bool:
    """Whether this coordinator, which serves, has something to fence on request."""
    for node in [node for node in st.to_fence if not _is_entitled(st, node)]:
        del st.to_fence[node]
    return bool(st.to_fence or st.unproven)


def fence(st: NodeState) -> Steps[None]:
    """One fence of all that was asked for. Raises `PathGone`: they will ask again."""
    assert st.current is not None
    wanted, st.to_fence = st.to_fence, {}
    own = tuple(st.unproven)
    keys = dict.fromkeys((*own, *(key for some in wanted.values() for key in some)))
    yield from st.do(Fence(st.op(), tuple(keys), (), silent(st, st.current)))
    proven(st, own)
    for node, some in wanted.items():
        if not _is_entitled(st, node):
            continue
        st.fenced_for[node] = st.fenced_for.get(node, frozenset()).union(some)
        if frozenset(st.to_fence.get(node, ())) <= st.fenced_for[node]:
            st.to_fence.pop(node, None)
        st.send(node, Fenced(some))
