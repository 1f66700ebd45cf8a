"""A channel to one incarnation of a peer: first in, first out, and nothing is lost, though the
connections under it break. Pure: what is to be sent is handed back, time is an argument.

Theory. A connection carries messages in order and loses only a suffix of them. So messages need
no numbers on their way: both ends count. What has been sent is kept until the peer says how many
it has (`Confirmed`). On a new connection each end first says how many it has received (`Resume`),
and the other goes on behind that. Nothing else is sent before the peer's `Resume` is here, so
whatever arrives on a connection continues what that connection's own `Resume` has counted.

Epochs. The receiver refuses messages of a lock epoch that is over, so they are not sent again:
`epoch_over` makes one `Skipped` of them, which counts as many as they were.

Room. At most ``WINDOW_BYTES`` are on their way in a connection, so that a long list of what was
kept cannot overflow its queue. When more than ``LIMIT_BYTES`` wait for a peer that takes nothing,
the channel is given up; so it is when the peer breaks the protocol above it. A channel that was
given up takes and delivers nothing any more, for a hole in it would be silent: one of the two
nodes has to leave, and ``broken`` says why. (Sizes are estimates: they bound memory, no more.)

invariants (`check`):
- ``confirmed`` <= what the connection was given <= ``sent``; ``told`` <= ``received``
- ``_flying`` and ``_waiting`` are the messages ``confirmed + 1`` to ``sent``, in order
- without a connection, or before the peer's `Resume`, nothing is ``_flying``
- what waits, waits for the window, or for the peer's `Resume`
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lockmgr.carried import Carried
from lockmgr.cluster.codec import WireError
from lockmgr.messages import GlimpseAnswer, Glimpses, Reassert, Waits
from lockmgr.ranges_messages import RangeReassert, RangeWaits
from lockmgr.snapshot_messages import LocksPart

WINDOW_BYTES: Final = 4 << 20
LIMIT_BYTES: Final = 64 << 20
CONFIRM_MESSAGES: Final = 64
CONFIRM_BYTES: Final = WINDOW_BYTES // 4
CONFIRM_S: Final = 0.2
"""How long the last messages of a burst may wait for their `Confirmed`."""
SKIP_MOST: Final = 1 << 48
USUAL_BYTES: Final = 256
"""What a small message is taken for."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The first thing on a connection: so many of your messages are here, go on with the next."""

    received: int


@dataclass(frozen=True, slots=True)
class Confirmed:
    """So many of your messages are here."""

    received: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """In place of so many messages of a lock epoch that is over."""

    count: int


Control = Resume | Confirmed | Skipped
"""What the two ends of a channel say to each other."""

_SIZES: Final[dict[type, Callable[[Any], int]]] = {
    Glimpses: lambda message: (
        USUAL_BYTES * (1 + len(message.asked) + len(message.probes))
        + sum(USUAL_BYTES + len(answer or b"") for _, _, answer in message.answers)
    ),
    GlimpseAnswer: lambda message: USUAL_BYTES + len(message.answer or b""),
    Reassert: lambda message: USUAL_BYTES * (1 + len(message.held) + len(message.mastered)),
    Waits: lambda message: (
        USUAL_BYTES * (1 + len(message.waiting) + len(message.holding) + len(message.queued))
    ),
    LocksPart: lambda message: (
        4 * USUAL_BYTES * (1 + len(message.locks) + len(message.queues) + len(message.ranges))
    ),
    RangeReassert: lambda message: USUAL_BYTES * (1 + len(message.holds)),
    RangeWaits: lambda message: (
        USUAL_BYTES
        * (1 + sum(1 + len(wait.behind) + len(wait.held_back_by) for wait in message.waits))
    ),
}


def size_bytes(message: Carried | Skipped) -> int:
    """About what a message costs in memory or in a queue."""
    size = _SIZES.get(type(message))
    return USUAL_BYTES if size is None else size(message)


class Channel:
    """Both directions between this node and one incarnation of another."""

    def __init__(self) -> None:
        self.sent = 0
        """Messages that the channel has taken."""
        self.confirmed = 0
        """... that the peer has."""
        self.received = 0
        """Messages of the peer's that were delivered."""
        self.told = 0
        """... that the peer knows of."""
        self.connected = False
        self.resumed = False
        """The peer's `Resume` has come on this connection."""
        self.broken: str | None = None
        """Why the channel was given up; None: it was not."""
        self.kept_bytes = 0
        self._flying: deque[Carried | Skipped] = deque()
        """Given to this connection."""
        self._flying_bytes = 0
        self._waiting: deque[Carried | Skipped] = deque()
        self._reached = 0
        """The last message that this connection was given, or the one before it as long as the
        peer has not resumed: the peer cannot have more."""
        self._unconfirmed_bytes = 0
        self._confirm_at: float | None = None

    @property
    def kept(self) -> int:
        """Messages that the peer may not have."""
        return self.sent - self.confirmed

    # -- out -----------------------------------------------------------------------------------
    def send(self, message: Carried) -> bool:
        """Take a message; True: give it to the connection now, False: its turn comes later.

        May give the channel up (``broken``).
        """
        if self.broken is not None:
            return False
        size = size_bytes(message)
        self.sent += 1
        self.kept_bytes += size
        if self.resumed and not self._waiting and self._flying_bytes < WINDOW_BYTES:
            self._flying.append(message)
            self._flying_bytes += size
            self._reached = self.sent
            return True
        self._waiting.append(message)
        if self.kept_bytes > LIMIT_BYTES:
            self.give_up(f"it has not taken {self.kept} messages, {self.kept_bytes >> 20} MiB")
        return False

    def _pump(self) -> list[object]:
        """What waits, as far as the window lets it."""
        out: list[object] = []
        while self._waiting and self._flying_bytes < WINDOW_BYTES:
            message = self._waiting.popleft()
            self._flying.append(message)
            self._flying_bytes += size_bytes(message)
            self._reached += _count(message)
            out.append(message)
        return out

    def epoch_over(self, epoch: int) -> list[object]:
        """From now on the sender is in lock epoch ``epoch``: what is older need not be kept. What
        there is room for now."""
        self._flying = _without_older(self._flying, epoch)
        self._waiting = _without_older(self._waiting, epoch)
        self._flying_bytes = sum(map(size_bytes, self._flying))
        self.kept_bytes = self._flying_bytes + sum(map(size_bytes, self._waiting))
        return self._pump() if self.resumed else []

    def give_up(self, words: str) -> None:
        """Take and deliver nothing any more; the first reason counts."""
        if self.broken is None:
            self.broken = words
        self._flying.clear()
        self._waiting.clear()
        self.kept_bytes = self._flying_bytes = 0
        self._confirm_at = None

    # -- connections ---------------------------------------------------------------------------
    def connect(self) -> list[object]:
        """There is a new connection; what is to be sent first."""
        self.lose()
        if self.broken is not None:
            return []
        self.connected = True
        self.told = self.received
        return [Resume(self.received)]

    def lose(self) -> None:
        """The connection is gone, with what was on its way."""
        self.connected = self.resumed = False
        self._waiting.extendleft(reversed(self._flying))
        self._flying.clear()
        self._flying_bytes = 0
        self._confirm_at = None
        self._unconfirmed_bytes = 0

    # -- in ------------------------------------------------------------------------------------
    def receive(self, message: Carried, now: float) -> list[object]:
        """Count a message that has arrived and is to be delivered; what is to be sent for that.

        To be called before it is delivered, so that an answer finds the channel in order. Raises
        `WireError`.
        """
        if not self.resumed:
            raise WireError(f"{type(message).__name__} before the channel was resumed")
        self.received += 1
        self._unconfirmed_bytes += size_bytes(message)
        if (
            self.received - self.told >= CONFIRM_MESSAGES
            or self._unconfirmed_bytes >= CONFIRM_BYTES
        ):
            return self._confirm()
        if self._confirm_at is None:
            self._confirm_at = now + CONFIRM_S
        return []

    def control(self, message: Control, now: float) -> list[object]:
        """Carry out what the peer's channel says to this one; what is to be sent for that.

        Raises `WireError`.
        """
        if isinstance(message, Resume):
            return self._resume(message.received)
        if not self.resumed:
            raise WireError(f"{type(message).__name__} before the channel was resumed")
        if isinstance(message, Confirmed):
            if not self.confirmed <= message.received <= self._reached:
                raise WireError(
                    f"{message.received} messages confirmed, of {self._reached}, "
                    f"{self.confirmed} before"
                )
            self._drop(message.received)
            return self._pump()
        if not 0 < message.count <= SKIP_MOST:
            raise WireError(f"{message.count} messages skipped")
        self.received += message.count
        if self._confirm_at is None:
            self._confirm_at = now + CONFIRM_S
        return []

    def _resume(self, received: int) -> list[object]:
        if self.resumed:
            raise WireError("the channel was resumed already")
        if not self.confirmed <= received <= self._reached:
            raise WireError(
                f"{received} messages received, of {self._reached} sent, {self.confirmed} before"
            )
        self.resumed = True
        self._drop(received)
        self._reached = received
        return self._pump()

    def _drop(self, received: int) -> None:
        """The peer has so many."""
        while self.confirmed < received:
            flown = self._flying or self._waiting
            message = flown.popleft()
            size = size_bytes(message)
            self.kept_bytes -= size
            if flown is self._flying:
                self._flying_bytes -= size
            self.confirmed += _count(message)
            if self.confirmed > received:  # in the middle of what was made one
                flown.appendleft(Skipped(self.confirmed - received))
                self.kept_bytes += size
                self._flying_bytes += size if flown is self._flying else 0
                self.confirmed = received

    def _confirm(self) -> list[object]:
        self.told = self.received
        self._unconfirmed_bytes = 0
        return [Confirmed(self.received)]

    # -- time ----------------------------------------------------------------------------------
    def next_timer(self) -> float | None:
        """When `time_passed` is due; None: not before something else happens."""
        return self._confirm_at

    def time_passed(self, now: float) -> list[object]:
        """What is to be sent because nothing else was."""
        if self._confirm_at is None or now < self._confirm_at:
            return []
        self._confirm_at = None
        return self._confirm() if self.told < self.received else []

    def check(self) -> None:
        """Assert the invariants."""
        flying = sum(map(_count, self._flying))
        waiting = sum(map(_count, self._waiting))
        assert self.told <= self.received
        assert self.resumed or not self._flying
        assert self.connected or not self.resumed
        assert self._flying_bytes == sum(map(size_bytes, self._flying))
        assert self.kept_bytes == self._flying_bytes + sum(map(size_bytes, self._waiting))
        if self.broken is not None:
            assert not self.kept_bytes
            return
        assert self.confirmed + flying + waiting == self.sent
        assert self.confirmed <= self._reached <= self.sent
        assert not self.resumed or self._reached == self.confirmed + flying
        assert not (self.resumed and self._waiting) or self._flying_bytes >= WINDOW_BYTES
        assert self.kept_bytes <= LIMIT_BYTES


def _count(message: object) -> int:
    return message.count if isinstance(message, Skipped) else 1


def _without_older(kept: deque[Carried | Skipped], epoch: int) -> deque[Carried | Skipped]:
    """Epochs only grow, so what is older stands at the beginning."""
    older = 0
    while kept and (isinstance(kept[0], Skipped) or kept[0].epoch < epoch):
        older += _count(kept.popleft())
    if older:
        kept.appendleft(Skipped(older))
    return kept
