"""What is done to the hosts, the network and the target, at random; each heals after a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

import trio

from redirector.block.simulated_faults import Hold
from tests.whole.hosts import Host, Life, World

PAUSES_S: Final = (0.2, 1.0, 3.0, 7.0)
"""From one fault to the next."""
LENGTHS_S: Final = (0.3, 1.5, 3.0, 6.5, 9.0)
"""Shorter and longer than a lease, and than it takes to be evicted."""
LONGEST_HOLD_S: Final = 1.5


class Faults:
    """``begun`` is told of each daemon that is started."""

    def __init__(
        self, world: World, rng: Random, nursery: trio.Nursery, begun: Callable[[Life], None]
    ) -> None:
        self.world = world
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self._nursery = nursery
        self._begun = begun
        self._running = 0
        self._healed = trio.Event()
        self._target_busy = False

    async def run(self, faults: int, kinds: tuple[str, ...] = ()) -> None:
        """So many, some of them at a time, of these ``kinds`` or of all; returns when all is
        healed."""
        actions: dict[str, Callable[[Host], Awaitable[None]]] = {
            "kill": self._kill,
            "power off": self._power_off,
            "freeze": self._freeze,
            "cut cable": self._cut_cable,
            "cut network": self._cut_network,
            "cut pair": self._cut_pair,
            "isolate": self._isolate,
            "lose sessions": self._lose_sessions,
            "restart target": self._restart_target,
            "target loses power": self._power_of_target,
            "hold writes": self._hold_writes,
            "leave": self._leave,
        }
        for _ in range(faults):
            await trio.sleep(self.rng.choice(PAUSES_S) * self.rng.uniform(0.5, 1.5))
            name = self.rng.choice(kinds or tuple(actions))
            host = self.rng.choice(self.world.hosts)
            self._running += 1
            self._nursery.start_soon(self._do, name, actions[name], host)
        while self._running:
            self._healed = trio.Event()
            await self._healed.wait()

    async def _do(self, name: str, action: Callable[[Host], Awaitable[None]], host: Host) -> None:
        if not host.machine.frozen and host.life is not None and not host.life.gone:
            self.counts[name] += 1
            self.world.tell(f"** {name}: {host.name}")
            await action(host)
            self.world.tell(f"** over: {name}: {host.name}")
        self._running -= 1
        self._healed.set()

    async def _wait(self) -> None:
        await trio.sleep(self.rng.choice(LENGTHS_S) * self.rng.uniform(0.7, 1.3))

    def _start(self, host: Host) -> None:
        self._begun(host.start())

    # -- hosts -----------------------------------------------------------------------------------
    async def _kill(self, host: Host) -> None:
        life = host.life
        assert life is not None
        node = life.node
        life.kill()
        if node is not None and self.rng.random() < 0.7:
            await trio.sleep(0.05)
            self.world.wires.death(host.name, node)
        await life.ended.wait()
        await self._wait()
        if host.life is life:
            self._start(host)

    async def _power_off(self, host: Host) -> None:
        life = host.life
        assert life is not None
        life.cut_power()
        await self._wait()
        life.forget()
        await life.ended.wait()
        if host.life is life:
            self._start(host)

    async def _freeze(self, host: Host) -> None:
        """Now and then while it has commands on their way: either their answers are in its sockets
        all the time, or they land when they are drained, or after the thaw."""
        life = host.life
        hold = self._hold(life) if self.rng.random() < 0.7 else None
        if hold is not None:
            await trio.sleep(self.rng.uniform(0.1, LONGEST_HOLD_S))
        if not host.machine.frozen and host.life is life:
            host.machine.freeze()
            self.world.wires.silent.add(host.name)
            if hold is not None and self.rng.random() < 0.5:
                hold.lift()
            await self._wait()
            self.world.wires.silent.discard(host.name)
            host.machine.thaw()
        if hold is not None:
            hold.lift()
        await trio.sleep(1)
        await self._again_if_ended(host)

    async def _leave(self, host: Host) -> None:
        life = host.life
        assert life is not None
        if host.serving is None:
            return
        await host.leave()
        await trio.sleep(self.rng.choice((0.0, 2.0)))
        if host.life is life:
            self._start(host)

    async def _again_if_ended(self, host: Host) -> None:
        """An administrator mounts again."""
        life = host.life
        if life is not None and life.ended.is_set() and not life.gone and not life.stopping:
            self._start(host)

    # -- paths -----------------------------------------------------------------------------------
    async def _cut_cable(self, host: Host) -> None:
        host.cable_cut = True
        await self._wait()
        host.cable_cut = False

    async def _cut_network(self, host: Host) -> None:
        for other in self.world.hosts:
            if other is not host:
                self.world.wires.cut(host.name, other.name)
        await self._wait()
        self.world.wires.heal()

    async def _cut_pair(self, host: Host) -> None:
        self.world.wires.cut(host.name, self.rng.choice(self.world.hosts).name)
        await self._wait()
        self.world.wires.heal()

    async def _isolate(self, host: Host) -> None:
        """Both at once: one switch, or one card, carries both. Nobody can tell it anything."""
        host.cable_cut = True
        await self._cut_network(host)
        host.cable_cut = False
        await trio.sleep(1)
        await self._again_if_ended(host)

    async def _lose_sessions(self, host: Host) -> None:
        lun = self.world.lun
        for nexus, device in list(lun.sessions.items()):
            if lun.owners.get(nexus) is host.life and self.rng.random() < 0.7:
                lun.close_session(device)

    # -- the target ------------------------------------------------------------------------------
    async def _restart_target(self, _host: Host) -> None:
        await self._down(power_lost=False)

    async def _power_of_target(self, _host: Host) -> None:
        await self._down(power_lost=True)

    async def _down(self, *, power_lost: bool) -> None:
        if self._target_busy:
            return
        self._target_busy = True
        lun = self.world.lun
        lun.disconnect()
        lun.restart(power_lost=power_lost)
        if power_lost:
            self.world.power_losses.append(trio.current_time())
        await trio.sleep(self.rng.choice((0.1, 1.0, 3.0)))
        lun.reconnect()
        self._target_busy = False

    async def _hold_writes(self, host: Host) -> None:
        """What the host has written stays on its way, maybe until it is fenced."""
        hold = self._hold(host.life)
        await trio.sleep(self.rng.uniform(0.1, LONGEST_HOLD_S))
        hold.lift()

    def _hold(self, life: Life | None) -> Hold:
        lun = self.world.lun
        return lun.hold(lambda command: lun.owners.get(command.nexus) is life)
