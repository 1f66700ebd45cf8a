"""Resets as the relay makes them."""

from __future__ import annotations

import struct

import pytest

from csvctl.lab.frames import ACK, FIN, RST, SYN, checksum, parse, resets

HOST, TARGET = b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"


def frame(
    flags: int, *, sequence: int = 1000, acknowledged: int = 2000, data: bytes = b""
) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", 40000, 3260, sequence, acknowledged, 5 << 4, flags, 64, 0, 0)
    total = 20 + len(tcp) + len(data)
    addresses = bytes([10, 1, 0, 1, 10, 1, 0, 254])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, total, 7, 0x4000, 64, 6, 0) + addresses
    return TARGET + HOST + b"\x08\x00" + ip + tcp + data


def test_an_established_segment_is_reset_both_ways() -> None:
    made = resets(frame(ACK, data=b"x" * 100))
    assert made is not None
    back, onward = parse(made.back), parse(made.onward)
    assert back is not None and onward is not None
    assert (back.target_mac, back.source_port, back.target_port) == (HOST, 3260, 40000)
    assert (back.flags, back.sequence) == (RST, 2000)
    assert (onward.target_mac, onward.source_port, onward.target_port) == (TARGET, 40000, 3260)
    assert (onward.flags, onward.sequence) == (RST | ACK, 1000)


def test_a_new_connection_is_refused_and_never_heard_of() -> None:
    made = resets(frame(SYN, acknowledged=0))
    assert made is not None and not made.onward
    back = parse(made.back)
    assert back is not None
    assert (back.flags, back.sequence, back.acknowledged) == (RST | ACK, 0, 1001)


def test_a_reset_is_not_answered() -> None:
    made = resets(frame(RST))
    assert made is not None and not made.back and made.onward == frame(RST)


def test_fin_and_data_count_in_the_acknowledgement() -> None:
    made = resets(frame(FIN, sequence=0xFFFFFFFF, data=b"xy"))
    assert made is not None
    back = parse(made.back)
    assert back is not None and back.acknowledged == 2


def test_checksums_are_right() -> None:
    made = resets(frame(ACK))
    assert made is not None
    for each in (made.back, made.onward):
        ip, tcp = each[14:34], each[34:]
        assert checksum(ip) == 0
        assert checksum(ip[12:20] + b"\0\x06" + struct.pack("!H", len(tcp)) + tcp) == 0


@pytest.mark.parametrize("cut", range(54))
def test_what_is_no_whole_segment_passes(cut: int) -> None:
    assert resets(frame(ACK)[:cut]) is None


def test_what_is_no_tcp_passes() -> None:
    whole = frame(ACK)
    assert resets(whole[:12] + b"\x08\x06" + whole[14:]) is None
    assert resets(whole[:23] + b"\x11" + whole[24:]) is None
    assert resets(whole[:20] + b"\x00\x10" + whole[22:]) is None  # a later fragment
