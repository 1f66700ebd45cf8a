"""What people see of the locks of a whole cluster: gathered from all nodes, joined into rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lockmgr.claim import Claim
from lockmgr.cluster.codes import REGISTRY
from lockmgr.cluster_snapshot import ClusterLocks, Party, Row, cluster_locks
from lockmgr.core import LockCore
from lockmgr.events import Acquire, Deliver, Effect, Gathered, GatherLocks, Send, StopGathering
from lockmgr.gather import LIMIT_RESOURCES, Gathering
from lockmgr.messages import Request, Resource
from lockmgr.modes import Mode
from lockmgr.ranges_events import SetRange
from lockmgr.ranges_messages import END, Access, Kind, Owner
from lockmgr.snapshot_messages import RESOURCES_PER_PART, AskLocks, LocksPart, ToldLock
from tests.unit.ranges_joined import RangesCluster

NL, CR, CW, PR, PW, EX = Mode
AT = [Resource(b"at %d" % node, bytes([node])) for node in range(4)]


class Watched(RangesCluster):
    """`gather` asks through one node."""

    def __init__(self, nodes: int) -> None:
        self.complete: set[int] = set()
        super().__init__(nodes)

    def _carry_out(self, node: int, effect: Effect) -> None:
        if isinstance(effect, Gathered):
            assert effect.ticket not in self.complete
            self.complete.add(effect.ticket)
        else:
            super()._carry_out(node, effect)

    def ask(self, node: int, ticket: int, cached: bool = False) -> None:
        self.step(node, GatherLocks(ticket, cached))

    def gather(self, node: int, cached: bool = False) -> ClusterLocks:
        self.ask(node, 1, cached)
        self.settle()
        assert 1 in self.complete
        told = self.cores[node].gathered[1].told
        self.step(node, StopGathering(1))
        self.complete.clear()
        return cluster_locks(told, bytes.decode, lambda node: f"node {node}", self.choose)


@pytest.mark.parametrize("asker", [0, 1, 2])
def test_who_holds_and_who_waits_in_which_order(asker: int) -> None:
    cluster = Watched(3)
    cluster.acquire(0, AT[1], PR, owner="alice")
    cluster.settle()
    cluster.sleep(1.0)
    cluster.acquire(2, AT[1], EX, owner="carol")
    cluster.settle()
    cluster.sleep(2.0)
    cluster.acquire(1, AT[1], PR, owner="bob")
    cluster.acquire(0, AT[1], EX, owner="dan")
    cluster.settle()
    shown = cluster.gather(asker)
    assert shown.locks == (
        Row(
            "at 1",
            "node 1",
            (Party("node 0", "PR, being lowered to NL", 3.0, ("alice PR 3.0 s",)),),
            (
                Party("node 2", "EX", 2.0, ("carol EX 2.0 s",)),
                Party("node 1", "PR", 0.0, ("bob PR 0.0 s",)),
                Party("node 0", "EX", 0.0, ("dan EX 0.0 s",)),
            ),
            (
                "node 2 (wants EX) waits for node 0 (PR)",
                "node 1 (wants PR) waits for node 2 (before it)",
                "dan on node 0 (wants EX) waits for alice on the same node",
            ),
        ),
    )
    assert not shown.deadlocks and not shown.silent
    assert json.loads(json.dumps(shown.as_json()))["locks"][0]["waiters"][0]["tasks"] == [
        "carol EX 2.0 s"
    ]


def test_what_is_only_cached_is_shown_on_request() -> None:
    cluster = Watched(3)
    cluster.cache(0, AT[1], EX)
    cluster.acquire(2, AT[2], PR)
    cluster.settle()
    (used,) = cluster.gather(1).locks
    assert (used.resource, used.master) == ("at 2", "node 2"), "though its master tells nothing"
    cached = cluster.gather(1, cached=True)
    assert [row.resource for row in cached.locks] == ["at 1", "at 2"]
    assert cached.locks[0].holders == (Party("node 0", "EX", 0.0),)
    assert cached.locks[0].master == "node 1"


def test_a_circle_is_told_in_words() -> None:
    cluster = Watched(2)
    cluster.acquire(0, AT[0], EX, owner="alice")
    cluster.acquire(1, AT[1], EX, owner="bob")
    cluster.settle()
    cluster.acquire(0, AT[1], EX, owner="alice")
    cluster.sleep(0.5)
    cluster.acquire(1, AT[0], EX, owner="bob")
    cluster.settle()
    (words,) = cluster.gather(0).deadlocks
    assert words.startswith("bob on node 1, which wants EX of b'at 0'; waits for alice")


def test_byte_ranges_with_their_owners() -> None:
    cluster = Watched(3)
    a = Owner(Kind.POSIX, 0, 1, pid=7)
    b = Owner(Kind.FLOCK, 2, 0x22)
    c = Owner(Kind.OFD, 1, 5, pid=8)
    cluster.lock(AT[2], a, 0, 10, Access.WRITE)
    cluster.lock(AT[2], b, 0, END, Access.READ)
    cluster.settle()
    cluster.lock(AT[2], c, 5, 6, Access.READ)
    cluster.settle()
    cluster.sleep(0.3)
    (row,) = cluster.gather(0).locks
    assert set(row.holders) == {
        Party("node 0", "WRITE 0..10", None, ("pid 7 (POSIX)",)),
        Party("node 2", "READ 0..end", None, ("owner 0x22 (FLOCK)",)),
    }
    assert row.waiters == (Party("node 1", "READ 5..6", 0.3, ("pid 8 (OFD)",)),)
    assert row.waits_for == ("pid 8 (OFD) on node 1 waits for pid 7 (POSIX) on node 0",)


def test_page_after_page() -> None:
    cluster = Watched(3)
    count = 2 * RESOURCES_PER_PART + 5
    for number in range(count):
        cluster.acquire(number % 3, Resource(b"r%04d" % number, bytes([number % 5])), EX)
    cluster.settle()
    shown = cluster.gather(2)
    assert [row.resource for row in shown.locks] == [f"r{number:04}" for number in range(count)]
    assert not shown.truncated and all(len(row.holders) == 1 for row in shown.locks)


def test_a_member_that_says_nothing_is_named() -> None:
    cluster = Watched(3)
    cluster.acquire(1, AT[0], EX)
    cluster.settle()
    cluster.ask(0, 1)
    cluster.deliver(0, 1)
    cluster.deliver(1, 0)
    assert 1 not in cluster.complete
    told = cluster.cores[0].gathered[1].told
    shown = cluster_locks(told, bytes.decode, str)
    assert shown.silent == ("2",) and [row.resource for row in shown.locks] == ["at 0"]


def test_another_view_begins_anew() -> None:
    cluster = Watched(3)
    cluster.acquire(1, AT[0], EX)
    cluster.settle()
    cluster.ask(0, 1)
    cluster.deliver(0, 1)
    cluster.kill(2)
    cluster.change_view()
    cluster.recover()
    assert 1 in cluster.complete
    assert sorted(cluster.cores[0].gathered[1].told) == [0, 1]


def test_what_departed_nodes_owe_is_shown() -> None:
    cluster = Watched(3)
    cluster.acquire(2, AT[0], EX)
    cluster.settle()
    cluster.kill(2)
    cluster.change_view()
    cluster.recover()
    cluster.acquire(1, AT[0], EX)
    cluster.settle()
    (row,) = cluster.gather(1).locks
    assert row.holders == (Party("node 2 (departed)", "EX", None),)
    assert row.waits_for == ("node 1 (wants EX) waits for node 2 (departed)",)


def test_a_page_that_was_not_asked_for_changes_nothing() -> None:
    gathering = Gathering(0, 5, False)
    asked = dict(gathering.begin(1, [0, 1]))
    assert sorted(asked) == [0, 1]

    def part(node: int, number: int, after: bytes, upto: bytes) -> LocksPart:
        return LocksPart(1, node, number, after, upto, False, (), (), (), None)

    for wrong in (part(2, 5, b"", b""), part(1, 4, b"", b""), part(1, 5, b"x", b"")):
        assert gathering.receive(wrong) is None
        assert gathering.missing == [0, 1]
    more = gathering.receive(part(1, 5, b"", b"m"))
    assert more is not None and more.after == b"m"
    assert gathering.receive(part(1, 5, b"", b"z")) is None, "twice"
    assert gathering.receive(part(1, 5, b"m", b"")) is None
    assert gathering.missing == [0]


def _endless(node: int) -> Iterator[LocksPart]:
    after = b""
    while True:
        lock = ToldLock(AT[0], None, 0.0, None, (), (), 0)
        upto = after + b"x"
        yield LocksPart(1, node, 5, after, upto, False, (lock,) * 1000, (), (), None)
        after = upto


def test_nobody_makes_the_asker_keep_more_than_so_much() -> None:
    gathering = Gathering(0, 5, False)
    dict(gathering.begin(1, [1]))
    for part in _endless(1):
        if gathering.receive(part) is None:
            break
    told = gathering.told[1]
    assert told.truncated and len(told.locks) == LIMIT_RESOURCES and not gathering.missing


def test_the_fullest_page_fits_into_its_message() -> None:
    """Long names of tasks, full lists, every resource with locks, a queue and ranges."""
    core = LockCore(0, 1, None, [0, 1], lambda _placement, _members: 0)
    ticket = 0
    for number in range(RESOURCES_PER_PART + 1):
        resource = Resource(b"%-32d" % number, b"\1")
        for task in range(20):
            for mode in (CR, EX):
                claim = Claim(resource, mode, holder="\N{SNOWMAN}" * 100, owner=(number, task))
                core.step(Acquire(claim), 0.0)
        core.step(Deliver(Request(resource, 1, 1, number, EX, True)), 0.0)
        for file in range(40):
            ticket += 1
            owner = Owner(Kind.OFD, 0, (1 << 62) + ticket, pid=ticket)
            start = END - 100 + file
            access = Access.READ if file < 35 else Access.WRITE
            core.step(SetRange(ticket, resource, owner, start, start + 50, access, True), 0.0)
    (sent,) = core.step(Deliver(AskLocks(1, 1, 9, b"", True)), 1e6)
    assert isinstance(sent, Send) and isinstance(sent.message, LocksPart)
    part = sent.message
    assert len(part.locks) == len(part.queues) == len(part.ranges) == RESOURCES_PER_PART
    assert part.upto and part.waits is not None and all(ranges.more for ranges in part.ranges)
    code, header, payload = REGISTRY.encode(part)
    assert REGISTRY.decode(code, header, payload) == part
    assert len(header) < REGISTRY.by_code[code].limit_bytes / 2
