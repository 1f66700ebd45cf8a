"""A master's resources, made anew from what the members of a view have said of them.

Each node's word on what it holds and awaits is the truth. What surviving masters of earlier
epochs know comes beside it: value blocks, and what departed nodes had. Resources of masters that
departed are *orphaned*: of them nothing is known but what the survivors hold.

The value block, in this order:
1. A node holds CW or more: since it was granted, nobody else can have changed the block. Its word.
2. The resource is orphaned: a change may have died with its master. Not valid.
3. A surviving master says who had PW or EX. If that node is there and says what it knows, that; if
   not, it has departed, or what it said when it lowered was lost on the way: not valid.
4. A surviving master says nobody had: its block.
A block made *not valid* takes the next sequence number, so that no older one is believed.

FIFO: requests that waited are queued again in the order of how long they have waited, by their
nodes' clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from lockmgr.debts import Debts, possible
from lockmgr.messages import (
    NEVER_WRITTEN,
    HeldState,
    MasterState,
    Request,
    Resource,
    ValueBlock,
)
from lockmgr.modes import COVERS, JOIN, Mode
from lockmgr.resource import MasteredResource


@dataclass(slots=True)
class Said:
    """What was said of one resource: by each node, and by masters of earlier epochs."""

    resource: Resource
    nodes: dict[int, HeldState] = field(default_factory=dict)
    masters: list[MasterState] = field(default_factory=list)

    @property
    def modes(self) -> list[Mode]:
        """What is held."""
        return [state.held for state in self.nodes.values() if state.held is not None]


@dataclass(slots=True)
class Rebuilt:
    """What the master begins with, once it thaws: resources, and requests that do not queue."""

    resources: dict[bytes, MasteredResource] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)


def rebuild(said: Iterable[Said], orphaned: set[bytes], debts: Debts, epoch: int) -> Rebuilt:
    """The resources of a master. ``orphaned``: names whose master before may have departed."""
    rebuilt = Rebuilt()
    owing = bool(debts.owing)
    for about in said:
        resource = about.resource
        if not owing and (usual := _held_by_one(about, debts, epoch)) is not None:
            rebuilt.resources[resource.name] = usual
            continue
        mastered = MasteredResource(resource, epoch, debts)
        mastered.value = true_value(about, resource.name in orphaned)
        mastered.owed = _owed(about, debts)
        for node, state in sorted(about.nodes.items()):
            if state.held is not None:
                mastered.restore(node, state.held, state.grant)
        asking = [(node, state) for node, state in about.nodes.items() if state.asked is not None]
        asking.sort(key=lambda item: (-item[1].waited_s, item[0]))
        for node, state in asking:
            assert state.asked is not None
            if state.queue:
                mastered.enqueue(node, state.serial, state.asked)
            else:
                request = Request(resource, epoch, node, state.serial, state.asked, False)
                rebuilt.requests.append(request)
        if not mastered.empty:
            rebuilt.resources[resource.name] = mastered
    return rebuilt


def _held_by_one(about: Said, debts: Debts, epoch: int) -> MasteredResource | None:
    """The same for the usual resource, quickly, for there are thousands: one node has it, in a mode
    that vouches for the value block, and nobody waits. None: it is another."""
    if len(about.nodes) != 1:
        return None
    ((node, state),) = about.nodes.items()
    if state.held is None or state.held not in _VOUCHING or state.asked is not None:
        return None
    mastered = MasteredResource(about.resource, epoch, debts)
    mastered.value = state.value
    mastered.restore(node, state.held, state.grant)
    return mastered


def _owed(about: Said, debts: Debts) -> dict[int, Mode]:
    if not debts.owing:
        return {}
    owed = debts.of_unknown(about.resource, possible(about.modes))
    for state in about.masters:
        for node, had in state.owed:
            owed[node] = JOIN[owed.get(node, Mode.NL)][had]
    return debts.unsettled(owed)


def true_value(about: Said, orphaned: bool) -> ValueBlock:
    """The value block as the module's theory says."""
    holders = [state for state in about.nodes.values() if state.held is not None]
    vouched = [state.value for state in holders if state.held in _VOUCHING]
    if vouched:
        return max(vouched, key=_sequence)
    known = [state.value for state in holders]
    known += [state.value for state in about.masters]
    latest = max(known, key=_sequence, default=NEVER_WRITTEN)
    if orphaned or not about.masters or any(_is_unsaid(each, about) for each in about.masters):
        return ValueBlock(None, latest.sequence + 1)
    return latest


def _is_unsaid(master: MasterState, about: Said) -> bool:
    """Who may have changed the block has not said what it knows."""
    if master.writer is None:
        return False
    writer = about.nodes.get(master.writer)
    return writer is None or writer.held is None


_VOUCHING: Final = frozenset(
    mode for mode in Mode if COVERS[mode][Mode.CW] or COVERS[mode][Mode.PR]
)


def _sequence(value: ValueBlock) -> int:
    return value.sequence
