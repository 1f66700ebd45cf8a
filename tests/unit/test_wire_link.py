"""Frames, handshake and hostile bytes: a message, a `WireError`, or patience; nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockmgr.cluster.codec import WireError
from lockmgr.cluster.codes import REGISTRY
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from lockmgr.cluster.wire import (
    FRAME_HEADER,
    HELLO_CODE,
    MIN_VERSION,
    FrameReader,
    Goodbye,
    Hello,
    WireLink,
    agree,
    frame,
)
from lockmgr.messages import Cancel, Resource
from tests.unit.wire_examples import example

ID = bytes(range(16))
OURS = Hello(ID, 1, 7, 12)
THEIRS = Hello(ID, 2, 9, 11)
FRAMES = [frame(REGISTRY, example(kind), MIN_VERSION) for kind in REGISTRY.by_type if kind != Hello]


def greeted(expected: NodeId | None = THEIRS.node) -> WireLink:
    link = WireLink(REGISTRY, OURS, expected)
    link.feed(WireLink(REGISTRY, THEIRS).opening())
    assert link.next() is None and link.agreed is not None
    return link


def drained(link: WireLink) -> list[object]:
    found = []
    while (message := link.next()) is not None:
        found.append(message)
    return found


# -- the good case -----------------------------------------------------------------------------
def test_two_links() -> None:
    one, two = WireLink(REGISTRY, OURS, THEIRS.node), WireLink(REGISTRY, THEIRS, OURS.node)
    one.feed(two.opening())
    two.feed(one.opening())
    assert one.next() is None and two.next() is None
    assert one.agreed is not None and one.agreed.peer == NodeId(2, 9) and one.agreed.epoch == 11
    assert two.agreed is not None and two.agreed.peer == NodeId(1, 7)
    message = Cancel(Resource(b"r", b"p"), 1, 2, 3)
    two.feed(one.encode(message) + one.closing("done"))
    assert drained(two) == [message, Goodbye("done")]
    assert (one.messages_out, two.messages_in) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(FRAMES), max_size=8), st.lists(st.integers(0, 400)))
def test_any_cut_gives_the_same(frames: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frames)
    whole = greeted()
    whole.feed(stream)
    expected = drained(whole)
    assert len(expected) == len(frames)
    link = greeted()
    found = []
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, end in pairwise(borders):
        link.feed(stream[start:end])
        found += drained(link)
    assert found == expected and link.held_bytes == 0


# -- the handshake -----------------------------------------------------------------------------
def test_agree_on_the_highest_version_and_common_features() -> None:
    ours = replace(OURS, min_version=2, max_version=5, features=0b1110, needs=0b10)
    theirs = replace(THEIRS, min_version=1, max_version=4, features=0b0111, needs=0b100)
    agreed = agree(ours, theirs, None)
    assert (agreed.version, agreed.features) == (4, 0b110)
    assert replace(agree(theirs, ours, None), peer=agreed.peer, epoch=11) == agreed


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (replace(THEIRS, cluster_id=bytes(16)), "the peer is of cluster 0{32}"),
        (replace(THEIRS, cluster_id=b"short"), "a cluster id of 5 bytes"),
        (replace(THEIRS, slot=3), "says it is 3.9, its certificate is 2.9's"),
        (replace(THEIRS, incarnation=8), "says it is 2.8"),
        (replace(THEIRS, min_version=2, max_version=3), "versions 2 to 3, this node 1 to 1"),
        (replace(THEIRS, min_version=0, max_version=0), "update the older"),
        (replace(THEIRS, min_version=-5, max_version=-1), "update the older"),
        (replace(THEIRS, needs=0b100), "this node lacks features 0x4"),
    ],
)
def test_handshake_refused(theirs: Hello, words: str) -> None:
    link = WireLink(REGISTRY, OURS, THEIRS.node)
    link.feed(frame(REGISTRY, theirs, 0))
    with pytest.raises(WireError, match=words):
        link.next()
    with pytest.raises(WireError, match=words):
        link.next()
    assert link.closing("why") == b""


def test_peer_without_what_we_need() -> None:
    with pytest.raises(WireError, match="the peer lacks features 0x1"):
        agree(replace(OURS, features=1, needs=1), THEIRS, None)


def test_self_is_no_peer_and_newcomers_are() -> None:
    with pytest.raises(WireError, match="which is this node"):
        agree(OURS, OURS, None)
    newcomer = replace(THEIRS, slot=NEWCOMER_SLOT, incarnation=0x1234567890)
    assert agree(OURS, newcomer, newcomer.node).peer == newcomer.node


def test_nothing_before_hello_and_no_hello_after() -> None:
    link = WireLink(REGISTRY, OURS)
    link.feed(frame(REGISTRY, Goodbye("early"), 0))
    with pytest.raises(WireError, match="Hello comes first"):
        link.next()
    link = WireLink(REGISTRY, OURS)
    link.feed(FRAMES[0])
    with pytest.raises(WireError, match="wire version 1, not 0"):
        link.next()
    link = greeted()
    link.feed(frame(REGISTRY, THEIRS, MIN_VERSION))
    with pytest.raises(WireError, match="Hello comes first, and once"):
        link.next()


# -- hostile bytes -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "words"),
    [
        ((0, 0, 1, 1, 16), "0x1 in a frame where 0 belongs"),
        ((0, 0, 1, 0, 999), "no message has code 999"),
        ((4097, 0, 1, 0, 16), "Request of 4097 bytes"),
        ((0xFFFFFFFF, 0xFFFFFFFF, 1, 0, 32), "Reassert of 4294967295 bytes"),
        ((1, 1, 1, 0, 16), "1 of payload"),
        ((10, 0, 0, 0, HELLO_CODE), "wire version 0, not 1"),
    ],
)
def test_refused_by_the_header_alone(head: tuple[int, ...], words: str) -> None:
    link = greeted()
    link.feed(FRAME_HEADER.pack(*head))
    with pytest.raises(WireError, match=words):
        link.next()
    link.feed(bytes(1000))
    assert link.held_bytes == 0


def test_a_partial_frame_holds_no_more_than_its_limit() -> None:
    reader = FrameReader(REGISTRY, MIN_VERSION)
    limit = REGISTRY.by_code[16].limit_bytes
    reader.feed(FRAME_HEADER.pack(limit, 0, MIN_VERSION, 0, 16))
    for _ in range(limit - 1):
        reader.feed(b"\0")
        assert reader.next() is None
    assert reader.held_bytes == FRAME_HEADER.size + limit - 1
    reader.feed(b"\0")
    assert reader.next() == (16, bytes(limit), b"")
    assert reader.held_bytes == 0


def mutated(rng: random.Random) -> bytes:
    """One to three valid frames, and what a fault or an enemy makes of them."""
    data = bytearray(b"".join(rng.choices(FRAMES, k=rng.randint(1, 3))))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        what = rng.randrange(6)
        if what == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[at] = rng.choice((0, 0x7F, 0x80, 0x90, 0x91, 0xC1, 0xCF, 0xDD, 0xDF, 0xFF))
        elif what == 2:
            del data[at : at + rng.randint(1, 8)]
        elif what == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif what == 4:
            del data[at:]
        else:
            other = rng.choice(FRAMES)
            cut = rng.randrange(len(other))
            data[at:at] = other[cut : cut + rng.randint(1, 16)]
    return bytes(data)


def reframed(rng: random.Random) -> bytes:
    """A frame whose lengths are right and whose msgpack part is a mutated one."""
    code = rng.choice(list(REGISTRY.by_code))
    body = bytearray(mutated(rng)[FRAME_HEADER.size :][: REGISTRY.by_code[code].limit_bytes])
    return FRAME_HEADER.pack(len(body), 0, MIN_VERSION, 0, code) + body


WILD: list[Any] = [None, True, -1, 0, (1 << 64) - 1, 0.5, b"", b"x" * 33, "", "a", [], [[]], {}]


def retyped(rng: random.Random) -> bytes:
    """A frame with well-formed msgpack, in which some field is anything."""
    sent = rng.choice(FRAMES)
    fields = msgpack.unpackb(sent[FRAME_HEADER.size :])
    target = fields
    while target and isinstance(inner := rng.choice(target), list) and rng.random() < 0.7:
        target = inner
    if target:
        target[rng.randrange(len(target))] = rng.choice(WILD)
    body: bytes = msgpack.packb(fields)
    (_length, *rest) = FRAME_HEADER.unpack_from(sent)
    return FRAME_HEADER.pack(len(body), *rest) + body


@pytest.mark.parametrize("make", [mutated, reframed, retyped])
def test_hundred_thousand_mutations(make: Callable[[random.Random], bytes]) -> None:
    """40,000 of each kind: messages that encode again, or a WireError in a few words."""
    rng = random.Random(2)
    most = FRAME_HEADER.size + max(entry.limit_bytes for entry in REGISTRY.by_code.values())
    good = bad = 0
    words: set[str] = set()
    link = greeted()
    for _ in range(40_000):
        link.feed(make(rng))
        try:
            while (message := link.next()) is not None:
                REGISTRY.encode(message)
                good += 1
            assert link.held_bytes <= most
            if rng.random() < 0.9:
                continue
        except WireError as error:
            words.add(str(error))
            bad += 1
        link = greeted()
    assert good > 50 and bad > 1000
    assert all(0 < len(text) < 300 and text.isprintable() for text in words)
