"""What a host makes of a lock holder that says nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from csvfs.format import Superblock
from csvfs.host.node import ClusterNode, number_of
from lockmgr.cluster.service import Cluster
from lockmgr.cluster.view import NodeId

ME, OTHER = NodeId(3, 1), NodeId(0, 7)


class Place:
    """This node's among the others, as far as that goes."""

    me = ME

    def __init__(self) -> None:
        self.has_lease = True
        self.lease = SimpleNamespace(valid=lambda: self.has_lease)
        self.heard: set[NodeId] = set()
        self.evicted: list[NodeId] = []

    def hears(self, node: NodeId) -> bool:
        return node in self.heard

    def evict(self, node: NodeId, why: str) -> None:
        assert why
        self.evicted.append(node)


@pytest.fixture
async def place() -> Place:
    return Place()


@pytest.fixture
async def node(place: Place) -> AsyncIterator[ClusterNode]:
    async with trio.open_nursery() as nursery:
        made = ClusterNode(nursery, cast("Superblock", None), lambda _words: None)
        made.begin(cast("Cluster", place))
        yield made
        nursery.cancel_scope.cancel()


async def test_a_holder_that_is_heard_and_says_nothing_is_evicted(
    node: ClusterNode, place: Place
) -> None:
    place.heard.add(OTHER)
    node._on_silent_holder(number_of(OTHER), "it holds EX")
    assert place.evicted == [OTHER]


async def test_a_holder_that_is_not_heard_is_for_the_judge(node: ClusterNode, place: Place) -> None:
    """Else the one host that is cut off would ask for the eviction of all others, and might well
    be the first to take the reservation."""
    node._on_silent_holder(number_of(OTHER), "it holds EX")
    assert not place.evicted


@pytest.mark.parametrize("has_lease", [True, False])
async def test_oneself(node: ClusterNode, place: Place, has_lease: bool) -> None:
    place.has_lease = has_lease
    node._on_silent_holder(number_of(ME), "it holds EX")
    assert place.evicted == [ME] * has_lease
