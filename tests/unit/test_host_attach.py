"""Mounting beside other hosts: what an admin is told, and what `csvctl node evict` waits for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from csvfs.errors import VolumeFailed
from csvfs.host import attach
from csvfs.host.problems import Kind, Problem
from csvfs.host.settings import MountSettings
from lockmgr.cluster.effects import Stop, StopReason
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlot

ME, OTHER = NodeId(0, 1), NodeId(1, 1)
NAMES = {"alpha": ME, "beta": OTHER}


def settings(address: str) -> MountSettings:
    return MountSettings("lun", "file:///lun", "/mnt", "gamma", "iqn.x", cluster_address=address)


def view(*nodes: NodeId, addresses: tuple[str, ...] = (), epoch: int = 7) -> View:
    """These are active."""
    slots = [
        ViewSlot(1, SlotState.ACTIVE, addresses=addresses, machine_id=b"m" * 16, node_name="beta")
        if NodeId(slot, 1) in nodes
        else ViewSlot()
        for slot in range(2)
    ]
    return View(epoch, 0, tuple(slots), lock_epoch=1)


async def test_an_address_that_only_this_host_reaches_is_refused_before_anything_else() -> None:
    others = view(OTHER, addresses=("10.2.0.1:21065",))
    with pytest.raises(Problem, match=r"nobody but .* 127.0.0.1:21065; beta is at 10\.") as raised:
        await attach._refuse_unreachable(
            cast("Any", None), others, settings("127.0.0.1:21065"), cast("Any", None)
        )
    assert raised.value.kind is Kind.USAGE


@dataclass
class Node:
    """A host's node that is told of views by the test."""

    view: View | None
    failure: VolumeFailed | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    async def wait_serving(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def wait_view(self) -> None:
        await self.changed.wait()

    def installed(self, seen: View) -> None:
        self.view = seen
        self.changed.set()

    def fail(self) -> None:
        self.failure = VolumeFailed("evicted")
        self.changed.set()


@dataclass
class Cluster:
    me: NodeId = ME
    stopped: Stop | None = None
    evicted: list[NodeId] = field(default_factory=list)

    def status(self) -> Cluster:
        return self

    def node_named(self, name: str) -> NodeId | None:
        return NAMES.get(name)

    def evict(self, node: NodeId, why: str) -> None:
        assert why == "why"
        self.evicted.append(node)


@dataclass
class Member:
    node: Node
    cluster: Cluster


def attached(member: Member) -> attach.Attached:
    made = attach.Attached.__new__(attach.Attached)
    made.node, made.cluster = cast("Any", member.node), cast("Any", member.cluster)
    return made


async def test_who_is_not_heard_is_told_its_address() -> None:
    stopped = Stop(StopReason.EVICTED, "evicted")
    member = Member(Node(None, VolumeFailed("evicted")), Cluster(stopped=stopped))
    with pytest.raises(Problem, match=r"did not hear each other; .* at 10.9.0.1:21065") as raised:
        await attach._wait_serving(cast("Any", member), settings("10.9.0.1:21065"))
    assert raised.value.kind is Kind.NOT_HEARD


async def test_the_only_host_is_not_evicted() -> None:
    member = Member(Node(view(ME)), Cluster())
    with pytest.raises(Problem, match="nobody is there to evict it") as raised:
        await attached(member).evict("alpha", "why")
    assert raised.value.kind is Kind.USAGE
    assert not member.cluster.evicted, "and not as soon as somebody joins, either"


async def test_an_unknown_name_is_refused() -> None:
    member = Member(Node(view(ME)), Cluster())
    with pytest.raises(Problem, match="no node 'delta'"):
        await attached(member).evict("delta", "why")


@pytest.mark.parametrize("name", ["alpha", "beta"])
async def test_who_evicts_is_told_when_it_is_done(name: str) -> None:
    """Also who asks for its own eviction: it never sees the view that says so."""
    member = Member(Node(view(ME, OTHER)), Cluster())
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await attached(member).evict(name, "why"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert member.cluster.evicted == [NAMES[name]]
        assert not answers
        if name == "beta":
            member.node.installed(view(ME, epoch=8))
        else:
            member.cluster.stopped = Stop(StopReason.EVICTED, "evicted")
            member.node.fail()
    assert answers == [{"slot": NAMES[name].slot, "epoch": 8 if name == "beta" else None}]


async def test_who_fails_while_it_evicts_another_says_so_at_once() -> None:
    member = Member(Node(view(ME, OTHER)), Cluster())
    member.cluster.stopped = Stop(StopReason.EVICTED, "evicted")
    member.node.fail()
    with pytest.raises(VolumeFailed):
        await attached(member).evict("beta", "why")
