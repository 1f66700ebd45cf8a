"""The lock manager's messages over the network: one `Channel` for each incarnation of a peer.

    link = LockLink(on_unresponsive)
    async with open_network(..., deliver, ...) as network:      # deliver calls link.take
        link.use(network)
        nursery.start_soon(link.run)
        async with open_lock_manager(node=number, send=link.send, ...) as manager:
            link.attach(manager)
            link.view_changed(view.listed, view.lock_epoch)     # before manager.view_changed

Concurrency: plain calls that do not wait; `run` is one task, which sleeps until a confirmation is
due. Nothing is called back from within `send`: what the network and the manager make of a message,
they make of it in tasks of their own.

Who breaks the rules: a message that no channel says in its state costs the peer its connection;
it may come back, and goes on where it was. What the lock manager takes for a violation ends the
channel for good, since then one of the two nodes is wrong about locks: ``on_unresponsive`` is told,
once, and whoever is behind that asks for an eviction. So it does if the peer is ahead and says more
than a node has to say in a few epochs: all of it is kept until this node's view catches up. Neither
ends the daemon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, get_args

import trio

from lockmgr.carried import Carried
from lockmgr.channel import LIMIT_BYTES, Channel, Control, size_bytes
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from lockmgr.errors import ProtocolViolation
from lockmgr.mastering import node_number
from lockmgr.messages import (
    Glimpses,
    MasterBound,
    Reassert,
    Reasserted,
    Suspicion,
    Waits,
    Working,
)
from lockmgr.ranges_messages import RangeMasterBound, RangeSuspicion, RangeWaits
from lockmgr.snapshot_messages import Snapshots

__all__ = ["LockLink"]

log = logging.getLogger("lockmgr.network")

NEVER: Final = float("inf")
AHEAD_BYTES: Final = 4 * LIMIT_BYTES
"""What is kept of a peer whose lock epoch is ahead of this node's."""
_CONTROL: Final = frozenset(get_args(Control))
_CARRIED: Final = frozenset(get_args(Carried))
_NAMES_SENDER: Final = frozenset(
    (
        *get_args(MasterBound),
        *(Working, Glimpses, Reassert, Reasserted, Suspicion, Waits),
        *get_args(RangeMasterBound),
        *(RangeSuspicion, RangeWaits),
        *get_args(Snapshots),
    )
)
"""Their ``node`` is who sends them; that of all others is whom they are for."""


class Carrier(Protocol):
    """What is needed of a `lockmgr.cluster.rpc.Network`."""

    def send(self, peer: NodeId, message: object) -> bool:
        """Queue it; False: it is lost, a `Lost` has been told or follows."""

    def refuse(self, peer: NodeId, reason: str) -> None:
        """Close the connection: the peer breaks the protocol."""


class Taker(Protocol):
    """What is needed of a `lockmgr.manager.LockManager`."""

    @property
    def node(self) -> int:
        """Its number."""

    def deliver(self, message: Any) -> None:
        """A message has arrived. Raises `ProtocolViolation`."""


class _Line:
    """A channel, and whom it is with."""

    __slots__ = ("ahead_bytes", "channel", "listed", "number", "peer", "reported")

    def __init__(self, peer: NodeId) -> None:
        self.peer = peer
        self.number = node_number(peer.slot, peer.incarnation)
        self.channel = Channel()
        self.listed = False
        """By the view that this node goes by, or by one before it."""
        self.ahead_bytes = 0
        """Of messages whose epoch this node's view has not reached, about."""
        self.reported = False


class LockLink:
    """See the module's docstring. ``on_unresponsive``: (node, words), who is to be evicted and why;
    it must not call this or the lock manager back."""

    def __init__(self, on_unresponsive: Callable[[NodeId, str], None]) -> None:
        self._on_unresponsive = on_unresponsive
        self._network: Carrier | None = None
        self._manager: Taker | None = None
        self._epoch = 0
        self._lines: dict[NodeId, _Line] = {}
        self._by_number: dict[int, _Line] = {}
        self._early: list[tuple[_Line, Carried]] = []
        """What has arrived before there is a lock manager."""
        self._due = NEVER
        self._sleep = trio.CancelScope()
        self.sent = 0
        """Messages of this node's lock manager to others."""

    # -- what the node says --------------------------------------------------------------------
    def use(self, network: Carrier) -> None:
        """Whatever is sent goes over this network. Before any of its events."""
        self._network = network

    def attach(self, manager: Taker) -> None:
        """Whatever arrives goes to this lock manager, what has arrived before at once."""
        self._manager = manager
        early, self._early = self._early, []
        for line, message in early:
            self._hand_over(line, message)

    def detach(self) -> None:
        """The lock manager is closed: what arrives is not wanted any more, nor is what is kept."""
        self._manager = None
        self._lines.clear()
        self._by_number.clear()
        self._network = None

    def view_changed(self, listed: Iterable[NodeId], lock_epoch: int) -> None:
        """The node goes by a view that lists these, with this lock epoch. Others are forgotten,
        but those who are ahead of this view: who has joined since, and is connected already."""
        listed = frozenset(listed)
        newest = {node.slot: node for node in listed}
        for node, line in list(self._lines.items()):
            if node not in listed and (line.listed or newest.get(node.slot, node) > node):
                del self._by_number[line.number]
                del self._lines[node]
        for node in listed:
            self._line(node).listed = True
        if lock_epoch > self._epoch:
            self._epoch = lock_epoch
            for line in self._lines.values():
                line.ahead_bytes = 0
                self._say(line, line.channel.epoch_over(lock_epoch))

    def send(self, to: int, message: Carried) -> None:
        """Take a message for a node (`LockManager`'s ``send``). Nobody listed: nobody needs it."""
        line = self._by_number.get(to)
        if line is None:
            return
        self.sent += 1
        if line.channel.send(message):
            assert self._network is not None
            self._network.send(line.peer, message)
        elif line.channel.broken is not None:
            self._broken(line)

    def statistics(self) -> dict[NodeId, tuple[int, int]]:
        """Of every channel: messages that the peer may not have, and about how many bytes."""
        return {
            node: (line.channel.kept, line.channel.kept_bytes) for node, line in self._lines.items()
        }

    # -- what the network tells ----------------------------------------------------------------
    def take(self, event: NetworkEvent) -> bool:
        """Carry an event out; True: it was a message of the lock manager's or of a channel, and
        concerns nobody else."""
        match event:
            case Arrived(peer, _number, message):
                kind = type(message)
                if kind in _CARRIED:
                    self._arrived(peer, message)
                elif kind in _CONTROL:
                    self._control(peer, message)
                else:
                    return False
                return True
            case Connected(peer):
                if peer.slot != NEWCOMER_SLOT and self._network is not None:
                    line = self._line(peer)
                    self._say(line, line.channel.connect())
            case Lost(peer):
                if peer in self._lines:
                    self._lines[peer].channel.lose()
        return False

    def _line(self, peer: NodeId) -> _Line:
        """A peer may be ahead of this node's view: it is known as soon as it is connected."""
        line = self._lines.get(peer)
        if line is None:
            line = self._lines[peer] = _Line(peer)
            self._by_number[line.number] = line
        return line

    def _arrived(self, peer: NodeId, message: Carried) -> None:
        line = self._lines.get(peer)
        if line is None or line.channel.broken is not None:
            return
        channel = line.channel
        try:
            out = channel.receive(message, trio.current_time())
        except WireError as error:
            self._refuse(line, str(error))
            return
        if message.epoch > self._epoch:
            line.ahead_bytes += size_bytes(message)
            if line.ahead_bytes > AHEAD_BYTES:
                channel.give_up(f"it is ahead of this node by {line.ahead_bytes >> 20} MiB")
                self._broken(line)
                return
        if out:
            self._say(line, out)
        else:
            self._watch(channel)
        if self._manager is None:
            self._early.append((line, message))
        else:
            self._hand_over(line, message)

    def _control(self, peer: NodeId, message: Control) -> None:
        line = self._lines.get(peer)
        if line is None or line.channel.broken is not None:
            return
        try:
            out = line.channel.control(message, trio.current_time())
        except WireError as error:
            self._refuse(line, str(error))
            return
        self._say(line, out)
        self._watch(line.channel)

    def _hand_over(self, line: _Line, message: Carried) -> None:
        manager = self._manager
        assert manager is not None
        try:
            named = line.number if type(message) in _NAMES_SENDER else manager.node
            if message.node != named:
                raise ProtocolViolation(f"node {message.node} in {message}: not {named}")
            manager.deliver(message)
        except ProtocolViolation as error:
            line.channel.give_up(f"it breaks the lock manager's protocol: {error}")
            self._broken(line)

    # -- the end of a channel ------------------------------------------------------------------
    def _refuse(self, line: _Line, words: str) -> None:
        assert self._network is not None
        self._network.refuse(line.peer, words)

    def _broken(self, line: _Line) -> None:
        """Tell of it, once."""
        if line.reported:
            return
        line.reported = True
        words = line.channel.broken or ""
        log.error("no locks with node %s any more: %s", line.peer, words)
        self._refuse(line, words)
        self._on_unresponsive(line.peer, words)

    def _say(self, line: _Line, messages: Iterable[object]) -> None:
        for message in messages:
            assert self._network is not None
            self._network.send(line.peer, message)

    # -- time ----------------------------------------------------------------------------------
    def _watch(self, channel: Channel) -> None:
        due = channel.next_timer()
        if due is not None and due < self._due:
            self._due = self._sleep.deadline = due

    async def run(self) -> None:
        """Confirm in time, for ever."""
        while True:
            with trio.CancelScope(deadline=self._due) as self._sleep:
                await trio.sleep_forever()
            now = trio.current_time()
            self._due = NEVER
            for line in self._lines.values():
                self._say(line, line.channel.time_passed(now))
                self._watch(line.channel)

    def check(self) -> None:
        """Assert the invariants of every channel."""
        for line in self._lines.values():
            line.channel.check()
            assert self._by_number[line.number] is line
