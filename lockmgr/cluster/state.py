"""All that one node believes about the cluster, and how its procedures do I/O.

Theory. A procedure is a generator that reads as its list of steps: it yields the I/O that it wants
(`IoEffect`) or that it waits (`Pause`), and is sent the outcome. A node runs one at a time on its
control session; heartbeats and block reads go on beside it. Whatever is not `Good`, and every loss
of the session while a procedure waits, ends it with `PathGone`: nobody continues on an assumption,
the next procedure opens a new session and looks first.

invariants (`check`):
- a node is coordinator only with an open control session whose key the installed view names as
  holder, and only after it has read the view under that reservation;
- the installed view lists this node, and its epoch never goes back;
- ``current``, what the LUN has as far as a holder knows, is not older than the installed view;
- the key of the open control session is not among those whose paths are lost, and what was said to
  be ready has nothing unproven behind it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from lockmgr.cluster.admission import Admissions
from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag, Identity
from lockmgr.cluster.effects import Effect, IoEffect, SendTo, StopReason
from lockmgr.cluster.judge import BlockWatch, Judge
from lockmgr.cluster.lease import Lease, LeasesGiven
from lockmgr.cluster.links import Links
from lockmgr.cluster.messages import Message, TakeOver
from lockmgr.cluster.outcomes import Good, Outcome
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import Keys, NodeId, View

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait until then, or until something happens that may change the plan."""

    until: float


Steps = Generator[IoEffect | Pause, Outcome, T]


class PathGone(Exception):
    """The session is lost, with whatever it was doing."""


class Stopped(Exception):
    """This incarnation is over."""

    def __init__(self, reason: StopReason, words: str) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words


@dataclass(slots=True)
class NodeState:
    """See the module's docstring. Times are of this node's clock."""

    identity: Identity
    settings: Settings
    keys: Keys
    rng: Random
    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)
    last_op: int = 0

    # -- the own paths ---------------------------------------------------------------------
    own_keys: set[int] = field(default_factory=set)
    """Every newcomer's and control key of this process, ever."""
    session: int = 0
    """Grows whenever the session that procedures use is lost or replaced."""
    path_key: int = 0
    """Of the open control session; 0: there is none."""
    lost_at: float = float("-inf")
    opened_at: float = 0.0
    holds: bool = False
    """The last word of the target: the control session's key holds."""
    may_write: bool = False
    """The view was read on this session under a reservation."""
    unproven: dict[int, None] = field(default_factory=dict)
    """Keys of lost paths of which something may still come, the oldest first."""
    lost_keys: set[int] = field(default_factory=set)
    """Of every own path that was ever lost."""
    unnamed: set[int] = field(default_factory=set)
    """Control sessions' keys that are lost, and that no `PathLost` has named yet."""
    ready_key: int = 0
    """The last that `PathsReady` was said of."""
    asked_to_fence: tuple[NodeId, tuple[int, ...]] | None = None
    """Who was asked since the last tick, and for what."""
    generation: int = 0
    """The greatest PRGENERATION since the target's last restart."""

    # -- membership ------------------------------------------------------------------------
    me: NodeId | None = None
    view: View | None = None
    """The installed one."""
    current: View | None = None
    """The one on the LUN, as this node read or wrote it last."""
    judge: Judge | None = None
    links: Links = field(init=False)
    watch: BlockWatch = field(default_factory=BlockWatch)
    best: frozenset[NodeId] = frozenset()
    """The judge's verdict at the last tick."""
    lease: Lease = field(init=False)
    given: LeasesGiven = field(init=False)

    # -- what others are to be told until the view shows it ----------------------------------
    dead: set[NodeId] = field(default_factory=set)
    asked: dict[NodeId, str] = field(default_factory=dict)
    replayed_here: set[NodeId] = field(default_factory=set)
    replaying: set[NodeId] = field(default_factory=set)
    journal_ready: bool = False
    awaiting_clearance: set[NodeId] = field(default_factory=set)
    """Departed that this node was told of, and that may not be granted yet."""

    # -- the coordinator's books -------------------------------------------------------------
    condemned: set[NodeId] = field(default_factory=set)
    leavers: dict[NodeId, bool] = field(default_factory=dict)
    ready: set[NodeId] = field(default_factory=set)
    replay_done: set[NodeId] = field(default_factory=set)
    over_at: dict[NodeId, float] = field(default_factory=dict)
    cleared: set[NodeId] = field(default_factory=set)
    lagging: set[NodeId] = field(default_factory=set)
    to_fence: dict[NodeId, tuple[int, ...]] = field(default_factory=dict)
    """Keys of their own that members want fenced."""
    fenced_for: dict[NodeId, frozenset[int]] = field(default_factory=dict)
    """Those that this node has fenced on request."""
    admissions: Admissions = field(init=False)
    thawed: int = -1

    # -- succession ------------------------------------------------------------------------
    named: TakeOver | None = None
    named_at: float = float("-inf")
    told_holding: bool = False
    backoff_until: float = float("-inf")
    try_at: float = float("-inf")
    watched: tuple[int, int] = (0, 0)
    """Holder key and epoch at the last survey of a holder that should not be."""
    watched_since: float = float("-inf")
    slept_at: float = float("-inf")
    suspected_since: float = float("inf")
    """Since when the coordinator has been outside the verdict, and this node inside."""

    leaving_since: float | None = None
    unregistered: bool | None = None
    """The leaver's keys are gone, and its journal is in order (True), or may not be (False)."""
    path_back: bool = False
    hurry_until: float = float("-inf")
    """Until then this node ticks faster, because somebody joins."""

    def __post_init__(self) -> None:
        self.lease = Lease(self.settings)
        self.links = Links(self.settings)
        self.given = LeasesGiven(self.settings)
        self.admissions = Admissions(self.settings)

    # -- reading ---------------------------------------------------------------------------
    @property
    def wall_ns(self) -> int:
        return self.identity.wall_offset_ns + int(self.now * 1e9)

    @property
    def known(self) -> View | None:
        """The view to go by: the installed one; before there is one, what was read last."""
        return self.view or self.current

    @property
    def coordinator(self) -> NodeId | None:
        """Whom the view to go by names as holder; None if that is no listed node."""
        view = self.known
        if view is None:
            return None
        owner = self.keys.owner(view.holder_key)
        return owner if owner is not None and view.lists(*owner) else None

    @property
    def in_office(self) -> bool:
        """Whether this node is the coordinator, and may act as one as far as it knows."""
        return (
            self.view is not None
            and self.path_key != 0
            and self.may_write
            and self.view.holder_key == self.path_key
        )

    def heartbeat(self, sequence: int) -> Heartbeat:
        assert self.me is not None and self.judge is not None
        flags = HeartbeatFlag.NONE
        if self.path_key and self.may_write:
            flags |= HeartbeatFlag.HAS_DIRECT_PATH
        if self.leaving_since is not None:
            flags |= HeartbeatFlag.LEAVING
        epoch = self.view.epoch if self.view is not None else 0
        hears = self.judge.hears(self.now)
        return Heartbeat(self.me.slot, self.me.incarnation, sequence, epoch, hears, flags)

    # -- doing -----------------------------------------------------------------------------
    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def hurry(self) -> None:
        """Somebody joins."""
        self.hurry_until = self.now + self.settings.hurry_for_s

    def send(self, peer: NodeId, message: Message) -> None:
        self.emit(SendTo(peer, message))

    def op(self) -> int:
        """A number for the next I/O."""
        self.last_op += 1
        return self.last_op

    def lose_path(self) -> None:
        """The session that procedures use is gone."""
        self.session += 1
        if self.path_key:
            self.lost_keys.add(self.path_key)
            self.unproven[self.path_key] = None
            self.unnamed.add(self.path_key)
            self.lost_at = self.now
        self.path_key = 0
        self.holds = self.may_write = False
        self.given.lost_office()

    def ask(self, effect: IoEffect, kind: type[T]) -> Steps[T]:
        """Carry out an I/O that answers with a ``kind``. Raises `PathGone`."""
        outcome = yield from self._wait(effect)
        if isinstance(outcome, Good) and isinstance(outcome.value, kind):
            return outcome.value
        raise PathGone

    def do(self, effect: IoEffect) -> Steps[None]:
        """Carry out an I/O that answers with nothing. Raises `PathGone`."""
        if not isinstance((yield from self._wait(effect)), Good):
            raise PathGone

    def rest(self, seconds: float) -> Steps[None]:
        """Wait so long, whatever happens. Raises `PathGone`."""
        until = self.now + seconds
        while self.now < until:
            yield from self._wait(Pause(until))

    def _wait(self, what: IoEffect | Pause) -> Generator[IoEffect | Pause, Outcome, Outcome]:
        session = self.session
        outcome = yield what
        if self.session != session:
            raise PathGone
        return outcome

    # -- invariants ------------------------------------------------------------------------
    def check(self) -> None:
        """Assert the invariants."""
        if self.view is not None:
            assert self.me is not None and self.view.lists(*self.me)
            assert self.current is not None and self.current.epoch >= self.view.epoch
        if self.in_office:
            assert self.holds and self.path_key in self.own_keys
            assert self.coordinator == self.me
        assert not self.holds or self.path_key
        assert self.path_key not in self.lost_keys
        assert self.lost_keys.issuperset(self.unproven)
        assert not self.path_key or self.ready_key != self.path_key or not self.unproven
        assert not self.may_write or self.path_key
        if self.judge is not None:
            self.judge.check(self.now)
