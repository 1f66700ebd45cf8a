"""Messages to bytes and back: nothing is lost, nothing wrong is believed, bytes stay the same."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockmgr.channel import Control
from lockmgr.cluster.codec import Registry, WireError
from lockmgr.cluster.codes import REGISTRY
from lockmgr.cluster.messages import EvictAsked, Message
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import MIN_VERSION, Goodbye, Hello, frame
from lockmgr.messages import AnyMessage, Cancel, Reassert, Request, Resource, Settled
from lockmgr.modes import Mode
from lockmgr.ranges_messages import RangeMessage
from lockmgr.snapshot_messages import Snapshots
from tests.unit.wire_examples import anything, example

GOLDEN = Path(__file__).with_name("wire_golden.txt")


def members_of(union: Any) -> set[type]:
    return {one for arm in get_args(union) for one in (members_of(arm) or {arm})}


def test_every_message_has_a_code() -> None:
    every = members_of(AnyMessage) | members_of(RangeMessage) | members_of(Message)
    every |= members_of(Control) | members_of(Snapshots)
    assert set(REGISTRY.by_type) == every | {Hello, Goodbye}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(REGISTRY.by_type)).flatmap(anything))
def test_roundtrip(message: object) -> None:
    code, header, payload = REGISTRY.encode(message)
    assert REGISTRY.decode(code, header, payload) == message


def golden_lines() -> list[str]:
    lines = []
    for code, entry in sorted(REGISTRY.by_code.items()):
        sent = frame(REGISTRY, example(entry.type), MIN_VERSION)
        lines.append(f"{code} {entry.type.__name__} {sent.hex()}")
    return lines


def test_golden_bytes() -> None:
    """Each message as version 1 has it. A field that is added has a default and comes last; then
    `python -m tests.unit.test_wire_codec` writes the new file."""
    assert GOLDEN.read_text().splitlines() == golden_lines()


@dataclass(frozen=True)
class Blob:
    offset: int
    data: bytes


class Flags(IntFlag):
    A = 1
    B = 4


@dataclass(frozen=True)
class Odd:
    flags: Flags
    pairs: tuple[tuple[int, bool], ...] = ()
    note: str | None = None


def own_registry() -> Registry:
    registry = Registry()
    registry.register(Blob, 1, payload="data", payload_limit_bytes=10)
    registry.register(Odd, 2, limit_bytes=100, max_items=3)
    return registry


def test_payload_follows_as_it_is() -> None:
    registry = own_registry()
    assert registry.encode(Blob(7, b"data")) == (1, msgpack.packb([7]), b"data")
    assert registry.decode(1, msgpack.packb([7]), b"data") == Blob(7, b"data")
    with pytest.raises(WireError, match="at most 4096 and 10"):
        registry.decode(1, msgpack.packb([7]), bytes(11))
    with pytest.raises(ValueError, match="at most"):
        registry.encode(Blob(7, bytes(11)))


def test_fields_added_later_may_be_missing() -> None:
    registry = own_registry()
    assert registry.decode(2, msgpack.packb([5])) == Odd(Flags.A | Flags.B)
    assert registry.decode(2, msgpack.packb([0, [[1, True]]])) == Odd(Flags(0), ((1, True),))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([], "an array of 1 to 3"),
        ([1, [], None, 4], "bad msgpack: 4 exceeds"),
        (7, "an array of 1 to 3 expected, not 7"),
        ([2], "Odd.flags: flags of Flags expected, not 2"),
        ([-1], "flags of Flags"),
        ([True], "flags of Flags"),
        ([1, [[1, 1]]], "Odd.pairs: tuple.1: true or false expected, not 1"),
        ([1, [[1.0, True]]], "a number expected, not 1.0"),
        ([1, [[1, True]] * 4], "bad msgpack: 4 exceeds"),
        ([1, [], b"note"], "Odd.note: text expected, not bytes of 4"),
        ([1, {}], "an array expected"),
        ([1, {1: 2}], "bad msgpack"),
        ([1, msgpack.ExtType(1, b"")], "an array expected"),
        ([1, msgpack.ExtType(1, b"1")], "bad msgpack"),
        ([1, msgpack.Timestamp(1)], "bad msgpack"),
    ],
)
def test_wrong_fields(fields: Any, words: str) -> None:
    with pytest.raises(WireError, match=words):
        own_registry().decode(2, msgpack.packb(fields))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "bad msgpack"),
        (b"\x91", "incomplete"),
        (b"\x91\x01\x01", "extra data"),
        (b"\xc1", "bad msgpack"),
        (b"\x93\x01\x90\xa1\xff", "utf-8"),
        (b"\xdd\xff\xff\xff\xff", "exceeds"),
        (b"\xdb\xff\xff\xff\xff", "exceeds|incomplete"),
        (b"\x91" * 99, "an array of 1 to 3|bad msgpack"),
        (bytes(101), "Odd of 101 bytes"),
    ],
)
def test_bad_msgpack(header: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        own_registry().decode(2, header)


@pytest.mark.parametrize(
    ("message", "fields", "words"),
    [
        (Request, [[b"", b""], 1, 2, 3, 0, True], "Request.resource: Resource: .*has 0 bytes"),
        (Request, [[b"x" * 33, b""], 1, 2, 3, 0, True], "resource: Resource: .*xxx"),
        (Request, [[b"r", b""], 1, 2, 3, 6, True], "Request.mode: one of Mode expected, not 6"),
        (Request, [[b"r", b""], 1, 2, 3, 0.0, True], "one of Mode"),
        (Cancel, [[b"r", b""], 1, 2, None], "Cancel.serial: a number expected, not None"),
        (Settled, [1, 2, [3, 3], []], "Settled.cleared: the same twice"),
        (EvictAsked, [[1], "why"], "NodeId: an array of 2 to 2"),
        (Reassert, [1, 2, [[[b"r", b""], 3, 0, [b"short", 1]]]], "ValueBlock: .*64 bytes"),
        (Reassert, [1, 2, [[[b"r", b""], 3, 0, [None, 0], 0, 0, True, float("nan")]]], "finite"),
    ],
)
def test_wrong_messages(message: type, fields: Any, words: str) -> None:
    with pytest.raises(WireError, match=words):
        REGISTRY.decode(REGISTRY.by_type[message].code, msgpack.packb(fields))


def test_words_stay_short() -> None:
    with pytest.raises(WireError) as caught:
        own_registry().decode(2, msgpack.packb([1, [], "x" * 80]) + b"x" * 3)
    assert len(str(caught.value)) < 200
    with pytest.raises(WireError) as caught:
        REGISTRY.decode(16, msgpack.packb([[b"\xff" * 1000, b""], 1, 2, 3, 0, True]))
    assert len(str(caught.value)) < 200


def test_what_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="beyond 64 bits"):
        REGISTRY.encode(Cancel(Resource(b"r", b""), 1, 2, 1 << 64))
    with pytest.raises(ValueError, match="at most 4096"):
        REGISTRY.encode(EvictAsked(NodeId(1, 1), "x" * 5000))
    with pytest.raises(ValueError, match="has no code"):
        REGISTRY.encode(Mode.EX)


def test_what_cannot_be_registered() -> None:
    @dataclass
    class Vague:
        what: int | str

    @dataclass
    class Mapping:
        what: dict[int, int]

    for kind in (Vague, Mapping):
        with pytest.raises(TypeError, match="no wire form"):
            Registry().register(kind, 1)
    with pytest.raises(TypeError, match="not its last field"):
        Registry().register(Blob, 1, payload="offset")
    registry = own_registry()
    with pytest.raises(ValueError, match="cannot have code 1"):
        registry.register(Vague, 1)


@pytest.mark.parametrize("code", [16, 32, 50, 96])
def test_nested_arrays_cost_little(code: int) -> None:
    """The worst that msgpack allocates before anything is checked."""
    entry = REGISTRY.by_code[code]
    deepest = b"\xdd" + entry.max_items.to_bytes(4, "big")
    header = deepest * (entry.limit_bytes // len(deepest))
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            REGISTRY.decode(code, header)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 9 * 1024 * max(entry.max_items, 64) + 2 * entry.limit_bytes + (1 << 17)


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")
