"""What to do next when a path was lost: the decisions, without I/O.

Theory. `Recovery` is a set of facts about this node's two sessions. Events change the facts
(`lost`, `opened`, `took`, ...), and `next_step` reads off the one thing to be done next, always
in the order that makes the facts safe (REDIRECTION.md has the timelines):

    OPEN control -> TAKE the reservation -> OPEN data -> PREEMPT old keys -> DRAIN
        -> VIEW on each new session -> REISSUE what the target forgot -> ANNOUNCE -> DONE

Nothing is remembered of "where we were": an event in the middle, such as the loss of the session
that was just opened, changes the facts, and the next step follows from them again. A step that ends
after such an event has proved nothing, and is ignored (`Step.at`).

invariants (`check`):
  1. a generation is given once; keys of lost sessions stay in ``unfenced`` until preempted
  2. ``undrained`` from the loss of a session until a reset that was issued after its key was gone
  3. a session counts as viewed only if its view was read after its REGISTER, under our reservation
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import Enum

from redirector.block.keys import PathKey


class Kind(Enum):
    """The two sessions of a node."""

    CONTROL = "control"
    DATA = "data"


class Do(Enum):
    """One step of a recovery."""

    OPEN = "log in and register"
    TAKE = "take the reservation"
    PREEMPT = "preempt the key of a lost session"
    DRAIN = "reset the LUN"
    VIEW = "read the view"
    REISSUE = "write again what the target forgot"
    ANNOUNCE = "tell the owner of the view"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, and to what."""

    do: Do
    kind: Kind | None = None
    key: int = 0
    at: int = field(default=0, compare=False)
    """How many losses there had been when it was decided."""

    def __str__(self) -> str:
        return self.do.value + (f" ({self.kind.value} session)" if self.kind else "")


@dataclass(slots=True)
class Recovery:
    """The facts. ``newest`` is the last generation given."""

    newest: PathKey
    live: dict[Kind, int] = field(default_factory=dict)
    """Registered sessions: kind to key."""
    holding: bool = False
    unfenced: list[int] = field(default_factory=list)
    """Keys of lost sessions that may still be registered."""
    undrained: bool = False
    viewed: set[Kind] = field(default_factory=set)
    restarted: bool = False
    """The target forgot its registrations, and perhaps what was not flushed."""
    losses: int = 0
    """Counts what makes the end of an earlier step worthless: it may have happened in between."""
    announced: bool = True
    """The owner of the view knows these sessions."""
    _were_live: set[int] = field(default_factory=set)
    """Keys that were certainly registered once, and not preempted since."""
    _spare: PathKey | None = None
    """A generation that was given but whose REGISTER was never sent."""

    @classmethod
    def of(cls, control_key: int, data_key: int) -> Recovery:
        """A node whose control session holds, and whose sessions are both good."""
        paths = [PathKey.parse(key) for key in (control_key, data_key)]
        known = [path for path in paths if path is not None]
        if len(known) != 2 or not known[0].is_of(known[1].slot, known[1].incarnation):
            raise ValueError("control and data session have keys of one incarnation")
        return cls(
            newest=max(known),
            live={Kind.CONTROL: control_key, Kind.DATA: data_key},
            holding=True,
            viewed=set(Kind),
            _were_live={control_key, data_key},
        )

    # -- deciding ----------------------------------------------------------------------------
    def next_step(self) -> Step:
        """What to do now; the same until an event changes a fact."""
        do, kind, key = self._next()
        return Step(do, kind, key, self.losses)

    def _next(self) -> tuple[Do, Kind | None, int]:
        if Kind.CONTROL not in self.live:
            return Do.OPEN, Kind.CONTROL, 0
        if not self.holding:
            return Do.TAKE, Kind.CONTROL, 0
        if Kind.DATA not in self.live:
            return Do.OPEN, Kind.DATA, 0
        if self.unfenced:
            return Do.PREEMPT, Kind.CONTROL, self.unfenced[0]
        if self.undrained:
            return Do.DRAIN, Kind.CONTROL, 0
        for kind in Kind:
            if kind not in self.viewed:
                return Do.VIEW, kind, 0
        if self.restarted:
            return Do.REISSUE, Kind.DATA, 0
        if not self.announced:
            return Do.ANNOUNCE, Kind.CONTROL, 0
        return Do.DONE, None, 0

    @property
    def data_flows(self) -> bool:
        """Whether commands may be issued on the data session: nothing of it is in doubt.

        While only the control session is renewed they may.
        """
        return Kind.DATA in self.live and Kind.DATA in self.viewed and not self.restarted

    def is_own(self, key: int) -> bool:
        """Whether a key is of this incarnation."""
        path = PathKey.parse(key)
        return path is not None and path.is_of(self.newest.slot, self.newest.incarnation)

    def misses_keys(self, keys: Container[int]) -> bool:
        """READ KEYS, before a session is registered, lacks a key of a lost session that nobody here
        preempted: the target forgot. (Or somebody else preempted it: then the view decides, and
        repeating writes does no harm.)
        """
        return any(key not in keys for key in self.unfenced if key in self._were_live)

    # -- events ------------------------------------------------------------------------------
    def take_generation(self) -> PathKey:
        """The generation for the next REGISTER. Raises `KeysExhausted`."""
        if self._spare is None:
            self._spare = self.newest = self.newest.next()
        return self._spare

    def registering(self) -> None:
        """Its REGISTER is being sent: whatever the outcome, nobody uses that generation again."""
        assert self._spare is not None
        self.unfenced.append(self._spare.pack())
        self._spare = None

    def opened(self, kind: Kind, key: int) -> None:
        """That session is registered."""
        self.unfenced.remove(key)
        self.live[kind] = key
        self._were_live.add(key)
        self.viewed.discard(kind)
        self.announced = False

    def lost(self, kind: Kind) -> None:
        """That session is lost or its registration gone; idempotent."""
        key = self.live.pop(kind, None)
        if key is None:
            return
        self.losses += 1
        self.unfenced.append(key)
        self.undrained = True
        self.viewed.discard(kind)
        if kind is Kind.CONTROL:
            self.holding = False

    def took(self, step: Step) -> None:
        """The control session holds now."""
        if step.at == self.losses:
            self.holding = True
            self.announced = False

    def forgot(self) -> None:
        """The target lost its registrations. Both sessions are to be given up before: what a view
        read before said counts no more, and nothing old may be on its way when writes are repeated.
        """
        self.losses += 1
        self.restarted = True
        self.viewed.clear()

    def preempted(self, key: int) -> None:
        """That key is registered no more."""
        self._were_live.discard(key)
        if key in self.unfenced:
            self.unfenced.remove(key)

    def disturbed(self) -> None:
        """A stranger's RESERVE(6) is in the way: a reset releases it."""
        self.undrained = True

    def drained(self, step: Step, keys: Iterable[int]) -> None:
        """The reset was answered; ``keys`` are those registered since. An own one among them, of no
        live session, comes from a REGISTER that was on its way when its session was lost: nothing
        else was sent there, but it has to go.
        """
        if step.at == self.losses:
            self.undrained = False
            own = {key for key in keys if self.is_own(key)}
            self.unfenced += sorted(own - set(self.live.values()))

    def saw_view(self, step: Step) -> None:
        """The view, read on that session, lists us."""
        if step.at == self.losses and step.kind is not None:
            self.viewed.add(step.kind)

    def reissued(self, step: Step) -> None:
        """What the target had forgotten is stable."""
        if step.at == self.losses:
            self.restarted = False

    def told(self, step: Step) -> None:
        """The owner of the view knows the sessions."""
        if step.at == self.losses:
            self.announced = True

    def check(self) -> None:
        """Assert the invariants."""
        assert len(set(self.unfenced)) == len(self.unfenced)
        assert not set(self.unfenced) & set(self.live.values())
        assert all(self.is_own(key) for key in (*self.unfenced, *self.live.values()))
        assert self.viewed <= set(self.live)
        assert not self.holding or Kind.CONTROL in self.live
