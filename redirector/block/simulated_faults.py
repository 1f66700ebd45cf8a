"""What can be told to a simulated target to do wrong, and the handles to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import trio

from redirector.block.arbiter import ArbiterHabits, Op
from redirector.block.device import BlockError, InitiatorPort


@dataclass(frozen=True, slots=True)
class Faults:
    """How this target departs from a good one, for as long as it exists."""

    arbiter: ArbiterHabits = field(default_factory=ArbiterHabits)
    reinstatement_keeps_old: bool = False
    """A login with the port of a living session leaves that session alive."""
    registrations_follow_port: bool = False
    """A registration belongs to the initiator port, and is there again after its next login."""
    reset_does_not_drain: bool = False
    """LOGICAL UNIT RESET is answered while earlier commands are still on their way."""
    reset_aborts: bool = False
    """A reset answers TASK ABORTED to commands on their way instead of letting them land."""


TGT = Faults(ArbiterHabits(leaks=frozenset({Op.UNMAP, Op.WRITE_SAME})))
"""tgt 1.0.85, as measured."""


@dataclass(eq=False, slots=True)
class Command:
    """A command on its way; what `hold` and `inject` match on."""

    nexus: int
    port: InitiatorPort
    op: Op
    land: Callable[[], object]
    offset_bytes: int = 0
    length_bytes: int = 0
    data: bytes = b""
    fua: bool = False
    answer: object = None
    error: BlockError | None = None
    ended: trio.Event | None = field(default=None, repr=False)


Match = Callable[[Command], bool]


class Floor(Protocol):
    """What a `Hold` needs of the target."""

    holds: list[Hold]

    def land_parked(self, command: Command) -> None: ...
    def forget_parked(self, command: Command) -> None: ...
    def lose(self, nexus: int) -> None: ...


class Hold:
    """Parks matching commands between arrival and landing, until it is lifted."""

    def __init__(self, floor: Floor, match: Match, limit: int | None) -> None:
        self._floor = floor
        self._match = match
        self._left = limit
        self._arrived = trio.Event()
        self.commands: list[Command] = []
        """The parked ones, in order of arrival."""

    def takes(self, command: Command) -> bool:
        """Whether this hold parks ``command``."""
        if self._left == 0 or not self._match(command):
            return False
        if self._left is not None:
            self._left -= 1
        self.commands.append(command)
        self._arrived.set()
        return True

    async def wait_held(self, commands: int = 1) -> None:
        """Return when so many commands are parked."""
        while len(self.commands) < commands:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def land(self, command: Command | None = None) -> None:
        """Let one command (default: the first) take effect, and be answered if its nexus lives."""
        self._floor.land_parked(command or self.commands[0])

    def drop(self, command: Command | None = None) -> None:
        """Lose one command without effect; its nexus is lost with it."""
        command = command or self.commands[0]
        self._floor.forget_parked(command)
        self._floor.lose(command.nexus)

    def lift(self) -> None:
        """Hold no more, and let everything parked land in order of arrival."""
        while self.commands:
            self.land()
        if self in self._floor.holds:
            self._floor.holds.remove(self)


@dataclass(slots=True)
class Injection:
    """What becomes of the next ``times`` commands that match."""

    match: Match
    error: Callable[[str], BlockError] | Literal["answer lost", "command lost"]
    times: int
