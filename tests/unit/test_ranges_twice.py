"""A second failure at every step of a recovery, with byte-range locks in all states.

Four nodes, whose programs have locks of all kinds and wait for others; node 3 dies or is evicted.
Views are installed and messages delivered one at a time; after each of these steps, in one run
each, another node dies, too. `tests.unit.ranges_joined` asserts after every step that nobody has
what another has, and that everybody has what it was told; in the end nobody waits any more.
"""

from __future__ import annotations

import random

import pytest

from lockmgr.messages import Resource
from lockmgr.ranges_messages import END, Access, Kind
from tests.unit.ranges_joined import RangesCluster

NODES = 4
FILES = [Resource(b"file %d" % number, bytes([number])) for number in range(NODES)]


class Script:
    """One recovery; ``order`` says who has what, and which channel or view is next."""

    def __init__(self, order: int) -> None:
        self.rng = random.Random(order)
        self.cluster = RangesCluster(NODES)
        self._prepare()

    def _prepare(self) -> None:
        cluster, rng = self.cluster, self.rng
        for _ in range(40):
            free = cluster.free()
            if not free:
                break
            owner = rng.choice(free)
            start = rng.randrange(6)
            end = rng.choice([start + 1, start + 3, END])
            if owner.kind is Kind.FLOCK:
                start, end = 0, END
            access = rng.choice([Access.READ, Access.WRITE, Access.WRITE, Access.NONE])
            cluster.lock(rng.choice(FILES), owner, start, end, access, rng.random() < 0.7)
            if rng.random() < 0.7:
                cluster.settle()
        for owner in sorted(cluster.busy)[::4]:
            cluster.cancel_range(owner)

    def begin(self) -> None:
        """The first failure, and the view that says so."""
        if self.rng.random() < 0.3:
            self.cluster.evict(NODES - 1)
        else:
            self.cluster.kill(NODES - 1, self.rng.choice([0, 2]))
        self.cluster.change_view()

    def one_step(self) -> bool:
        """Install a view or deliver a message; False: nothing is left to be done."""
        cluster = self.cluster
        installs = [node for node in sorted(cluster.present) if cluster.views[node]]
        choices: list[int | tuple[int, int]] = [*installs, *cluster.busy_channels]
        if not choices:
            return False
        choice = self.rng.choice(choices)
        if isinstance(choice, int):
            cluster.install(choice)
        else:
            cluster.deliver(*choice)
        return True


def finish(cluster: RangesCluster) -> None:
    """No more failures: all must end well. Who waits is served when the others give way; but a
    circle of open files nobody breaks (Linux, fcntl(2)), so who waits then gives up."""
    cluster.recover_all()
    for _ in range(10):
        for owner in cluster.free():
            for file in FILES:
                cluster.close_file(file, owner)
                cluster.settle()
        cluster.sleep(1.1)
        cluster.settle()
    for owner in [owner for owner in sorted(cluster.busy) if owner.kind is not Kind.POSIX]:
        cluster.cancel_range(owner)
        cluster.settle()
    assert not cluster.busy
    cluster.end()


def run(order: int, every: int = 1) -> int:
    script = Script(order)
    script.begin()
    count = 0
    while script.one_step():
        count += 1
    finish(script.cluster)
    for step in range(0, count + 1, every):
        which, keep = step % (NODES - 1), step // 3 % 2 * 100
        script = Script(order)
        script.begin()
        for _ in range(step):
            script.one_step()
        cluster = script.cluster
        try:
            cluster.kill(sorted(cluster.present)[which], keep)
            if keep:
                script.one_step()
            cluster.change_view()
            finish(cluster)
        except AssertionError as error:
            error.add_note(f"order {order} {step=} {which=} {keep=}")
            raise
    return count


@pytest.mark.parametrize("order", range(2))
def test_a_second_failure_after_every_step(order: int) -> None:
    assert run(order) > 20


@pytest.mark.full
@pytest.mark.parametrize("order", range(2, 40))
def test_a_second_failure_after_every_step_of_other_orders(order: int) -> None:
    run(order)
