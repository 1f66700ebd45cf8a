"""A second failure at every step of a recovery: for all steps, all victims, several orders.

Four nodes with locks in all states; node 3 dies; views are installed and messages delivered one at
a time. After each of these steps, in one run each, another node dies too. Whatever was lost, the
survivors must come to rest with compatible holds, nothing granted over a journal that is not
replayed, and everybody who waited served.
"""

from __future__ import annotations

import random

import pytest

from lockmgr.claim import Claim
from lockmgr.messages import Resource
from lockmgr.modes import Mode
from lockmgr.settings import Settings
from tests.unit.lockmgr_changing import ChangingCluster

NL, CR, CW, PR, PW, EX = Mode
FIRST_VICTIM = 3


class Script:
    """One recovery; ``order`` seeds which channel or view is next."""

    def __init__(self, order: int, newcomer: bool) -> None:
        self.rng = random.Random(order)
        self.cluster = ChangingCluster(4, Settings(min_hold_s=0.0))
        if newcomer:
            self.cluster.kill(0)
            self.cluster.change_view()
            self.cluster.recover_all()
            self.cluster.join()
            self.cluster.recover()
        self.nodes = sorted(self.cluster.alive)
        self._prepare()

    def _prepare(self) -> None:
        cluster = self.cluster
        modes = [EX, PR, CW, PW, CR, NL, PR]
        for position in range(14):
            resource = Resource(b"r%d" % position, bytes([position % 5]))
            holder = self.nodes[position % 4]
            claim = cluster.acquire(holder, resource, modes[position % 7])
            cluster.settle()
            if position % 3 == 0:
                cluster.release(claim)
        for position in range(14):
            resource = Resource(b"r%d" % position, bytes([position % 5]))
            cluster.acquire(self.nodes[(position + 1) % 4], resource, modes[(position + 2) % 7])
            if position % 2:
                cluster.acquire(self.nodes[(position + 2) % 4], resource, EX)
        for _ in range(self.rng.randrange(20)):
            if cluster.busy_channels:
                cluster.deliver(*self.rng.choice(cluster.busy_channels))
        for place in sorted(cluster.demoting, key=repr)[::2]:
            cluster.demoted(*place)

    def begin(self) -> None:
        """The first failure, and the view that says so."""
        self.cluster.kill(self.nodes[-1] if FIRST_VICTIM not in self.nodes else FIRST_VICTIM)
        self.cluster.change_view()

    def one_step(self) -> bool:
        """Install a view or deliver a message; False: nothing is left to be done."""
        cluster = self.cluster
        installs = [node for node in sorted(cluster.alive) if cluster.views[node]]
        choices: list[int | tuple[int, int]] = [*installs, *cluster.busy_channels]
        if not choices:
            return False
        choice = self.rng.choice(choices)
        if isinstance(choice, int):
            cluster.install(choice)
        else:
            cluster.deliver(*choice)
        return True


def finish(cluster: ChangingCluster) -> None:
    """No more failures: all must end well."""
    cluster.recover()
    waiting = set(cluster.waiting)
    cluster.recover_all()
    served: set[Claim] = set()
    for _ in range(100):
        served |= waiting & cluster.held.keys()
        for claim in list(cluster.held):
            cluster.release(claim)
        cluster.settle()
        if not cluster.held:
            break
    assert served == waiting and not cluster.waiting
    cluster.drain_everything()


def steps_of(order: int, newcomer: bool) -> int:
    script = Script(order, newcomer)
    script.begin()
    count = 0
    while script.one_step():
        count += 1
    finish(script.cluster)
    return count


def run(order: int, newcomer: bool, every: int = 1) -> int:
    count = steps_of(order, newcomer)
    for step in range(0, count + 1, every):
        for which in range(3):
            for keep in (0, 100):
                script = Script(order, newcomer)
                script.begin()
                for _ in range(step):
                    script.one_step()
                cluster = script.cluster
                cluster.kill(sorted(cluster.alive)[which], keep)
                if keep:
                    script.one_step()
                cluster.change_view()
                try:
                    finish(cluster)
                except AssertionError as error:
                    error.add_note(f"order {order} {newcomer=} {step=} {which=} {keep=}")
                    raise
    return count


@pytest.mark.parametrize("newcomer", [False, True])
def test_a_second_failure_after_every_step(newcomer: bool) -> None:
    assert run(0, newcomer) > 20


@pytest.mark.full
@pytest.mark.parametrize("order", range(1, 12))
def test_a_second_failure_after_every_step_of_other_orders(order: int) -> None:
    run(order, newcomer=order % 2 == 1)
