"""Hosts of a cluster over loopback sockets and a shared directory, all in one process.

A `Host` is a daemon as far as its cluster goes: its locks thaw, and journals are replayed, as soon
as that is asked for. It can be killed, cut off from the others (`cable`), or from the directory.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from lockmgr.cluster import effects
from lockmgr.cluster.blocks import Heartbeat, Identity
from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.connection import Connection
from lockmgr.cluster.directory_arbiter import DirectoryArbiter, make_directory
from lockmgr.cluster.effects import Stop, UpwardEffect
from lockmgr.cluster.network_events import NetworkEvent
from lockmgr.cluster.network_settings import NetworkSettings
from lockmgr.cluster.peers import Address
from lockmgr.cluster.rpc import Network
from lockmgr.cluster.service import Cluster, open_cluster
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId, View

ID = bytes(range(16))
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
    reopen_s=0.1,
    leave_within_s=5.0,
    hurry_s=0.05,
)
NETWORK = NetworkSettings(courtesy_s=0.05, ping_s=0.5)


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait for a condition; a test that waits too long fails. (Long: machines may be busy.)"""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await trio.sleep(0.005)


class Cable:
    """Between a host's network and all others. Cut: whatever is sent or comes waits or is lost,
    and nobody is told."""

    def __init__(self) -> None:
        self._whole = trio.Event()
        self._whole.set()

    @property
    def is_cut(self) -> bool:
        return not self._whole.is_set()

    def cut(self) -> None:
        self._whole = trio.Event()

    def mend(self) -> None:
        self._whole.set()

    async def wait_whole(self) -> None:
        await self._whole.wait()

    def plug_into(self, network: Network) -> None:
        """Everything of this network goes through the cable from now on."""
        beats, greeter = network._beats, network._greeter
        send, decoded = beats.send, beats._decoded
        connect, incoming = greeter._connect, greeter.incoming

        def send_beat(heartbeat: Heartbeat) -> None:
            if not self.is_cut:
                send(heartbeat)

        def decode(data: bytes, source: str) -> Heartbeat | None:
            return None if self.is_cut else decoded(data, source)

        async def dial(address: Address) -> trio.abc.Stream:
            await self.wait_whole()
            return CableStream(await connect(address), self)

        async def answer(stream: trio.SocketStream) -> Connection:
            await self.wait_whole()
            return await incoming(CableStream(stream, self))  # type: ignore[arg-type] # any Stream

        for where, name, what in (
            (beats, "send", send_beat),
            (beats, "_decoded", decode),
            (greeter, "_connect", dial),
            (greeter, "incoming", answer),
        ):
            setattr(where, name, what)


class CableStream(trio.abc.Stream):
    """A TCP connection through a `Cable`."""

    def __init__(self, stream: trio.SocketStream, cable: Cable) -> None:
        self._stream = stream
        self._cable = cable

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._cable.wait_whole()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._cable.wait_whole()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        await self._cable.wait_whole()
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


class Host:
    """One daemon on one machine."""

    def __init__(self, world: World, name: str, machine: str) -> None:
        self.world = world
        self.name = name
        self.credentials = make_credentials()
        self.identity = Identity(
            name,
            hashlib.sha256(machine.encode()).digest()[:16],
            bytes(16),
            self.credentials.fingerprint,
            (),
            self.credentials.certificate,
        )
        self.arbiter = DirectoryArbiter(world.directory, self.identity, self._path_lost)
        self.obituary = world.directory.parent / f"{name}.obituary"
        self.cable = Cable()
        self.cluster: Cluster
        self.effects: list[UpwardEffect] = []
        self.on_effect: Callable[[UpwardEffect], None] = lambda _effect: None
        self.on_network: Callable[[NetworkEvent], bool] = lambda _event: False
        self.replays = True
        self.dead = False
        self._scope = trio.CancelScope()

    # -- what tests ask ------------------------------------------------------------------------
    @property
    def node(self) -> NodeId:
        assert self.cluster.me is not None
        return self.cluster.me

    @property
    def view(self) -> View:
        assert self.cluster.view is not None
        return self.cluster.view

    @property
    def stopped(self) -> Stop | None:
        return self.cluster.stopped

    def of(self, kind: type) -> list[Any]:
        """The effects of that kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def sees_active(self, *hosts: Host) -> bool:
        """Does it go by a view in which just these are active?"""
        view = self.cluster.view
        return view is not None and {*view.active} == {host.cluster.me for host in hosts}

    # -- what happens to it ----------------------------------------------------------------------
    def kill(self) -> None:
        """SIGKILL: its sockets are closed, its keys stay registered."""
        self.dead = True
        self._scope.cancel()
        self.arbiter.close()

    def lose_storage(self) -> None:
        self.arbiter.directory = self.world.directory / "away"

    def find_storage(self) -> None:
        self.arbiter.directory = self.world.directory

    # -- life ------------------------------------------------------------------------------------
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is killed, has left, or the test is over."""
        with self._scope:
            async with open_cluster(
                self.identity,
                self.arbiter.keys,
                self.arbiter,
                Address("127.0.0.1", 0),
                self.credentials,
                ID,
                on_effect=self._told,
                on_network=lambda event: self.on_network(event),
                settings=self.world.settings,
                network_settings=NETWORK,
                rng=random.Random(self.world.rng.getrandbits(64)),
                obituary=self.obituary,
            ) as cluster:
                self.cluster = cluster
                self.cable.plug_into(cluster._network)
                task_status.started()
                await cluster.wait_stopped()
        self.arbiter.close()

    def _path_lost(self, keys: tuple[int, ...]) -> None:
        self.cluster.path_lost(keys)

    def _told(self, effect: UpwardEffect) -> None:
        self.effects.append(effect)
        self.cluster._member.check()
        self.cluster._book.check()
        match effect:
            case effects.ViewInstalled(view):
                self.cluster.locks_thawed(view.lock_epoch)
            case effects.ReplayWanted(node) if self.replays:
                self.cluster.replayed(node)
        self.on_effect(effect)


class World:
    """A directory, and the hosts that share it."""

    def __init__(self, directory: Path, nursery: trio.Nursery, settings: Settings) -> None:
        self.directory = directory
        self.nursery = nursery
        self.settings = settings
        self.rng = random.Random(7)
        self.hosts: list[Host] = []

    async def begin(self, name: str, machine: str = "") -> Host:
        """Start a daemon; it asks to join."""
        host = Host(self, name, machine or name)
        self.hosts.append(host)
        await self.nursery.start(host.run)
        return host

    async def start(self, *names: str) -> list[Host]:
        """Start daemons one after the other; they are all active, and know it."""
        hosts: list[Host] = []
        for name in names:
            hosts.append(await self.begin(name))
            await until(lambda: all(host.sees_active(*hosts) for host in hosts))
        return hosts


@asynccontextmanager
async def open_world(tmp_path: Path, settings: Settings = QUICK) -> AsyncIterator[World]:
    """A volume that nobody has used, and no hosts."""
    directory = tmp_path / "shared"
    make_directory(directory, 8)
    async with trio.open_nursery() as nursery:
        yield World(directory, nursery, settings)
        nursery.cancel_scope.cancel()
