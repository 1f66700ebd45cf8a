"""How a node's control session comes back, and how the reservation changes hands.

open        OpenPaths; the view does not list this node: it is over
              nobody holds     the target has restarted: `await_holder`
              an own dead key  `Take` it at once: `take_office`
              another's key, though the view names this node: deposed; back off, and tell it
take over   1  Survey: who holds, and is that one to be deposed?
            2  Take: an atomic compare-and-swap. Lost: back off
take office 3  Fence the old holder's lost paths, and the own: nothing that was written over them is
               on its way any more
            4  Survey: the view, current now for good. Not listed: write nothing, leave
            5  `coordinator.publish`: one view with the new holder and without those who go
"""

from __future__ import annotations

from lockmgr.cluster.change import Changes, next_view
from lockmgr.cluster.coordinator import duties, look, publish, replayers, silent
from lockmgr.cluster.effects import Fence, OpenPaths, Reserve, StopReason, Survey, Take
from lockmgr.cluster.errors import MembershipViolation
from lockmgr.cluster.judge import Judge
from lockmgr.cluster.messages import YouHold
from lockmgr.cluster.outcomes import Lost, Opened, Surveyed, TakeAnswer, Won
from lockmgr.cluster.proof import proven
from lockmgr.cluster.state import NodeState, PathGone, Pause, Steps, Stopped
from lockmgr.cluster.view import NodeId, View

_EVICTED = (
    "the view on the LUN does not list this node any more: the others have evicted it, and its I/O "
    "is fenced at the target. Mount again to come back as a new incarnation"
)


# -- opening paths -----------------------------------------------------------------------------
def open_paths(st: NodeState) -> Steps[None]:
    """Until the control session is open again, however long that takes. Raises `Stopped`."""
    while True:
        st.path_back = False
        try:
            yield from open_once(st)
        except PathGone:
            until = st.now + st.settings.reopen_s
            while st.now < until and not st.path_back:
                yield Pause(until)
        else:
            return


def open_once(st: NodeState) -> Steps[Surveyed]:
    """Raises `PathGone`, `Stopped`. What was read decides what this session may do."""
    assert st.me is not None
    opened = yield from st.ask(OpenPaths(st.op(), *st.me), Opened)
    survey = opened.survey
    st.own_keys.add(opened.key)
    check_listed(st, survey.view)
    if st.unnamed:
        keys = ", ".join(f"{key:#x}" for key in sorted(st.unnamed))
        raise MembershipViolation(f"new paths before PathLost has named those with {keys}")
    st.path_key, st.opened_at = opened.key, st.now
    if st.judge is None:
        st.judge = Judge(st.me, st.settings, st.links, st.watch)
        st.judge.set_nodes(survey.view.listed, st.now, survey.view.joining)
    st.judge.restart(st.now)
    note_survey(st, survey)
    st.may_write = survey.holder_key != 0
    st.best = st.judge.verdict(st.now, direct=True)
    owner = st.keys.owner(survey.holder_key)
    named = st.keys.owner(survey.view.holder_key)
    if owner == st.me or survey.holder_key in st.own_keys:
        # An own dead key holds.
        st.told_holding = True
    elif named == st.me and owner is not None:
        st.backoff_until = st.now + st.settings.evict_after_s
        st.send(owner, YouHold(survey.holder_key))
    return survey


def check_listed(st: NodeState, view: View) -> None:
    """Raises `Stopped` if this node is no member any more."""
    assert st.me is not None
    if not view.lists(*st.me):
        if st.leaving_since is not None:
            raise Stopped(StopReason.LEFT, "this node has left the cluster")
        raise Stopped(StopReason.EVICTED, _EVICTED)


def note_survey(st: NodeState, survey: Surveyed) -> None:
    """What the target says now."""
    st.generation = survey.generation
    if st.current is None or survey.view.epoch > st.current.epoch:
        st.current = survey.view
    st.holds = st.path_key != 0 and survey.holder_key == st.path_key
    watched = (survey.holder_key, survey.view.epoch)
    if watched != st.watched or st.slept_at >= st.watched_since:
        st.watched, st.watched_since = watched, st.now


# -- nobody holds ------------------------------------------------------------------------------
def await_holder(st: NodeState) -> Steps[None]:
    """The target has forgotten everything, or never knew a holder. Nothing is written before
    somebody has reserved and the view was read under that: first by the node that the view names,
    after a grace by any listed one; RESERVE decides.
    """
    assert st.me is not None
    since, holder_seen = st.now, 0
    while True:
        survey = yield from st.ask(Survey(st.op()), Surveyed)
        check_listed(st, survey.view)
        note_survey(st, survey)
        if survey.holder_key != 0 and holder_seen == survey.holder_key:
            # The view of this survey was read when there was a holder already.
            st.may_write = True
            return
        holder_seen = survey.holder_key
        if survey.holder_key != 0:
            continue
        if since <= st.slept_at:
            since = st.now
        first = st.keys.owner(survey.view.holder_key) == st.me
        if first or st.now - since >= st.settings.restart_grace_s + _rank(st, survey.view):
            answer = yield from st.ask(Reserve(st.op()), TakeAnswer)
            if isinstance(answer, Won):
                st.holds = True
                yield from take_office(st, 0)
                return
        yield from st.rest(st.settings.heartbeat_s)


def _rank(st: NodeState, view: View) -> float:
    """Seconds by which this node goes after those before it, so that few try at once."""
    assert st.me is not None
    before = [node for node in view.listed if node < st.me and node in st.best]
    return len(before) * st.settings.heartbeat_s


# -- succession --------------------------------------------------------------------------------
def is_due(st: NodeState) -> bool:
    """Whether this node, which is not the coordinator, should look at the reservation now."""
    view, coordinator = st.known, st.coordinator
    assert view is not None and st.me is not None
    if st.now < st.try_at or st.me not in st.best:
        return False
    if st.told_holding or st.holds or _is_named(st) or not st.may_write:
        return True
    if coordinator is not None and coordinator in st.dead:
        return True
    if st.now < st.backoff_until:
        return False
    if coordinator == st.me or coordinator is None or coordinator in st.asked:
        return True
    if coordinator in st.best:
        return False
    return st.now - st.suspected_since >= _rank(st, view)


def _is_named(st: NodeState) -> bool:
    return st.named is not None and st.now - st.named_at <= st.settings.path_loss_s


def take_over(st: NodeState) -> Steps[None]:
    """Steps 1 to 5, as far as the holder is one to be deposed."""
    assert st.me is not None
    st.told_holding = False
    st.try_at = st.now + st.settings.heartbeat_s
    survey = yield from st.ask(Survey(st.op()), Surveyed)
    check_listed(st, survey.view)
    note_survey(st, survey)
    holder = survey.holder_key
    if holder == st.path_key:
        yield from take_office(st, survey.view.holder_key)
    elif holder == 0 or not st.may_write:  # somebody may have reserved since
        st.may_write = False
        yield from await_holder(st)
    elif is_deposable(st, survey):
        yield from take(st, holder)


def take(st: NodeState, holder: int) -> Steps[None]:
    """Steps 2 to 5."""
    answer = yield from st.ask(Take(st.op(), holder), TakeAnswer)
    if isinstance(answer, Won):
        st.holds = True
        yield from take_office(st, holder)
    elif isinstance(answer, Lost):
        st.backoff_until = st.now + st.settings.evict_after_s
        st.named = None
    else:
        st.may_write = False
        yield from await_holder(st)


def is_deposable(st: NodeState, survey: Surveyed) -> bool:
    """Whether that holder is one to be deposed by this node."""
    assert st.judge is not None
    holder, view = survey.holder_key, survey.view
    owner = st.keys.owner(holder)
    if holder in st.own_keys or owner == st.me:
        return True
    if st.named is not None and _is_named(st) and st.named.holder_key == holder:
        return True
    if st.me not in st.best:
        return False
    if owner is None and not st.keys.is_newcomer(holder):
        # A stranger's. To take the LUN from it is for people to decide.
        return False
    if owner is None or not view.lists(*owner) or not st.judge.knows(owner):
        # A newcomer that came to nothing, or somebody whose view was never announced.
        return st.now - st.watched_since >= st.settings.evict_after_s
    return owner in st.dead or owner in st.asked or owner not in st.best


def take_office(st: NodeState, old_key: int) -> Steps[None]:
    """Steps 3 to 5, by who holds the reservation."""
    assert st.me is not None and st.judge is not None
    old = st.keys.owner(old_key)
    own = tuple(st.unproven)
    keys = [old_key, *own] if old_key and old_key != st.path_key else [*own]
    nodes: tuple[NodeId, ...] = ()
    if st.named is not None and st.named.holder_key == old_key:
        keys.extend(key for key in st.named.lost_keys if key not in keys)
    elif old is not None and old != st.me and (old not in st.best or old in st.dead):
        nodes = (old,)
    st.named = None
    stragglers = silent(st, st.current) if st.current is not None else ()
    yield from st.do(Fence(st.op(), tuple(dict.fromkeys(keys)), nodes, stragglers))
    proven(st, own)
    survey = yield from st.ask(Survey(st.op()), Surveyed)
    check_listed(st, survey.view)
    note_survey(st, survey)
    if not st.holds:
        st.backoff_until = st.now + st.settings.evict_after_s
        return
    st.may_write = True
    view = survey.view
    st.current = view
    st.judge.set_nodes(view.listed, st.now, view.joining)
    yield from look(st)
    for other in {old, st.keys.owner(view.holder_key)} - {st.me, None}:
        if other is not None:
            st.given.other_held(st.judge.changed_at(other, st.now), st.now)
    st.best = st.judge.verdict(st.now, direct=True)
    if st.me not in st.best:
        return
    st.condemned.clear()
    st.admissions.forget()
    wanted = duties(st, view)
    changes = Changes(evict=wanted.evict)
    fit = replayers(st, view, changes.evict)
    yield from publish(
        st, view, next_view(view, st.path_key, changes, fit, st.wall_ns), everything=True
    )
