"""One connection that is past its greeting: a queue out, messages in, signs of life.

Concurrency: `Connection.run` is one task that reads, with a child that writes; the state below
changes between their checkpoints only, and `send` and `fail` may be called at any time by anybody.
Nothing here waits for whoever reads the messages: `arrived` is a plain call. `run` ends when the
connection has failed, and first says `lost`, then last words, within `goodbye_s`.

invariants (`Connection.check`):
- ``queue_bytes`` is what has been queued and not been taken by TLS, at most `queue_bytes` of the
  settings;
- ``failure`` is set once; after it nothing arrives, and nothing more is queued but last words.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from lockmgr.cluster.codec import WireError
from lockmgr.cluster.link_messages import Chosen, Died, Ping, Pong
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Goodbye, WireLink

READ_BYTES: Final = 64 << 10

TlsStream = trio.SSLStream[trio.SocketStream]


@dataclass(slots=True)
class Traffic:
    """With one peer, over all connections."""

    bytes_in: int = 0
    """As TLS gives and takes them; so are those sent."""
    bytes_out: int = 0
    messages_in: int = 0
    messages_out: int = 0
    dropped: int = 0
    """Messages sent while there was no connection."""
    queue_peak_bytes: int = 0
    connections: int = 0
    last_loss: str = ""


class Receiver(Protocol):
    """What a connection tells. Plain calls that do not wait."""

    def arrived(self, connection: Connection, message: Any) -> None:
        """The next message. Raises `WireError` for one that must not come now."""

    def chosen(self, connection: Connection, number: int) -> None:
        """The peer has chosen this connection. Raises `WireError`."""

    def died(self, connection: Connection) -> None:
        """The peer's supervisor speaks, and says that the peer is dead."""

    def lost(self, connection: Connection) -> None:
        """It is over: ``failure`` says why."""


class Connection:
    """A TLS stream whose peer has been proven to be ``peer``."""

    def __init__(
        self,
        stream: TlsStream,
        link: WireLink,
        peer: NodeId,
        settings: NetworkSettings,
        *,
        dialed: bool,
        early: list[Any],
    ) -> None:
        """``early``: messages that came together with the peer's Hello."""
        assert link.agreed is not None
        self.peer = peer
        self.agreed = link.agreed
        self.dialed = dialed
        self.number = 0
        """0: not chosen."""
        self.failure: str | None = None
        self.goodbye: str | None = None
        """The peer's last words."""
        self.announced = False
        """One side has said goodbye, or its system has closed the connection: its daemon has ended,
        which shows by itself: nobody needs to look into it."""
        self.traffic = Traffic()
        self.queue_bytes = 0
        self.rtt_s: float | None = None
        self.born_s = self.heard_s = trio.current_time()
        self._stream = stream
        self._link = link
        self._settings = settings
        self._early = early
        self._queue: deque[bytes] = deque()
        self._writable = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._answered: trio.Event | None = None
        self._drained = trio.Event()
        self._pinged_s = self.born_s
        self._sending_s: float | None = None
        self._reading = trio.CancelScope()

    # -- out -----------------------------------------------------------------------------------
    def send(self, message: object) -> bool:
        """Queue a message; False: the connection has failed, maybe for this one.

        Raises ValueError for a message that no peer could take.
        """
        if self.failure is not None:
            return False
        data = self._link.encode(message)
        if self.queue_bytes + len(data) > self._settings.queue_bytes:
            self.fail(
                f"{self.queue_bytes} bytes wait to be sent, the peer takes them too slowly",
                forget=True,
            )
            return False
        self._put(data)
        self.traffic.messages_out += 1
        return True

    def _put(self, data: bytes) -> None:
        self._queue.append(data)
        self.queue_bytes += len(data)
        if self.queue_bytes > self.traffic.queue_peak_bytes:
            self.traffic.queue_peak_bytes = self.queue_bytes
        self._writable.unpark()

    async def wait_room(self) -> None:
        """Until little is queued, or the connection has failed."""
        while self.failure is None and self.queue_bytes >= self._settings.room_bytes:
            await self._room.park()

    def _batch(self) -> bytes:
        batch = [self._queue.popleft()]
        size = len(batch[0])
        while self._queue and size + len(self._queue[0]) <= self._settings.batch_bytes:
            batch.append(self._queue.popleft())
            size += len(batch[-1])
        return batch[0] if len(batch) == 1 else b"".join(batch)

    async def _write(self) -> None:
        try:
            while True:
                if not self._queue:
                    if self.failure is not None:
                        break
                    await self._writable.park()
                    continue
                data = self._batch()
                self._sending_s = trio.current_time()
                await self._stream.send_all(data)
                self._sending_s = None
                self.traffic.bytes_out += len(data)
                # After `fail` with ``forget`` nothing is queued any more.
                self.queue_bytes = max(0, self.queue_bytes - len(data))
                if self.queue_bytes < self._settings.room_bytes:
                    self._room.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._broken(error, "it broke while sending")
        finally:
            self._drained.set()

    # -- its end -------------------------------------------------------------------------------
    def fail(self, reason: str, farewell: str = "", *, forget: bool = False) -> None:
        """The connection is not used any more; the first reason counts.

        What has been queued is still sent within `goodbye_s`, then ``farewell`` (at most 1,000
        characters). ``forget``: nothing more is sent, the peer would not take it.
        """
        if forget:
            self._queue.clear()
            self.queue_bytes = 0
        if self.failure is not None:
            return
        self.failure = reason
        if farewell and not forget:
            self.announced = True
            self._put(self._link.closing(farewell))
        self._reading.cancel()
        self._writable.unpark_all()
        self._room.unpark_all()
        self._has_answered()

    def refuse(self, words: str) -> None:
        """The peer breaks the protocol: that is its end, and somebody needs to look into it."""
        if self.failure is None:
            self.fail(f"the peer breaks the protocol: {words}", f"protocol error: {words}")
            self.announced = False

    def _broken(self, error: BaseException | None, words: str) -> None:
        if self.failure is None:
            self.announced = error is None or isinstance(error.__cause__, ConnectionError)
        self.fail(words if error is None else f"{words}: {cause_of(error)}", forget=True)

    async def run(self, receiver: Receiver) -> None:
        """Carry messages until the connection has failed; then close it."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                with self._reading:
                    await self._read(receiver)
                receiver.lost(self)
                with trio.move_on_after(self._settings.goodbye_s):
                    await self._drained.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.fail("this node closes it", forget=True)
            receiver.lost(self)
            await self.cut()

    async def cut(self) -> None:
        """Give the socket back. Any number of times."""
        await trio.aclose_forcefully(self._stream)

    # -- in ------------------------------------------------------------------------------------
    async def _read(self, receiver: Receiver) -> None:
        try:
            for message in self._early:
                self._take(message, receiver)
            self._early = []
            while self.failure is None:
                data = await self._stream.receive_some(READ_BYTES)
                if not data:
                    self._broken(None, "the peer has closed it")
                    return
                self.heard_s = trio.current_time()
                self.traffic.bytes_in += len(data)
                self._has_answered()
                self._link.feed(data)
                while self.failure is None and (message := self._link.next()) is not None:
                    self._take(message, receiver)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._broken(error, "it broke")
        except WireError as error:
            self.refuse(str(error))

    def _take(self, message: Any, receiver: Receiver) -> None:
        if self.failure is not None:
            return
        self.traffic.messages_in += 1
        match message:
            case Ping(stamp_ns):
                self.send(Pong(stamp_ns))
            case Pong(stamp_ns):
                self.rtt_s = max(0.0, (time.monotonic_ns() - stamp_ns) / 1e9)
            case Goodbye(words):
                self.announced, self.goodbye = True, words
                self.fail(f"the peer closes it: {ascii(words)[1:-1]:.200}", forget=True)
            case Chosen(number):
                receiver.chosen(self, number)
            case Died():
                receiver.died(self)
            case _:
                receiver.arrived(self, message)

    # -- signs of life -------------------------------------------------------------------------
    def ping(self) -> None:
        """Ask the peer to say something."""
        self._pinged_s = trio.current_time()
        self.send(Ping(time.monotonic_ns()))

    async def probe(self, within_s: float) -> bool:
        """Does the peer say anything over this connection?"""
        if self._answered is None:
            self._answered = trio.Event()
        answered = self._answered
        self.ping()
        if self.failure is None:
            with trio.move_on_after(within_s):
                await answered.wait()
        return self.failure is None and answered.is_set()

    def _has_answered(self) -> None:
        if self._answered is not None:
            self._answered.set()
            self._answered = None

    def look(self, now: float, slept: bool) -> None:
        """Once in a while: ping, or give up. ``slept``: this process was not looking, so that
        what it has not heard says nothing."""
        settings = self._settings
        if slept:
            self.heard_s = now
            self._sending_s = None if self._sending_s is None else now
        elif now - self.heard_s >= settings.silence_s:
            self.fail(f"nothing has been heard for {now - self.heard_s:.1f} s", forget=True)
        elif self._sending_s is not None and now - self._sending_s >= settings.silence_s:
            self.fail(
                f"the peer has taken nothing for {now - self._sending_s:.1f} s, "
                f"{self.queue_bytes} bytes wait",
                forget=True,
            )
        elif not self.number and now - self.born_s >= settings.greeting_s:
            self.fail("it was not chosen in time", "not chosen in time")
        elif now - max(self.heard_s, self._pinged_s) >= settings.ping_s or (
            now - self._pinged_s >= settings.silence_s
        ):
            self.ping()

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.queue_bytes <= self._settings.queue_bytes + (4 << 10)
        assert sum(map(len, self._queue)) <= self.queue_bytes
        if self._sending_s is None and self.failure is None:
            assert sum(map(len, self._queue)) == self.queue_bytes


def cause_of(error: BaseException) -> str:
    """What a broken stream says, in words for a log line."""
    cause = error.__cause__ or error
    return str(getattr(cause, "reason", None) or cause or type(cause).__name__)[:200]
