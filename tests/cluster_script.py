"""A script of `tests.volume_script` carried out by several nodes, each step by the one it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from csvfs.ondisk.geometry import ROOT_INODE
from lockmgr.settings import Settings
from tests.cluster_volumes import Cluster, Node, cluster_volumes
from tests.volume_model import Model, OpenFile
from tests.volume_model import Node as ModelNode
from tests.volume_script import Forget, Replay, Step, look


@dataclass(frozen=True)
class Acted:
    """One step, and the place of the node that does it."""

    place: int
    step: Step


@dataclass(frozen=True)
class Kill:
    """That node syncs and dies; another one comes in its place."""

    place: int


@dataclass(frozen=True)
class Leave:
    """That node leaves, and comes back."""

    place: int


Act = Acted | Kill | Leave


@dataclass
class ClusterReplay(Replay):
    """One script on one cluster, one step after the other."""

    nodes: list[Node] = field(default_factory=list)
    places: int = 3
    seed: int = 0
    told: dict[int, dict[ModelNode, int]] = field(default_factory=dict)
    """By place: how often the kernel there was told of an inode."""

    async def carry_out(self, script: Sequence[Act]) -> None:
        """Raises AssertionError where the volume and the model differ."""
        self.inos[self.model.root] = ROOT_INODE
        settings = self.settings or Settings()
        async with cluster_volumes(self.places, seed=self.seed, settings=settings) as cluster:
            self.nodes = list(cluster.nodes)
            for act in script:
                await self._act(cluster, act)
            cluster.check()
            for node in self.nodes:
                await self._compare_all(node.volume)

    async def _act(self, cluster: Cluster, act: Act) -> None:
        node = self.nodes[act.place]
        if isinstance(act, Acted):
            self.lookups = self.told.setdefault(act.place, {})
            await self._step(node.volume, act.step)
            return
        self.told.pop(act.place, None)
        if isinstance(act, Kill):
            await node.volume.sync()
            await cluster.kill(node)
        else:
            await cluster.leave(node)
        self.nodes[act.place] = await cluster.join()


class ClusterScript:
    """Collects acts while the model goes ahead: who may do what."""

    def __init__(self, model: Model, places: int) -> None:
        self.model = model
        self.places = places
        self.acts: list[Act] = []
        self.homes: dict[OpenFile, int] = {}
        """Which place has the handle open."""
        self.told: list[set[ModelNode]] = [set() for _ in range(places)]
        """What the kernel at each place knows."""

    def tell(self, place: int, node: ModelNode) -> None:
        """Let the kernel at ``place`` find ``node`` by its path, as it has to before it asks."""
        if node is self.model.root or node in self.told[place] or node.nlink == 0:
            return
        parent, name = next(
            (directory, name)
            for directory in self._directories()
            for name, child in directory.names.items()
            if child is node
        )
        self.tell(place, parent)
        self.acts.append(Acted(place, Step("lookup", (parent, name), node, look(node))))
        self.told[place].add(node)

    def _directories(self) -> Iterator[ModelNode]:
        waiting = [self.model.root]
        while waiting:
            directory = waiting.pop()
            yield directory
            waiting += [child for child in directory.names.values() if child.is_directory]

    def open_at(self, node: ModelNode) -> set[int]:
        """Places that have this inode open."""
        return {place for handle, place in self.homes.items() if handle.node is node}

    def place_for(self, args: tuple[Any, ...], wish: int) -> int | None:
        """Who can do a step with these arguments: ``wish`` if possible; None: nobody.

        A handle is good where it was opened, an inode without a name where it is open.
        """
        possible = set(range(self.places))
        for arg in args:
            if isinstance(arg, OpenFile):
                possible &= {self.homes[arg]} if arg in self.homes else set()
            elif isinstance(arg, ModelNode) and arg.nlink == 0:
                possible &= self.open_at(arg)
        if not possible:
            return None
        return wish if wish in possible else min(possible)

    def gone(self, place: int) -> None:
        """The node at ``place`` is no more, nor is what it had open."""
        self.homes = {handle: at for handle, at in self.homes.items() if at != place}
        self.told[place].clear()


def forgotten(node: ModelNode) -> Step:
    """The step by which a kernel forgets an inode."""
    return Forget("forget", (node,), None)
