"""What the two ends of a connection say to each other for its own sake. Codes 1 to 15."""

from __future__ import annotations

from dataclasses import dataclass

from lockmgr.cluster.codec import Registry
from lockmgr.cluster.codes import new_registry


@dataclass(frozen=True, slots=True)
class Chosen:
    """The lower of the two nodes takes this connection: both use it from now on, and no other."""

    number: int
    """Grows; a smaller one than the last is of a connection that is already given up."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Say something."""

    stamp_ns: int
    """Of the sender's clock; means nothing to the receiver."""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a `Ping`, at once."""

    stamp_ns: int


@dataclass(frozen=True, slots=True)
class Died:
    """The sender has reaped the daemon of the incarnation whose certificate it shows: nothing of
    it runs any more. Answered with a `Goodbye` of these words: `DEATH_NOTED`."""


DEATH_NOTED = "death noted"


def connection_registry() -> Registry:
    """All messages of this package, those above included; layers above add theirs."""
    registry = new_registry()
    registry.register(Chosen, 3)
    registry.register(Ping, 4)
    registry.register(Pong, 5)
    registry.register(Died, 6)
    return registry
