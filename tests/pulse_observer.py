"""Looks at a node's heartbeats from outside: datagrams as the kernel received them, and the block.

Neither depends on when this process gets to run: datagrams carry the kernel's time of arrival.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from csvfs.format import BadBlock, Superblock, byte_offset, decode_heartbeat
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.datagram import BODY, DATAGRAM_BYTES

SO_TIMESTAMPNS: Final = 35
_TIME: Final = struct.Struct("@qq")


class Observer:
    """Listens on a port of its own, until left. Times are of CLOCK_REALTIME, seconds."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, int]] = []
        """When, and which sequence number."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.1)
        self.port: int = self._socket.getsockname()[1]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                data, extra, _, _ = self._socket.recvmsg(DATAGRAM_BYTES, 64)
            except TimeoutError:
                continue
            seconds, nanoseconds = _TIME.unpack(extra[0][2][: _TIME.size])
            sequence = BODY.unpack_from(data)[6]
            self.heard.append((seconds + nanoseconds * 1e-9, sequence))

    def times(self, since_s: float, until_s: float) -> list[float]:
        """Of what arrived in between, and the two ends."""
        heard = [when for when, _ in self.heard if since_s < when < until_s]
        return [since_s, *heard, until_s]

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Between what arrived in between, the two ends included."""
        times = self.times(since_s, until_s)
        return [later - earlier for earlier, later in pairwise(times)]


class BlockObserver:
    """Reads a heartbeat block from the file behind the LUN, a hundred times a second."""

    def __init__(self, backing: Path, superblock: Superblock, slot: int) -> None:
        self.seen: list[tuple[float, Heartbeat]] = []
        """When it had changed, and to what."""
        self._superblock = superblock
        self._slot = slot
        self._address = superblock.geometry.heartbeat(slot)
        self._fd = os.open(backing, os.O_RDONLY)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        os.close(self._fd)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            data = os.pread(self._fd, 4096, byte_offset(self._address))
            try:
                beat = decode_heartbeat(data, self._address, self._superblock.volume_id, self._slot)
            except BadBlock:
                continue  # not written yet, or just being written
            if not self.seen or self.seen[-1][1] != beat:
                self.seen.append((time.time(), beat))

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Between changes in between, the two ends included."""
        seen = [when for when, _ in self.seen if since_s < when < until_s]
        times = [since_s, *seen, until_s]
        return [later - earlier for earlier, later in pairwise(times)]
