"""What the benchmarks make of what they see."""

from __future__ import annotations

import struct

import pytest

from benchmarks.lab_hosts import first_active
from benchmarks.wire_beats import heartbeat_in, late_ms, quantile
from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.datagram import encode_heartbeat

LOG = """\
2026-11-23 13:34:02,100 INFO redirector.flow: data flows
2026-11-23 13:34:02,703 INFO lockmgr.cluster: view 3: active host1 (0.1), host11 (4.1); joining host2 (5.1)
2026-11-23 13:34:03,500 INFO lockmgr.cluster: view 4: active host1 (0.1), host2 (5.1), host11 (4.1)
2026-11-23 13:34:09,000 INFO lockmgr.cluster: view 5: active host2 (5.1)
"""  # noqa: E501


def test_a_host_is_active_with_the_first_view_that_says_so() -> None:
    assert first_active(LOG, "host2") - first_active(LOG, "host11") == pytest.approx(0.797)
    with pytest.raises(RuntimeError, match="host3"):
        first_active(LOG, "host3")


def frame(payload: bytes, protocol: int = 17, options: bytes = b"") -> bytes:
    """An Ethernet frame with an IPv4 packet."""
    version = 0x45 + len(options) // 4
    packet = struct.pack(">B8xBHII", version, protocol, 0, 1, 2) + options
    return bytes(14) + packet + bytes(8) + payload


def test_finds_heartbeats_in_frames() -> None:
    beat = encode_heartbeat(Heartbeat(3, 7, 42, 1, 0), bytes(16), bytes(32))
    assert heartbeat_in(frame(beat)) == ("3.7", 42)
    assert heartbeat_in(frame(beat, options=bytes(8))) == ("3.7", 42)
    assert heartbeat_in(frame(beat, protocol=6)) is None
    assert heartbeat_in(frame(beat[:-1])) is None
    assert heartbeat_in(frame(b"X" + beat[1:])) is None
    assert heartbeat_in(b"") is None


def test_a_heartbeat_is_late_by_what_it_came_after_its_time() -> None:
    times = {"0.1": [10.0, 10.5, 11.2, 11.3], "1.1": [5.0, 5.6]}
    assert late_ms(times, 0.5) == pytest.approx([0.0, 0.0, 100.0, 200.0])
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 1.0) == 5.0
