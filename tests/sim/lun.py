"""A LUN in simulated time: its target, the sessions with it, and the ways between.

The way of a command: it leaves the host (`Session.submit`), travels, is admitted or refused by
`redirector.block.arbiter.Arbiter`, *lands* (does what it does) at once or much later, and its
answer travels back. What was measured on a real target (FACTS) holds here:

- PREEMPT does not wait for what was admitted; LOGICAL UNIT RESET answers when all that was
  admitted before it has landed, a closed session's commands too, and every nexus hears 2900;
- a big read has ended only when its host took the answer, so one that does not read (frozen,
  cut off) holds up a reset, until its session is closed: by reinstatement, say;
- of two resets at a time the first is never answered;
- a login with the port of a session replaces it; registrations stay with closed sessions;
- what a host's kernel holds in its socket while the way is cut may arrive when it heals, though
  the program has long given the session up;
- a restart forgets sessions, registrations and reservation; of what was on its way a part lands.

`tests.sim.target` gives this the faces that `redirector.block.reservations` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from redirector.block.arbiter import PR_OUT_OPS, Arbiter, Op
from redirector.block.device import (
    BlockError,
    InitiatorPort,
    OutcomeUnknown,
    Unreachable,
)
from tests.sim.world import Process, Resume, Wish, World

T = TypeVar("T")

ANSWER_LIMIT_S = 2.0
"""No answer of a session for so long, and its host gives it up (DESIGN section 7)."""
LOGIN_LIMIT_S = 1.0
_TRAVEL_S = 0.0002
_PR_OPS = PR_OUT_OPS | {Op.READ_KEYS, Op.READ_RESERVATION, Op.TEST_UNIT_READY}


@dataclass(eq=False)
class SanLink:
    """The way between one host and the target, each direction for itself."""

    host: str
    cut_out: bool = False
    """What the host sends does not arrive."""
    cut_in: bool = False
    sessions: list[Session] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.cut_out and not self.cut_in


@dataclass(eq=False, slots=True)
class Command(Generic[T]):
    """Something asked of the target."""

    session: Session
    op: Op
    apply: Callable[[], T]
    resume: Resume
    words: str
    big: bool
    since: float
    process: Process
    """That reads the answer."""
    answered: bool = False
    holder: int = 0
    """The key that held when it was admitted, if it writes the view."""

    @property
    def is_view(self) -> bool:
        """Does it write the view?"""
        return self.words.startswith("view ")


class Session:
    """One I_T nexus: what its host and the target each know of it."""

    def __init__(
        self, lun: SimLun, nexus: int, process: Process, link: SanLink, port: InitiatorPort
    ) -> None:
        self.lun = lun
        self.nexus = nexus
        self.process = process
        self.link = link
        self.port = port
        self.here = True
        """Its host may use it."""
        self.there = True
        """The target has it."""
        self.key = 0
        """What it registered last."""
        self.on_lost: Callable[[], None] | None = None
        self.told_elsewhere: list[BlockError] = []
        """Unit attentions that another reader was told; the next questions are."""
        self.outstanding: dict[Command[Any], None] = {}
        self._last_arrival = 0.0
        self._last_answer = 0.0
        self._stalled_out: list[Command[Any]] = []
        self._stalled_in: list[tuple[Command[Any], object]] = []
        self._watched = False

    # -- at the host -----------------------------------------------------------------------
    def submit(
        self,
        op: Op,
        apply: Callable[[], T],
        resume: Resume,
        words: str = "",
        *,
        big: bool = False,
        process: Process | None = None,
    ) -> None:
        """Send a command; ``resume`` gets its answer, or the exception that it ended with.
        ``process`` reads the answer, if it is not the one that logged in."""
        world = self.lun.world
        if not self.here:
            world.after(0.0, resume, OutcomeUnknown(f"{op}: the session is gone"))
            return
        reader = process or self.process
        command = Command(self, op, apply, resume, words, big, world.now, reader)
        self.outstanding[command] = None
        if self.link.cut_out or self._stalled_out:
            self._stalled_out.append(command)
        else:
            self._travel(command)
        if not self._watched:
            self._watched = True
            world.after(ANSWER_LIMIT_S, self.process.deliver, self._watch)

    def ask(self, op: Op, apply: Callable[[], T], words: str = "", *, big: bool = False) -> Wish[T]:
        """The same, for coroutines. Raises what the target refuses with, and `OutcomeUnknown`."""
        if self.told_elsewhere:
            told = self.told_elsewhere.pop(0)
            return Wish(lambda resume: self.lun.world.after(0.0, resume, told))
        return Wish(lambda resume: self.submit(op, apply, resume, words, big=big))

    def _watch(self) -> None:
        """2 s without an answer, though the target would answer if it could, are a loss."""
        self._watched = False
        if not self.here or not self.outstanding:
            return
        oldest = next(iter(self.outstanding))
        world = self.lun.world
        waited_s = world.now - oldest.since
        if waited_s >= ANSWER_LIMIT_S - 0.001 and not (self.link.whole and self.there):
            self.lose("no answer for 2 s")
            return
        self._watched = True
        next_s = ANSWER_LIMIT_S - waited_s if waited_s < ANSWER_LIMIT_S - 0.001 else 0.5
        world.after(max(0.05, next_s), self.process.deliver, self._watch)

    def lose(self, why: str) -> None:
        """Give the session up: every outcome that is not known will not be known."""
        if not self.here:
            return
        world = self.lun.world
        if world.tracing:
            world.trace(self.process.name, f"session {self} is lost: {why}")
        self._leave()
        outstanding = list(self.outstanding)
        self.outstanding.clear()
        if self.on_lost is not None:
            self.on_lost()
        for command in outstanding:
            command.resume(OutcomeUnknown(f"{command.op}: {why}"))

    def close(self) -> None:
        """Log out; nothing is outstanding, or nobody cares."""
        self.on_lost = None
        self.lose("closed here")

    def _leave(self) -> None:
        self.here = False
        if self.there and not self.link.cut_out:
            self.lun.world.after(_TRAVEL_S * 2, self.lun.end_session, self)
        elif self._stalled_out and self.lun.world.chance(0.5):
            self._stalled_out.clear()

    def orphan(self, *, power_off: bool) -> None:
        """The process is no more; its kernel (if there is one) still sends what it was given."""
        if not self.here:
            return
        self.on_lost = None
        if power_off:
            self.here = False
            self._stalled_out.clear()
        else:
            self._leave()
        self.outstanding.clear()

    # -- on the way ------------------------------------------------------------------------
    def _travel(self, command: Command[Any]) -> None:
        world = self.lun.world
        when = world.now + _TRAVEL_S * (0.5 + world.rng.random())
        self._last_arrival = when = max(when, self._last_arrival)
        world.at(when, self.lun.arrive, command)

    def answer(self, command: Command[Any], result: object) -> None:
        """The target answers."""
        if not self.there:
            self.lun.taken(command)
            return
        if self.link.cut_in or self._stalled_in:
            self._stalled_in.append((command, result))
            return
        world = self.lun.world
        when = world.now + _TRAVEL_S * (0.5 + world.rng.random())
        self._last_answer = when = max(when, self._last_answer)
        world.at(when, self._answered, command, result)

    def _answered(self, command: Command[Any], result: object) -> None:
        if self.here and self.process.alive:
            # A frozen host takes it when it reads again; until then the target keeps a big one.
            command.process.deliver(self._take, command, result)
        else:
            self.lun.taken(command)

    def _take(self, command: Command[Any], result: object) -> None:
        self.lun.taken(command)
        if command in self.outstanding:
            del self.outstanding[command]
            command.resume(result)

    def healed(self) -> None:
        """The way is whole again, in one direction at least."""
        if not self.link.cut_out:
            stalled_out, self._stalled_out = self._stalled_out, []
            for command in stalled_out:
                self._travel(command)
            if not self.here and self.there:
                self.lun.world.after(_TRAVEL_S * 3, self.lun.end_session, self)
        if not self.link.cut_in:
            stalled_in, self._stalled_in = self._stalled_in, []
            for command, result in stalled_in:
                self.answer(command, result)
            if self.here and not self.there:
                self.lun.world.after(_TRAVEL_S, self.process.deliver, self.lose, "reset by peer")

    def __str__(self) -> str:
        return f"{self.nexus}/{self.port.isid & 0xFFFF:x}"


@dataclass(eq=False)
class _Reset:
    waits_for: dict[Command[Any], None]
    resume: Resume
    link: SanLink


class SimLun:
    """The target and its one LUN. What stands on it, `tests.sim.content` knows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.arbiter = Arbiter()
        self.sessions: dict[int, Session] = {}
        """Those that the target has, by nexus."""
        self.up = True
        self.restarts = 0
        self.slow_until = 0.0
        self.late_chance = 0.0
        """How likely an admitted write, or big read, lands late: a fence has something to drain."""
        self.late_s = 1.0
        self.on_landing: Callable[[Command[Any]], None] = lambda _command: None
        """Called just before a command does something."""
        self.drains = 0
        self.slow_drains = 0
        self._on_its_way: dict[Command[Any], None] = {}
        self._reset: _Reset | None = None
        self._nexus = 0

    # -- sessions --------------------------------------------------------------------------
    def login(self, process: Process, link: SanLink, port: InitiatorPort, resume: Resume) -> None:
        """Log in; ``resume`` gets a `Session` or `LoginFailed`."""
        if link.cut_out:
            self.world.after(LOGIN_LIMIT_S, resume, Unreachable("no answer to the login"))
        else:
            self.world.after(_TRAVEL_S * 2, self._login, process, link, port, resume)

    def _login(self, process: Process, link: SanLink, port: InitiatorPort, resume: Resume) -> None:
        if not self.up:
            self.world.after(_TRAVEL_S, resume, Unreachable("connection refused"))
            return
        for old in list(self.sessions.values()):
            if old.port == port:
                self.end_session(old)
        self._nexus += 1
        session = Session(self, self._nexus, process, link, port)
        self.sessions[session.nexus] = session
        link.sessions.append(session)
        self.arbiter.open(session.nexus)
        if link.cut_in:
            session.here = False
            self.world.after(LOGIN_LIMIT_S, resume, Unreachable("no answer to the login"))
        elif not process.alive:
            self.end_session(session)
        else:
            self.world.after(_TRAVEL_S * 2, resume, session)

    def end_session(self, session: Session) -> None:
        """The target closes it; what it had admitted still lands."""
        if not session.there:
            return
        session.there = False
        self.sessions.pop(session.nexus, None)
        self.arbiter.close(session.nexus)
        for command in [c for c in self._on_its_way if c.session is session and c.answered]:
            self.taken(command)
        if session.here and not session.link.cut_in:
            self.world.after(_TRAVEL_S, session.process.deliver, session.lose, "reset by peer")
        elif not session.here:
            session.link.sessions.remove(session)

    # -- commands --------------------------------------------------------------------------
    def arrive(self, command: Command[Any]) -> None:
        """A command is at the target: admit it or not."""
        session = command.session
        if not session.there:
            return
        try:
            self.arbiter.admit(session.nexus, command.op)
            if command.op in _PR_OPS:
                session.answer(command, self._land(command))
                return
        except BlockError as refusal:
            session.answer(command, refusal)
            return
        if command.is_view:
            command.holder = self.arbiter.read_reservation().key
        delay_s = self._service_s(command)
        self._on_its_way[command] = None
        if delay_s:
            self.world.after(delay_s, self._landed, command)
        else:
            self._landed(command)

    def _service_s(self, command: Command[Any]) -> float:
        rng = self.world.rng
        may_be_late = command.op is Op.WRITE or command.big
        if may_be_late and self.late_chance and rng.random() < self.late_chance:
            return self.late_s * rng.random()
        if self.world.now < self.slow_until:
            return rng.random() * 0.4
        return 0.0

    def _land(self, command: Command[T]) -> T:
        self.on_landing(command)
        return command.apply()

    def _landed(self, command: Command[Any]) -> None:
        if command not in self._on_its_way:
            return  # the target restarted meanwhile
        try:
            result: object = self._land(command)
        except BlockError as refusal:
            result = refusal
        command.answered = True
        if not command.big:
            self.taken(command)
        command.session.answer(command, result)

    def taken(self, command: Command[Any]) -> None:
        """The target has it no longer on its hands."""
        if command in self._on_its_way:
            del self._on_its_way[command]
            reset = self._reset
            if reset is not None and command in reset.waits_for:
                del reset.waits_for[command]
                if not reset.waits_for:
                    self._finish_reset(reset)

    # -- LOGICAL UNIT RESET ----------------------------------------------------------------
    def reset(self, link: SanLink, resume: Resume) -> None:
        """Over an unregistered session of its own; ``resume`` may never be called."""
        if not link.cut_out:
            self.world.after(_TRAVEL_S * 3, self._begin_reset, link, resume)

    def _begin_reset(self, link: SanLink, resume: Resume) -> None:
        if not self.up:
            return
        self.drains += 1
        self._reset = reset = _Reset(dict(self._on_its_way), resume, link)
        if reset.waits_for:
            self.slow_drains += 1
            if self.world.tracing:
                waiting = ", ".join(f"{c.op} of {c.session}" for c in reset.waits_for)
                self.world.trace("target", f"a reset waits for {waiting}")
        else:
            self._finish_reset(reset)

    def _finish_reset(self, reset: _Reset) -> None:
        self._reset = None
        self.arbiter.reset()
        if not reset.link.cut_in:
            self.world.after(_TRAVEL_S, reset.resume, None)

    # -- restart ---------------------------------------------------------------------------
    def stop(self) -> None:
        """The target dies; of what was admitted a part lands."""
        self.up = False
        self.restarts += 1
        self._reset = None
        for command in list(self._on_its_way):
            if not command.answered and self.world.chance(0.5):
                self._land(command)
        self._on_its_way.clear()
        for session in list(self.sessions.values()):
            self.end_session(session)
        self.arbiter.forget()

    def begin(self) -> None:
        """It is back, and remembers nothing of reservations."""
        self.up = True

    # -- cuts ------------------------------------------------------------------------------
    def healed(self, link: SanLink) -> None:
        """Let what was held up go on."""
        for session in list(link.sessions):
            session.healed()
        link.sessions[:] = [s for s in link.sessions if s.here or s.there]
