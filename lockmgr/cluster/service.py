"""The trio shell of a node's membership: one `Member`, its network, and what carries out its I/O.

    async with open_cluster(identity, arbiter, network..., on_effect=...) as cluster:
        ...                                    # the member runs; effects come through on_effect
        await cluster.leave()

What is decided, and why, is in `lockmgr.cluster.member`; here are only tasks.

- The member takes one event at a time, in the order in which they came; an effect that causes
  another event (a replay that is done at once) has it taken after the step that it came from.
- Each I/O is a task, and answered exactly once.
- Who is a peer: everybody whom the newest view lists that was read or installed; to a newcomer too,
  which has its temporary key for a name. A coordinator also talks to newcomers that ask. What is
  said to somebody in the step that drops him is sent before he is dropped.

Concurrency: the member changes in `Cluster._drain` only, which never awaits. Callbacks from network
and arbiter may come at any `await` of anybody.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Protocol, get_args

import trio

from lockmgr.cluster import effects, events
from lockmgr.cluster.blocks import Identity, JoinRequest
from lockmgr.cluster.certificates import BadCertificate, Credentials
from lockmgr.cluster.effects import UpwardEffect
from lockmgr.cluster.member import Member
from lockmgr.cluster.messages import Announce, Message
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.outcomes import Blocks, Good, Knocked, Opened, Outcome, Surveyed
from lockmgr.cluster.peers import Address, Peer, parse_address, peers_in
from lockmgr.cluster.rpc import Network, PeerStatistics, open_network
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NEWCOMER_SLOT, Keys, NodeId, SlotState, View, ViewSlot

log = logging.getLogger("lockmgr.cluster")

CERTIFICATES_AGAIN_S: Final = 0.5
"""After a certificate was not where it should be."""
NEWCOMER_FORGOTTEN_S: Final = 3.0
"""A newcomer whose join block did not change for so long is no peer any more."""

_MESSAGES: Final = frozenset(get_args(Message))


def boottime_s() -> float:
    """CLOCK_BOOTTIME, seconds: the clock of leases, which runs while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class NodeStopped(Exception):
    """This incarnation is over; says why."""

    def __init__(self, stop: effects.Stop) -> None:
        super().__init__(stop.words)
        self.stop = stop


class Arbiter(Protocol):
    """What is shared storage to the members: it bears witness of who lives, and it fences.

    One that is no LUN must keep the promises in `lockmgr.cluster.effects` all the same: what is
    fenced changes nothing any more, and of two that `Take` the same key one wins.
    """

    @property
    def certificates(self) -> Mapping[bytes, bytes]:
        """By fingerprint, DER: those that stood in the blocks which were read last."""

    async def carry_out(self, effect: effects.IoEffect) -> Outcome:
        """Do it, and say how it ended. `Knock` is never asked of it."""

    async def read_certificates(self, nodes: Iterable[NodeId]) -> None:
        """Look for the certificates of these; `certificates` has what is there."""

    async def aclose(self) -> None:
        """Log out everywhere, for good."""

    def abort(self) -> None:
        """Drop everything, for good."""


class Lease:
    """How long this node may answer from what it knows."""

    def __init__(self) -> None:
        self.until_s = float("-inf")
        self._stopped: effects.Stop | None = None
        self._changed = trio.Event()

    def valid(self) -> bool:
        """Whether it runs now."""
        return boottime_s() < self.until_s

    @property
    def left_s(self) -> float:
        """Seconds; below 0: it is over since then."""
        return self.until_s - boottime_s()

    async def wait_valid(self) -> None:
        """Return when it runs. Raises `NodeStopped` when it never will."""
        while not self.valid():
            if self._stopped is not None:
                raise NodeStopped(self._stopped)
            await self._changed.wait()

    def renewed(self, until_s: float) -> None:
        self.until_s = max(self.until_s, until_s)
        self._tell()

    def stop(self, stop: effects.Stop) -> None:
        """It is over for good."""
        self._stopped = stop
        self.until_s = float("-inf")
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A listed node as this one sees it."""

    node: NodeId
    name: str
    state: SlotState
    is_this_node: bool
    is_coordinator: bool
    has_path: bool
    """Of its own, to the shared storage, as far as its heartbeats say."""
    is_heard: bool
    """By this node, over the network."""
    last_seen_s: float | None
    """Since its last sign of life; None: it is not listed any more."""
    addresses: tuple[str, ...]
    network: PeerStatistics | None


@asynccontextmanager
async def open_cluster(
    identity: Identity,
    arbiter: Arbiter,
    keys: Keys,
    cluster_id: bytes,
    listen: Address,
    credentials: Credentials,
    *,
    on_effect: Callable[[UpwardEffect], None],
    on_network: Callable[[NetworkEvent], bool] = lambda _event: False,
    on_peers: Callable[[NodeId, tuple[Peer, ...]], None] = lambda _own, _peers: None,
    rng: Random,
    settings: Settings | None = None,
) -> AsyncIterator[Cluster]:
    """Have a member run until the end of the block; whoever wants it to leave says so before.

    ``on_effect`` is told what `effects.UpwardEffect` has, ``on_network`` what the network tells,
    first: True means that it concerns nobody else; ``on_peers`` who this node is and with whom it
    talks, each time that changes. None may wait. At the end of the block what
    is open is dropped, as in a crash, unless the node has left. Raises OSError if ``listen`` cannot
    be had.
    """
    async with trio.open_nursery() as nursery:
        member = Member(identity, settings or Settings(), keys, rng)
        cluster = Cluster(nursery, member, arbiter, on_effect, on_network, on_peers)
        async with open_network(
            credentials, cluster_id, listen, cluster._network_tells, rng=rng
        ) as network:
            cluster._begin(network)
            yield cluster
            cluster._ended = True
        nursery.cancel_scope.cancel()


class Cluster:
    """A node's place among the others. Made by `open_cluster`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        member: Member,
        arbiter: Arbiter,
        on_effect: Callable[[UpwardEffect], None],
        on_network: Callable[[NetworkEvent], bool],
        on_peers: Callable[[NodeId, tuple[Peer, ...]], None],
    ) -> None:
        self.member = member
        self.lease = Lease()
        self.network: Network
        self._nursery = nursery
        self._arbiter = arbiter
        self._on_effect = on_effect
        self._on_network = on_network
        self._on_peers = on_peers
        self._queue: deque[events.Event] = deque()
        self._draining = False
        self._ended = False
        self._known: View | None = None
        """The newest that was read or installed."""
        self._newcomer_key = 0
        self._asking: dict[int, tuple[JoinRequest, float]] = {}
        """By slot: newcomers' join blocks, and when each changed last."""
        self._installed: object = None
        self._looking = False
        """Certificates are being looked for."""
        self._timer = trio.CancelScope()
        self._stopped = trio.Event()

    def _begin(self, network: Network) -> None:
        self.network = network
        self._nursery.start_soon(self._tick, name="membership timer")
        self.give(events.Start())

    # -- what others ask -----------------------------------------------------------------------
    @property
    def node(self) -> NodeId | None:
        """Slot and incarnation, once this node is listed."""
        return self.member.node

    @property
    def view(self) -> View | None:
        """The installed view."""
        return self.member.view

    @property
    def stopped(self) -> effects.Stop | None:
        """Why this incarnation is over, if it is."""
        return self.member.stopped

    async def wait_stopped(self) -> effects.Stop:
        """Return when it is over, with why."""
        await self._stopped.wait()
        assert self.member.stopped is not None
        return self.member.stopped

    def status(self) -> tuple[NodeStatus, ...]:
        """Of every node that is not gone, by slot."""
        view = self._known
        if view is None:
            return ()
        network = {each.peer: each for each in self.network.statistics()}
        nodes = (NodeId(slot, view.slots[slot].incarnation) for slot in view.members)
        return tuple(self._status_of(node, view.slots[node.slot], network) for node in nodes)

    def _status_of(
        self, node: NodeId, entry: ViewSlot, network: Mapping[NodeId, PeerStatistics]
    ) -> NodeStatus:
        st = self.member.state
        judge, now = st.judge, boottime_s()
        direct, heard, seen_s = False, False, None
        if node == self.node:
            direct, heard, seen_s = st.path_key != 0, True, 0.0
        elif judge is not None and judge.knows(node):
            direct = judge.is_direct(node)
            heard = bool(judge.hears(now) >> node.slot & 1)
            seen_s = now - judge.last_sign(node)
        return NodeStatus(
            node,
            entry.node_name,
            entry.state,
            node == self.node,
            node == st.coordinator,
            direct,
            heard,
            seen_s,
            entry.addresses,
            network.get(node),
        )

    # -- what others say -------------------------------------------------------------------------
    def give(self, event: events.Event) -> None:
        """Something has happened to this node. Never waits."""
        self._queue.append(event)
        if not self._draining:
            self._drain()

    def replayed(self, node: NodeId) -> None:
        """A `ReplayWanted` is done and stable."""
        self.give(events.Replayed(node))

    def locks_thawed(self, lock_epoch: int) -> None:
        self.give(events.LocksThawed(lock_epoch))

    def path_lost(self, keys: tuple[int, ...]) -> None:
        self.give(events.PathLost(keys))

    def evict(self, node: NodeId, why: str) -> None:
        """Somebody wants that node to go."""
        self.give(events.EvictWanted(node, why))

    async def leave(self) -> None:
        """Go. All I/O is drained, no lock is held, the journal is empty. Raises `NodeStopped` if
        it ended otherwise."""
        self.give(events.LeaveWanted())
        stop = await self.wait_stopped()
        if stop.reason is not effects.StopReason.LEFT:
            raise NodeStopped(stop)

    # -- stepping --------------------------------------------------------------------------------
    def _drain(self) -> None:
        self._draining = True
        try:
            while self._queue:
                event = self._queue.popleft()
                for effect in self.member.step(event, boottime_s()):
                    self._carry_out(effect)
        finally:
            self._draining = False
        self._install()
        due = self.member.next_timer()
        self._timer.deadline = _on_trio_clock(due)

    async def _tick(self) -> None:
        while self.member.stopped is None:
            self._timer = trio.CancelScope(deadline=_on_trio_clock(self.member.next_timer()))
            with self._timer:
                await trio.sleep_forever()
            self.give(events.Tick())

    def _carry_out(self, effect: effects.Effect) -> None:
        match effect:
            case effects.SendTo(peer, message):
                self.network.send(peer, message)
            case effects.Beat(heartbeat):
                self.network.beat(heartbeat)
            case effects.Knock():
                self._nursery.start_soon(self._knock, effect)
            case effects.LeaseUntil(until_s):
                self.lease.renewed(until_s)
                self._on_effect(effect)
            case effects.ViewInstalled(view):
                self._know(view)
                self._on_effect(effect)
            case effects.CloseSessions():
                self._nursery.start_soon(self._arbiter.aclose)
            case effects.Stop():
                self._stop(effect)
            case effects.DepartedMayBeGranted() | effects.ReplayWanted() | effects.PathsReady():
                self._on_effect(effect)
            case _:
                if isinstance(effect, effects.OpenNewcomer):
                    self._newcomer_key = effect.key
                self._nursery.start_soon(self._do, effect)

    def _stop(self, stop: effects.Stop) -> None:
        level = logging.INFO if stop.reason is effects.StopReason.LEFT else logging.ERROR
        log.log(level, "this node is no member any more (%s): %s", stop.reason.value, stop.words)
        self.lease.stop(stop)
        self._on_effect(stop)
        self._stopped.set()
        self._timer.cancel()

    # -- I/O -------------------------------------------------------------------------------------
    async def _do(self, effect: effects.IoEffect) -> None:
        outcome = await self._arbiter.carry_out(effect)
        if isinstance(outcome, Good):
            match outcome.value:
                case Opened(survey=Surveyed(view=view)) | Surveyed(view=view):
                    self._know(view)
                case Blocks(joins=joins):
                    self._see(joins)
        self.give(events.Done(effect.op, outcome))

    async def _knock(self, effect: effects.Knock) -> None:
        wanted = frozenset(effect.nodes)
        view = self._known
        if view is not None:
            await self._arbiter.read_certificates(wanted)
        own = NodeId(NEWCOMER_SLOT, self._newcomer_key)
        peers = peers_in(view, self._arbiter.certificates, own) if view is not None else ()
        answered = await self.network.knock([peer for peer in peers if peer.node in wanted])
        self.give(events.Done(effect.op, Good(Knocked(answered))))

    def _know(self, view: View) -> None:
        if self._known is None or view.epoch > self._known.epoch:
            self._known = view

    def _see(self, joins: Iterable[JoinRequest]) -> None:
        now = boottime_s()
        for request in joins:
            before = self._asking.get(request.slot)
            if before is None or before[0] != request:
                self._asking[request.slot] = (request, now)

    # -- network ---------------------------------------------------------------------------------
    def _install(self) -> None:
        """Tell the network who is a peer, if that is news."""
        view, own = self._known, self.node
        if view is None or self._ended:
            return
        if own is None:
            if not self._newcomer_key:
                return
            own = NodeId(NEWCOMER_SLOT, self._newcomer_key)
        asking = self._newcomers() if self.member.is_coordinator else ()
        missing = self._without_certificate(view)
        if missing and not self._looking:
            self._looking = True
            self._nursery.start_soon(self._look_for_certificates)
        wanted = (own, view.epoch, missing, asking)
        if wanted != self._installed:
            self._installed = wanted
            peers = peers_in(view, self._arbiter.certificates, own)
            self.network.install(own, view.epoch, (*peers, *asking), view.secret)
            self._on_peers(own, peers)

    def _without_certificate(self, view: View) -> frozenset[NodeId]:
        known = self._arbiter.certificates
        return frozenset(
            node
            for node in view.listed
            if node != self.node and view.slots[node.slot].fingerprint not in known
        )

    def _newcomers(self) -> tuple[Peer, ...]:
        since = boottime_s() - NEWCOMER_FORGOTTEN_S
        found = []
        for request, changed_at in self._asking.values():
            if changed_at < since:
                continue
            try:
                addresses = tuple(parse_address(text) for text in request.addresses)
                node = NodeId(NEWCOMER_SLOT, request.key)
                found.append(Peer(node, request.certificate, addresses))
            except (BadCertificate, ValueError) as error:
                log.debug("a newcomer's join block in slot %d: %s", request.slot, error)
        return tuple(found)

    async def _look_for_certificates(self) -> None:
        said: frozenset[NodeId] = frozenset()
        while True:
            view = self._known
            assert view is not None, "somebody is missing from it"
            missing = self._without_certificate(view)
            if not missing:
                break
            if missing - said:
                said |= missing
                names = ", ".join(map(str, sorted(missing)))
                log.info("looking for the certificates of %s", names)
            await self._arbiter.read_certificates(missing)
            self._install()
            await trio.sleep(CERTIFICATES_AGAIN_S)
        self._looking = False
        self._install()

    def _network_tells(self, event: NetworkEvent) -> None:
        if self._on_network(event):
            return
        match event:
            case Connected(peer):
                self.give(events.PeerConnected(peer))
            case Lost(peer):
                self.give(events.PeerLost(peer))
            case Arrived(peer, _number, message):
                self._arrived(peer, message)
            case _:
                self.give(event)

    def _arrived(self, peer: NodeId, message: Any) -> None:
        if type(message) not in _MESSAGES:
            self.network.refuse(peer, f"{type(message).__name__} is of no use here")
            return
        if isinstance(message, Announce):
            try:
                message.view.check()
                if self.view is not None and message.view.epoch > self.view.epoch:
                    message.view.follows(self.view)
            except AssertionError as error:
                self.network.refuse(peer, f"it announces a view that cannot be: {error}")
                return
        self.give(events.Received(peer, message))


def _on_trio_clock(due: float | None) -> float:
    """A time of CLOCK_BOOTTIME as trio's deadlines have it."""
    return float("inf") if due is None else trio.current_time() + max(0.0, due - boottime_s())
