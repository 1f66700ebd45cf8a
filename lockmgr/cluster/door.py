"""Connections from whoever: bounded in number, in time, and in what is logged about them.

A stranger is a connection that has not proven who it is. When there are too many the oldest from
the address with most of them is put out: who fills the room makes room.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from lockmgr.cluster.connection import Connection
from lockmgr.cluster.greeting import Greeter, GreetingFailed
from lockmgr.cluster.network_settings import NetworkSettings

LINES_AT_ONCE: Final = 20
LINES_A_SECOND: Final = 1.0
EARLY_S: Final = 5.0
"""A node that dials may be ahead of this one's view by as much; then a human should look."""
NEW_ROW_S: Final = 5.0
"""Who dials in vain comes again sooner."""
ADDRESSES: Final = 256
TOO_MANY: Final = "too many connections have not said who they are"

log = logging.getLogger("lockmgr.network")


@dataclass(eq=False, slots=True)
class Stranger:
    """One of them."""

    source: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    put_out: bool = False


class Strangers:
    """Those that are being greeted, oldest first.

    invariants: at most ``strangers``, and ``strangers_each`` from one address.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        self._settings = settings
        self._present: list[Stranger] = []

    def __len__(self) -> int:
        return len(self._present)

    @contextmanager
    def admit(self, source: str) -> Iterator[Stranger]:
        """A connection is greeted in this context; it may be cancelled for a newer one."""
        count = Counter(stranger.source for stranger in self._present)
        if count[source] >= self._settings.strangers_each:
            self._put_out(source)
        elif len(self._present) >= self._settings.strangers:
            self._put_out(max(count, key=lambda other: count[other]))
        stranger = Stranger(source)
        self._present.append(stranger)
        try:
            with stranger.scope:
                yield stranger
        finally:
            if stranger in self._present:
                self._present.remove(stranger)

    def _put_out(self, source: str) -> None:
        oldest = next(stranger for stranger in self._present if stranger.source == source)
        oldest.put_out = True
        oldest.scope.cancel()
        self._present.remove(oldest)


class LineLimit:
    """How many lines a stranger may cause in the log."""

    def __init__(self) -> None:
        self._left: float = LINES_AT_ONCE
        self._since_s = 0.0
        self._suppressed = 0

    def allow(self, now: float) -> str | None:
        """What to append to the line; None: do not write it."""
        self._left = min(LINES_AT_ONCE, self._left + max(0.0, now - self._since_s) * LINES_A_SECOND)
        self._since_s = now
        if self._left < 1:
            self._suppressed += 1
            return None
        self._left -= 1
        suppressed, self._suppressed = self._suppressed, 0
        return f" ({suppressed} more like this were not logged)" if suppressed else ""


class EarlyBirds:
    """Addresses from which somebody came lately who is not believed, perhaps not yet."""

    def __init__(self) -> None:
        self._visits: dict[str, tuple[float, float]] = {}
        """The first and the last one of a row."""

    def is_early(self, source: str, now: float) -> bool:
        """Somebody comes from there. False: has come for so long that no view is on its way."""
        first, last = self._visits.pop(source, (now, now))
        if now - last > NEW_ROW_S:
            first = now
        while len(self._visits) >= ADDRESSES:
            del self._visits[next(iter(self._visits))]
        self._visits[source] = first, now
        return now - first < EARLY_S


class Door:
    """Greets whoever comes, and hands over who is known."""

    def __init__(
        self,
        greeter: Greeter,
        settings: NetworkSettings,
        serve: Callable[[Connection], Awaitable[None]],
        unknown_came: Callable[[], None],
    ) -> None:
        """``unknown_came`` is told of each that has a certificate, but none that is believed."""
        self._greeter = greeter
        self._settings = settings
        self._serve = serve
        self._unknown_came = unknown_came
        self._strangers = Strangers(settings)
        self._lines = LineLimit()
        self._early = EarlyBirds()

    async def listen(self, listeners: list[trio.SocketListener], nursery: trio.Nursery) -> None:
        """Until cancelled; each connection is a task of the nursery."""
        await trio.serve_listeners(self._incoming, listeners, handler_nursery=nursery)

    async def _incoming(self, stream: trio.SocketStream) -> None:
        try:
            source = str(stream.socket.getpeername()[0])
        except OSError:  # gone already
            await trio.aclose_forcefully(stream)
            return
        connection = None
        level = logging.WARNING
        words = f"it has not said who it is within {self._settings.greeting_s:g} s"
        try:
            with self._strangers.admit(source) as stranger:
                with trio.move_on_after(self._settings.greeting_s):
                    connection = await self._greeter.incoming(stream)
        except GreetingFailed as error:
            words = str(error)
            if error.unknown:
                self._unknown_came()
            early = error.unknown and self._early.is_early(source, trio.current_time())
            level = logging.INFO if error.left or early else logging.WARNING
        if connection is not None:
            await self._serve(connection)
            return
        await trio.aclose_forcefully(stream)
        self._refused(level, source, TOO_MANY if stranger.put_out else words)

    def _refused(self, level: int, source: str, words: str) -> None:
        more = self._lines.allow(trio.current_time())
        if more is not None:
            log.log(level, "connection from %s refused: %s%s", source, ascii(words)[1:-1], more)
