"""What is damaged is an error that names the block, never a crash or a guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csvfs import format as fmt
from csvfs.format import BadBlock, BlockType, Geometry

VOLUME = bytes(range(16))
_geometry = Geometry.for_lun(1 << 30, 4)
_superblock = fmt.Superblock(VOLUME, _geometry, 1, "label", b"\x01\x02")
_identity = fmt.Identity(3, 2, 0, 4, bytes(16), bytes(16), "node", ("[::1]:1",), b"certificate")
_join = fmt.JoinRequest(
    2, 5, 1, "node", bytes(16), bytes(16), fmt.certificate_fingerprint(b"x"), ("[::1]:1",), b"x"
)
_slot = fmt.SlotBlock(2, _identity, (fmt.Session(fmt.SessionKind.DATA, 1, 5, "iqn.x:y", 6),))
_view = fmt.View(4, 9, (fmt.ViewSlot(1, fmt.SlotState.ACTIVE, node_name="node"),) * 4)
_group = fmt.GroupHeader.fresh(0, _geometry.group_first_unit(0), _geometry.group_units(0))

Decode = Callable[[bytearray], object]
_DECODERS: dict[str, tuple[int, bytearray, Decode]] = {
    "superblock": (0, _superblock.encode(0), fmt.Superblock.decode),
    "view": (16, fmt.encode_view(_view, VOLUME), lambda b: fmt.decode_view(b, 16, VOLUME)),
    "slot": (50, _slot.encode(VOLUME, 50, 1), lambda b: fmt.SlotBlock.decode(b, 50, VOLUME, 2)),
    "heartbeat": (
        114,
        fmt.encode_heartbeat(fmt.Heartbeat(2, 1, 5, 1, 0), VOLUME, 114),
        lambda b: fmt.decode_heartbeat(b, 114, VOLUME, 2),
    ),
    "join": (
        178,
        fmt.encode_join(_join, VOLUME, 178),
        lambda b: fmt.decode_join(b, 178, VOLUME, 2),
    ),
    "journal header": (
        400,
        fmt.JournalHeader(0, 1, 1, 0).encode(VOLUME, 400, 1),
        lambda b: fmt.JournalHeader.decode(b, 400, VOLUME, 0),
    ),
    "group header": (
        _group.address,
        _group.encode(VOLUME, 1),
        lambda b: fmt.GroupHeader.decode(b, _group.address, VOLUME, 0),
    ),
}


@pytest.mark.parametrize("name", _DECODERS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_an_error_that_names_the_block(name: str, data: st.DataObject) -> None:
    address, block, decode = _DECODERS[name]
    decode(block)
    bit = data.draw(st.one_of(st.integers(0, 511), st.integers(0, len(block) * 8 - 1)))
    damaged = bytearray(block)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadBlock, match=f"block {address} is not a valid {name} block"):
        decode(damaged)


@pytest.mark.parametrize("name", _DECODERS)
@settings(max_examples=60)
@given(data=st.data())
def test_nonsense_under_a_valid_checksum_is_an_error_or_a_value(
    name: str, data: st.DataObject
) -> None:
    """Whoever can forge a checksum gets no crash out of the reader."""
    _, block, decode = _DECODERS[name]
    forged = bytearray(block)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(48, 250), st.integers(48, len(block) - 1)))
        forged[at] = data.draw(st.integers(0, 255))
    fmt.seal(forged, fmt.block_version(forged) or 1)
    try:
        decode(forged)
    except BadBlock:
        pass


@pytest.mark.parametrize("name", _DECODERS)
@given(length=st.integers(0, 4095))
@settings(max_examples=10)
def test_short_block(name: str, length: int) -> None:
    _, block, decode = _DECODERS[name]
    with pytest.raises(BadBlock):
        decode(block[:length])


@pytest.mark.parametrize("name", _DECODERS)
def test_noise(name: str) -> None:
    _, block, decode = _DECODERS[name]
    noise = Random(name)
    for _ in range(10):
        with pytest.raises(BadBlock):
            decode(bytearray(noise.randbytes(len(block))))


# -- the errors' words ---------------------------------------------------------------------------
def _inode(address: int = 40, owner: int = 40) -> bytearray:
    block = fmt.new_block(BlockType.INODE, address, owner, VOLUME)
    fmt.seal(block, 7)
    return block


def test_verify_returns_the_version() -> None:
    assert fmt.verify(_inode(), 40, BlockType.INODE, VOLUME, 40) == 7


@pytest.mark.parametrize(
    ("address", "kind", "volume", "owner", "words"),
    [
        (41, BlockType.INODE, VOLUME, 40, "it says that it is block 40"),
        (40, BlockType.XATTR, VOLUME, 40, "type is inode, not xattr"),
        (40, BlockType.INODE, bytes(16), 40, f"belongs to volume {VOLUME.hex()}"),
        (40, BlockType.INODE, VOLUME, 39, "owner is 40, not 39"),
    ],
)
def test_what_does_not_fit_is_said(
    address: int, kind: BlockType, volume: bytes, owner: int, words: str
) -> None:
    with pytest.raises(BadBlock, match=words) as caught:
        fmt.verify(_inode(), address, kind, volume, owner)
    assert caught.value.address == address
    assert caught.value.expected == kind


def test_zeroes_and_foreign_bytes_are_said() -> None:
    with pytest.raises(BadBlock, match="all zeroes"):
        fmt.verify(bytes(4096), 40, BlockType.INODE, VOLUME)
    with pytest.raises(BadBlock, match="magic is 58585858"):
        fmt.verify(b"X" * 4096, 40, BlockType.INODE, VOLUME)
    block = _inode()
    block[4] = 99
    fmt.seal(block, 1)
    with pytest.raises(BadBlock, match=r"type is unknown \(99\)"):
        fmt.verify(block, 40, BlockType.INODE, VOLUME)


def test_a_block_that_was_never_sealed_is_refused() -> None:
    block = fmt.new_block(BlockType.INODE, 40, 40, VOLUME)
    with pytest.raises(BadBlock, match="checksum"):
        fmt.verify(block, 40, BlockType.INODE, VOLUME)


def test_a_version_that_no_clock_reaches_is_refused() -> None:
    block = _inode()
    fmt.HEADER.pack_into(block, 0, fmt.MAGIC, BlockType.INODE, 0, 0, 0, VOLUME, 40, 1 << 63, 40, 0)
    crc = fmt.checksum(block)
    block[8:12] = crc.to_bytes(4, "little")
    with pytest.raises(BadBlock, match="version"):
        fmt.verify(block, 40, BlockType.INODE, VOLUME)


def test_too_long_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="label"):
        replace(_superblock, label="x" * 65).encode(0)
    with pytest.raises(ValueError, match="node name"):
        fmt.encode_view(replace(_view, slots=(fmt.ViewSlot(node_name="é" * 33),)), VOLUME)
    for addresses, words in (
        (("a:1",) * 6, "6 addresses: at most 5"),
        (("",), "empty address"),
        (("a" * 63 + ":1",), "longer"),
    ):
        with pytest.raises(ValueError, match=words):
            fmt.encode_view(replace(_view, slots=(fmt.ViewSlot(addresses=addresses),)), VOLUME)
        with pytest.raises(ValueError, match=words):
            fmt.encode_join(replace(_join, addresses=addresses), VOLUME, 178)
    with pytest.raises(ValueError, match="initiator name"):
        replace(_slot, sessions=(fmt.Session(fmt.SessionKind.DATA, 1, 1, "i" * 224, 1),)).encode(
            VOLUME, 50, 1
        )


def test_a_join_block_without_a_certificate_is_none() -> None:
    with pytest.raises(ValueError, match="without a certificate"):
        fmt.encode_join(replace(_join, certificate=b"", fingerprint=bytes(32)), VOLUME, 178)
    block = fmt.encode_join(_join, VOLUME, 178)
    fmt.CERTIFICATE_LENGTH.pack_into(block, fmt.CERTIFICATE_OFFSET, 0)
    fmt.seal(block, 2)
    with pytest.raises(BadBlock, match="no certificate"):
        fmt.decode_join(block, 178, VOLUME, 2)


def test_a_join_block_cannot_claim_the_fingerprint_of_another() -> None:
    with pytest.raises(ValueError, match="not that of the certificate"):
        fmt.encode_join(replace(_join, fingerprint=b"F" * 32), VOLUME, 178)


def test_a_lock_epoch_beyond_the_epoch_is_damage() -> None:
    with pytest.raises(BadBlock, match="lock epoch 5 in epoch 4"):
        fmt.decode_view(fmt.encode_view(replace(_view, lock_epoch=5), VOLUME), 16, VOLUME)
