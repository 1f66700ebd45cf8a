"""The heartbeat as a datagram: 72 bytes under an HMAC, which C code can make and read as well.

    offset  size  big-endian
    0       4     "LMHB"
    4       1     version, 1
    5       1     slot
    6       2     0
    8       4     incarnation
    12      4     flags
    16      8     sequence
    24      8     epoch
    32      8     bit map of the slots heard
    40      32    HMAC-SHA256 of the cluster id and bytes 0 to 39, under the view's secret

The cluster id is not sent; who has another one finds a wrong HMAC. The HMAC is compared in
constant time and before anything in the datagram is believed. `HeartbeatFilter` lets no datagram
through twice and none after a later one: per slot, (incarnation, sequence) only grows.
"""

from __future__ import annotations

import hashlib
import hmac
from struct import Struct
from typing import Final

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.view import MAX_SLOTS, SECRET_BYTES

MAGIC: Final = b"LMHB"
VERSION: Final = 1
BODY: Final = Struct(">4sBBHIIQQQ")
MAC_BYTES: Final = 32
DATAGRAM_BYTES: Final = BODY.size + MAC_BYTES

_KNOWN_FLAGS: Final = int(HeartbeatFlag.LEAVING | HeartbeatFlag.HAS_DIRECT_PATH)

assert BODY.size == 40
assert DATAGRAM_BYTES == 72


def _mac(body: bytes, cluster_id: bytes, secret: bytes) -> bytes:
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return hmac.digest(secret, cluster_id + body, hashlib.sha256)


def encode_heartbeat(heartbeat: Heartbeat, cluster_id: bytes, secret: bytes) -> bytes:
    """The datagram. Raises ValueError or struct.error for what does not fit."""
    body = BODY.pack(
        MAGIC,
        VERSION,
        heartbeat.slot,
        0,
        heartbeat.incarnation,
        heartbeat.flags,
        heartbeat.sequence,
        heartbeat.epoch,
        heartbeat.hears,
    )
    return body + _mac(body, cluster_id, secret)


def decode_heartbeat(data: bytes, cluster_id: bytes, secret: bytes) -> Heartbeat:
    """The heartbeat in a datagram. Raises `WireError`; the datagram is then dropped, and counted.

    A datagram under the secret of another view fails as any forgery does.
    """
    if len(data) != DATAGRAM_BYTES:
        raise WireError(f"a heartbeat of {len(data)} bytes, not {DATAGRAM_BYTES}")
    body, mac = data[: BODY.size], data[BODY.size :]
    if not hmac.compare_digest(mac, _mac(body, cluster_id, secret)):
        raise WireError("a heartbeat that was not made with this view's secret")
    magic, version, slot, zero, incarnation, flags, sequence, epoch, hears = BODY.unpack(body)
    if magic != MAGIC or version != VERSION or zero:
        raise WireError(f"a heartbeat of version {version}, not {VERSION}")
    if slot >= MAX_SLOTS:
        raise WireError(f"a heartbeat of slot {slot}")
    if flags & ~_KNOWN_FLAGS:
        raise WireError(f"a heartbeat with flags {flags:#x}")
    return Heartbeat(slot, incarnation, sequence, epoch, hears, HeartbeatFlag(flags))


class HeartbeatFilter:
    """What was heard last of each slot: at most `MAX_SLOTS` entries."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}

    def is_new(self, heartbeat: Heartbeat) -> bool:
        """Was it sent after all that has been let through of this slot?"""
        sign = (heartbeat.incarnation, heartbeat.sequence)
        last = self._last.get(heartbeat.slot)
        if last is not None and sign <= last:
            return False
        self._last[heartbeat.slot] = sign
        return True
