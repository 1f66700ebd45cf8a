"""Reservation keys: who a registration belongs to, in 64 bits.

    tag 16 | slot 8 | incarnation 24 | generation 16        (most significant first)

One life of a node in a slot is an incarnation, never reused; each nexus that carries its I/O has
the next generation. So a key is registered once, ever, and PREEMPT of it is a compare-and-swap.
Newcomers and offline tools, who have no slot, use slot 255 with a random remainder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from redirector.block.device import BlockError, InitiatorPort

TAG = 0xC5F5
"""A key of csvfs; whatever begins otherwise is a stranger's."""
NEWCOMER_SLOT = 255
MAX_SLOT = 254
MAX_INCARNATION = (1 << 24) - 1
MAX_GENERATION = (1 << 16) - 1
_REMAINDER_BITS = 40


class KeysExhausted(BlockError):
    """A counter in the key would wrap; a key must never come again."""


@dataclass(frozen=True, slots=True, order=True)
class PathKey:
    """The key of one path of one incarnation."""

    slot: int
    incarnation: int
    generation: int

    def __post_init__(self) -> None:
        if not 0 <= self.slot <= MAX_SLOT:
            raise ValueError(f"slot {self.slot} is not within 0..{MAX_SLOT}")
        if not 1 <= self.incarnation <= MAX_INCARNATION:
            raise KeysExhausted(f"incarnation {self.incarnation} is not within 24 bits")
        if not 1 <= self.generation <= MAX_GENERATION:
            raise KeysExhausted(
                f"slot {self.slot}, incarnation {self.incarnation}: all {MAX_GENERATION} path "
                "generations are used up; unmount and mount again for a new incarnation"
            )

    def pack(self) -> int:
        """The 64-bit key."""
        return TAG << 48 | self.slot << 40 | self.incarnation << 16 | self.generation

    @classmethod
    def parse(cls, key: int) -> PathKey | None:
        """The path behind a key; None for a newcomer's and for a stranger's."""
        slot, incarnation, generation = key >> 40 & 0xFF, key >> 16 & 0xFFFFFF, key & 0xFFFF
        if key >> 48 != TAG or slot == NEWCOMER_SLOT or not incarnation or not generation:
            return None
        return cls(slot, incarnation, generation)

    def next(self) -> PathKey:
        """The next generation. Raises `KeysExhausted` instead of wrapping."""
        return replace(self, generation=self.generation + 1)

    def is_of(self, slot: int, incarnation: int) -> bool:
        """Whether it belongs to that life of that slot."""
        return self.slot == slot and self.incarnation == incarnation


def newcomer_key(rng: Random) -> int:
    """A key for who has no slot: a newcomer, ``check``, ``dump``, ``validate``."""
    return TAG << 48 | NEWCOMER_SLOT << 40 | rng.getrandbits(_REMAINDER_BITS)


def is_newcomer(key: int) -> bool:
    """Whether `newcomer_key` made it."""
    return key >> 40 == TAG << 8 | NEWCOMER_SLOT


def is_foreign(key: int) -> bool:
    """Whether no csvfs makes such a key."""
    return PathKey.parse(key) is None and not is_newcomer(key)


def key_words(key: int) -> str:
    """A key for people."""
    path = PathKey.parse(key)
    if path is not None:
        return (
            f"{key:#018x} (slot {path.slot}, incarnation {path.incarnation}, "
            f"path generation {path.generation})"
        )
    if is_newcomer(key):
        return f"{key:#018x} (a newcomer or an offline tool of csvfs)"
    return f"{key:#018x} (not a key of csvfs)"


def choose_port(initiator_name: str, rng: Random) -> InitiatorPort:
    """An initiator port of this host that no other session has: a random ISID (RFC 7143 11.12.5,
    type 10b: 24 random bits and a 16-bit qualifier, here random too).
    """
    return InitiatorPort(initiator_name, 0x80 << 40 | rng.getrandbits(40))
