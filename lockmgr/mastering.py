"""Who masters a resource: rendezvous hashing of its placement over the members of a view.

Thaler and Ravishankar 1998 ("highest random weight"): each member has a score for each placement,
the highest wins. When a member goes, only what it mastered moves; when one comes, only what it
gets moves, from every other alike. All nodes compute the same from the member list alone.

invariants:
- the answer depends on the placement and the set of members, on nothing else
- what is remembered belongs to one member list, and is bounded by ``CACHE_LIMIT`` placements
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from lockmgr.messages import Resource

CACHE_LIMIT: Final = 65_536
INCARNATION_BITS: Final = 24

NOBODY: Final = -1
"""Masters everything as long as there are no members."""

Choose = Callable[[bytes, Sequence[int]], int]
"""(placement, members) to the member that masters it."""


def node_number(slot: int, incarnation: int) -> int:
    """How the lock manager calls one life of a node in a slot. Raises `ValueError`."""
    if slot < 0 or not 0 <= incarnation < 1 << INCARNATION_BITS:
        raise ValueError(f"slot {slot}, incarnation {incarnation}")
    return slot << INCARNATION_BITS | incarnation


def slot_and_incarnation(node: int) -> tuple[int, int]:
    """What `node_number` was made of."""
    return node >> INCARNATION_BITS, node & ((1 << INCARNATION_BITS) - 1)


def rendezvous(placement: bytes, members: Sequence[int]) -> int:
    """The member with the highest score for ``placement``; ``members`` is not empty."""
    return max(members, key=lambda node: (_score(placement, node), node))


def _score(placement: bytes, node: int) -> bytes:
    return blake2b(placement, digest_size=8, salt=node.to_bytes(8, "little")).digest()


class Mastering:
    """The masters in one view."""

    __slots__ = ("_cache", "_choose", "members")

    def __init__(self, members: Sequence[int], choose: Choose = rendezvous) -> None:
        self.members = tuple(members)
        self._choose = choose
        self._cache: dict[bytes, int] = {}

    def master_of(self, resource: Resource) -> int:
        """The node that masters ``resource``."""
        return self.of(resource.placement)

    def of(self, placement: bytes) -> int:
        """The node that masters what has this placement."""
        master = self._cache.get(placement)
        if master is None:
            if len(self._cache) >= CACHE_LIMIT:
                self._cache.clear()
            master = self._choose(placement, self.members) if self.members else NOBODY
            self._cache[placement] = master
        return master
