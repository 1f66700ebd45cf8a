"""Reservation keys (`redirector.block.keys`) as the cluster's membership sees them."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from csvfs.ondisk.slots import Session
from lockmgr.cluster.view import NodeId
from redirector.block.device import InitiatorPort
from redirector.block.keys import PathKey, is_newcomer, newcomer_key
from redirector.block.reservations import Victim


class PathKeys:
    """Satisfies `lockmgr.cluster.view.Keys`."""

    def owner(self, key: int) -> NodeId | None:
        """The incarnation that a key belongs to; None for a newcomer's and for a stranger's."""
        return owner_of(key)

    def is_newcomer(self, key: int) -> bool:
        """Whether a newcomer, or an offline tool, made it."""
        return is_newcomer(key)

    def newcomer(self, random_bits: int) -> int:
        """A newcomer's key."""
        return newcomer_key(Random(random_bits))


def owner_of(key: int) -> NodeId | None:
    """The incarnation that a key belongs to; None for a newcomer's and for a stranger's."""
    path = PathKey.parse(key)
    return None if path is None else NodeId(path.slot, path.incarnation)


def victims_of_sessions(sessions: Iterable[Session]) -> list[Victim]:
    """What is to be reinstated of recorded sessions: each where it was made. No keys."""
    return [
        Victim(port=InitiatorPort(each.initiator_name, each.isid), portal=each.portal)
        for each in sessions
    ]
