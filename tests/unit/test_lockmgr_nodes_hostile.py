"""Peers that say what no correct peer says: it costs them the connection, nobody else a thing."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockmgr import events
from lockmgr.channel import Confirmed, Resume, Skipped
from lockmgr.claim import Claim
from lockmgr.cluster.lock_link import _NAMES_SENDER, LockLink
from lockmgr.cluster.network_events import Arrived, Connected, Lost
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId
from lockmgr.cluster.wire import Agreed
from lockmgr.core import LockCore
from lockmgr.errors import ProtocolViolation
from lockmgr.manager import open_lock_manager
from lockmgr.mastering import node_number
from lockmgr.messages import (
    AnyMessage,
    Granted,
    MasterState,
    Reassert,
    Refused,
    Request,
    Resource,
    Thaw,
    ValueBlock,
)
from lockmgr.modes import Mode
from tests.unit.lock_nodes import EX, LockNode, start_nodes
from tests.unit.network_nodes import until
from tests.unit.wire_examples import anything

NAMES = (b"a", b"b", b"c")
A, B, C, NEWCOMER = NodeId(0, 1), NodeId(1, 1), NodeId(2, 1), NodeId(NEWCOMER_SLOT, 77)
HERE, THERE = node_number(*A), node_number(*B)
X = Resource(b"x", b"")


def made_to_fit(message: Any, epoch: int, rng: random.Random) -> Any:
    """The same from node 2 to node 1, about resources that there are."""
    changes: dict[str, Any] = {
        "epoch": epoch if rng.random() < 0.95 else rng.choice((0, epoch + 1)),
        "node": 2 if type(message) in _NAMES_SENDER else 1,
    }
    if hasattr(message, "resource"):
        changes["resource"] = Resource(rng.choice(NAMES), b"p")
    for name in ("serial", "grant", "asker"):
        if hasattr(message, name) and rng.random() < 0.7:
            changes[name] = rng.randrange(8)
    if isinstance(message, Reassert):
        for name in ("held", "mastered"):
            changes[name] = tuple(
                replace(state, resource=Resource(rng.choice(NAMES), b"p"))
                for state in getattr(message, name)
            )
    return replace(message, **changes)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(*map(anything, get_args(AnyMessage))), min_size=5, max_size=30),
    st.integers(0, 1 << 30),
)
def test_a_core_refuses_or_takes_whatever_it_is_told(messages: list[Any], seed: int) -> None:
    """No error but a `ProtocolViolation`, and every invariant holds after it."""
    rng = random.Random(seed)
    core = LockCore(1, 0, None, ())
    core.step(events.ViewChanged(1, (1, 2), 2), 0.0)
    if rng.random() < 0.7:
        core.step(events.Deliver(Reassert(1, 2, last=True, views=((),))), 0.0)
        core.step(events.Deliver(Thaw(1, 1, frozenset(), frozenset())), 0.0)
    now = 0.0
    for message in messages:
        now += rng.random()
        if rng.random() < 0.5:
            mode = rng.choice(list(Mode))
            claim = Claim(
                Resource(rng.choice(NAMES), b"p"), mode, holder="x", owner=rng.choice("o")
            )
            core.step(events.Acquire(claim), now)
        try:
            core.step(events.Deliver(made_to_fit(message, core.epoch, rng)), now)
        except ProtocolViolation:
            pass
        core.check()


@pytest.mark.parametrize("members", [(-1,), (1 << 63,)])
def test_nodes_that_cannot_be(members: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="members"):
        Reassert(1, 2, last=True, views=(members,))
    assert MasterState(X, ValueBlock(), None, ()).owed == ()


# -- the link, with a network that is only a list ------------------------------------------------
@dataclass
class Wire:
    """What the link says to the network."""

    said: list[tuple[NodeId, object]] = field(default_factory=list)
    refused: list[tuple[NodeId, str]] = field(default_factory=list)
    accused: list[tuple[NodeId, str]] = field(default_factory=list)

    def send(self, peer: NodeId, message: object) -> bool:
        self.said.append((peer, message))
        return True

    def refuse(self, peer: NodeId, reason: str) -> None:
        self.refused.append((peer, reason))


@dataclass
class Manager:
    """Remembers, and may refuse."""

    node: int = HERE
    got: list[Any] = field(default_factory=list)

    def deliver(self, message: Any) -> None:
        if isinstance(message, Granted):
            raise ProtocolViolation("nobody asked for it")
        self.got.append(message)


def linked(*, attach: bool = True) -> tuple[LockLink, Wire, Manager]:
    wire, manager = Wire(), Manager()
    link = LockLink(lambda peer, words: wire.accused.append((peer, words)))
    link.use(wire)
    if attach:
        link.attach(manager)
    link.view_changed([A, B], 1)
    link.take(Connected(B, 1, Agreed(B, 1, 0, 1, "")))
    link.take(Arrived(B, 1, Resume(0)))
    assert wire.said == [(B, Resume(0))]
    wire.said.clear()
    return link, wire, manager


def request(node: int = THERE, serial: int = 1) -> Request:
    return Request(X, 1, node, serial, EX, True)


async def test_it_hands_on_what_comes_and_leaves_the_rest_to_others() -> None:
    link, wire, manager = linked()
    assert link.take(Arrived(B, 1, request()))
    assert manager.got == [request()]
    assert not link.take(Arrived(B, 1, "something of the membership's"))
    assert not link.take(Lost(B, 1, "gone"))
    link.send(THERE, Refused(X, 1, THERE, 1))
    assert not wire.said, "there is no connection"
    link.take(Connected(B, 2, Agreed(B, 1, 0, 1, "")))
    link.take(Arrived(B, 2, Resume(0)))
    assert wire.said == [(B, Resume(1)), (B, Refused(X, 1, THERE, 1))]
    link.check()


async def test_who_is_ahead_of_the_view_is_not_forgotten_by_an_older_one() -> None:
    """C has joined in view 9, which this node has read on the LUN; view 8 was announced before,
    and comes now. The connection goes on, so nobody would say `Connected` again."""
    link, wire, manager = linked()
    link.take(Connected(C, 1, Agreed(C, 1, 0, 9, "")))
    link.take(Arrived(C, 1, Resume(0)))
    link.view_changed([A, B], 8)
    link.take(Arrived(C, 1, request(node_number(*C))))
    link.view_changed([A, B, C], 9)
    link.send(node_number(*C), Refused(X, 9, node_number(*C), 1))
    assert manager.got == [request(node_number(*C))]
    assert (C, Refused(X, 9, node_number(*C), 1)) in wire.said
    link.view_changed([A, B], 10)
    assert C not in link.statistics()
    link.take(Connected(C, 2, Agreed(C, 1, 0, 10, "")))
    link.view_changed([A, B, NodeId(C.slot, C.incarnation + 1)], 11)
    assert C not in link.statistics(), "another has its slot"


async def test_messages_come_before_there_is_a_lock_manager() -> None:
    link, wire, manager = linked(attach=False)
    link.take(Arrived(B, 1, request()))
    link.take(Arrived(B, 1, Granted(X, 1, HERE, 1, EX, ValueBlock())))
    link.attach(manager)
    assert manager.got == [request()]
    assert [peer for peer, _words in wire.accused] == [B]


@pytest.mark.parametrize("message", [Confirmed(5), Resume(0), Skipped(0), Confirmed(-1)])
async def test_what_no_channel_says_costs_the_connection(message: object) -> None:
    link, wire, manager = linked()
    link.take(Arrived(B, 1, message))
    assert [peer for peer, _words in wire.refused] == [B] and not wire.accused
    link.take(Lost(B, 1, "refused"))
    link.take(Connected(B, 2, Agreed(B, 1, 0, 1, "")))
    link.take(Arrived(B, 2, Resume(0)))
    link.take(Arrived(B, 2, request()))
    assert manager.got == [request()], "it may come back"


@pytest.mark.parametrize(
    "message",
    [
        request(HERE),
        request(12345),
        Refused(X, 1, THERE, 1),
        Reassert(1, HERE),
        Granted(X, 1, HERE, 1, EX, ValueBlock()),
    ],
)
async def test_what_no_lock_manager_says_ends_the_channel(
    message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "lockmgr")
    link, wire, manager = linked()
    link.take(Arrived(B, 1, message))
    ((peer, words),) = wire.refused
    assert peer == B and words.startswith("it breaks the lock manager's protocol: ")
    assert wire.accused == [(B, words)]
    link.take(Arrived(B, 1, request()))
    link.take(Lost(B, 1, "refused"))
    link.take(Connected(B, 2, Agreed(B, 1, 0, 1, "")))
    for late in (Resume(0), request(), Confirmed(7)):
        link.take(Arrived(B, 2, late))
    link.send(THERE, Refused(X, 1, THERE, 1))
    assert not manager.got and not wire.said, "nothing more, until it leaves the view"
    assert len(wire.refused) == len(wire.accused) == 1
    link.view_changed([A], 2)
    assert not link.statistics().get(B)


async def test_newcomers_and_nobody() -> None:
    link, wire, manager = linked()
    assert not link.take(Connected(NEWCOMER, 1, Agreed(NEWCOMER, 1, 0, 1, "")))
    assert link.take(Arrived(NEWCOMER, 1, request()))
    assert link.take(Arrived(NEWCOMER, 1, Resume(3)))
    link.send(12345, request())
    assert not manager.got and not wire.said and not wire.refused


async def test_who_takes_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "lockmgr")
    monkeypatch.setattr("lockmgr.channel.LIMIT_BYTES", 2000)
    link, wire, _manager = linked()
    link.take(Lost(B, 1, "gone"))
    for serial in range(20):
        link.send(THERE, Refused(X, 1, THERE, serial))
    assert wire.accused == [(B, "it has not taken 8 messages, 0 MiB")]


async def test_who_is_ahead_is_kept_up_with_only_so_far(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it says of a later epoch is kept until the view of that one is here."""
    caplog.set_level(logging.CRITICAL, "lockmgr")
    monkeypatch.setattr("lockmgr.cluster.lock_link.AHEAD_BYTES", 2000)
    link, wire, manager = linked()
    for epoch in (2, 3, 4):
        for serial in range(7):
            link.take(Arrived(B, 1, replace(request(serial=serial), epoch=epoch)))
        link.view_changed([A, B], epoch)
    assert len(manager.got) == 21 and not wire.accused
    for serial in range(20):
        link.take(Arrived(B, 1, request(serial=serial)))
    assert len(manager.got) == 41 and not wire.accused, "what is late costs nothing"
    for serial in range(20):
        link.take(Arrived(B, 1, replace(request(serial=serial), epoch=99)))
    assert wire.accused == [(B, "it is ahead of this node by 0 MiB")]
    assert len(manager.got) == 48
    link.view_changed([A], 5)
    assert not link.statistics().get(B)


# -- over a real network -------------------------------------------------------------------------
async def test_a_violation_ends_neither_daemon_nor_network(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "lockmgr")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            a, b, c = await start_nodes(nursery, 3)
            number = connection_number(a, b)
            b.network.send(a.name, Granted(X, 1, a.number, 9, EX, ValueBlock()))
            await until(lambda: a.accused)
            ((peer, words),) = a.accused
            assert peer == b.name and "nobody asked for" in words
            await until(lambda: connection_number(a, b) > number)
            here = placed_at(a, c)
            async with c.manager.acquire(here, EX):
                pass
            a.check()
            assert [node.accused for node in (b, c)] == [[], []]
            nursery.cancel_scope.cancel()


def connection_number(node: LockNode, other: LockNode) -> int:
    return next(one.number for one in node.network.statistics() if one.peer == other.name)


def placed_at(*masters: LockNode) -> Resource:
    """A resource that one of these masters."""
    numbers = [node.number for node in masters]
    core = masters[0].manager.core
    found = (Resource(b"n", b"p%d" % number) for number in range(100))
    return next(one for one in found if core.recovery.mastering.master_of(one) in numbers)


async def test_a_closed_lock_manager_is_detached() -> None:
    link, wire, _manager = linked()
    async with open_lock_manager(node=HERE, members=(HERE, THERE), send=link.send) as manager:
        link.attach(manager)
        link.detach()
        link.take(Lost(B, 1, "gone"))
        link.take(Connected(B, 2, Agreed(B, 1, 0, 1, "")))
        link.take(Arrived(B, 1, request()))
        link.send(THERE, request(HERE))
    assert not wire.said
