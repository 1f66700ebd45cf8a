"""What a message between two nodes costs: `python -m benchmarks.rpc`, two processes on loopback.

round trip      a small message and its answer, one at a time
one way         small messages as fast as they go
4 KiB one way   messages with 4 KiB in them
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection as Pipe

import trio

from lockmgr.cluster.certificates import Credentials, make_credentials
from lockmgr.cluster.messages import AskLease, LeaseGiven
from lockmgr.cluster.network_events import Arrived, Connected, NetworkEvent
from lockmgr.cluster.peers import Address, Peer
from lockmgr.cluster.rpc import Network, open_network
from lockmgr.cluster.view import NodeId
from lockmgr.messages import GlimpseAnswer, Resource

ROUND_TRIP_BOUND_MS = 0.3
ONE_WAY_BOUND = 10_000
PORTS = Address("127.0.0.1", 0)
HERE, THERE = NodeId(0, 1), NodeId(1, 1)
ID = bytes(16)
SMALL = Resource(b"inode 12345", b"group 7")


def serve(pipe: Pipe, credentials: Credentials) -> None:
    """The other node: answers each `AskLease`, takes everything else."""
    trio.run(_serve, pipe, credentials)


async def _serve(pipe: Pipe, credentials: Credentials) -> None:
    network: Network

    def deliver(event: NetworkEvent) -> None:
        if isinstance(event, Arrived) and isinstance(event.message, AskLease):
            network.send(HERE, LeaseGiven(event.message.stamp))

    async with open_network(credentials, ID, PORTS, deliver, rng=random.Random(2)) as network:
        pipe.send(network.address)
        certificate = pipe.recv()
        network.install(THERE, 1, [Peer(HERE, certificate)], bytes(32))
        while not await trio.to_thread.run_sync(pipe.poll, 0.2):
            pass


class Caller:
    """This node."""

    def __init__(self) -> None:
        self.network: Network | None = None
        self.connected = trio.Event()
        self.wanted: float = -1
        self.answered = trio.Event()

    def deliver(self, event: NetworkEvent) -> None:
        if isinstance(event, Connected):
            self.connected.set()
        elif isinstance(event, Arrived) and event.message.stamp == self.wanted:
            self.answered.set()

    async def ask(self, stamp: float) -> None:
        """A round trip; everything sent before has arrived when it is over."""
        assert self.network is not None
        self.wanted, self.answered = stamp, trio.Event()
        self.network.send(THERE, AskLease(stamp))
        await self.answered.wait()

    async def stream(self, message: object, number: int) -> float:
        """Messages a second, one way."""
        assert self.network is not None
        started = time.perf_counter()
        for _ in range(number // 50):
            for _ in range(50):
                self.network.send(THERE, message)
            await self.network.wait_room(THERE)
            await trio.lowlevel.checkpoint()
        await self.ask(-2)
        return number / (time.perf_counter() - started)


async def round_trips(caller: Caller, number: int) -> list[float]:
    """Milliseconds each, sorted."""
    took = []
    for stamp in range(number):
        started = time.perf_counter()
        await caller.ask(stamp)
        took.append((time.perf_counter() - started) * 1e3)
    return sorted(took)


async def with_peer(measure: Callable[[Caller], Awaitable[None]]) -> None:
    """Two processes, connected."""
    ours, theirs = make_credentials(), make_credentials()
    pipe, far_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(far_end, theirs))
    process.start()
    try:
        address = await trio.to_thread.run_sync(pipe.recv)
        caller = Caller()
        rng = random.Random(1)
        async with open_network(ours, ID, PORTS, caller.deliver, rng=rng) as network:
            caller.network = network
            pipe.send(ours.certificate)
            peer = Peer(THERE, theirs.certificate, (address,))
            network.install(HERE, 1, [peer], bytes(32))
            await caller.connected.wait()
            await measure(caller)
            pipe.send(None)
    finally:
        await trio.to_thread.run_sync(process.join, 5)
        process.terminate()


def main() -> None:
    """Print a table; exit 1 where a bound is missed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.rpc", description=__doc__)
    options.add_argument("--runs", type=int, default=3, help="the best of so many counts")
    runs = options.parse_args().runs
    best = {"median": 1e9, "p99": 1e9, "small": 0.0, "big": 0.0}

    async def measure(caller: Caller) -> None:
        for _ in range(runs):
            took = await round_trips(caller, 2000)
            best["median"] = min(best["median"], statistics.median(took))
            best["p99"] = min(best["p99"], took[int(len(took) * 0.99)])
            small = await caller.stream(LeaseGiven(1), 30_000)
            best["small"] = max(best["small"], small)
            message = GlimpseAnswer(SMALL, 1, 0, 1, bytes(4096))
            best["big"] = max(best["big"], await caller.stream(message, 20_000))

    trio.run(with_peer, measure)
    print(f"round trip, median   {best['median']:8.3f} ms   (<= {ROUND_TRIP_BOUND_MS:g})")
    print(f"round trip, p99      {best['p99']:8.3f} ms")
    print(f"one way              {best['small']:8,.0f} /s   (>= {ONE_WAY_BOUND:,})")
    print(f"4 KiB one way        {best['big']:8,.0f} /s   {best['big'] * 4096 / 1e6:,.0f} MB/s")
    if best["median"] > ROUND_TRIP_BOUND_MS or best["small"] < ONE_WAY_BOUND:
        raise SystemExit("a bound is missed")


if __name__ == "__main__":
    main()
