"""What can go wrong in membership, beyond what its effects already say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lockmgr.cluster.effects import Stop


class MembershipError(Exception):
    """Base of all below."""


class IncarnationsExhausted(MembershipError):
    """A slot's incarnation number would wrap; a key must never come again."""


class EpochsExhausted(MembershipError):
    """The view's epoch would wrap."""


class MembershipViolation(MembershipError, AssertionError):
    """The shell, or a peer, did what no correct one does."""


class ClusterStopped(MembershipError):
    """This incarnation is over: ``stop`` says how and why."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.words)
        self.stop = stop
