"""A whole cluster: machines, the daemons that live on them, the LUN and the network between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockmgr.cluster import effects, events
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId, View
from lockmgr.messages import Resource
from lockmgr.settings import Settings as LockSettings
from tests.sim.content import Content
from tests.sim.coverage import Coverage
from tests.sim.daemon import Daemon
from tests.sim.lun import SanLink, SimLun
from tests.sim.network import Network
from tests.sim.oracle import Oracle, Violation
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.faults import Ambush

DRIFT = 0.0002


@dataclass(eq=False)
class Machine:
    """A host: its clock, its ways, and the daemon that runs on it now."""

    name: str
    machine_id: bytes
    boots: int
    rate: float
    offset_s: float
    san: SanLink
    daemon: Daemon | None = None
    lives: int = 0
    has_power: bool = True
    wanted: bool = True
    """Its daemon is to be started again when it has ended."""
    ended: list[effects.Stop] = field(default_factory=list)

    @property
    def boot_id(self) -> bytes:
        return self.machine_id[:8] + self.boots.to_bytes(8, "little")

    def clock(self, world_s: float) -> float:
        """CLOCK_BOOTTIME."""
        return self.offset_s + self.rate * world_s

    def world_time(self, clock_s: float) -> float:
        """When its clock shows that."""
        return (clock_s - self.offset_s) / self.rate


class Cluster:
    """See the module's docstring. Chosen by the seed: how many machines, slots, resources."""

    def __init__(self, seed: int, *, tracing: bool = False, nodes: int | None = None) -> None:
        self.world = world = World(seed, tracing=tracing)
        rng = world.rng
        big = rng.random() < 1 / 200
        chosen = rng.randrange(16, 65) if big else rng.choice((3, 3, 3, 4, 4, 5, 5, 6, 7, 8))
        count = nodes if nodes is not None else chosen
        slots = min(64, count + rng.randrange(0, 3))
        view = View.empty(slots, 2, secret=rng.randbytes(32))
        self.content = Content([view, View.empty(slots, 1, secret=view.secret)])
        self.lun = SimLun(world)
        self.network = Network(world)
        self.oracle = Oracle(world, self.lun, self.content)
        self.coverage = Coverage()
        self.settings = Settings()
        self.lock_settings = LockSettings(cache_limit=rng.choice((3, 1000, 1000)))
        self.resources = [
            Resource(b"file %d" % number, b"place %d" % (number % 5))
            for number in range(rng.randrange(3, 9))
        ]
        self.guests = 2 if count <= 8 else 1
        self.think_s = rng.choice((0.3, 0.5, 0.8)) * max(1.0, count / 4)
        self.quiet = False
        self.steps = 0
        self.ambush: Ambush | None = None
        self.by_node: dict[NodeId, Daemon] = {}
        self.daemons: list[Daemon] = []
        """Those that run."""
        self.machines = [self._machine(number) for number in range(count)]

    def _machine(self, number: int) -> Machine:
        rng = self.world.rng
        name = f"host{number + 1}"
        return Machine(
            name,
            number.to_bytes(4, "little") * 4,
            1,
            1.0 + DRIFT * (2 * rng.random() - 1),
            rng.random() * 1e6,
            SanLink(name),
        )

    # -- lives -----------------------------------------------------------------------------
    def boot(self, machine: Machine) -> None:
        """Start a daemon, unless one runs or there is no power."""
        if not machine.has_power or not machine.wanted:
            return
        if machine.daemon is not None and machine.daemon.serves:
            return
        machine.lives += 1
        if machine.daemon is not None and machine.daemon.process.alive:
            machine.daemon.process.kill()
        machine.daemon = daemon = Daemon(self, machine, machine.lives)
        self.daemons.append(daemon)
        self.world.trace(daemon.name, "starts")
        daemon.start()

    def _gone(self, daemon: Daemon) -> None:
        if daemon in self.daemons:
            self.daemons.remove(daemon)

    def kill(self, machine: Machine) -> None:
        """SIGKILL of its daemon; the supervisor reaps it and tells the peers."""
        daemon = machine.daemon
        if daemon is None or not daemon.process.alive:
            return
        daemon.kill()
        self._gone(daemon)
        if daemon.node is not None:
            self.world.after(
                0.01 + 0.05 * self.world.rng.random(), self._tell_death, machine, daemon, [], 20
            )

    def _tell_death(
        self, machine: Machine, dead: Daemon, told: list[Daemon], attempts: int
    ) -> None:
        if not machine.has_power or dead.node is None:
            return
        network = self.network
        for peer in self.daemons:
            if peer in told or peer.process.frozen or peer.view is None:
                continue
            if not network.streams(dead, peer) or not network.streams(peer, dead):
                continue
            told.append(peer)
            proof = events.DeathProven(dead.node)
            self.world.after(0.001, peer.process.deliver, peer.step, proof)
        if attempts:
            self.world.after(0.5, self._tell_death, machine, dead, told, attempts - 1)

    def power_off(self, machine: Machine) -> None:
        """Daemon, supervisor and kernel are gone at once."""
        machine.has_power = False
        self.network.power(machine.name, on=False)
        if machine.daemon is not None:
            machine.daemon.kill(power_off=True)
            self._gone(machine.daemon)

    def power_on(self, machine: Machine) -> None:
        """Another boot: another boot id, another clock."""
        if machine.has_power:
            return
        machine.has_power = True
        machine.boots += 1
        machine.offset_s = 20.0 - machine.rate * self.world.now
        self.network.power(machine.name, on=True)

    def stopped(self, daemon: Daemon, effect: effects.Stop) -> None:
        """A daemon has ended by itself. As systemd would, start it again, in a while."""
        self._gone(daemon)
        machine = daemon.machine
        machine.ended.append(effect)
        self.coverage.stop(effect)
        if not self.quiet:
            self.world.after(1.0 + 8.0 * self.world.rng.random(), self.boot, machine)

    def leaves(self, daemon: Daemon) -> None:
        """It says that it has given up everything."""
        if daemon.is_active and daemon.node and self.content.journals.get(daemon.node.slot):
            self.oracle.fail(f"{daemon.name} leaves, and its journal is not empty")

    # -- what daemons say --------------------------------------------------------------------
    def daemon_of(self, node: NodeId) -> Daemon | None:
        """The one that runs as this incarnation."""
        daemon = self.by_node.get(node)
        if daemon is None or not daemon.serves or daemon.node != node:
            return None
        return daemon

    def claims(self, daemon: Daemon) -> None:
        """It opens paths as this incarnation: nobody else ever has."""
        assert daemon.node is not None
        other = self.by_node.setdefault(daemon.node, daemon)
        if other is not daemon:
            self.oracle.fail(f"{daemon.name} is {daemon.node}, as {other.name} was")

    def view_installed(self, daemon: Daemon, effect: effects.ViewInstalled) -> None:
        """It goes by another view: that view must be on the LUN."""
        if self.oracle.views.get(effect.view.epoch) != effect.view:
            self.oracle.fail(f"{daemon.name} installs view {effect.view.epoch}, never written")
        for departed in effect.departed:
            if departed.cleared:
                self.may_be_granted(departed.node, daemon.name)

    def may_be_granted(self, node: NodeId, by: str) -> None:
        """What it held may be granted to others."""
        self.oracle.may_be_granted(node, self.by_node.get(node), by)

    # -- everything ------------------------------------------------------------------------
    def check_all(self) -> None:
        """What must be true at any time, of everything."""
        self.oracle.check_all()

    def check_settled(self) -> None:
        """After all faults are healed, and time: every host is a member again."""
        problems = list(self.unsettled())
        if problems:
            raise Violation("after faults were healed: " + "; ".join(problems))

    def unsettled(self) -> list[str]:
        """What is not as it should be after a while without faults."""
        view = self.content.view
        problems: list[str] = []
        for machine in self.machines:
            daemon = machine.daemon
            if daemon is None or not daemon.process.alive:
                problems.append(f"{machine.name} has no daemon")
            elif daemon.stopped is not None:
                problems.append(f"{daemon.name} has stopped: {daemon.stopped.words}")
            elif daemon.node is None or daemon.node not in view.active:
                problems.append(f"{daemon.name} ({daemon.node}) is not an active member")
            elif daemon.view != view:
                epoch = daemon.view.epoch if daemon.view is not None else 0
                problems.append(f"{daemon.name} goes by view {epoch}, not {view.epoch}")
            elif daemon.lease_left_s <= 0:
                problems.append(f"{daemon.name} has no lease")
            if daemon is None or not daemon.serves:
                continue
            for claim, (_, since) in daemon.locking.application.waiting.items():
                if self.world.now - since > 10.0:
                    problems.append(f"{claim} waits for {self.world.now - since:.1f} s")
        problems.extend(
            f"the view lists {node}, which does not run"
            for node in view.listed
            if self.daemon_of(node) is None
        )
        problems.extend(f"journal of {node} is not replayed" for node in view.to_replay)
        return problems

    def check_everybody_reads(self) -> None:
        """Every member reads every block, under its lock."""
        finished: list[str] = []
        readers = [daemon for daemon in self.daemons if daemon.is_active]
        for daemon in readers:
            application = daemon.locking.application
            daemon.process.start(application.read_everything(), finished.append)
        for _ in range(15):
            if len(finished) < len(readers):
                self.world.run(self.world.now + 1.0)
        missing = [daemon.name for daemon in readers if daemon.name not in finished]
        if missing:
            self.oracle.fail(f"after all is calm {', '.join(missing)} cannot read every block")
