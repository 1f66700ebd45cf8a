"""A relay in a host's SAN link: it delays frames, or resets every TCP connection.

    python -m csvctl.lab.relay NEAR FAR ORDERS

runs in the switch's namespace and carries frames between two links. ORDERS is a file with two
words, ``DELAY_S RESET`` (RESET is 0 or 1), that is read at the start and with each SIGHUP. Each
direction is delayed by half of DELAY_S, so that a question and its answer take DELAY_S longer.

It works on frames and not on connections: putting it in, and taking it out, breaks none, and what
a host has sent before its power failed still arrives. Frames are read with their virtio header
(packet(7) PACKET_VNET_HDR), which carries checksums and segments that are yet to be made.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csvctl.lab.frames import resets

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
_ETH_P_ALL: Final = 0x0003
_SO_RCVBUFFORCE: Final = 33
_VNET_HEADER_BYTES: Final = 10
_FRAME_BYTES: Final = 1 << 17
_BUFFER_BYTES: Final = 16 << 20
_QUEUE_BYTES: Final = 64 << 20
"""What a slow link holds in each direction; more is dropped, as by a switch."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What the relay is to do."""

    delay_s: float
    reset: bool

    def encode(self) -> str:
        return f"{self.delay_s} {int(self.reset)}\n"

    @classmethod
    def decode(cls, text: str) -> Orders:
        """Raises ValueError."""
        delay, reset = text.split()
        return cls(float(delay), bool(int(reset)))


class Relay:
    """Both directions of one link."""

    def __init__(self, near: str, far: str, orders: Path) -> None:
        self._links = (_open(near), _open(far))
        self._path = orders
        self._orders = Orders.decode(orders.read_text())
        self._waiting: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
        """For each link, what is to be sent on it and when, in the order of its arrival."""
        self._bytes = [0, 0]

    def run(self) -> None:
        """Until SIGTERM or SIGKILL."""
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer)
        signal.signal(signal.SIGHUP, lambda *_: None)
        while True:
            wanted: list[socket.socket | int] = [*self._links, wake_reader]
            ready, _, _ = select.select(wanted, [], [], self._until_due())
            if wake_reader in ready:
                os.read(wake_reader, 64)
                self._orders = Orders.decode(self._path.read_text())
            for side, link in enumerate(self._links):
                if link in ready:
                    self._receive(side)
            self._send_due()

    def _receive(self, side: int) -> None:
        for _ in range(64):
            try:
                frame, about = self._links[side].recvfrom(_FRAME_BYTES)
            except BlockingIOError:
                return
            if about[2] != socket.PACKET_OUTGOING:
                self._take(side, frame)

    def _take(self, side: int, frame: bytes) -> None:
        other = 1 - side
        instead = resets(frame[_VNET_HEADER_BYTES:]) if self._orders.reset else None
        if instead is None:
            self._queue(other, frame)
            return
        plain = bytes(_VNET_HEADER_BYTES)
        if instead.back:
            self._queue(side, plain + instead.back)
        if instead.onward:
            self._queue(other, plain + instead.onward)

    def _queue(self, side: int, frame: bytes) -> None:
        if self._bytes[side] + len(frame) <= _QUEUE_BYTES:
            self._waiting[side].append((time.monotonic() + self._orders.delay_s / 2, frame))
            self._bytes[side] += len(frame)

    def _until_due(self) -> float | None:
        due = [queue[0][0] for queue in self._waiting if queue]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _send_due(self) -> None:
        now = time.monotonic()
        for side, queue in enumerate(self._waiting):
            while queue and queue[0][0] <= now:
                _, frame = queue.popleft()
                self._bytes[side] -= len(frame)
                try:
                    self._links[side].send(frame)
                except (BlockingIOError, OSError):
                    continue  # full, or down: a frame is lost, as in any network


def _open(name: str) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    # The protocol is named only now, so that nothing comes from any other link.
    link.bind((name, _ETH_P_ALL))
    return link


if __name__ == "__main__":
    Relay(sys.argv[1], sys.argv[2], Path(sys.argv[3])).run()
