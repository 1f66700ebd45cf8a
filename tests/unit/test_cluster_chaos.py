"""Faults at random in the tiny world: whatever happens, what must hold holds, and when everything
is healed the cluster comes to rest. (The simulator in tests/sim goes much further.)
"""

from __future__ import annotations

from random import Random

import pytest

from lockmgr.cluster.events import DeathProven, EvictWanted, LeaveWanted
from lockmgr.cluster.settings import Settings
from tests.unit.cluster_host import Host
from tests.unit.cluster_world import World

KINDS = (
    *("freeze", "freeze", "thaw", "kill", "kill", "proven", "start", "start"),
    *("cut", "cut", "one-way", "heal-net", "san", "san", "heal-san"),
    *("restart", "leave", "evict", "break", "hold"),
)


class Chaos:
    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.world = World(slots=6, settings=Settings())
        self.names = [f"host{n}" for n in range(self.rng.randint(2, 5))]
        self.said: list[str] = []
        for name in self.names:
            self.world.host(name)
            self.world.run(self.rng.choice((0.0, 0.3, 7.0)))
        self.world.run(self.rng.choice((2.0, 15.0)))

    @property
    def alive(self) -> list[Host]:
        return [h for h in self.world.hosts if not h.dead and h.stopped is None]

    def fault(self) -> None:
        rng, world = self.rng, self.world
        kind = rng.choice(KINDS)
        alive = self.alive
        host = rng.choice(alive) if alive else None
        self.said.append(f"{world.t:.3f} {kind} {host.name if host else ''}")
        if kind == "heal-net":
            world.cuts.clear()
        elif kind == "restart":
            world.restart_target()
        elif kind == "start":
            self.start(rng.choice(self.names))
        elif kind == "heal-san":
            self.heal_san()
        elif host is not None:
            self.fault_of(kind, host)

    def fault_of(self, kind: str, host: Host) -> None:
        rng, world = self.rng, self.world
        other = rng.choice(self.alive)
        if kind == "freeze":
            world.freeze(host)
        elif kind == "thaw":
            for frozen in [h for h in self.alive if h.frozen]:
                world.thaw(frozen)
        elif kind in ("kill", "proven"):
            world.kill(host)
            if kind == "proven" and host.member.node is not None:
                world.run(0.1)
                for peer in self.alive:
                    peer.give(DeathProven(host.node))
        elif kind == "cut" and other is not host:
            world.cut((host, other))
        elif kind == "one-way":
            world.cuts.add((host.name, other.name))
        elif kind == "san" and host.name not in world.san_cuts:
            world.cut_san(host)
        elif kind == "leave":
            host.give(LeaveWanted())
        elif kind == "evict" and other.member.node is not None:
            host.give(EvictWanted(other.node, "chaos"))
        elif kind == "break" and not host.frozen:
            world.break_session(host)
        elif kind == "hold":
            host.hold_view = True

    def start(self, name: str) -> None:
        """The host's supervisor starts a daemon if there is none."""
        if all(h.dead or h.stopped for h in self.world.hosts if h.name == name):
            self.world.host(name)

    def heal_san(self) -> None:
        for host in self.alive:
            if host.name in self.world.san_cuts:
                self.world.heal_san(host)
        self.world.san_cuts.clear()

    def heal(self) -> None:
        world = self.world
        world.cuts.clear()
        self.heal_san()
        for host in self.alive:
            host.hold_view = False
            if host.frozen:
                world.thaw(host)
        for name in self.names:
            self.start(name)

    def at_rest(self) -> bool:
        alive = self.alive
        views = [h.member.view for h in alive]
        first = views[0] if views else None
        return (
            first is not None
            and all(view == first for view in views)
            and {first.slots[n.slot].node_name for n in first.active} == set(self.names)
            and not first.to_replay
            and sum(h.member.is_coordinator for h in alive) == 1
        )


def run(seed: int, faults: int = 12) -> Chaos:
    chaos = Chaos(seed)
    try:
        for _ in range(faults):
            chaos.fault()
            chaos.world.run(chaos.rng.choice((0.0, 0.01, 0.05, 0.5, 2.0, 7.0, 12.0)))
        for _ in range(12):
            chaos.heal()
            chaos.world.run(10)
            if chaos.at_rest():
                break
        else:
            raise AssertionError(f"not at rest\n{chaos.world.story()}")
    except BaseException:
        print("\n".join(chaos.said))
        raise
    return chaos


@pytest.mark.parametrize("seed", range(60))
def test_chaos(seed: int) -> None:
    run(seed)
