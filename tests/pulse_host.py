"""A node of a volume in a process of its own, that does to its event loop what it is told to.

    python -m tests.pulse_host URL NAME PORT native|python [HEARTBEAT_S]

Heartbeats also go to PORT of this machine. Commands on standard input, answers as JSON on standard
output: ``busy S [T]`` computes for S seconds, T (0.9) at a time; ``hang S`` sleeps with the whole
loop; ``idle S``; ``status``; ``leave``. What the lease was meanwhile is seen by a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from random import SystemRandom
from typing import Any, Final

import trio
import trio.lowlevel

from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.native_pulse import NativePulse
from csvfs.membership.path_keys import PathKeys
from csvfs.membership.peek import peek
from lockmgr.cluster import effects
from lockmgr.cluster.blocks import Heartbeat, Identity
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.datagram import encode_heartbeat
from lockmgr.cluster.peers import Address
from lockmgr.cluster.pulse import Pulse, PulseWiring, PythonPulse
from lockmgr.cluster.service import Cluster, open_cluster
from lockmgr.cluster.settings import Settings
from redirector.block.reservations import Registration
from redirector.block.url import open_lun

STRETCH_S: Final = 0.9


class ObservedNativePulse(NativePulse):
    """Sends to one more."""

    observer: Address

    def install(self, secret: bytes, targets: Iterable[Address]) -> None:
        super().install(secret, (*targets, self.observer))


def native(arbiter: LunArbiter, superblock: Any, observer: Address) -> Callable[..., Pulse]:
    def make(wiring: PulseWiring) -> Pulse:
        pulse = ObservedNativePulse(arbiter, superblock, wiring)
        pulse.observer = observer
        return pulse

    return make


def python(observer: Address) -> Callable[..., Pulse]:
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    class ObservedPythonPulse(PythonPulse):
        def __init__(self, wiring: PulseWiring) -> None:
            super().__init__(wiring)
            self._send_on = wiring.send
            self._cluster_id = wiring.cluster_id
            self._secret = bytes(32)
            self._send = self._both

        def install(self, secret: bytes, targets: Iterable[Address]) -> None:
            del targets
            self._secret = secret

        def _both(self, beat: Heartbeat) -> None:
            data = encode_heartbeat(beat, self._cluster_id, self._secret)
            own.sendto(data, (observer.host, observer.port))
            self._send_on(beat)

    return ObservedPythonPulse


class LeaseLog:
    """What the lease was, now and then."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.samples: list[tuple[float, float]] = []
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.samples.append((boottime(), self._cluster.lease.until_s))
            time.sleep(0.02)

    def since(self, began: float) -> list[tuple[float, float]]:
        return [each for each in self.samples if each[0] > began]


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


class Node:
    def __init__(self) -> None:
        self.cluster: Cluster
        self.arbiter: LunArbiter

    def on_lost(self, keys: tuple[int, ...]) -> None:
        self.cluster.path_lost(keys)

    def on_effect(self, effect: effects.UpwardEffect) -> None:
        match effect:
            case effects.ReplayWanted(node):
                self.cluster.replayed(node)
            case effects.ViewInstalled(view):
                self.cluster.locks_thawed(view.lock_epoch)
            case _:
                pass


async def busy(seconds: float, stretch_s: float = STRETCH_S) -> None:
    """Again and again, never waiting in between."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stretch = time.monotonic() + stretch_s
        while time.monotonic() < stretch:
            pass
        await trio.lowlevel.checkpoint()


async def obey(cluster: Cluster, log: LeaseLog) -> None:
    stdin = trio.lowlevel.FdStream(os.dup(0))
    pending = b""
    while not cluster.stopped:
        data = await stdin.receive_some()
        if not data:
            return
        pending += data
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            word, *arguments = line.decode().split()
            began, began_wall = boottime(), time.time()
            if word == "busy":
                await busy(*map(float, arguments))
            elif word == "idle":
                await trio.sleep(float(arguments[0]))
            elif word == "hang":
                time.sleep(float(arguments[0]))  # noqa: ASYNC251 - that is what is asked for
            elif word == "leave":
                stop = await cluster.leave()
                say(left=stop.reason.value)
                return
            ended_wall = time.time()
            samples = log.since(began)
            pulse = cluster.status().pulse
            say(
                began=began_wall,
                ended=ended_wall,
                lease_most_s=max((until - began for _, until in samples), default=0.0),
                lease_least_left_s=min((until - now for now, until in samples), default=0.0),
                lease_valid=cluster.lease.valid(),
                pulse={name: getattr(pulse, name) for name in pulse.__slots__},
                has_path=cluster.status().has_path,
            )


async def main(url: str, name: str, port: int, kind: str, heartbeat_s: float = 0.5) -> None:
    lun = open_lun(url, None)
    initiator = f"iqn.2026-11.test:{name}"
    peeked = await peek(lun, initiator)
    credentials = make_credentials()
    machine = hashlib.sha256(name.encode()).digest()[:16]
    identity = Identity(
        name, machine, machine, credentials.fingerprint, (), credentials.certificate, 0
    )
    node = Node()

    def ignore(_control: Registration, _data: Registration) -> None:
        pass

    async with trio.open_nursery() as nursery:
        arbiter = LunArbiter(
            lun,
            peeked.superblock,
            identity,
            initiator,
            on_lost=node.on_lost,
            on_opened=ignore,
        )
        observer = Address("127.0.0.1", port)
        make_pulse = (
            native(arbiter, peeked.superblock, observer) if kind == "native" else python(observer)
        )
        await nursery.start(arbiter.run)
        async with open_cluster(
            identity,
            PathKeys(),
            arbiter,
            Address("127.0.0.1", 0),
            credentials,
            peeked.superblock.volume_id,
            on_effect=node.on_effect,
            make_pulse=make_pulse,
            settings=Settings(heartbeat_s=heartbeat_s),
            rng=SystemRandom(),
        ) as cluster:
            node.cluster = cluster
            await cluster.wait_active()
            assert cluster.me is not None
            say(slot=cluster.me.slot, incarnation=cluster.me.incarnation)
            await obey(cluster, LeaseLog(cluster))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    url, name, port, kind, *heartbeat = sys.argv[1:]
    trio.run(partial(main, url, name, int(port), kind, *map(float, heartbeat)))
