"""SCSI on paper: bytes as the standards print them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirector.block import scsi
from redirector.block.device import (
    IllegalRequest,
    MediumError,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    SpaceExhausted,
    TargetBusy,
    TargetRefused,
    UnitAttention,
)


def fixed(key: int, asc_ascq: int, code: int = 0x70) -> bytes:
    return bytes([code, 0, key, 0, 0, 0, 0, 10]) + bytes(4) + asc_ascq.to_bytes(2, "big") + bytes(4)


def descriptor(key: int, asc_ascq: int, code: int = 0x72) -> bytes:
    return bytes([code, key]) + asc_ascq.to_bytes(2, "big") + bytes(4)


@pytest.mark.parametrize("form", [fixed, descriptor])
@pytest.mark.parametrize(
    ("key", "asc_ascq", "kind", "words"),
    [
        (3, 0x1100, MediumError, "medium error: unrecovered read error"),
        (5, 0x2000, IllegalRequest, "illegal request: invalid command operation code"),
        (6, 0x2A03, UnitAttention, "unit attention: reservations preempted"),
        (7, 0x2707, SpaceExhausted, "data protect: space allocation failed"),
        (7, 0x2700, TargetRefused, "data protect: write protected"),
        (4, 0x1234, TargetRefused, "hardware error"),
    ],
)
def test_sense_in_both_formats(
    form: object, key: int, asc_ascq: int, kind: type[TargetRefused], words: str
) -> None:
    assert callable(form)
    error = scsi.refusal("WRITE", 0x02, form(key, asc_ascq))
    assert type(error) is kind
    assert (error.status, error.sense_key, error.asc_ascq) == (0x02, key, asc_ascq)
    assert str(error) == f"WRITE: {words} (sense {key:X}/{asc_ascq:04X})"


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (0x18, ReservationConflict, "READ: reservation conflict"),
        (0x08, TargetBusy, "READ: busy"),
        (0x28, TargetBusy, "READ: task set full"),
        (0x40, TargetBusy, "READ: task aborted"),
        (0x30, TargetRefused, "READ: ACA active"),
        (0x7F, TargetRefused, "READ: status 7Fh"),
    ],
)
def test_status_without_sense(status: int, kind: type[TargetRefused], words: str) -> None:
    error = scsi.refusal("READ", status, b"")
    assert type(error) is kind
    assert str(error) == words


def test_deferred_sense_is_of_an_earlier_command() -> None:
    for data in (fixed(3, 0x0C00, 0x71), descriptor(3, 0x0C00, 0x73)):
        assert scsi.parse_sense(data) == scsi.Sense(3, 0x0C00, deferred=True)
        refusal = scsi.refusal("READ", 0x02, data)
        assert "(of an earlier command)" in str(refusal)
        assert type(refusal) is TargetRefused  # it is not what was read here that is gone


def test_an_array_that_fails_over_is_busy() -> None:
    for asc_ascq in (0x0401, 0x040A):
        assert type(scsi.refusal("READ", 0x02, fixed(2, asc_ascq))) is TargetBusy
    assert type(scsi.refusal("READ", 0x02, fixed(2, 0x0403))) is TargetRefused


@given(st.binary(max_size=300))
def test_no_answer_of_a_target_breaks_the_parsers(data: bytes) -> None:
    scsi.refusal("READ", 0x02, data)
    scsi.parse_device_id(data)
    scsi.parse_block_limits(data)
    scsi.parse_unmap_supported(data)
    scsi.parse_cache_non_volatile(data)
    scsi.parse_write_cache_enabled(data)
    scsi.vpd_body(data, scsi.VPD_LIMITS)
    for parse in (
        scsi.parse_inquiry,
        scsi.parse_capacity,
        scsi.parse_keys,
        scsi.parse_reservation,
        scsi.parse_capabilities,
    ):
        with contextlib.suppress(ValueError):
            parse(data)


def test_command_blocks() -> None:
    assert scsi.inquiry(252).hex(" ") == "12 00 00 00 fc 00"
    assert scsi.inquiry(252, 0x83).hex(" ") == "12 01 83 00 fc 00"
    assert scsi.mode_sense_caching(192).hex(" ") == "1a 08 08 00 c0 00"
    assert scsi.read_capacity_16(32).hex(" ") == "9e 10" + " 00" * 8 + " 00 00 00 20 00 00"
    assert scsi.unmap_command(24).hex(" ") == "42 00 00 00 00 00 00 00 18 00"
    assert scsi.write_same_16(0x123456789A, 16).hex(" ") == (
        "93 00 00 00 00 12 34 56 78 9a 00 00 00 10 00 00"
    )
    assert scsi.persistent_reserve_in(1, 64).hex(" ") == "5e 01 00 00 00 00 00 00 40 00"
    assert scsi.persistent_reserve_out(4, 6).hex(" ") == "5f 04 06 00 00 00 00 00 18 00"
    assert len(scsi.SYNCHRONIZE_CACHE_16) == 16


def test_parameter_lists() -> None:
    keys = scsi.reserve_parameters(0x0102030405060708, 0x1112131415161718)
    assert keys.hex() == "0102030405060708" + "1112131415161718" + "00" * 8
    unmap = scsi.unmap_parameters([(0x100, 8), (0x200, 16)])
    assert unmap.hex(" ", 4) == (
        "00260020 00000000 00000000 00000100 00000008 00000000 00000000 00000200 00000010 00000000"
    )


def test_the_best_designator_is_taken() -> None:
    def designator(kind: int, identifier: bytes, association: int = 0) -> bytes:
        return bytes([1, association << 4 | kind, 0, len(identifier)]) + identifier

    t10 = designator(1, b"VENDOR  1234")
    eui = designator(2, b"eui-64..")
    naa = designator(3, bytes.fromhex("6001405f00000001"))
    local = designator(3, bytes.fromhex("3000000100000001"))
    port = designator(3, bytes.fromhex("5001405f00000001"), association=1)
    assert scsi.parse_device_id(port + t10 + local + eui + naa).hex() == "6001405f00000001"
    assert scsi.parse_device_id(port + t10 + local + eui) == b"eui-64.."
    assert scsi.parse_device_id(local + t10) == b"VENDOR  1234"
    assert scsi.parse_device_id(port + local).hex() == "3000000100000001"
    assert scsi.parse_device_id(port) == b""


def test_reservation_data() -> None:
    keys = bytes.fromhex("00000007 00000010 00000000000000aa 00000000000000bb")
    assert scsi.parse_keys(keys) == RegisteredKeys(7, (0xAA, 0xBB))
    with pytest.raises(ValueError, match="24 announced"):
        scsi.parse_keys(keys[:16])
    assert scsi.key_list_bytes(keys[:8]) == 24
    none = Reservation(7, 0, ReservationType.NONE)
    assert scsi.parse_reservation(bytes.fromhex("00000007 00000000")) == none
    held = bytes.fromhex("00000007 00000010 00000000000000aa 00000000 00 06 0000")
    six = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
    assert scsi.parse_reservation(held) == Reservation(7, 0xAA, six)
    other = scsi.parse_reservation(held.replace(b"\x06", b"\x05"))
    assert other.type == 5
    assert not isinstance(other.type, ReservationType)
    with_types = scsi.parse_capabilities(bytes.fromhex("0008 01 80 4000 0000"))
    assert with_types == scsi.ReserveCapabilities(True, True)
    assert scsi.parse_capabilities(bytes.fromhex("0008 00 00 0000 0000")) == (
        scsi.ReserveCapabilities(False, None)
    )


def test_cache_and_provisioning_pages() -> None:
    caching = bytes([0x08, 18, 0x04]) + bytes(17)
    assert scsi.parse_write_cache_enabled(bytes([23, 0, 0, 0]) + caching) is True
    off = bytes([0x08, 18, 0x00]) + bytes(17)
    assert scsi.parse_write_cache_enabled(bytes([31, 0, 0, 8]) + bytes(8) + off) is False
    assert scsi.parse_write_cache_enabled(bytes([3, 0, 0, 0])) is None
    assert scsi.parse_cache_non_volatile(bytes([0, 0, 0x02]))
    assert not scsi.parse_cache_non_volatile(bytes([0, 0, 0x03]))
    assert scsi.parse_unmap_supported(bytes([0, 0x80]))
    limits = bytes(4) + (2048).to_bytes(4, "big") + bytes(8)
    assert scsi.parse_block_limits(limits) == scsi.BlockLimits(2048, 0, 0, 0)
    assert scsi.parse_capacity(bytes(7) + b"\xff" + bytes([0, 0, 16, 0, 0, 0, 0x80])) == (
        scsi.Capacity(256, 4096, True)
    )
