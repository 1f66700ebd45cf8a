"""Hosts: daemons that take part in the volume, and programs that use it.

    down -> starting -> serving -> leaving -> down
                  \\________\\________\\__-> down: killed, without power, or its node has failed

A *killed* daemon is gone at once; its kernel closes its sockets, and its supervisor says that it
is dead. A host *without power* is silent: its sessions stay open at the target until somebody
fences them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import trio

from csvfs.errors import FilesystemError
from csvfs.format import Superblock
from csvfs.host.member import ClusterMember, open_member, serving_volume
from csvfs.host.node import ClusterNode
from csvfs.membership.claim import ClaimRefused, LeaveIncomplete
from csvfs.membership.peek import peek
from csvfs.volume import Volume, VolumeOptions
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.certificates import Credentials, make_credentials
from lockmgr.cluster.effects import Stop, UpwardEffect, ViewInstalled
from lockmgr.cluster.errors import ClusterStopped
from lockmgr.cluster.lease_watch import LeaseWatch
from lockmgr.cluster.peers import Address
from lockmgr.cluster.view import NodeId, View
from redirector.block.device import BlockError
from tests.cluster_volumes import NodeDied
from tests.whole.cables import CabledLun, WatchedLun
from tests.whole.machines import Machine, realtime_ns
from tests.whole.wires import Wires

T = TypeVar("T")

ENDS = (FilesystemError, BlockError, ClusterStopped, LeaveIncomplete, ClaimRefused)
"""What a daemon may end with."""

_CREDENTIALS: list[Credentials] = []


def credentials(number: int) -> Credentials:
    """Always the same ones within a process: they take long to make."""
    while len(_CREDENTIALS) <= number:
        _CREDENTIALS.append(make_credentials())
    return _CREDENTIALS[number]


class World:
    """What all hosts have in common."""

    def __init__(self, lun: WatchedLun, superblock: Superblock, rng: Random) -> None:
        self.lun = lun
        self.superblock = superblock
        self.rng = rng
        self.trace: list[str] = []
        self.wires = Wires(Random(rng.random()), self.tell)
        self.hosts: list[Host] = []
        self.lives: list[Life] = []
        self.newest: View | None = None
        """Of all views that were installed somewhere."""
        self.departed: dict[NodeId, float] = {}
        """Incarnations that a view has left out, and when that was first installed."""
        self.power_losses: list[float] = []
        """When the target lost what its cache had."""

    def tell(self, words: str) -> None:
        self.trace.append(f"{trio.current_time():10.4f}  {words}")

    def host_of(self, shown: Credentials) -> str:
        """Who has these credentials."""
        return next(life.host.name for life in self.lives if life.credentials is shown)

    def view_installed(self, by: Life, view: View) -> None:
        if self.newest is None or view.epoch > self.newest.epoch:
            for node in self.newest.listed if self.newest is not None else ():
                if not view.lists(*node):
                    self.departed.setdefault(node, trio.current_time())
            self.newest = view
            self.tell(f"{by}: view {view.epoch}: {', '.join(map(str, view.listed))}")


class WatchedNode(ClusterNode):
    """A node that tells what it is told."""

    life: Life

    def on_effect(self, effect: UpwardEffect) -> None:
        match effect:
            case ViewInstalled(view):
                self.life.world.view_installed(self.life, view)
            case Stop(reason, words):
                self.life.world.tell(f"{self.life}: stops ({reason.value}): {words}")
        super().on_effect(effect)


class Answering:
    """A volume whose answers are given under a lease, as `csvfs.operations` gives them."""

    def __init__(self, volume: Volume, lease: LeaseWatch) -> None:
        self._volume = volume
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._volume, name)
        if not inspect.iscoroutinefunction(method):
            return method

        async def answer(*args: Any) -> Any:
            try:
                return await method(*args)
            finally:
                if not self._lease.valid():
                    await self._lease.wait_valid()

        return answer


class Life:
    """One daemon, from its start to its end."""

    def __init__(self, host: Host, number: int) -> None:
        self.host = host
        self.world = host.world
        self.number = number
        self.credentials = credentials(len(self.world.lives))
        self.rng = Random(f"{self.world.rng.random()}")
        self.gone = False
        self.ended_at: float | None = None
        """When its programs were told, or not any more."""
        self.member: ClusterMember | None = None
        self.volume: Any = None
        """What programs use."""
        self.scope = trio.CancelScope()
        self.ready = trio.Event()
        """It serves."""
        self.stopping = False
        """Programs are to end, since it is to leave."""
        self.leave = trio.Event()
        self.ended = trio.Event()
        self.left = False
        self._calls: dict[trio.CancelScope, None] = {}
        self._called = trio.Event()
        self.world.lives.append(self)

    def __str__(self) -> str:
        return f"{self.host.name}.{self.number}"

    @property
    def cable_cut(self) -> bool:
        return self.host.cable_cut

    @property
    def node(self) -> NodeId | None:
        """Its incarnation, once it is listed."""
        return None if self.member is None else self.member.cluster.me

    @property
    def dead(self) -> bool:
        """Programs on it are not answered any more."""
        return self.ended_at is not None

    def may_write(self) -> str:
        """See `Initiator`."""
        node = self.node
        if node is not None and node in self.world.departed:
            return f"{self} was {node}, which no view lists any more"
        return ""

    def died(self) -> None:
        if self.ended_at is None:
            self.ended_at = trio.current_time()

    # -- the daemon ------------------------------------------------------------------------------
    async def run(self) -> None:
        """All of it."""
        tell = self.world.tell
        tell(f"{self}: starts")
        try:
            with self.scope:
                await self._serve()
        except BaseException as error:
            _expect_only(error)
            tell(f"{self}: ends: {_words(error)}")
        else:
            tell(f"{self}: {'has left' if self.left else 'is dead'}")
        finally:
            self.died()
            for scope in list(self._calls):
                scope.cancel()
            self.ended.set()

    async def _serve(self) -> None:
        host, world = self.host, self.world
        lun = CabledLun(world.lun, self)
        machine_id = hashlib.sha256(host.name.encode()).digest()[:16]
        identity = Identity(
            host.name,
            machine_id,
            machine_id,
            self.credentials.fingerprint,
            (str(host.address),),
            self.credentials.certificate,
        )

        def make_node(*parts: Any) -> WatchedNode:
            node = WatchedNode(*parts)
            node.life = self
            return node

        peeked = await peek(lun, host.initiator, rng=self.rng)
        async with open_member(
            lun,
            peeked,
            identity,
            self.credentials,
            host.initiator,
            listen=host.address,
            told=lambda words: world.tell(f"{self}: {words}"),
            rng=self.rng,
            make_node=make_node,
        ) as self.member:
            options = VolumeOptions(clock=realtime_ns)
            async with serving_volume(self.member, peeked.superblock, options) as volume:
                self.volume = Answering(volume, self.member.cluster.lease)
                world.tell(f"{self}: serves as {self.node}")
                self.ready.set()
                await self._until_the_end(self.member.node)
            self.died()
        self.left = True

    async def _until_the_end(self, node: ClusterNode) -> None:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await node.wait_failed()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await self.leave.wait()
            nursery.cancel_scope.cancel()
        if node.failure is not None:
            self.died()
            raise node.failure

    # -- what is done to it ----------------------------------------------------------------------
    def kill(self) -> None:
        """SIGKILL. Its kernel closes what it had open."""
        self._vanish()
        lun = self.world.lun
        for device in [d for d in lun.sessions.values() if lun.owners.get(d.nexus) is self]:
            lun.close_session(device)
        network = self.world.wires.networks.get(self.host.name)
        if network is not None:
            network.close("reset by peer")
        self.scope.cancel()

    def cut_power(self) -> None:
        """Nobody closes anything: it is only silent."""
        self._vanish()
        self.host.machine.freeze()
        self.world.wires.silent.add(self.host.name)

    def _vanish(self) -> None:
        self.gone = True
        self.died()

    def forget(self) -> None:
        """After `cut_power`: what is left of it in this process ends, and does nothing."""
        network = self.world.wires.networks.pop(self.host.name, None)
        if network is not None:
            network.close("it is silent")
        self.world.wires.silent.discard(self.host.name)
        self.scope.cancel()
        self.host.machine.thaw()

    # -- programs --------------------------------------------------------------------------------
    async def programs_ended(self) -> None:
        """Return when no program runs here."""
        while self._calls:
            self._called = trio.Event()
            await self._called.wait()

    async def call(self, method: Callable[..., Awaitable[T]], *args: Any) -> T:
        """``await method(*args)`` as a program on this host. Raises `NodeDied` if its daemon or its
        volume ends meanwhile."""
        with trio.CancelScope() as scope:
            self._calls[scope] = None
            if self.dead:
                scope.cancel()
            try:
                return await method(*args)
            except (FilesystemError, BlockError, ClusterStopped):
                assert self.member is not None
                if not self.dead and self.member.node.failure is None:
                    raise
                self.died()
            finally:
                self._calls.pop(scope, None)
                self._called.set()
        if self.dead:
            raise NodeDied(str(self))
        raise AssertionError("a call was cancelled, and its daemon lives")


class Host:
    """A machine, its daemon, and what is around them."""

    def __init__(self, world: World, name: str, nursery: trio.Nursery) -> None:
        self.world = world
        self.name = name
        self.machine = Machine(name)
        self.address = Address(f"10.0.0.{len(world.hosts) + 1}", 21065)
        self.initiator = f"iqn.2026-11.test:{name}"
        self.cable_cut = False
        self.life: Life | None = None
        self._lives = 0
        self._nursery = nursery
        world.hosts.append(self)

    def start(self) -> Life:
        """Start the daemon; the one before has ended."""
        assert self.life is None or self.life.ended.is_set()
        self._lives += 1
        self.life = life = Life(self, self._lives)
        self._nursery.start_soon(self.machine.run, life.run)
        return life

    def run(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A program."""
        self._nursery.start_soon(self.machine.run, work, *args)

    @property
    def serving(self) -> Life | None:
        """Its daemon, if there is one that serves."""
        life = self.life
        if life is None or not life.ready.is_set() or life.dead or life.stopping:
            return None
        return life

    async def leave(self) -> None:
        """Unmount; returns when the daemon has ended."""
        life = self.life
        assert life is not None
        self.world.tell(f"{life}: is to leave")
        life.stopping = True
        await life.programs_ended()
        life.leave.set()
        await life.ended.wait()

    async def settled(self) -> None:
        """Return when its daemon has ended, or serves."""
        life = self.life
        if life is None:
            return
        async with trio.open_nursery() as nursery:
            for event in (life.ready, life.ended):

                async def watch(event: trio.Event = event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)


def _expect_only(error: BaseException) -> None:
    """Raises whatever a daemon must not end with."""
    if isinstance(error, BaseExceptionGroup):
        _expected, rest = error.split(ENDS)
        if rest is not None:
            raise error
    elif not isinstance(error, ENDS):
        raise error


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_words(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"
