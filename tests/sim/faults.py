"""What goes wrong in a seed: which faults, when, on whom, for how long.

Each fault is a function that does something to the cluster and says when it is over; `Plan` picks
them from the seed's dice, injects them, heals them, and counts which pairs have met. One pair is
not left to chance: the seed's number names it, so that as many seeds in a row as there are pairs
reach them all. Half of the faults that end or stop a host do not strike at a time but at a *step*:
an `Ambush` waits until some daemon does a certain thing (writes a view, sends `Reasserted`), and
strikes just before or after. The seed's number also names the step of the first ambush, and what it
takes to bring it about is done soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from lockmgr.cluster import events
from tests.sim.cluster import Cluster, Machine

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon

FIRST_AT_S = 9.0
LAST_AT_S = 38.0
INSISTS_UNTIL_S = 41.0
MEET_WITHIN_S = 8.0
"""Faults that begin so soon after each other have met, even if the first is over."""

LEAST_FAULTS = 3

Heal = Callable[[], None]

STEPS = (
    "WriteView",
    "Fence",
    "Take",
    "Reserve",
    "OpenPaths",
    "WriteJoin",
    "ViewInstalled",
    "Announce",
    "ReplayWanted",
    "FenceAsked",
    "Fenced",
    "PathsReady",
    "DepartedMayBeGranted",
    "Unregister",
    "Leave",
    "TakeOver",
    "Ready",
    "ReplayDone",
    "Reassert",
    "Reasserted",
    "Thaw",
    "Settled",
    "Granted",
    "Lower",
    "WriteHeartbeat",
    "AskLease",
    "LeaseGiven",
)

BRINGS_ABOUT = {
    **dict.fromkeys(("OpenPaths", "FenceAsked", "Fenced", "PathsReady"), "san-reset"),
    **dict.fromkeys(("AskLease", "LeaseGiven"), "san-cut"),
    **dict.fromkeys(("Unregister", "Leave", "TakeOver"), "leave"),
    **dict.fromkeys(("Granted", "Lower", "WriteHeartbeat"), ""),
    "Reserve": "target-restart",
}
"""The fault that makes somebody take a step; whatever is not named: "restart"."""
OF_THE_HOLDER = ("Take", "TakeOver", "Unregister")
"""Steps that follow if that befalls the holder."""


@dataclass
class Ambush:
    """Strike whoever does something of this name."""

    step: str
    after: bool
    strike: Callable[[Machine], None]

    def matches(self, effect: object) -> bool:
        """Is this it?"""
        if type(effect).__name__ == self.step:
            return True
        message = getattr(effect, "message", None)
        return message is not None and type(message).__name__ == self.step


class Plan:
    """The faults of one seed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.rng = cluster.world.rng
        self.injected: list[tuple[str, float]] = []
        self.heals: list[Heal] = []
        self.darkness = 0
        """How many faults keep the LUN away from everybody."""
        self._ambushed = False

    # -- the plan --------------------------------------------------------------------------
    def begin(self) -> None:
        """Start the machines, and lay out the faults."""
        rng = self.rng
        machines = self.cluster.machines
        pair = PAIRS[self.world.seed % len(PAIRS)]
        late = max(rng.randrange(0, 4 if len(machines) > 3 else 2), pair.count("join"))
        for number, machine in enumerate(machines):
            if number >= len(machines) - late:
                machine.wanted = False  # joins by a fault
            else:
                self.world.at(0.3 * number * rng.random(), self.cluster.boot, machine)
        times = sorted(
            FIRST_AT_S + (LAST_AT_S - FIRST_AT_S) * rng.random() for _ in range(rng.randrange(0, 6))
        )
        for position in range(1, len(times)):
            if rng.random() < 0.4:  # faults come in clusters
                times[position] = times[position - 1] + 2.5 * rng.random()
        for time in times:
            self.world.at(time, self._insist, [""])
        ending = rng.choice(("kill", "power-off", "freeze"))
        self.world.at(FIRST_AT_S + 15.0 * rng.random(), self._insist, [ending])
        first_s = FIRST_AT_S + (LAST_AT_S - MEET_WITHIN_S - FIRST_AT_S) * rng.random()
        self.world.at(first_s, self._insist, list(pair if rng.random() < 0.5 else pair[::-1]))

    def _insist(self, kinds: list[str]) -> None:
        """One after the other, each as soon as there is somebody whom it can befall; "": any, as is
        what has found nobody for so long that the seed would have too few."""
        if self.world.now > INSISTS_UNTIL_S:
            if len(self.injected) >= LEAST_FAULTS:
                return
            kinds = [""]
        weights = [weight for _, weight in FAULTS.values()]
        if self._inject(kinds[0] or self.rng.choices(list(FAULTS), weights)[0]):
            del kinds[0]
            pause_s = 2.5 * self.rng.random()
        else:
            pause_s = 0.2
        if kinds:
            self.world.after(pause_s, self._insist, kinds)

    def _inject(self, kind: str, machine: Machine | None = None) -> bool:
        """False: there was nothing that it could do."""
        machine = machine or self._victim()
        inject, _ = FAULTS[kind]
        heal = inject(self, machine)
        if heal is None:
            return False
        now = self.world.now
        self.world.trace("fault", f"{kind} ({machine.name})")
        self.cluster.coverage.fault(kind)
        for other, when in self.injected:
            if now - when <= MEET_WITHIN_S:
                self.cluster.coverage.pair(kind, other)
        self.injected.append((kind, now))
        self.heals.append(heal)
        return True

    def _victim(self) -> Machine:
        """The coordinator more often than others."""
        holder = self._holder() if self.rng.random() < 0.4 else None
        return holder or self.rng.choice(self.cluster.machines)

    def _holder(self) -> Machine | None:
        key = self.cluster.lun.arbiter.read_reservation().key
        for machine in self.cluster.machines:
            daemon = machine.daemon
            if daemon is not None and daemon.serves and _holds(daemon, key):
                return machine
        return None

    def heal_all(self) -> None:
        """From now on nothing goes wrong any more."""
        assert len(self.injected) >= LEAST_FAULTS, "a seed without faults shows nothing"
        self.world.trace("fault", "everything heals")
        cluster = self.cluster
        cluster.ambush = None
        for heal in self.heals:
            heal()
        cluster.network.loss = cluster.network.duplication = 0.0
        cluster.network.slow_until = cluster.lun.slow_until = 0.0
        cluster.lun.late_chance = 0.0
        if not cluster.lun.up:
            cluster.lun.begin()
        for machine in cluster.machines:
            machine.wanted = True
            if machine.daemon is not None:
                machine.daemon.thaw()
            cluster.power_on(machine)
            cluster.boot(machine)

    def once(self, heal: Heal) -> Heal:
        """The same, done once only."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                heal()

        return once

    def later(self, low_s: float, high_s: float, heal: Heal) -> Heal:
        """Heal after a time between these, mostly short; or when everything is healed."""
        once = self.once(heal)
        self.world.after(low_s + (high_s - low_s) * self.rng.random() ** 2, once)
        return once

    def strike(
        self, machine: Machine, what: Callable[[Machine], None], often: tuple[str, ...] = ()
    ) -> None:
        """Now, or at a step of somebody: at one of ``often``, or any other."""
        if self.cluster.ambush is not None:
            what(machine)
            return
        if not self._ambushed:
            self._ambushed = True
            step = STEPS[self.world.seed % len(STEPS)]
            self.wait_for(step, what)
            self.world.after(0.2 + self.rng.random(), self._bring_about, step)
            return
        if self.rng.random() < 0.5:
            what(machine)
            return
        self.wait_for(self.rng.choice(often if often and self.rng.random() < 0.3 else STEPS), what)

    def _bring_about(self, step: str) -> None:
        ambush = self.cluster.ambush
        kind = BRINGS_ABOUT.get(step, "restart")
        if kind and ambush is not None and ambush.step == step:
            self._inject(kind, self._holder() if step in OF_THE_HOLDER else None)
            self.world.after(3.0, self._bring_about, step)

    def wait_for(self, step: str, what: Callable[[Machine], None]) -> None:
        """Strike whoever does this next, just before or just after it."""
        after = self.rng.random() < 0.5
        self.world.trace("fault", f"waits for {step} ({'after' if after else 'before'} it)")

        def struck(victim: Machine) -> None:
            self.world.trace("fault", f"strikes {victim.name} at its {step}")
            self.cluster.coverage.reached[f"struck at {step}"] += 1
            what(victim)

        self.cluster.ambush = Ambush(step, after, struck)


def _holds(daemon: Daemon, key: int) -> bool:
    paths = daemon.paths
    return any(r is not None and r.key == key for r in (paths.control, paths.newcomer))


# -- hosts -------------------------------------------------------------------------------------
def _kill(plan: Plan, machine: Machine) -> Heal | None:
    def strike(victim: Machine) -> None:
        plan.cluster.kill(victim)
        plan.later(0.3, 9.0, lambda: plan.cluster.boot(victim))

    plan.strike(machine, strike)
    return lambda: None


def _power_off(plan: Plan, machine: Machine) -> Heal | None:
    def strike(victim: Machine) -> None:
        plan.cluster.power_off(victim)

        def again() -> None:
            plan.cluster.power_on(victim)
            plan.cluster.boot(victim)

        plan.later(1.0, 15.0, again)

    plan.strike(machine, strike)
    return lambda: None


def _freeze(plan: Plan, machine: Machine) -> Heal | None:
    def strike(victim: Machine) -> None:
        daemon = victim.daemon
        if daemon is None or not daemon.serves or daemon.process.frozen:
            return
        plan.world.trace(daemon.name, "is frozen")
        if plan.rng.random() < 0.5:
            _late_writes(plan, victim)
        daemon.freeze()

        def thaw() -> None:
            plan.world.trace(daemon.name, "is thawed")
            daemon.thaw()

        plan.later(0.2, 18.0, thaw)

    plan.strike(machine, strike, ("WriteHeartbeat", "AskLease"))
    return lambda: None


def _hang(plan: Plan, machine: Machine) -> Heal | None:
    daemon = machine.daemon
    if daemon is None or not daemon.serves or daemon.process.frozen:
        return None
    plan.world.trace(daemon.name, "hangs")
    daemon.hang()

    def come_round() -> None:
        plan.world.trace(daemon.name, "comes round")
        daemon.thaw()

    plan.later(0.2, 9.0, come_round)
    return lambda: None


def _restart(plan: Plan, machine: Machine) -> Heal | None:
    plan.cluster.kill(machine)
    plan.world.after(0.05, plan.cluster.boot, machine)
    return lambda: None


def _leave(_plan: Plan, machine: Machine) -> Heal | None:
    daemon = machine.daemon
    if daemon is None or not daemon.serves or daemon.process.frozen:
        return None
    daemon.leave()
    return lambda: None


def _blackout(plan: Plan, _machine: Machine) -> Heal | None:
    """No power anywhere; it comes back host by host, in another order."""
    for machine in plan.cluster.machines:
        if machine.has_power:
            plan.world.after(0.3 * plan.rng.random(), plan.cluster.power_off, machine)

    def again(machine: Machine) -> None:
        plan.cluster.power_on(machine)
        plan.cluster.boot(machine)

    for machine in plan.cluster.machines:
        plan.later(1.0, 8.0, partial(again, machine))
    return lambda: None


def _shutdown(plan: Plan, _machine: Machine) -> Heal | None:
    """Everybody leaves, the last one parks; they come back by themselves."""
    for machine in plan.cluster.machines:
        daemon = machine.daemon
        if daemon is not None and daemon.serves:
            plan.world.after(2.0 * plan.rng.random(), daemon.process.deliver, daemon.leave)
    return lambda: None


def _join(plan: Plan, machine: Machine) -> Heal | None:
    for candidate in plan.cluster.machines:
        if not candidate.wanted:
            candidate.wanted = True
            plan.cluster.boot(candidate)
            return lambda: None
    if machine.daemon is None or not machine.daemon.serves:
        plan.cluster.boot(machine)
        return lambda: None
    return None


def _evict(plan: Plan, machine: Machine) -> Heal | None:
    victim = plan._victim().daemon
    judge = machine.daemon
    if victim is None or victim.node is None or judge is None or not judge.serves:
        return None
    judge.process.deliver(judge.step, events.EvictWanted(victim.node, "an administrator asked"))
    return lambda: None


# -- the SAN -----------------------------------------------------------------------------------
def _cut_san(plan: Plan, machine: Machine, *, out: bool, into: bool) -> Heal | None:
    if machine.san.cut_out or machine.san.cut_in:
        return None

    def strike(victim: Machine) -> None:
        san = victim.san
        san.cut_out, san.cut_in = san.cut_out or out, san.cut_in or into
        plan.world.trace(victim.name, f"SAN cut: out {san.cut_out}, in {san.cut_in}")

        def heal() -> None:
            san.cut_out = san.cut_in = False
            plan.world.trace(victim.name, "SAN healed")
            plan.cluster.lun.healed(san)
            daemon = victim.daemon
            if daemon is not None and daemon.paths.control is None:
                daemon.process.deliver(daemon.step, events.PathBack())

        plan.later(0.3, 16.0, heal)

    plan.strike(machine, strike)
    return lambda: None


def _san_cut(plan: Plan, machine: Machine) -> Heal | None:
    return _cut_san(plan, machine, out=True, into=True)


def _san_cut_out(plan: Plan, machine: Machine) -> Heal | None:
    return _cut_san(plan, machine, out=True, into=False)


def _san_cut_in(plan: Plan, machine: Machine) -> Heal | None:
    return _cut_san(plan, machine, out=False, into=True)


def _san_reset(plan: Plan, machine: Machine) -> Heal | None:
    """Its sessions are closed at the target; what it had sent may still land."""

    def reset() -> None:
        plan.cluster.lun.late_chance = 0.0
        for session in list(machine.san.sessions):
            if session.there:
                plan.cluster.lun.end_session(session)

    if plan.rng.random() < 0.7 and _late_writes(plan, machine) is not None:
        plan.cluster.lun.late_chance = 0.7
        plan.world.after(0.3 + plan.rng.random(), reset)
    else:
        reset()
    return lambda: None


def _san_dark(plan: Plan, _machine: Machine) -> Heal | None:
    """The LUN is away for everybody."""
    plan.darkness += 1
    for machine in plan.cluster.machines:
        machine.san.cut_out = machine.san.cut_in = True

    def heal() -> None:
        plan.darkness -= 1
        if plan.darkness:
            return
        for machine in plan.cluster.machines:
            machine.san.cut_out = machine.san.cut_in = False
            plan.cluster.lun.healed(machine.san)
            daemon = machine.daemon
            if daemon is not None and daemon.paths.control is None:
                daemon.process.deliver(daemon.step, events.PathBack())
        plan.world.trace("fault", "the LUN is back for everybody")

    return plan.later(0.5, 12.0, heal)


def _target_restart(plan: Plan, _machine: Machine) -> Heal | None:
    lun = plan.cluster.lun
    if not lun.up:
        return None
    lun.stop()

    if plan.cluster.ambush is None and plan.rng.random() < 0.3:
        plan.wait_for("Reserve", plan.cluster.kill)

    def begin() -> None:
        if not lun.up:
            plan.world.trace("target", "is up again")
            lun.begin()

    return plan.later(0.05, 5.0, begin)


def _slow_lun(plan: Plan, _machine: Machine) -> Heal | None:
    plan.cluster.lun.slow_until = plan.world.now + 1.0 + 8.0 * plan.rng.random()
    return lambda: None


def _late_writes(plan: Plan, _machine: Machine) -> Heal | None:
    lun = plan.cluster.lun
    if lun.late_chance:
        return None
    lun.late_chance = 0.3
    lun.late_s = 0.5 + 4.0 * plan.rng.random()

    def heal() -> None:
        lun.late_chance = 0.0

    return plan.later(0.5, 5.0, heal)


# -- the network -------------------------------------------------------------------------------
def _cut(plan: Plan, pairs: list[tuple[str, str]]) -> Heal:
    network = plan.cluster.network
    for source, to in pairs:
        network.cut(source, to)

    def heal() -> None:
        plan.world.trace("fault", "a network cut heals")
        for source, to in pairs:
            network.heal(source, to)

    return plan.later(0.3, 18.0, heal)


def _net_cut(plan: Plan, machine: Machine) -> Heal | None:
    others = [m.name for m in plan.cluster.machines if m is not machine]
    return _cut(
        plan, [(machine.name, o) for o in others] + [(other, machine.name) for other in others]
    )


def _net_cut_pair(plan: Plan, machine: Machine) -> Heal | None:
    other = plan.rng.choice([m for m in plan.cluster.machines if m is not machine])
    if plan.rng.random() < 0.4:
        return _filter(plan, machine.name, other.name)
    return _cut(plan, [(machine.name, other.name), (other.name, machine.name)])


def _filter(plan: Plan, one: str, other: str) -> Heal:
    """As a firewall does that was told of the datagrams, and not of the connections."""
    network = plan.cluster.network
    network.filter(one, other, on=True)
    plan.world.trace("fault", f"nothing but datagrams passes between {one} and {other}")

    def heal() -> None:
        plan.world.trace("fault", f"connections pass again between {one} and {other}")
        network.filter(one, other, on=False)

    return plan.later(0.3, 18.0, heal)


def _net_one_way(plan: Plan, machine: Machine) -> Heal | None:
    others = [m.name for m in plan.cluster.machines if m is not machine]
    chosen = [other for other in others if plan.rng.random() < 0.6] or others[:1]
    if plan.rng.random() < 0.5:
        return _cut(plan, [(machine.name, other) for other in chosen])
    return _cut(plan, [(other, machine.name) for other in chosen])


def _partition(plan: Plan, _machine: Machine) -> Heal | None:
    names = [machine.name for machine in plan.cluster.machines]
    plan.rng.shuffle(names)
    cut = plan.rng.randrange(1, len(names))
    pairs = [(a, b) for a in names[:cut] for b in names[cut:]]
    return _cut(plan, pairs + [(b, a) for a, b in pairs])


def _net_lossy(plan: Plan, _machine: Machine) -> Heal | None:
    network = plan.cluster.network
    network.loss = 0.1 + 0.3 * plan.rng.random()
    network.duplication = 0.2
    network.slow_s = 0.2 * plan.rng.random()
    network.slow_until = plan.world.now + 10.0 * plan.rng.random()

    def heal() -> None:
        network.loss = network.duplication = 0.0

    return plan.later(2.0, 12.0, heal)


def _net_reset(plan: Plan, machine: Machine) -> Heal | None:
    network = plan.cluster.network
    for connection in list(network.connections.values()):
        if any(end.host_name == machine.name for end in connection.ends):
            network.reset(connection)
    return lambda: None


FAULTS: dict[str, tuple[Callable[[Plan, Machine], Heal | None], float]] = {
    "kill": (_kill, 2.0),
    "power-off": (_power_off, 1.5),
    "freeze": (_freeze, 2.5),
    "hang": (_hang, 2.0),
    "restart": (_restart, 1.0),
    "leave": (_leave, 1.2),
    "join": (_join, 3.0),
    "evict": (_evict, 1.0),
    "blackout": (_blackout, 1.0),
    "shutdown": (_shutdown, 1.0),
    "san-cut": (_san_cut, 1.5),
    "san-cut-out": (_san_cut_out, 1.0),
    "san-cut-in": (_san_cut_in, 1.0),
    "san-reset": (_san_reset, 1.8),
    "san-dark": (_san_dark, 1.0),
    "target-restart": (_target_restart, 1.0),
    "slow-lun": (_slow_lun, 1.0),
    "late-writes": (_late_writes, 1.5),
    "net-cut": (_net_cut, 1.2),
    "net-cut-pair": (_net_cut_pair, 1.0),
    "net-one-way": (_net_one_way, 1.2),
    "partition": (_partition, 1.0),
    "net-lossy": (_net_lossy, 1.0),
    "net-reset": (_net_reset, 1.0),
}

PAIRS = tuple(combinations_with_replacement(FAULTS, 2))
"""Seed by seed the next one of them."""
