"""Heartbeats as datagrams: forged, altered, replayed, reordered, of another cluster or secret."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.datagram import (
    BODY,
    DATAGRAM_BYTES,
    HeartbeatFilter,
    _mac,
    decode_heartbeat,
    encode_heartbeat,
)
from lockmgr.cluster.view import MAX_SLOTS

ID = bytes(range(16))
SECRET = bytes(range(32))
BEAT = Heartbeat(3, 7, 1000, 42, 0b1011, HeartbeatFlag.HAS_DIRECT_PATH)
U64 = st.integers(0, (1 << 64) - 1)


@settings(deadline=None)
@given(
    st.builds(
        Heartbeat,
        st.integers(0, MAX_SLOTS - 1),
        st.integers(0, (1 << 32) - 1),
        U64,
        U64,
        U64,
        st.sampled_from([HeartbeatFlag(bits) for bits in range(4)]),
    )
)
def test_roundtrip(heartbeat: Heartbeat) -> None:
    assert decode_heartbeat(encode_heartbeat(heartbeat, ID, SECRET), ID, SECRET) == heartbeat


def test_golden_bytes() -> None:
    assert encode_heartbeat(BEAT, ID, SECRET).hex() == (
        "4c4d4842010300000000000700000002"
        "00000000000003e8000000000000002a000000000000000b"
        "f51fb6f7ea1093cfc244b22911242f8f24b115aadcc6887f65d737527c254cc3"
    )


def test_every_bit_counts() -> None:
    sent = encode_heartbeat(BEAT, ID, SECRET)
    for bit in range(8 * DATAGRAM_BYTES):
        altered = bytearray(sent)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError, match="secret"):
            decode_heartbeat(bytes(altered), ID, SECRET)


def test_other_secret_other_cluster() -> None:
    sent = encode_heartbeat(BEAT, ID, SECRET)
    for cluster, secret in ((ID, bytes(32)), (bytes(16), SECRET)):
        with pytest.raises(WireError, match="secret"):
            decode_heartbeat(sent, cluster, secret)


@pytest.mark.parametrize("length", [0, 1, DATAGRAM_BYTES - 1, DATAGRAM_BYTES + 1, 65_507])
def test_length(length: int) -> None:
    with pytest.raises(WireError, match=f"of {length} bytes"):
        decode_heartbeat(bytes(length), ID, SECRET)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ((b"LMHX", 1, 3, 0, 7, 0, 1, 1, 1), "version"),
        ((b"LMHB", 2, 3, 0, 7, 0, 1, 1, 1), "version 2, not 1"),
        ((b"LMHB", 1, 3, 1, 7, 0, 1, 1, 1), "version"),
        ((b"LMHB", 1, MAX_SLOTS, 0, 7, 0, 1, 1, 1), "slot 64"),
        ((b"LMHB", 1, 3, 0, 7, 8, 1, 1, 1), "flags 0x8"),
    ],
)
def test_well_signed_nonsense(body: tuple[object, ...], words: str) -> None:
    packed = BODY.pack(*body)
    with pytest.raises(WireError, match=words):
        decode_heartbeat(packed + _mac(packed, ID, SECRET), ID, SECRET)


def test_secret_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 0"):
        encode_heartbeat(BEAT, ID, b"")


def test_filter_lets_nothing_through_twice() -> None:
    beats = [
        Heartbeat(slot, incarnation, sequence, 1, 0)
        for slot in (0, 1)
        for incarnation in (4, 5)
        for sequence in range(20)
    ]
    rng = random.Random(1)
    for _ in range(50):
        gate = HeartbeatFilter()
        passed = [beat for beat in rng.choices(beats, k=200) if gate.is_new(beat)]
        for slot in (0, 1):
            signs = [(b.incarnation, b.sequence) for b in passed if b.slot == slot]
            assert signs == sorted(set(signs))
    assert all(map(HeartbeatFilter().is_new, beats))


def test_random_bytes() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        with pytest.raises(WireError):
            decode_heartbeat(rng.randbytes(DATAGRAM_BYTES), ID, SECRET)
