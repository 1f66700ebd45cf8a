"""Becoming a member.

    1  OpenNewcomer: a temporary key, and only then the view is read
    2  choose a free slot, WriteJoin, again every hurry_s; watch. The first time it knocks at the
       coordinator's, which looks at once
    3  the view lists this node: OpenPaths, DropNewcomer          (a coordinator has admitted it)
    or, when there is nobody to admit it (`decide`):
    3  Take the holder's key, or Reserve; Lost: back off
    4  Fence it, Survey, decide again by what nobody else can change any more
    5  write the view: this node joins, everybody else is gone; fence all that is not listed
    6  OpenPaths; Take the own temporary key from there; DropNewcomer
    7  write the view with the proper holder's key, install it

Before step 5 a failure leaves nothing but a temporary key, which the next attempt knows as its own.
After it the node is listed, and `succession` goes on from whatever it finds.

invariants:
- a newcomer writes nothing but join blocks, until it holds the reservation;
- it takes over only what is parked, its own host's dead, or silent (`Silence`) and unanswering.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from lockmgr.cluster.blocks import Heartbeat, JoinRequest
from lockmgr.cluster.change import assign, joining_slot, next_incarnation
from lockmgr.cluster.effects import (
    DropNewcomer,
    Fence,
    Knock,
    OpenNewcomer,
    ReadBlocks,
    Reserve,
    StopReason,
    Survey,
    Take,
    WriteJoin,
    WriteView,
)
from lockmgr.cluster.outcomes import Blocks, Knocked, Lost, Opened, Surveyed, TakeAnswer, Won
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.state import NodeState, PathGone, Steps, Stopped
from lockmgr.cluster.succession import open_once, take_office
from lockmgr.cluster.view import MAX_INCARNATION, NodeId, SlotState, View, ViewSlot


class Silence:
    """How long nothing has changed, counted only while it was watched."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: Hashable = object()
        self._since = 0.0
        self._last = float("-inf")

    def hear(self, state: Hashable, now: float, slept_at: float) -> bool:
        """Take one observation; True once ``silence_s`` of unbroken silence are over."""
        unwatched = now - self._last > self._settings.path_loss_s or slept_at > self._last
        if state != self._state or unwatched:
            self._state, self._since = state, now
        self._last = now
        return now - self._since >= self._settings.silence_s

    def broken(self) -> None:
        """Somebody has answered."""
        self._state = object()


@dataclass(slots=True)
class _Search:
    """What a newcomer knows while it asks."""

    silence: Silence
    began: float
    slot: int | None = None
    sequence: int = 0
    seen: dict[NodeId, _Seen] = field(default_factory=dict)

    def see(self, heartbeats: tuple[Heartbeat, ...], now: float) -> None:
        """As just read."""
        for beat in heartbeats:
            seen = self.seen.setdefault(beat.node, _Seen(beat.sequence, self.began))
            if beat.sequence != seen.sequence:
                seen.sequence, seen.changed_at = beat.sequence, now
                seen.changes += 1

    def lives(self, node: NodeId) -> bool:
        """Whether it was seen to live. One heartbeat may have been on its way when it died."""
        return node in self.seen and self.seen[node].changes >= 2

    def quiet_since(self, nodes: tuple[NodeId, ...]) -> float:
        """Since when none of them was seen to do anything."""
        return max((self.seen[n].changed_at for n in nodes if n in self.seen), default=self.began)


@dataclass(slots=True)
class _Seen:
    """The heartbeat block of a node."""

    sequence: int
    changed_at: float
    changes: int = 0


def join(st: NodeState) -> Steps[None]:
    """Until this node is listed and its paths are open. Raises `Stopped`."""
    search = _Search(Silence(st.settings), st.now)
    while st.me is None:
        key = st.keys.newcomer(st.rng.getrandbits(64))
        st.own_keys.add(key)
        try:
            opened = yield from st.ask(OpenNewcomer(st.op(), key), Opened)
            survey = opened.survey
            while st.me is None:
                survey = yield from _attempt(st, search, key, survey)
        except PathGone:
            if st.me is None:
                yield from _rest(st)
            else:
                st.lose_path()
    # Listed. What is left of the way is what every member does that has lost its paths.


def _rest(st: NodeState) -> Steps[None]:
    try:
        yield from st.rest(st.settings.reopen_s)
    except PathGone:
        return


def _attempt(st: NodeState, search: _Search, key: int, survey: Surveyed) -> Steps[Surveyed]:
    """One look at the volume and what follows."""
    listed = survey.view.find(st.identity.fingerprint)
    if listed is not None:
        yield from _move_in(st, listed, survey)
        return survey
    _refuse_foreign(st, survey)
    blocks = yield from st.ask(ReadBlocks(st.op()), Blocks)
    st.watch.take(blocks.heartbeats, st.now)
    search.see(blocks.heartbeats, st.now)
    _refuse_duplicate(st, search, survey.view)
    state = (_fingerprint(st, survey), frozenset(blocks.heartbeats))
    quiet = search.silence.hear(state, st.now, st.slept_at)
    if quiet and survey.view.listed:
        strangers = tuple(n for n in survey.view.listed if not _is_own(st, survey.view, n))
        if strangers:
            asked_at = st.now
            knocked = yield from st.ask(Knock(st.op(), strangers), Knocked)
            if knocked.answered or st.slept_at > asked_at:
                search.silence.broken()
                quiet = False
    watched_s = st.now - search.quiet_since(survey.view.listed)
    if may_succeed(st, survey, quiet=quiet, watched_s=watched_s):
        yield from _succeed(st, key, survey)
    else:
        yield from _request(st, search, key, survey, blocks)
        yield from st.rest(st.settings.hurry_s)
    return (yield from st.ask(Survey(st.op()), Surveyed))


def _fingerprint(st: NodeState, survey: Surveyed) -> Hashable:
    """What must not change while silence is waited for, heartbeats aside."""
    keys = frozenset(
        key
        for key in survey.keys
        if (owner := st.keys.owner(key)) is not None and survey.view.lists(*owner)
    )
    return survey.view.epoch, survey.holder_key, keys


def _is_own(st: NodeState, view: View, node: NodeId) -> bool:
    """An earlier incarnation of this host: dead, since this process has the daemon's lock."""
    entry = view.slots[node.slot]
    return (entry.node_name, entry.machine_id) == (st.identity.node_name, st.identity.machine_id)


def may_succeed(
    st: NodeState, survey: Surveyed, *, quiet: bool, watched_s: float = float("inf")
) -> bool:
    """Whether the newcomer may take the reservation now. ``watched_s``: for how long no listed
    node was seen to do anything.

    A name and a machine id of another boot may be those of a copy of this host's system disk,
    which lives and has a lock file of its own.
    """
    view, holder = survey.view, survey.holder_key
    if quiet:
        return True
    if holder == 0:
        return False
    if view.listed:
        if not all(_is_own(st, view, node) for node in view.listed):
            return False
        boots = {view.slots[node.slot].boot_id for node in view.listed}
        if boots != {st.identity.boot_id} and watched_s < st.settings.claimed_dead_s:
            return False
        owner = st.keys.owner(holder)
        return (
            holder in st.own_keys
            or holder == view.holder_key
            or (owner is not None and view.lists(*owner))
        )
    if holder in st.own_keys:
        return True
    return not view.members and holder == view.holder_key


def _refuse_foreign(st: NodeState, survey: Surveyed) -> None:
    """Raises `Stopped` if somebody uses the LUN who is not of this cluster's making."""
    for key in (survey.holder_key, *survey.keys):
        if key and st.keys.owner(key) is None and not st.keys.is_newcomer(key):
            raise Stopped(
                StopReason.REFUSED,
                f"the key {key:#x} is registered on the LUN, and no node of this cluster makes "
                "such a key: another program uses the LUN. Find out which before you go on",
            )


def _refuse_duplicate(st: NodeState, search: _Search, view: View) -> None:
    """Raises `Stopped` if a listed node of this name is seen to live."""
    for node in view.listed:
        entry = view.slots[node.slot]
        if entry.node_name == st.identity.node_name and search.lives(node):
            where = ", ".join(entry.addresses) or "an unknown address"
            raise Stopped(
                StopReason.REFUSED,
                f"a node named {entry.node_name} is a member already (slot {node.slot}, at "
                f"{where}) and it lives. Give this host another name, or stop that one",
            )


# -- being admitted ----------------------------------------------------------------------------
def _request(
    st: NodeState, search: _Search, key: int, survey: Surveyed, blocks: Blocks
) -> Steps[None]:
    view = survey.view
    taken = {
        join.slot: join for join in blocks.joins if join.fingerprint != st.identity.fingerprint
    }
    slot = search.slot
    if slot is None or (slot in taken and search.sequence) or not _is_free(view.slots[slot]):
        slot = _choose_slot(st, view, frozenset(taken))
        search.slot = slot
    if slot is None:
        if _is_full_for_good(st, search, view, blocks):
            raise Stopped(
                StopReason.REFUSED,
                f"all {len(view.slots)} slots of the volume are in use: stop a host, or format "
                "with more slots",
            )
        return
    search.sequence += 1
    me = st.identity
    request = JoinRequest(
        slot,
        key,
        search.sequence,
        me.node_name,
        me.machine_id,
        me.boot_id,
        me.fingerprint,
        me.addresses,
        me.certificate,
    )
    yield from st.do(WriteJoin(st.op(), request))
    holder = st.keys.owner(survey.holder_key)
    if search.sequence > 1 or holder is None or not view.lists(*holder):
        return
    if not _is_own(st, view, holder):
        st.emit(Knock(st.op(), (holder,)))  # it looks at once: nothing depends on its answer


def _is_full_for_good(st: NodeState, search: _Search, view: View, blocks: Blocks) -> bool:
    """No slot will be free soon: none needs replay, none has a dead node of this host, whom the
    others will evict; and somebody lives, or there will be silence."""
    if view.to_replay or any(_is_own(st, view, node) for node in view.listed):
        return False
    return any(search.lives(beat.node) for beat in blocks.heartbeats)


def _is_free(slot: ViewSlot) -> bool:
    return slot.state is SlotState.FREE and slot.incarnation < MAX_INCARNATION


def _choose_slot(st: NodeState, view: View, asked_for: frozenset[int]) -> int | None:
    """The one this host had last; else any that is free, rather one nobody asks for."""
    free = [n for n, slot in enumerate(view.slots) if _is_free(slot)]
    for number in free:
        if view.slots[number].node_name == st.identity.node_name and number not in asked_for:
            return number
    unasked = [n for n in free if n not in asked_for]
    choices = unasked or free
    return st.rng.choice(choices) if choices else None


def _move_in(st: NodeState, node: NodeId, survey: Surveyed) -> Steps[None]:
    """A coordinator has admitted this node."""
    st.me = node
    st.current = survey.view
    yield from open_once(st)
    yield DropNewcomer(st.op())


# -- succeeding --------------------------------------------------------------------------------
def _succeed(st: NodeState, key: int, survey: Surveyed) -> Steps[None]:
    """Steps 3 to 7. Raises `PathGone` if somebody else was faster."""
    old = survey.holder_key
    if old != key:
        effect = Take(st.op(), old) if old else Reserve(st.op())
        answer = yield from st.ask(effect, TakeAnswer)
        if isinstance(answer, Lost):
            yield from st.rest(st.settings.evict_after_s)
            return
        if not isinstance(answer, Won):
            return
    keys = (old,) if old not in (0, key) else ()
    yield from st.do(Fence(st.op(), keys, stragglers=_all_gone(survey.view)))
    seen = yield from st.ask(Survey(st.op()), Surveyed)
    if seen.holder_key != key:
        return
    if seen.view.epoch != survey.view.epoch and not may_succeed(st, seen, quiet=False):
        # A member was faster with its view than this node with its PREEMPT: not mine to take.
        raise PathGone
    for node in {st.keys.owner(old), st.keys.owner(seen.view.holder_key)} - {None}:
        if node is not None:
            st.given.other_held(st.watch.changed_at(node, st.now), st.now)
    view = _first_view(st, key, seen)
    slot = view.find(st.identity.fingerprint)
    assert slot is not None
    yield from st.do(WriteView(st.op(), view))
    st.me, st.current = slot, view
    st.dead |= {node for node in seen.view.listed if _is_own(st, seen.view, node)}
    again = yield from st.ask(Survey(st.op()), Surveyed)
    strangers = tuple(k for k in again.keys if k != key)
    gone = tuple({*view.to_replay, *_all_gone(seen.view)})
    yield from st.do(Fence(st.op(), strangers, tuple(sorted(gone))))
    opened = yield from open_once(st)
    if opened.holder_key != key or opened.view.epoch != view.epoch:
        raise PathGone
    taken = yield from st.ask(Take(st.op(), key), TakeAnswer)
    if not isinstance(taken, Won):
        raise PathGone
    st.holds = True
    yield DropNewcomer(st.op())
    yield from take_office(st, key)


def _all_gone(view: View) -> tuple[NodeId, ...]:
    """Whoever was a member before this node: none of them has been heard for a while."""
    return (*view.listed, *view.to_replay)


def _first_view(st: NodeState, key: int, seen: Surveyed) -> View:
    """Step 5's: this node joins; whoever was listed is gone, and this node replays."""
    before = seen.view
    dead = before.listed
    own = [node.slot for node in dead if _is_own(st, before, node)]
    free = [n for n, slot in enumerate(before.slots) if _is_free(slot)]
    free.sort(key=lambda n: (before.slots[n].node_name != st.identity.node_name, n))
    waiting = [node.slot for node in before.to_replay]
    usable = [
        n
        for n in (*free, *own, *waiting, *(node.slot for node in dead))
        if before.slots[n].incarnation < MAX_INCARNATION
    ]
    if not usable:
        raise Stopped(StopReason.REFUSED, "every slot has used up its incarnation numbers")
    slot = usable[0]
    request = JoinRequest(
        slot,
        key,
        0,
        st.identity.node_name,
        st.identity.machine_id,
        st.identity.boot_id,
        st.identity.fingerprint,
        st.identity.addresses,
    )
    incarnation = next_incarnation(before, slot, seen.keys, st.keys)
    slots = {node.slot: _gone(before.slots[node.slot]) for node in dead if node.slot != slot}
    slots[slot] = joining_slot(request, incarnation, before.slots[slot])
    after = before.next(key, slots, st.wall_ns)
    return after.with_replayers(assign(after, (slot,)))


def _gone(entry: ViewSlot) -> ViewSlot:
    return replace(entry, state=SlotState.NEEDS_REPLAY)
