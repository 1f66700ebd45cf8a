"""What the relay makes of an Ethernet frame that carries TCP, when it is to reset connections.

Pure. Each segment is answered with the reset that a host without that connection sends (RFC 9293
3.10.7.1), and a reset goes on in its place, with its sequence number, which the other side expects
next (RFC 5961 3.2). Everything else passes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_ETHERNET: Final = struct.Struct("!6s6sH")
_IP: Final = struct.Struct("!BBHHHBBH4s4s")
_TCP: Final = struct.Struct("!HHIIBBHHH")
_PSEUDO: Final = struct.Struct("!4s4sBBH")
_IPV4: Final = 0x0800
_TCP_NUMBER: Final = 6
_FRAGMENT: Final = 0x3FFF
"""More fragments, or an offset."""

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10


@dataclass(frozen=True, slots=True)
class Segment:
    """As much of a TCP segment as a reset needs."""

    source_mac: bytes
    target_mac: bytes
    source: bytes
    target: bytes
    source_port: int
    target_port: int
    sequence: int
    acknowledged: int
    flags: int
    length: int
    """In sequence numbers: the payload's bytes, SYN and FIN."""


@dataclass(frozen=True, slots=True)
class Resets:
    """What is sent instead of a segment."""

    back: bytes
    onward: bytes


def parse(frame: bytes) -> Segment | None:
    """The TCP segment in a frame; None if there is none, or it is only part of one."""
    if len(frame) < _ETHERNET.size + _IP.size:
        return None
    target_mac, source_mac, kind = _ETHERNET.unpack_from(frame)
    packet = frame[_ETHERNET.size :]
    version, _, total, _, fragment, _, protocol, _, source, target = _IP.unpack_from(packet)
    header = (version & 0x0F) * 4
    if kind != _IPV4 or version >> 4 != 4 or header < _IP.size or protocol != _TCP_NUMBER:
        return None
    if fragment & _FRAGMENT or total > len(packet) or total < header + _TCP.size:
        return None
    source_port, target_port, sequence, acknowledged, offset, flags, _, _, _ = _TCP.unpack_from(
        packet, header
    )
    payload = total - header - (offset >> 4) * 4
    if payload < 0:
        return None
    return Segment(
        source_mac,
        target_mac,
        source,
        target,
        source_port,
        target_port,
        sequence,
        acknowledged,
        flags,
        payload + bool(flags & SYN) + bool(flags & FIN),
    )


def resets(frame: bytes) -> Resets | None:
    """What goes out instead of the frame; None if it is no TCP, and passes."""
    segment = parse(frame)
    if segment is None:
        return None
    if segment.flags & RST:
        return Resets(b"", frame)
    if segment.flags & ACK:
        back = _reset(segment, segment.acknowledged, 0, RST, turned=True)
    else:
        after = (segment.sequence + segment.length) & 0xFFFFFFFF
        back = _reset(segment, 0, after, RST | ACK, turned=True)
    if segment.flags & SYN:
        return Resets(back, b"")
    onward = _reset(segment, segment.sequence, segment.acknowledged, RST | ACK, turned=False)
    return Resets(back, onward)


def _reset(
    segment: Segment, sequence: int, acknowledged: int, flags: int, *, turned: bool
) -> bytes:
    here = (segment.source_mac, segment.source, segment.source_port)
    there = (segment.target_mac, segment.target, segment.target_port)
    (from_mac, source, source_port), (to_mac, target, target_port) = (
        (there, here) if turned else (here, there)
    )
    head = (source_port, target_port, sequence, acknowledged, _TCP.size // 4 << 4, flags, 0)
    pseudo = _PSEUDO.pack(source, target, 0, _TCP_NUMBER, _TCP.size)
    tcp = _TCP.pack(*head, checksum(pseudo + _TCP.pack(*head, 0, 0)), 0)
    about = (0x45, 0, _IP.size + _TCP.size, 0, 0x4000, 64, _TCP_NUMBER)
    ip = _IP.pack(*about, checksum(_IP.pack(*about, 0, source, target)), source, target)
    return _ETHERNET.pack(to_mac, from_mac, _IPV4) + ip + tcp


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
