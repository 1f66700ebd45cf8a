"""Times and limits of connections. None of them decides who is a member: heartbeats do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What tests change, and nobody else should need to."""

    greeting_s: float = 3.0
    """From the TCP connection to the peer's Hello; for who dials, to the choice of the peer."""
    connect_s: float = 1.0
    """For one address; then the next is tried."""
    probe_s: float = 1.0
    """An old connection must answer within this time, or the new one takes its place."""
    redial_first_s: float = 0.05
    redial_most_s: float = 1.0
    """Dialing again: doubled each time from the first to the most, times 0.5 to 1.5."""
    courtesy_s: float = 0.2
    """How long who does not choose waits for the other to dial."""
    ping_s: float = 1.5
    """Nothing heard for so long: the peer is asked to say something."""
    silence_s: float = 5.0
    """Nothing heard, or nothing taken, for so long: the connection is lost."""
    look_s: float = 0.5
    """How often that is looked at. Who looks 1 s too late has slept, and starts afresh."""
    queue_bytes: int = 16 << 20
    """What may wait to be sent to one peer. More than any node ever has to say in one step; a peer
    that lets so much gather is lost."""
    room_bytes: int = 256 << 10
    """`Network.wait_room` waits until less than this is queued."""
    batch_bytes: int = 64 << 10
    """What is given to TLS at once, at least one message."""
    goodbye_s: float = 0.5
    """For last words; then the connection is cut."""
    strangers: int = 128
    """Connections that have not proven who they are."""
    strangers_each: int = 32
    """The same, from one address: several nodes behind one, which all start at once, fit."""

    def __post_init__(self) -> None:
        if not self.probe_s < self.greeting_s:
            raise ValueError("who dials must wait longer than an old connection is probed")
        if not self.look_s + self.ping_s < self.silence_s:
            raise ValueError("a peer must be asked before it is called silent")
