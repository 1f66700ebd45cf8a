"""One node's membership: a pure state machine from newcomer to the end.

Theory. A step takes one event. Some change what this node believes (`state.NodeState`), some answer
the I/O that a procedure waits for; then the procedure goes on, or the next one is chosen
(`_plan`), and the effects are returned. One procedure runs at a time:

    newcomer.join            until this node is listed
    succession.open_paths    whenever it has no control session
    succession.take_over     when the reservation should change hands, to this node
    coordinator.serve        in office, when the view should change
    proof.fence              in office, when lost paths of members are to be fenced
    leave.*                  when it wants to go

Everything that another node must learn is said again with every tick until the view shows it, so
no message needs an answer, and a lost connection loses nothing.

invariants (`check`): those of `state.NodeState`; and
- every I/O is answered once, and at most one answer is awaited by the procedure;
- after `Stop` there are no effects.
"""

from __future__ import annotations

from random import Random

from lockmgr.cluster import proof
from lockmgr.cluster.beating import Beating
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.coordinator import duties, is_serving, keep_books, refuse, serve
from lockmgr.cluster.effects import DropNewcomer, Effect, Stop, StopReason
from lockmgr.cluster.errors import MembershipError, MembershipViolation
from lockmgr.cluster.events import (
    BeatHeard,
    DeathProven,
    Done,
    Event,
    EvictWanted,
    HeartbeatFailed,
    HeartbeatWritten,
    LeaveWanted,
    LocksThawed,
    PathBack,
    PathLost,
    PeerConnected,
    PeerLost,
    Received,
    Replayed,
    Start,
    StrangerCame,
    Tick,
)
from lockmgr.cluster.hearsay import receive, tell_coordinator
from lockmgr.cluster.leave import (
    is_late,
    leave_as_member,
    name_successor,
    others,
    park,
    stop_late,
)
from lockmgr.cluster.newcomer import join
from lockmgr.cluster.outcomes import Good, Outcome
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.state import NodeState, PathGone, Pause, Steps, Stopped
from lockmgr.cluster.succession import is_due, open_paths, take_over
from lockmgr.cluster.view import Keys, NodeId, View


class Member:
    """The membership of one daemon on one volume, for one incarnation at most."""

    def __init__(self, identity: Identity, settings: Settings, keys: Keys, rng: Random) -> None:
        self.state = NodeState(identity, settings, keys, rng)
        self._beating = Beating(self.state)
        self._life: Steps[None] | None = None
        self._awaits: int | Pause | None = None
        self._stirred = False
        self._outstanding: set[int] = set()
        self._seen_ops = 0
        self._tick_at: float | None = None
        self._ticked_at = self._look_again_at = float("-inf")
        self._last_step: float | None = None
        self.stopped: Stop | None = None

    # -- what others may look at ---------------------------------------------------------------
    @property
    def node(self) -> NodeId | None:
        """Slot and incarnation, once this node is listed."""
        return self.state.me

    @property
    def view(self) -> View | None:
        """The installed view."""
        return self.state.view

    @property
    def is_coordinator(self) -> bool:
        """In office, as far as this node knows; the target has the last word."""
        return self.stopped is None and self.state.in_office

    @property
    def lease_until(self) -> float:
        return self.state.lease.until

    def hears(self, node: NodeId, now: float) -> bool:
        """Whether this node and that one have heard each other of late."""
        judge, me = self.state.judge, self.node
        return judge is not None and me is not None and judge.has_met(node, (me,), now)

    @property
    def heartbeat_key(self) -> int:
        """Of the control session that heartbeats may be written on now; 0: on none."""
        return self._beating.key if self.stopped is None else 0

    def next_timer(self) -> float | None:
        """When the next `Tick` is due; None: before `Start`, and after `Stop`. A procedure that
        pauses is woken by one, though the heartbeat's time has not come."""
        if self.stopped is not None or self._tick_at is None:
            return None
        if isinstance(self._awaits, Pause):
            return min(self._tick_at, self._awaits.until)
        return self._tick_at

    # -- stepping ------------------------------------------------------------------------------
    def step(self, event: Event, now: float) -> list[Effect]:
        """Carry out one event at ``now`` (CLOCK_BOOTTIME, seconds).

        Raises `MembershipViolation` for what no correct shell does.
        """
        st = self.state
        if self._last_step is not None and now < self._last_step:
            raise MembershipViolation(f"the clock went back from {self._last_step} to {now}")
        if self.stopped is not None:
            self._last_step = now
            return []
        st.now = now
        if self._last_step is not None and now - self._last_step >= st.settings.judge_gap_s:
            self._slept()
        self._last_step = now
        try:
            self._take(event)
            self._go_on()
            self._hurry()
            proof.tell(st)
        except Stopped as stopped:
            self._stop(stopped.reason, stopped.words)
        except PathGone as error:
            raise AssertionError("a procedure let its path go") from error
        except MembershipViolation:
            raise
        except MembershipError as error:
            self._stop(StopReason.CANNOT_GO_ON, str(error))
        effects, st.effects = st.effects, []
        self._register(effects)
        return effects

    def _slept(self) -> None:
        """Nothing that this node did not see is anybody's silence."""
        st = self.state
        st.slept_at = st.now
        if st.judge is not None:
            st.judge.restart(st.now)
            st.best = st.judge.verdict(st.now, direct=bool(st.path_key))
        st.admissions.forget()
        st.named = None
        st.suspected_since = float("inf")

    def _register(self, effects: list[Effect]) -> None:
        for effect in effects:
            op = getattr(effect, "op", None)
            if isinstance(op, int):
                self._outstanding.add(op)

    def _stop(self, reason: StopReason, words: str) -> None:
        self.stopped = Stop(reason, words)
        self.state.emit(self.stopped)
        self._life = None
        self._awaits = None

    # -- events --------------------------------------------------------------------------------
    def _take(self, event: Event) -> None:
        st = self.state
        match event:
            case Done(op, outcome):
                self._done(op, outcome)
            case BeatHeard(beat):
                self._beating.heard(beat)
                if st.now >= st.hurry_until:
                    return
            case HeartbeatWritten(key, sent_at):
                self._beating.written(key, sent_at)
            case HeartbeatFailed(key):
                self._beating.failed(key)
            case Tick():
                self._tick()
            case Start():
                if self._tick_at is not None:
                    raise MembershipViolation("started twice")
                self._tick_at = st.now + st.rng.random() * st.settings.heartbeat_s
            case Received(peer, message):
                receive(st, self._beating, peer, message)
            case PathLost(keys):
                self._path_lost(keys)
            case PathBack():
                st.path_back = True
            case StrangerCame():
                self._look_soon()
            case PeerConnected(peer):
                st.links.connected(peer)
                if is_serving(st):
                    st.lagging.add(peer)
                    keep_books(st)
            case PeerLost(peer):
                st.links.lost(peer, st.now)
            case DeathProven(node):
                if node != st.me:
                    st.dead.add(node)
                tell_coordinator(self.state)
            case EvictWanted(node, why):
                st.asked[node] = why
                tell_coordinator(self.state)
            case Replayed(node):
                if node == st.me:
                    st.journal_ready = True
                else:
                    st.replayed_here.add(node)
                tell_coordinator(self.state)
            case LocksThawed(lock_epoch):
                st.thawed = max(st.thawed, lock_epoch)
                tell_coordinator(self.state)
            case LeaveWanted():
                if st.leaving_since is None:
                    st.leaving_since = st.now
        self._stirred = True

    def _path_lost(self, keys: tuple[int, ...]) -> None:
        st = self.state
        if st.me is None or st.path_key in keys:
            st.lose_path()
        # Else it is of paths that this node knows are lost, or that were not opened to the end.
        elif proof.is_news(st, keys) and st.path_key:
            st.lose_path()  # new paths may have been said to be ready too early
        proof.lost(st, keys)

    def _done(self, op: int, outcome: Outcome) -> None:
        if op not in self._outstanding:
            raise MembershipViolation(f"an answer to {op}, which is not awaited")
        self._outstanding.discard(op)
        if self._beating.done(op, outcome):
            return
        if self._awaits == op:
            self._resume(outcome)

    def _tick(self) -> None:
        st = self.state
        assert self._tick_at is not None
        if st.now < self._tick_at:
            return
        hurries = st.now < st.hurry_until
        self._ticked_at = st.now
        self._tick_at = st.now + (st.settings.hurry_s if hurries else st.settings.heartbeat_s)
        self._beating.tick()
        if is_late(st):
            raise stop_late()
        self._suspect()
        st.asked_to_fence = None
        keep_books(st)
        refuse(st)
        name_successor(st)
        tell_coordinator(self.state)

    def _hurry(self) -> None:
        """Who joins need not wait for the next heartbeat that was due at the usual pace."""
        st = self.state
        if self._tick_at is not None and st.now < st.hurry_until:
            self._tick_at = min(self._tick_at, st.now + st.settings.hurry_s)

    def _look_soon(self) -> None:
        """Whoever waits to be admitted need not wait for the next tick. Strangers may come in
        masses: they cause one tick more in the time of a heartbeat."""
        st = self.state
        if self._tick_at is None or not is_serving(st) or st.now < self._look_again_at:
            return
        self._look_again_at = st.now + st.settings.heartbeat_s
        self._tick_at = min(self._tick_at, max(st.now, self._ticked_at + st.settings.hurry_s))

    def _suspect(self) -> None:
        st = self.state
        inside = st.me in st.best
        if st.path_key and inside and st.coordinator not in (None, st.me, *st.best):
            st.suspected_since = min(st.suspected_since, st.now)
        else:
            st.suspected_since = float("inf")

    # -- procedures ----------------------------------------------------------------------------
    def _go_on(self) -> None:
        """Wake a procedure whose time has come; choose the next one when there is none."""
        if self._tick_at is None:
            return
        due = isinstance(self._awaits, Pause) and self.state.now >= self._awaits.until
        if not self._stirred and not due:
            return
        self._stirred = False
        if isinstance(self._awaits, Pause):
            self._resume(Good())
        for _ in range(_PROCEDURES_A_STEP):
            if self._life is not None:
                return
            self._life = self._plan()
            if self._life is None:
                return
            self._resume(None)

    def _resume(self, outcome: Outcome | None) -> None:
        assert self._life is not None
        self._awaits = None
        try:
            wanted = next(self._life) if outcome is None else self._life.send(outcome)
        except StopIteration:
            self._life = None
            return
        except PathGone:
            self._life = None
            if self.state.path_key or self.state.me is None:
                self.state.lose_path()
            return
        if isinstance(wanted, Pause):
            self._awaits = wanted
        else:
            self._awaits = wanted.op
            self.state.emit(wanted)

    def _plan(self) -> Steps[None] | None:
        """The next procedure; None: nothing to do."""
        st = self.state
        leaving = st.leaving_since is not None
        if st.me is None:
            if leaving:
                st.emit(DropNewcomer(st.op()))
                raise Stopped(StopReason.LEFT, "the node has left before it had joined")
            return join(st)
        if st.unregistered is not None:
            return None
        if leaving and st.coordinator != st.me:
            return leave_as_member(st)
        if not st.path_key:
            return open_paths(st)
        if not st.may_write or not st.in_office:
            return take_over(st) if is_due(st) else None
        if not is_serving(st) or st.current is None:
            return None
        if leaving and not others(st, st.current):
            return park(st)
        changes = duties(st, st.current)
        if changes:
            return serve(st, changes)
        return proof.fence(st) if proof.is_due(st) else None

    # -- invariants ----------------------------------------------------------------------------
    def check(self) -> None:
        """Assert the invariants."""
        if self.stopped is not None:
            assert self._life is None
            assert not self.state.effects
            return
        self.state.check()
        assert (self._awaits is None) == (self._life is None)
        if isinstance(self._awaits, int):
            assert self._awaits in self._outstanding


_PROCEDURES_A_STEP = 4
"""A procedure that ends without I/O is followed by the next at once; more often than this in one
step would be a loop, and the next tick goes on."""
