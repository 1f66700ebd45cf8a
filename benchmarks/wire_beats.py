"""Heartbeats as they leave the hosts of a lab, seen from outside.

    python -m benchmarks.wire_beats PORT...        in the network namespace of the lab's switch

Looks at what comes in at the given ports of the switch (AF_PACKET, with the kernel's time) until
its standard input is closed, then prints JSON: for each slot and incarnation, the times of its
heartbeats in seconds. A heartbeat goes to every peer; the first datagram of each counts.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
from itertools import pairwise
from typing import Final

from lockmgr.cluster.datagram import BODY, DATAGRAM_BYTES, MAGIC

ETH_P_ALL: Final = 3
"""Frames of a bridge's port are seen by no narrower socket: the bridge takes them before."""
SOL_PACKET: Final = 263
PACKET_IGNORE_OUTGOING: Final = 23
ETHERNET_BYTES: Final = 14
IPPROTO_UDP: Final = 17
SO_TIMESTAMPNS: Final = 35
SO_RCVBUFFORCE: Final = 33
BUFFER_BYTES: Final = 4 << 20
_TIME: Final = struct.Struct("@qq")


def heartbeat_in(frame: bytes) -> tuple[str, int] | None:
    """("slot.incarnation", sequence) of the heartbeat in an Ethernet frame, if it is one."""
    if len(frame) < ETHERNET_BYTES + 20 or frame[ETHERNET_BYTES + 9] != IPPROTO_UDP:
        return None
    payload = ETHERNET_BYTES + (frame[ETHERNET_BYTES] & 15) * 4 + 8
    if len(frame) < payload + DATAGRAM_BYTES or frame[payload : payload + len(MAGIC)] != MAGIC:
        return None
    _, _, slot, _, incarnation, _, sequence, _, _ = BODY.unpack_from(frame, payload)
    return f"{slot}.{incarnation}", sequence


def late_ms(times: dict[str, list[float]], interval_s: float) -> list[float]:
    """How much later than due each heartbeat was sent, in order of size. Early ones (there was
    something to tell) are on time."""
    late = []
    for each in times.values():
        late += [max(later - earlier - interval_s, 0.0) * 1000 for earlier, later in pairwise(each)]
    return sorted(late)


def quantile(ordered: list[float], part: float) -> float:
    """Of values in order."""
    return ordered[int(part * (len(ordered) - 1))]


def main() -> None:
    """Watch, then print."""
    chosen = selectors.DefaultSelector()
    chosen.register(sys.stdin, selectors.EVENT_READ)
    for port in sys.argv[1:]:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        tap.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        tap.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        tap.bind((port, ETH_P_ALL))
        tap.setblocking(False)
        chosen.register(tap, selectors.EVENT_READ)
    times: dict[str, list[float]] = {}
    seen: dict[str, int] = {}
    print("watching", flush=True)
    while True:
        for key, _ in chosen.select():
            if key.fileobj is sys.stdin:
                print(json.dumps(times))
                return
            assert isinstance(key.fileobj, socket.socket)
            _read(key.fileobj, times, seen)


def _read(tap: socket.socket, times: dict[str, list[float]], seen: dict[str, int]) -> None:
    while True:
        try:
            frame, extra, _, _ = tap.recvmsg(2048, 64)
        except BlockingIOError:
            return
        found = heartbeat_in(frame)
        if found is None or seen.get(found[0], -1) >= found[1]:
            continue
        seen[found[0]] = found[1]
        seconds, nanoseconds = _TIME.unpack(extra[0][2][: _TIME.size])
        times.setdefault(found[0], []).append(seconds + nanoseconds * 1e-9)


if __name__ == "__main__":
    main()
