"""What a cluster needs of the storage that its nodes share, as two roles.

A *witness* keeps what all nodes can read: the view, heartbeats, join requests, certificates. A
*fencer* decides who may write: it registers keys, lets one of them hold, and shuts others out. On a
LUN with persistent reservations one object is both; a directory with file locks, too
(`directory_arbiter`). Where they are two, `Split` makes one of them.

Both carry out effects (`lockmgr.cluster.effects` says what each one means) and answer with an
outcome (`lockmgr.cluster.outcomes`). They keep to these rules:

- `carry_out` returns exactly once for each effect, within a bounded time; what failed is `Refused`
  or `Unknown`, never an exception. An exception ends the cluster's tasks: it is a bug, or the node
  can do nothing more.
- Nothing is repeated by itself, unless it was certainly not done.
- When the paths are lost, `Cluster.path_lost` is called with their keys first; what was under way
  on them is answered after that.
- `carry_out` may be called by many tasks at once, and cancelled when the cluster is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from lockmgr.cluster.effects import (
    DropNewcomer,
    Fence,
    OpenNewcomer,
    OpenPaths,
    ReadBlocks,
    Reserve,
    Survey,
    Take,
    Unregister,
    WriteHeartbeat,
    WriteJoin,
    WriteView,
)
from lockmgr.cluster.outcomes import Outcome
from lockmgr.cluster.view import NodeId

WitnessEffect = ReadBlocks | WriteHeartbeat | WriteJoin | WriteView
FencerEffect = (
    OpenNewcomer | DropNewcomer | OpenPaths | Survey | Take | Reserve | Fence | Unregister
)
ArbiterEffect = WitnessEffect | FencerEffect
"""Every `IoEffect` but `Knock`, which the network carries out."""


class Certificates(Protocol):
    """Where certificates are found."""

    @property
    def certificates(self) -> Mapping[bytes, bytes]:
        """DER by fingerprint: what is known so far."""
        ...

    async def read_certificates(self, nodes: Iterable[NodeId]) -> None:
        """Look for those of these nodes; whatever is there is in `certificates` afterwards. Nothing
        is raised for what is not there, nor for storage that does not answer."""
        ...


class Witness(Certificates, Protocol):
    """What is read and written on shared storage."""

    async def carry_out(self, effect: WitnessEffect) -> Outcome:
        """Do it, and say how it ended."""
        ...


class Fencer(Protocol):
    """Who may use shared storage: take, reserve, fence, open paths. `Survey` belongs here, since it
    reads the view together with who holds and who is registered."""

    async def carry_out(self, effect: FencerEffect) -> Outcome:
        """Do it, and say how it ended."""
        ...


class Arbiter(Certificates, Protocol):
    """Both in one."""

    async def carry_out(self, effect: ArbiterEffect) -> Outcome:
        """Do it, and say how it ended."""
        ...


class Split:
    """An `Arbiter` made of a witness and a fencer."""

    def __init__(self, witness: Witness, fencer: Fencer) -> None:
        self._witness = witness
        self._fencer = fencer

    @property
    def certificates(self) -> Mapping[bytes, bytes]:
        """The witness's."""
        return self._witness.certificates

    async def read_certificates(self, nodes: Iterable[NodeId]) -> None:
        """The witness's."""
        await self._witness.read_certificates(nodes)

    async def carry_out(self, effect: ArbiterEffect) -> Outcome:
        """Whoever it is for carries it out."""
        if isinstance(effect, WitnessEffect):
            return await self._witness.carry_out(effect)
        return await self._fencer.carry_out(effect)
