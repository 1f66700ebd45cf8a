"""What the supervisor must know once its daemon is dead: who it was, how to prove it, whom to tell.

The daemon writes it into memory that both have (memfd_create(2)), at each change of its peers; the
supervisor reads it when it has reaped the daemon. So the private key stays in memory, and nothing
has to be asked of a daemon that hangs. Two halves are written in turn, each with a number and a
checksum: a daemon that dies in the middle leaves the will before.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final, NamedTuple

import msgpack
from crc32c import crc32c

_HEAD: Final = Struct("<QII")
"""Number, length, CRC32C of what follows."""
_HALF_BYTES: Final = 256 << 10
"""64 peers with certificates of at most 1,152 bytes and their addresses."""


class Will(NamedTuple):
    """Everything that `lockmgr.cluster.obituary.report_death` asks for, as plain values."""

    volume_id: bytes
    slot: int
    incarnation: int
    certificate: bytes
    key_pem: bytes
    peers: list[tuple[int, int, bytes, list[str]]]
    """Slot, incarnation, certificate, addresses."""


class LastWill:
    """One will in the memory behind ``fd``; below 0: nobody will read it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._number = 0

    def write(self, will: Will) -> None:
        """This is the last will from now on. Raises OSError."""
        self._put(msgpack.packb(will))

    def revoke(self) -> None:
        """There is nobody to be told of anything. Raises OSError."""
        self._put(b"")

    def _put(self, data: bytes) -> None:
        if self._fd < 0:
            return
        if len(data) > _HALF_BYTES - _HEAD.size:
            raise ValueError(f"a last will of {len(data)} bytes")
        self._number += 1
        head = _HEAD.pack(self._number, len(data), crc32c(data))
        os.pwrite(self._fd, head + data, self._number % 2 * _HALF_BYTES)


def make_will_memory() -> int:
    """Memory for a will; a descriptor to be handed on. Raises OSError."""
    return os.memfd_create("csvfs-last-will", 0)


def read_will(fd: int) -> Will | None:
    """The last one that was written whole; None: there is none, or it was revoked."""
    best, found = 0, b""
    for half in range(2):
        raw = os.pread(fd, _HALF_BYTES, half * _HALF_BYTES)
        if len(raw) < _HEAD.size:
            continue
        number, length, checksum = _HEAD.unpack_from(raw)
        data = raw[_HEAD.size : _HEAD.size + length]
        if number > best and len(data) == length and crc32c(data) == checksum:
            best, found = number, data
    if not found:
        return None
    volume_id, slot, incarnation, certificate, key_pem, peers = msgpack.unpackb(found)
    named = [tuple(each) for each in peers]
    return Will(volume_id, slot, incarnation, certificate, key_pem, named)


def execute(will: Will, within_s: float = 5.0) -> int:
    """Tell every peer that the node is dead, which must be true; how many have noted it."""
    import trio

    from lockmgr.cluster.certificates import Credentials
    from lockmgr.cluster.obituary import report_death
    from lockmgr.cluster.peers import Peer, parse_address
    from lockmgr.cluster.view import NodeId

    peers = [
        Peer(NodeId(slot, incarnation), certificate, tuple(map(parse_address, addresses)))
        for slot, incarnation, certificate, addresses in will.peers
    ]
    if not peers:
        return 0

    async def tell() -> int:
        noted = await report_death(
            Credentials(will.certificate, will.key_pem),
            will.volume_id,
            NodeId(will.slot, will.incarnation),
            peers,
            within_s,
        )
        return len(noted)

    return trio.run(tell)
