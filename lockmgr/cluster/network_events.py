"""What the network tells, in this order for each peer: `Connected`, what arrives over that
connection, `Lost`, and then the next connection. `BeatHeard`, `DeathProven` and
`StrangerCame` come at any time.

Nothing of a connection arrives after its `Lost`. Whatever was sent over a connection and has not
reached the peer's `Arrived` is followed by a `Lost` on the sender's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockmgr.cluster.events import BeatHeard, DeathProven, StrangerCame
from lockmgr.cluster.view import NodeId
from lockmgr.cluster.wire import Agreed


@dataclass(frozen=True, slots=True)
class Connected:
    """From now on messages reach the peer."""

    peer: NodeId
    number: int
    """Of the connection, the same on both sides; grows with each one of a pair of nodes."""
    agreed: Agreed


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection is gone, and messages with it. It proves nothing about the peer."""

    peer: NodeId
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message, in the order of sending. A payload is a field of it."""

    peer: NodeId
    number: int
    message: Any


NetworkEvent = Connected | Lost | Arrived | BeatHeard | DeathProven | StrangerCame
