"""The byte stream between two nodes: frames, the handshake, and a link made of both. No I/O.

A frame is 12 bytes of header, big-endian, then two parts:

    offset  size
    0       4     length of the msgpack part
    4       4     length of the payload
    8       1     wire version: 0 in a Hello, then the version agreed on
    9       1     0
    10      2     code of the message
    12            msgpack part, then payload

Each side first sends a `Hello`; what is in it, and its frame, never change. Version and features
are agreed on by each side alone, from the two Hellos. The shell has proven by the certificate who
the peer is; the handshake compares.

invariants:
- a `FrameReader` that has been drained holds less than one frame, and no frame is longer than the
  limits of its code allow: they are checked when its header is there, before the rest is kept
- nothing but a Hello is decoded before the handshake is done, and no Hello after it
- after a `WireError` a link says nothing more: it raises the same again
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from lockmgr.cluster.codec import Registered, Registry, WireError
from lockmgr.cluster.view import NodeId

FRAME_HEADER: Final = Struct(">IIBBH")
HELLO_VERSION: Final = 0
"""In the header of a Hello, whose form all versions have in common."""
HELLO_CODE: Final = 1
GOODBYE_CODE: Final = 2
CLUSTER_ID_BYTES: Final = 16

MIN_VERSION: Final = 1
MAX_VERSION: Final = 1
"""The versions this code speaks."""
FEATURES: Final = 0
"""Of 64 bits each: what this code can do beyond its version; none so far."""

assert FRAME_HEADER.size == 12


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of each side. ``slot`` NEWCOMER_SLOT: not a member yet."""

    cluster_id: bytes
    """16 bytes: of the volume, or of whatever the nodes have in common."""
    slot: int
    incarnation: int
    epoch: int
    """Of the sender's view. For people and for whoever is behind: it decides nothing."""
    min_version: int = MIN_VERSION
    max_version: int = MAX_VERSION
    features: int = FEATURES
    """What the sender can do."""
    needs: int = 0
    """What the receiver must be able to do."""
    software: str = ""
    """For people."""

    @property
    def node(self) -> NodeId:
        return NodeId(self.slot, self.incarnation)


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender closes the connection, and says why."""

    words: str


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the handshake came to."""

    peer: NodeId
    version: int
    features: int
    """What both can do."""
    epoch: int
    """The peer's when it said hello."""
    software: str


def agree(ours: Hello, theirs: Hello, expected: NodeId | None) -> Agreed:
    """Compare two Hellos. ``expected``: whom the certificate names, if that is known.

    Raises `WireError` with what is to be done about it.
    """
    for hello in (theirs, ours):
        if len(hello.cluster_id) != CLUSTER_ID_BYTES:
            raise WireError(f"a cluster id of {len(hello.cluster_id)} bytes")
    if theirs.cluster_id != ours.cluster_id:
        raise WireError(
            f"the peer is of cluster {theirs.cluster_id.hex()}, this one is {ours.cluster_id.hex()}"
        )
    if expected is not None and theirs.node != expected:
        raise WireError(f"the peer says it is {theirs.node}, its certificate is {expected}'s")
    if theirs.node == ours.node:
        raise WireError(f"the peer says it is {ours.node}, which is this node")
    version = min(ours.max_version, theirs.max_version)
    if version < max(ours.min_version, theirs.min_version, 1):
        raise WireError(
            f"the peer speaks wire versions {theirs.min_version} to {theirs.max_version}, this "
            f"node {ours.min_version} to {ours.max_version}: update the older of the two"
        )
    for needs, features, who in (
        (theirs.needs, ours.features, "this node"),
        (ours.needs, theirs.features, "the peer"),
    ):
        if needs & ~features:
            raise WireError(f"{who} lacks features {needs & ~features:#x}: update it")
    features = ours.features & theirs.features
    return Agreed(theirs.node, version, features, theirs.epoch, theirs.software)


def frame(registry: Registry, message: object, version: int) -> bytes:
    """A message as a frame. Raises ValueError if no peer could take it."""
    code, header, payload = registry.encode(message)
    head = FRAME_HEADER.pack(len(header), len(payload), version, 0, code)
    return b"".join((head, header, payload))


class FrameReader:
    """Cuts a byte stream into frames. ``version`` is what the next frame must say."""

    __slots__ = ("_buffer", "_entry", "_lengths", "_registry", "version")

    def __init__(self, registry: Registry, version: int) -> None:
        self.version = version
        self._registry = registry
        self._buffer = bytearray()
        self._entry: Registered | None = None
        self._lengths = (0, 0)

    @property
    def held_bytes(self) -> int:
        """What has arrived and was not taken."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes have arrived. To be followed by `next` until that returns None."""
        self._buffer += data

    def drop(self) -> None:
        """Nothing of this stream is wanted any more."""
        self._buffer.clear()

    def next(self) -> tuple[int, bytes, bytes] | None:
        """Code, msgpack part and payload of the next frame; None: it is not complete.

        Raises `WireError`.
        """
        if self._entry is None:
            if len(self._buffer) < FRAME_HEADER.size:
                return None
            header_bytes, payload_bytes, version, zero, code = FRAME_HEADER.unpack_from(
                self._buffer
            )
            if version != self.version:
                raise WireError(f"a frame of wire version {version}, not {self.version}")
            if zero:
                raise WireError(f"{zero:#x} in a frame where 0 belongs")
            self._entry = self._registry.entry(code, header_bytes, payload_bytes)
            self._lengths = (header_bytes, payload_bytes)
        middle = FRAME_HEADER.size + self._lengths[0]
        end = middle + self._lengths[1]
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            header = bytes(view[FRAME_HEADER.size : middle])
            payload = bytes(view[middle:end])
        del self._buffer[:end]
        code = self._entry.code
        self._entry = None
        return code, header, payload


class WireLink:
    """One connection's worth of protocol: bytes in, messages out, and the other way round.

    ``expected`` is the node that the peer's certificate names. The shell sends `opening` at once,
    feeds what arrives, takes messages with `next` until it returns None, and closes the connection
    on `WireError`, with `closing` as its last words.
    """

    def __init__(self, registry: Registry, ours: Hello, expected: NodeId | None = None) -> None:
        self.agreed: Agreed | None = None
        self.failure: WireError | None = None
        self.messages_in = 0
        self.messages_out = 0
        self._registry = registry
        self._ours = ours
        self._expected = expected
        self._reader = FrameReader(registry, HELLO_VERSION)

    @property
    def held_bytes(self) -> int:
        """What has arrived and is not a whole message yet."""
        return self._reader.held_bytes

    def opening(self) -> bytes:
        """The first bytes to be sent."""
        return frame(self._registry, self._ours, HELLO_VERSION)

    def closing(self, words: str) -> bytes:
        """The last bytes to be sent: why. Nothing if the peer could not read it."""
        return b"" if self.agreed is None else self.encode(Goodbye(words[:1000]))

    def encode(self, message: object) -> bytes:
        """A message as bytes. Raises ValueError if the peer could not take it.

        Not before the handshake is done.
        """
        assert self.agreed is not None
        self.messages_out += 1
        return frame(self._registry, message, self.agreed.version)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes have arrived."""
        if self.failure is None:
            self._reader.feed(data)

    def next(self) -> Any | None:
        """The next message, the peer's Hello apart; None: more bytes are needed.

        Raises `WireError`.
        """
        if self.failure is not None:
            raise self.failure
        try:
            return self._next()
        except WireError as error:
            self.failure = error
            self._reader.drop()
            raise

    def _next(self) -> Any | None:
        while (found := self._reader.next()) is not None:
            code, header, payload = found
            if (code == HELLO_CODE) != (self.agreed is None):
                raise WireError(f"code {code} in the wrong place: Hello comes first, and once")
            message = self._registry.decode(code, header, payload)
            if self.agreed is not None:
                self.messages_in += 1
                return message
            self.agreed = agree(self._ours, message, self._expected)
            self._reader.version = self.agreed.version
        return None
