"""A look at the volume before this node's membership begins: is it one, and may it be mounted?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random, SystemRandom
from typing import Final

import trio

from csvfs.format import BLOCK_BYTES, BadBlock, Superblock, View
from csvfs.membership.claim import ClaimRefused
from csvfs.membership.decision import refuse
from csvfs.membership.fixed_area import read_heartbeats
from csvfs.membership.newcomer import observe, open_newcomer
from redirector.block.device import Lun, LunIdentity, OutcomeUnknown
from redirector.block.reservations import KeyInUse, PathClosed

_ATTEMPTS: Final = 4
"""Whoever takes over the cluster at this moment fences every newcomer: they begin again."""
_LIFE_S: Final = 2.5
_LIFE_POLL_S: Final = 0.25
_SYSTEM_RANDOM: Final = SystemRandom()


@dataclass(frozen=True, slots=True)
class Peeked:
    """What stands on the LUN. All but the superblock may be another already."""

    superblock: Superblock
    superblock_trouble: BadBlock | None
    """What is wrong with the superblock, if its backup had to be used."""
    identity: LunIdentity
    view: View


async def peek(lun: Lun, initiator_name: str, *, rng: Random = _SYSTEM_RANDOM) -> Peeked:
    """Log in as a newcomer, look, log out: nothing is left behind, not even a key.

    Raises `ClaimRefused` for what no host may mount so (a copy of the LUN, unknown features,
    another system's reservation), `ForeignReservation`, `NoVolume`, `NoView`, `LoginFailed`,
    `BlockError`.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return await _look(lun, initiator_name, rng)
        except (PathClosed, KeyInUse, OutcomeUnknown):
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


async def _look(lun: Lun, initiator_name: str, rng: Random) -> Peeked:
    async with await open_newcomer(lun, initiator_name, rng) as newcomer:
        seen = await observe(newcomer)
    refusal = refuse(seen)
    if refusal is not None:
        raise ClaimRefused(refusal)
    return Peeked(seen.superblock, newcomer.superblock_trouble, seen.identity, seen.view)


async def shows_life(
    lun: Lun, initiator_name: str, slots: frozenset[int], *, rng: Random = _SYSTEM_RANDOM
) -> bool:
    """Whether a heartbeat in one of these slots is seen to change; takes 2.5 s if none does. False
    proves nothing: who takes over has to watch for longer. Raises as `peek`.
    """
    first: list[bytes] | None = None
    async with await open_newcomer(lun, initiator_name, rng) as newcomer:
        with trio.move_on_after(_LIFE_S):
            while True:
                area = await newcomer.registration.ask(lambda: read_heartbeats(newcomer.device))
                seen = [area[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] for slot in slots]
                if first is not None and seen != first:
                    return True
                first = seen
                await trio.sleep(_LIFE_POLL_S)
    return False
