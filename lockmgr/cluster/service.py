"""The trio shell of a cluster's membership: a `Member`, its network, and its arbiter.

    async with open_cluster(
        identity, keys, arbiter, address, credentials, cluster_id, on_effect=..., rng=...
    ) as cluster:
        await cluster.wait_active()
        ...
        await cluster.leave()

Whoever uses it is told by ``on_effect`` what the member wants from above (`UpwardEffect`), in
order, and answers with `Cluster.replayed`, `Cluster.locks_thawed`. ``on_network`` rides on the
connections: it is told of `Connected`, `Lost` and every message that is not the membership's
(`LockLink.take` is one), and says whether a message was its own. Both are plain calls that must not
wait, and may call everything here that is not async. What the arbiter must do: `arbiter`.

Concurrency. One task (`_run`) steps the member; everything that happens is queued for it by plain
calls, so a step is never entered twice, and what happened first is told first. Each I/O is a task
of its own, answered by one `Done`, also after `Stop`. One task looks for certificates while some
are missing. ``on_effect`` is called from the stepping task, ``on_network`` from the network's. An
exception of either, or of the arbiter, ends all tasks and leaves `open_cluster`: what a state
machine has not taken in cannot be told again, and a dead daemon is better than a wrong one.

A host that slept (suspended, or its loop was held up) has datagrams and answers in its sockets:
they are let in and delivered first, then comes one `Tick`.

Leaving the context without `Cluster.leave` is a crash as far as the others can see. After `Stop`
no message is taken any more, what was queued is still sent, and what the arbiter is doing is waited
for a little.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final, cast, get_args

import trio

from lockmgr.cluster import effects, events
from lockmgr.cluster.arbiter import Arbiter
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.boottime import boottime, deadline_at
from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.codec import Registry, WireError
from lockmgr.cluster.effects import Effect, IoEffect, Stop, StopReason, UpwardEffect
from lockmgr.cluster.errors import ClusterStopped
from lockmgr.cluster.lease_watch import LeaseWatch
from lockmgr.cluster.member import Member
from lockmgr.cluster.messages import Announce, Message
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.obituary import remove_obituary, write_obituary
from lockmgr.cluster.outcomes import Blocks, Good, Knocked, Opened, Outcome, Surveyed
from lockmgr.cluster.peer_book import Acquaintance, PeerBook
from lockmgr.cluster.peers import Address
from lockmgr.cluster.pulse import Pulse, PulseWiring, PythonPulse
from lockmgr.cluster.rpc import Network, open_network
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.status import ClusterStatus, Hearing, nodes_in
from lockmgr.cluster.view import NEWCOMER_SLOT, Keys, NodeId, View
from lockmgr.errors import ProtocolViolation

__all__ = ["Cluster", "open_cluster"]

log = logging.getLogger("lockmgr.cluster")

CERTIFICATES_AGAIN_S: Final = 0.05, 0.5
"""At first, and then doubled up to this."""
SETTLE_PASSES: Final = 16
"""How often, at most, the loop goes round to let in what a host that slept has in its sockets."""

SEND_PASSES: Final = 4
"""How often the loop goes round until what was queued is in the sockets, if there is room."""

_MESSAGES: Final = frozenset(get_args(Message))
_IO: Final = frozenset(get_args(IoEffect))


def _takes_nothing(event: NetworkEvent) -> bool:
    del event
    return False


@asynccontextmanager
async def open_cluster(
    identity: Identity,
    keys: Keys,
    arbiter: Arbiter,
    listen: Address,
    credentials: Credentials,
    cluster_id: bytes,
    *,
    on_effect: Callable[[UpwardEffect], None],
    rng: Random,
    on_network: Callable[[NetworkEvent], bool] = _takes_nothing,
    settings: Settings | None = None,
    network_settings: NetworkSettings | None = None,
    registry: Registry | None = None,
    obituary: Path | None = None,
    make_pulse: Callable[[PulseWiring], Pulse] = PythonPulse,
    software: str = "",
) -> AsyncIterator[Cluster]:
    """Be a newcomer, then a member. ``identity`` must have the fingerprint and the certificate of
    ``credentials``; without addresses it gets the one that the network listens at (port 0 of
    ``listen``: any that is free). ``cluster_id``: 16 bytes that all nodes have in common.
    ``obituary``: the file for the supervisor, see `lockmgr.cluster.obituary`. ``registry``: a
    `connection_registry` with the messages of the layers above. ``make_pulse``: what sends the
    heartbeats (`lockmgr.cluster.pulse`).

    Raises OSError if the address cannot be had. What ends the tasks comes as an exception group.
    """
    if identity.fingerprint != credentials.fingerprint:
        raise ValueError("the identity has another fingerprint than the credentials")
    settings = settings or Settings()
    told: list[Callable[[NetworkEvent], None]] = []
    async with (
        open_network(
            credentials,
            cluster_id,
            listen,
            lambda event: told[0](event),
            rng=rng,
            settings=network_settings,
            registry=registry,
            software=software,
        ) as network,
        trio.open_nursery() as nursery,
    ):
        if not identity.addresses:
            identity = replace(identity, addresses=(str(network.address),))
        cluster = Cluster(
            Member(identity, settings, keys, rng),
            settings,
            network,
            arbiter,
            nursery,
            PeerBook(credentials.certificate),
            on_effect,
            on_network,
            partial(write_obituary, obituary, cluster_id, credentials) if obituary else None,
            make_pulse,
        )
        told.append(cluster._network_told)
        nursery.start_soon(cluster._run)
        nursery.start_soon(cluster._find_certificates)
        nursery.start_soon(cluster._pulse.run, cluster._give)
        try:
            yield cluster
            if cluster.stopped is not None:
                await cluster._finish_io()
                if obituary is not None and cluster.stopped.reason is StopReason.LEFT:
                    remove_obituary(obituary)
        finally:
            cluster._end()
            if (
                obituary is not None and cluster.is_evicted
            ):  # then the others know more than it says
                remove_obituary(obituary)
        nursery.cancel_scope.cancel()


class Cluster:
    """Made by `open_cluster`. Nothing here waits but what is async."""

    def __init__(
        self,
        member: Member,
        settings: Settings,
        network: Network,
        arbiter: Arbiter,
        nursery: trio.Nursery,
        book: PeerBook,
        on_effect: Callable[[UpwardEffect], None],
        on_network: Callable[[NetworkEvent], bool],
        write_obituary: Callable[[Acquaintance], None] | None,
        make_pulse: Callable[[PulseWiring], Pulse],
    ) -> None:
        self.address = network.address
        """Where this node listens."""
        self._member = member
        self._settings = settings
        self._network = network
        self._arbiter = arbiter
        self._nursery = nursery
        self._book = book
        self._on_effect = on_effect
        self._on_network = on_network
        self._write_obituary = write_obituary
        self._pulse = make_pulse(
            PulseWiring(
                network.cluster_id,
                network.beat_socket_fd,
                settings,
                network.beat,
                self._write_heartbeat,
            )
        )
        network.beats_follow(self._pulse.install)
        self.lease = LeaseWatch(self._pulse)
        self._hearing = Hearing()
        self._inputs: deque[events.Event] = deque()
        self._news = trio.Event()
        self._changed = trio.Event()
        self._misses = trio.Event()
        self._io = 0
        """I/O under way."""
        self._idle = trio.Event()
        self._was_coordinator = False
        self._ended: Stop | None = None
        """The context was left without `Cluster.leave`."""
        self._complained: set[NodeId] = set()

    # -- what the node asks ----------------------------------------------------------------------
    @property
    def me(self) -> NodeId | None:
        """Slot and incarnation, once this node is listed."""
        return self._member.node

    @property
    def view(self) -> View | None:
        """The installed one."""
        return self._member.view

    @property
    def is_coordinator(self) -> bool:
        """In office, as far as this node knows."""
        return self._member.is_coordinator

    @property
    def stopped(self) -> Stop | None:
        """Why and how this incarnation is over."""
        return self._member.stopped or self._ended

    @property
    def is_evicted(self) -> bool:
        """The others have gone on without this node."""
        return self.stopped is not None and self.stopped.reason is StopReason.EVICTED

    @property
    def lease_until(self) -> float:
        """CLOCK_BOOTTIME; -inf: there is none."""
        return self.lease.until_s

    @property
    def is_active(self) -> bool:
        """A member that takes part in locking."""
        view, me = self.view, self.me
        return self.stopped is None and view is not None and me in view.active

    async def wait_listed(self) -> NodeId:
        """Until a view that lists this node is installed. Raises `ClusterStopped`."""
        await self._wait(lambda: self.view is not None)
        assert self.me is not None
        return self.me

    async def wait_active(self) -> View:
        """Until this node takes part in locking. Raises `ClusterStopped`."""
        await self._wait(lambda: self.is_active)
        assert self.view is not None
        return self.view

    async def wait_stopped(self) -> Stop:
        """Until this incarnation is over."""
        while self.stopped is None:
            await self._changed.wait()
        return self.stopped

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while self.stopped is None and not condition():
            await self._changed.wait()
        if self.stopped is not None:
            raise ClusterStopped(self.stopped)

    def status(self) -> ClusterStatus:
        """For people."""
        st, view, now = self._member.state, self.view or self._book.known, boottime()
        counts = self._network.beat_counts
        until = self.lease.until_s
        return ClusterStatus(
            me=self.me,
            stopped=self.stopped,
            epoch=0 if view is None else view.epoch,
            lock_epoch=0 if view is None else view.lock_epoch,
            coordinator=st.coordinator,
            is_coordinator=self.is_coordinator,
            lease_left_s=None if until == float("-inf") else until - now,
            has_path=bool(st.path_key) and st.may_write,
            unproven_keys=tuple(st.unproven),
            nodes=nodes_in(
                view, self.me, st.coordinator, self._hearing, self._network.statistics(), now
            ),
            pulse=self._pulse.statistics(),
            beats_heard=counts.heard,
            beats_bad=counts.bad,
        )

    def hears(self, node: NodeId) -> bool:
        """Whether datagrams pass between this node and ``node``, both ways. If not, it is not for
        its slowness that it answers nothing, and the judge sees to who stays."""
        return self._member.hears(node, boottime())

    # -- what the node says ------------------------------------------------------------------------
    def replayed(self, node: NodeId) -> None:
        """`ReplayWanted` of that incarnation is done and stable."""
        self._give(events.Replayed(node))

    def locks_thawed(self, lock_epoch: int) -> None:
        """The locks are recovered in this lock epoch."""
        self._give(events.LocksThawed(lock_epoch))

    def evict(self, node: NodeId, why: str) -> None:
        """``node`` must go; asked for until the view shows it."""
        self._give(events.EvictWanted(node, why))

    def path_lost(self, keys: tuple[int, ...]) -> None:
        """`events.PathLost`; to be called before what was under way on them is answered."""
        self._give(events.PathLost(keys))

    def path_back(self) -> None:
        """A portal answers again."""
        self._give(events.PathBack())

    async def leave(self) -> Stop:
        """Leave the cluster. All I/O is drained, no lock is held, the journal is empty. Returns
        when this incarnation is over, which takes `Settings.leave_within_s` at most."""
        self._give(events.LeaveWanted())
        return await self.wait_stopped()

    # -- messages of the layers above -----------------------------------------------------------
    def send(self, peer: NodeId, message: object) -> bool:
        """`Network.send`."""
        return self._network.send(peer, message)

    def refuse(self, peer: NodeId, reason: str) -> None:
        """`Network.refuse`."""
        self._network.refuse(peer, reason)

    async def wait_room(self, peer: NodeId) -> None:
        """`Network.wait_room`."""
        await self._network.wait_room(peer)

    # -- stepping --------------------------------------------------------------------------------
    def _give(self, event: events.Event) -> None:
        """Queue an event for the member."""
        if self.stopped is None:
            self._inputs.append(event)
            self._news.set()

    async def _run(self) -> None:
        """Step the member until it stops."""
        await self._step(events.Start())
        stepped_at = boottime()
        while self.stopped is None:
            due = self._member.next_timer()
            assert due is not None
            with trio.move_on_at(deadline_at(due)):
                await self._news.wait()
            self._news = trio.Event()
            if boottime() - stepped_at >= self._settings.judge_gap_s:
                await self._let_in()
            for _ in range(len(self._inputs)):
                await self._step(self._inputs.popleft())
            stepped_at = boottime()
            due = self._member.next_timer()
            if due is not None and due <= stepped_at:
                self._pulse.ticked(stepped_at - due)
                await self._step(events.Tick())
            if self._inputs:
                self._news.set()
        self._inputs.clear()

    async def _let_in(self) -> None:
        """This node slept: what the kernel has for it is older than now."""
        for _ in range(SETTLE_PASSES):
            before = len(self._inputs)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            if len(self._inputs) == before:
                return

    async def _step(self, event: events.Event) -> None:
        before = (self.me, self.view, self.stopped)
        todo = self._member.step(event, boottime())
        if any(isinstance(effect, effects.ViewInstalled) for effect in todo):
            await self._announce_first(todo)
        for effect in todo:
            self._carry_out(effect)
        self._pulse.follow(self._member.heartbeat_key)
        if self.me is not None:
            self._book.is_listed_as(self.me)
        self._make_known()
        if (self.me, self.view, self.stopped) != before:
            self._changed.set()
            self._changed = trio.Event()

    async def _announce_first(self, todo: list[Effect]) -> None:
        """What goes to others is sent before this node goes by its view: the lock manager has
        much to do then, and so have theirs, all at the same time."""
        messages = [effect for effect in todo if isinstance(effect, effects.SendTo)]
        if not messages or self.stopped is not None:
            return
        for message in messages:
            todo.remove(message)
            self._carry_out(message)
        for _ in range(SEND_PASSES):
            await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        """Nothing steps the member any more: whoever waits for something is told."""
        if self.stopped is None:
            self._ended = Stop(StopReason.CANNOT_GO_ON, "this node ends without having left")
            self._pulse.stop()
            self.lease.stopped(self._ended)
            self._changed.set()

    # -- effects -----------------------------------------------------------------------------------
    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case effects.SendTo(peer, message):
                self._network.send(peer, message)
            case effects.Beat(heartbeat):
                self._hearing.heard(heartbeat, boottime())
                self._pulse.beat(effect)
            case _ if type(effect) in _IO:
                self._nursery.start_soon(self._answer, cast("IoEffect", effect))
            case _:
                self._tell_upwards(cast("UpwardEffect", effect))

    def _tell_upwards(self, effect: UpwardEffect) -> None:
        match effect:
            case effects.ViewInstalled(view, departed=departed):
                self._tell_departed(view, departed)
                self._book.goes_by(view)
                self._hearing.forget_others(view)
                log.info("view %s: %s", view.epoch, _in_words(view))
            case effects.LeaseUntil(until_s):
                self.lease.renewed(until_s)
            case Stop(reason, words):
                self._pulse.stop()
                self.lease.stopped(effect)
                level = logging.INFO if reason is StopReason.LEFT else logging.ERROR
                log.log(level, "this node stops (%s): %s", reason.value, words)
        self._on_effect(effect)

    def _tell_departed(self, view: View, departed: tuple[effects.Departed, ...]) -> None:
        for node in (each.node for each in departed if each.needs_replay):
            replayer = view.slots[node.slot].replay_by
            name = view.slots[node.slot].node_name or "a node"
            who = view.slots[replayer].node_name if replayer < len(view.slots) else "nobody yet"
            # Of a host that is back its supervisor, or its system's log, has told what happened.
            back = name in {view.slots[each.slot].node_name for each in view.listed}
            log.log(
                logging.INFO if back else logging.WARNING,
                "%s (%s) is gone without having left: it is fenced; its journal is replayed by %s",
                name,
                node,
                who,
            )

    async def _write_heartbeat(self, effect: effects.WriteHeartbeat) -> Outcome:
        with self._counted():
            return await self._arbiter.carry_out(effect)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """An I/O."""
        self._io += 1
        yield
        self._io -= 1
        if not self._io:
            self._idle.set()

    async def _answer(self, effect: IoEffect) -> None:
        """Carry out an I/O, and say how it ended."""
        if isinstance(effect, effects.OpenNewcomer):
            self._book.asks_as(effect.key)
        with self._counted():
            outcome = await self._perform(effect)
            if isinstance(outcome, Good):
                self._learn(outcome.value)
            self._give(events.Done(effect.op, outcome))

    async def _perform(self, effect: IoEffect) -> Outcome:
        match effect:
            case effects.Knock(_, nodes):
                await self._arbiter.read_certificates(nodes)
                self._book.learn(self._arbiter.certificates)
                answered = await self._network.knock(self._book.to_knock_at(nodes))
                return Good(Knocked(answered))
            case _:
                return await self._arbiter.carry_out(effect)

    def _learn(self, value: Any) -> None:
        match value:
            case Surveyed():
                self._book.saw(value.view)
            case Opened():
                self._book.saw(value.survey.view)
            case Blocks(heartbeats, joins):
                now = boottime()
                self._hearing.read(heartbeats, now)
                self._book.saw_joins(joins, now)

    async def _finish_io(self) -> None:
        """Wait for what the arbiter still does, as long as one answer may take."""
        with trio.move_on_after(self._settings.path_loss_s):
            while self._io:
                self._idle = trio.Event()
                await self._idle.wait()

    # -- the network -------------------------------------------------------------------------------
    def _make_known(self) -> None:
        """Tell the network whom this node talks to now. After a step, so that last words for whom
        the view does not list any more are queued before."""
        if self.stopped is not None:
            self._end_network()
            return
        coordinator = self.is_coordinator
        if not self._book.take_changes() and coordinator == self._was_coordinator:
            return
        self._was_coordinator = coordinator
        self._book.learn(self._arbiter.certificates)
        now = self._book.acquaintance(coordinator=coordinator)
        self._book.take_changes()
        if now is None:
            return
        if self._book.missing:
            self._misses.set()
        self._network.install(now.own, now.epoch, now.peers, now.secret)
        self._book.forget_unused()
        if self._write_obituary is not None and self.me is not None:
            self._write_obituary(now)

    def _end_network(self) -> None:
        own, known = self._book.own, self._book.known
        if own is not None and known is not None:
            self._network.install(own, known.epoch, (), known.secret)

    async def _find_certificates(self) -> None:
        """Look for certificates as long as some are missing."""
        first_s, most_s = CERTIFICATES_AGAIN_S
        again_s = first_s
        while True:
            await self._misses.wait()
            missing = self._book.missing
            if not missing or self.stopped is not None:
                self._misses = trio.Event()
                again_s = first_s
                continue
            await self._arbiter.read_certificates(missing)
            self._book.learn(self._arbiter.certificates)
            if self.stopped is None:
                self._make_known()
            for node in missing:
                if node in self._book.missing and node not in self._complained:
                    self._complained.add(node)
                    log.info("node %s has no certificate yet: it cannot be talked to", node)
            await trio.sleep(again_s)
            again_s = min(2 * again_s, most_s)

    def _network_told(self, event: NetworkEvent) -> None:
        match event:
            case Arrived(peer, _, message):
                if type(message) not in _MESSAGES:
                    self._hand_over(event)
                elif peer.slot != NEWCOMER_SLOT and self._can_be(peer, message):
                    self._give(events.Received(peer, message))
            case Connected(peer):
                self._on_network(event)
                if peer.slot != NEWCOMER_SLOT:
                    self._give(events.PeerConnected(peer))
            case Lost(peer):
                self._on_network(event)
                self._give(events.PeerLost(peer))
            case events.BeatHeard(beat):
                self._hearing.heard(beat, boottime())
                self._give(event)
            case events.DeathProven() | events.StrangerCame():
                self._give(event)

    def _hand_over(self, event: Arrived) -> None:
        """A message for the layers above. Who sends what it must not loses the connection."""
        try:
            if self._on_network(event):
                return
            words = f"{type(event.message).__name__} is not wanted here"
        except (ProtocolViolation, WireError) as error:
            words = str(error)
        self._refuse(event.peer, words)

    def _can_be(self, peer: NodeId, message: Message) -> bool:
        """The member takes an announced view for true: what no holder announces ends here."""
        if isinstance(message, Announce):
            try:
                message.view.check()
                if self.view is not None and message.view.epoch > self.view.epoch:
                    message.view.follows(self.view)
            except (AssertionError, ValueError) as error:
                self._refuse(peer, f"it announces a view that cannot be: {error}")
                return False
        return True

    def _refuse(self, peer: NodeId, words: str) -> None:
        log.warning("node %s breaks the protocol: %s", peer, words)
        self._network.refuse(peer, words)


def _in_words(view: View) -> str:
    def names(nodes: tuple[NodeId, ...]) -> str:
        return ", ".join(f"{view.slots[node.slot].node_name} ({node})" for node in nodes) or "-"

    words = f"active {names(view.active)}"
    if view.joining:
        words += f"; joining {names(view.joining)}"
    if view.to_replay:
        words += f"; to be replayed {names(view.to_replay)}"
    return words
