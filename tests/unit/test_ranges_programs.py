"""Programs on three nodes lock at random, in virtual time, while nodes die and join.

What a program has is written down only while it is certain: after it was told so, until it asks for
less. No two may exclude each other, and in the end all is given back.
"""

from __future__ import annotations

import pytest
import trio

from lockmgr.errors import RangeRefused
from lockmgr.messages import Resource
from lockmgr.ranges_manager import RangeLocks
from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner
from tests.crash import deterministic_run
from tests.unit.ranges_hosts import FILES, Hosts, of, three

NONE, READ, WRITE = Access
POSIX, OFD, FLOCK = Kind


class Programs:
    """Each locks and unlocks at random; who has what is written down only while it is certain."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.has: dict[tuple[Resource, Owner], dict[int, Access]] = {}
        self.granted = 0
        self.ended: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.interrupted = 0

    async def run(self, node: int, kind: Kind, number: int, until: float) -> None:
        ranges, owner = of(self.hosts, node, kind, number)
        try:
            while trio.current_time() < until:
                await trio.sleep(self.hosts.rng.random() * 0.05)
                await self._one(ranges, owner)
            for file in FILES:
                self._lower(file, owner, 0, 8, NONE)
                await ranges.close(file, owner)
        finally:
            for file in FILES:
                self.has.pop((file, owner), None)

    async def _one(self, ranges: RangeLocks, owner: Owner) -> None:
        rng = self.hosts.rng
        file = rng.choice(FILES[:4])
        start = rng.randrange(8)
        end = rng.randint(start + 1, 8)
        if owner.kind is FLOCK:
            start, end = 0, 8
        access = rng.choice([NONE, READ, WRITE, WRITE])
        self._lower(file, owner, start, end, NONE if owner.kind is FLOCK else access)
        last = END if owner.kind is FLOCK else end
        with trio.move_on_after(rng.choice([0.001, 0.02, 0.5, 100])) as scope:
            try:
                await ranges.lock(file, owner, start, last, access, wait=rng.random() < 0.7)
            except RangeRefused as error:
                self.ended[error.outcome] += 1
                if error.outcome is Outcome.DEADLOCK:
                    for other in FILES:
                        self._lower(other, owner, 0, 8, NONE)
                        await ranges.close(other, owner)
            else:
                self._raise(file, owner, start, end, access)
        if scope.cancelled_caught:
            self.interrupted += 1
            if access is NONE:
                await ranges.unlock(file, owner, start, last)

    def _lower(self, file: Resource, owner: Owner, start: int, end: int, keep: Access) -> None:
        held = self.has.get((file, owner), {})
        for byte in [byte for byte in held if start <= byte < end and held[byte] > keep]:
            held[byte] = keep

    def _raise(self, file: Resource, owner: Owner, start: int, end: int, access: Access) -> None:
        self.granted += access is not NONE
        self.has.setdefault((file, owner), {}).update(dict.fromkeys(range(start, end), access))
        for (other_file, other), held in self.has.items():
            if (
                other_file != file
                or other == owner
                or (other.kind is FLOCK) != (owner.kind is FLOCK)
            ):
                continue
            for byte in range(start, end):
                both = {held.get(byte, NONE), access}
                assert NONE in both or WRITE not in both, (file, owner, other, byte)


async def _random_recoveries(seed: int, until: float, ended: list[Programs]) -> None:
    async with three(seed, slowest_s=0.004) as hosts:
        programs = Programs(hosts)

        def begin(node: int) -> None:
            for number, kind in enumerate([POSIX, POSIX, OFD, FLOCK], 1):
                hosts.hosts[node].nursery.start_soon(programs.run, node, kind, number, until)

        for node in hosts.members:
            begin(node)
        while trio.current_time() < until:
            await trio.sleep(hosts.rng.random() * 0.6)
            if len(hosts.members) > 2:
                hosts.kill(hosts.rng.choice(hosts.members))
                if hosts.rng.random() < 0.3:
                    hosts.change_view()
                    await trio.sleep(hosts.rng.random() * 0.01)
                    hosts.kill(hosts.rng.choice(hosts.members))
                hosts.change_view()
                await trio.sleep(hosts.rng.random() * 0.2)
            else:
                await hosts.thaw()
                hosts.clear()
                begin(await hosts.join())
        hosts.clear()
        await hosts.thaw()
        await trio.sleep(200)
        assert not any(programs.has.values())
        for host in hosts.hosts.values():
            core = host.manager.core
            core.check()
            assert not core.ranges.client.held and not core.ranges.client.pending
            assert not core.ranges.master.files and not core.ranges.master.later
    ended.append(programs)


def _run(seed: int, until: float) -> Programs:
    ended: list[Programs] = []
    deterministic_run(lambda: _random_recoveries(seed, until, ended), seed)
    (programs,) = ended
    return programs


@pytest.mark.parametrize("seed", range(8))
def test_programs_exclude_each_other_through_recoveries(seed: int) -> None:
    programs = _run(seed, 6.0)
    assert programs.granted > 100 and programs.interrupted > 10
    assert programs.ended[Outcome.WOULD_BLOCK] > 10


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 160))
def test_programs_exclude_each_other_through_many_recoveries(seed: int) -> None:
    _run(seed, 20.0)
