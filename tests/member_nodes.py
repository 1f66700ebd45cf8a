"""Whole members over real sessions with a LUN: the smallest shell that works, for tests.

Each `MemberNode` is a `Member` with a `LunArbiter`. Between nodes there is a perfect network, as
long as they are not cut off. Locks thaw, and journals are replayed, as soon as that is asked for.
The clock is trio's.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import trio

from csvfs.format import Superblock, View
from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.fixed_area import read_view
from csvfs.membership.path_keys import PathKeys
from csvfs.membership.peek import peek
from csvfs.mkfs import FormatOptions, make_filesystem
from lockmgr.cluster import effects, events
from lockmgr.cluster.blocks import Heartbeat, Identity
from lockmgr.cluster.member import Member
from lockmgr.cluster.outcomes import Good, Knocked, Outcome
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from redirector.block.device import InitiatorPort, Lun
from redirector.block.reservations import Registration

QUICK = Settings(
    heartbeat_s=0.1,
    hears_s=0.5,
    lease_s=1.2,
    answer_within_s=0.4,
    lease_over_s=1.5,
    evict_after_s=2.0,
    judge_gap_s=0.4,
    path_loss_s=0.8,
    silence_s=1.0,
    restart_grace_s=1.0,
    claimed_dead_s=0.6,
    reopen_s=0.2,
    leave_within_s=10.0,
    hurry_s=0.05,
)
"""For LUNs in real time."""


async def format_lun(lun: Lun, *, slots: int = 4) -> None:
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 0x80 << 40 | 1)) as device:
        await make_filesystem(
            device, FormatOptions(label="v", slots=slots), now_ns=1, rng=Random(5)
        )


@dataclass(eq=False)
class Cluster:
    """Nodes that hear each other, around one LUN."""

    open_lun: Callable[[], Lun]
    settings: Settings
    nursery: trio.Nursery
    nodes: list[MemberNode] = field(default_factory=list)
    lives: dict[str, int] = field(default_factory=dict)

    async def node(self, name: str) -> MemberNode:
        """A new daemon on that host; it has begun to join."""
        lun = self.open_lun()
        life = self.lives[name] = self.lives.get(name, 0) + 1
        peeked = await peek(lun, initiator_of(name), rng=Random(f"{name}{life}"))
        node = MemberNode(self, name, life, lun, peeked.superblock)
        self.nodes.append(node)
        await self.nursery.start(node.run)
        return node

    async def active(self, *names: str) -> list[MemberNode]:
        """So many nodes, each ACTIVE, the first the coordinator."""
        nodes: list[MemberNode] = []
        for name in names:
            nodes.append(await self.node(name))
            for node in nodes:
                await node.until(lambda node=node: len(node.active) == len(nodes))  # type: ignore[misc]
        return nodes


def initiator_of(name: str) -> str:
    return f"iqn.2026-11.test:{name}"


class MemberNode:
    """One daemon."""

    def __init__(
        self, cluster: Cluster, name: str, life: int, lun: Lun, superblock: Superblock
    ) -> None:
        self.cluster = cluster
        self.name = name
        machine = hashlib.md5(name.encode()).digest()
        certificate = f"certificate of {name} {life}".encode()
        identity = Identity(
            name,
            machine,
            machine,
            hashlib.sha256(certificate).digest(),
            (f"{name}:7000",),
            certificate,
        )
        rng = Random(f"{name} {life}")
        self.member = Member(identity, cluster.settings, PathKeys(), rng)
        self.arbiter = LunArbiter(
            lun,
            superblock,
            identity,
            initiator_of(name),
            on_lost=self._lost,
            on_opened=self._opened,
            rng=rng,
        )
        self.lun = lun
        self.superblock = superblock
        self.log: list[effects.Effect] = []
        self.told: list[str] = []
        """What the data path is told, in order."""
        self.outcomes: list[tuple[effects.AnyIo, Outcome]] = []
        self.cut_off = False
        self.connected: set[NodeId] = set()
        """With whom: as soon as something of it comes, and for good."""
        self.stopped = trio.Event()
        self.scope = trio.CancelScope()
        self._changed = trio.Event()
        self._send, self._receive = trio.open_memory_channel[events.Event](float("inf"))
        self._frozen: trio.Event | None = None
        self._locks = -1
        self._writing = False
        self._newcomer_key = 0

    # -- what tests ask ------------------------------------------------------------------------
    @property
    def id(self) -> NodeId:
        assert self.member.node is not None
        return self.member.node

    @property
    def view(self) -> View | None:
        return self.member.view

    @property
    def active(self) -> tuple[NodeId, ...]:
        return self.view.active if self.view is not None else ()

    @property
    def stop(self) -> effects.Stop:
        assert self.member.stopped is not None
        return self.member.stopped

    @property
    def data(self) -> Registration:
        assert self.arbiter.data is not None
        return self.arbiter.data

    async def until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        """Return when it holds, looked at after each step. Raises `TimeoutError`."""
        with trio.move_on_after(within_s):
            while not condition():
                await self._changed.wait()
            return
        raise TimeoutError(f"{self.name}: not within {within_s} s; {self.arbiter.trouble}")

    async def view_on_lun(self) -> View:
        """As it is read on the data session."""
        data = self.data
        return await data.ask(lambda: read_view(data.device, self.superblock.volume_id))

    # -- what happens to it ----------------------------------------------------------------------
    def give(self, event: events.Event) -> None:
        self._send.send_nowait(event)

    def freeze(self) -> None:
        self._frozen = trio.Event()

    def thaw(self) -> None:
        frozen, self._frozen = self._frozen, None
        assert frozen is not None
        frozen.set()

    def kill(self) -> None:
        """Its sessions are closed, as by its kernel."""
        self.cluster.nodes.remove(self)
        self.scope.cancel()

    def _lost(self, keys: tuple[int, ...]) -> None:
        self.told.append("lost")
        self.give(events.PathLost(keys))

    def _opened(self, _control: Registration, _data: Registration) -> None:
        self.told.append("restarted" if self.arbiter.restarted else "opened")

    # -- running -----------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._run_arbiter)
                task_status.started()
                self._step(events.Start(), nursery)
                while self.member.stopped is None:
                    await self._one(nursery)
                self.stopped.set()
                self._changed.set()
                nursery.cancel_scope.cancel()

    async def _run_arbiter(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.arbiter.run(task_status=task_status)

    async def _one(self, nursery: trio.Nursery) -> None:
        due = self.member.next_timer()
        event: events.Event = events.Tick()
        with trio.move_on_at(due if due is not None else float("inf")):
            event = await self._receive.receive()
        if self._frozen is not None:
            await self._frozen.wait()
        self._step(event, nursery)
        if self.member.next_timer() is not None and self.member.next_timer() <= self.now:  # type: ignore[operator]
            self._step(events.Tick(), nursery)

    @property
    def now(self) -> float:
        return trio.current_time()

    def _step(self, event: events.Event, nursery: trio.Nursery) -> None:
        for effect in self.member.step(event, self.now):
            self.log.append(effect)
            self._carry_out(effect, nursery)
        self.member.check()
        self.arbiter.check()
        self._changed.set()
        self._changed = trio.Event()

    def _carry_out(self, effect: effects.Effect, nursery: trio.Nursery) -> None:
        match effect:
            case effects.SendTo(peer, message):
                for node in self._reached():
                    if node.is_peer(peer) and self.member.node is not None:
                        node.give(events.Received(self.id, message))
            case effects.Beat(beat, key):
                for node in self._reached():
                    if self.id not in node.connected:
                        node.connected.add(self.id)
                        node.give(events.PeerConnected(self.id))
                    node.give(events.BeatHeard(beat))
                if key and not self._writing:
                    self._writing = True
                    nursery.start_soon(self._write, beat, key, self.now)
            case effects.ViewInstalled(view):
                if view.lock_epoch != self._locks and self.member.node in view.active:
                    self._locks = view.lock_epoch
                    self.give(events.LocksThawed(view.lock_epoch))
            case effects.ReplayWanted(node_id):
                self.give(events.Replayed(node_id))
            case effects.PathsReady():
                self.told.append("ready")
            case effects.LeaseUntil() | effects.DepartedMayBeGranted():
                pass
            case effects.CloseSessions():
                nursery.start_soon(self.arbiter.aclose)
            case effects.Stop():
                self.cluster.nodes.remove(self)
            case _:
                nursery.start_soon(self._do, effect)

    async def _do(self, effect: effects.AnyIo) -> None:
        if isinstance(effect, effects.Knock):
            answered = frozenset(
                node.id for node in self._reached() if node.member.node in effect.nodes
            )
            self.give(events.Done(effect.op, Good(Knocked(answered))))
            return
        if isinstance(effect, effects.OpenNewcomer):
            self._newcomer_key = effect.key
        outcome = await self.arbiter.carry_out(effect)
        self.outcomes.append((effect, outcome))
        self.give(events.Done(effect.op, outcome))

    async def _write(self, beat: Heartbeat, key: int, sent_at: float) -> None:
        effect = effects.WriteHeartbeat(0, beat)
        outcome = await self.arbiter.carry_out(effect)
        self.outcomes.append((effect, outcome))
        self._writing = False
        good = isinstance(outcome, Good)
        self.give(events.HeartbeatWritten(key, sent_at) if good else events.HeartbeatFailed(key))

    def is_peer(self, peer: NodeId) -> bool:
        if peer.slot == NEWCOMER_SLOT:
            return peer.incarnation == self._newcomer_key
        return peer == self.member.node

    def _reached(self) -> list[MemberNode]:
        if self.cut_off:
            return []
        return [node for node in self.cluster.nodes if node is not self and not node.cut_off]


@asynccontextmanager
async def open_cluster(
    open_lun: Callable[[], Lun], settings: Settings | None = None
) -> AsyncIterator[Cluster]:
    """A LUN with a fresh volume, and as yet no node."""
    await format_lun(open_lun())
    async with trio.open_nursery() as nursery:
        yield Cluster(open_lun, settings or Settings(), nursery)
        nursery.cancel_scope.cancel()
