"""Who waits for whom, put together from the answers of all nodes; deadlocks in it, and victims.

Vertices are waits of claims, and requests at masters, on which waits of one node may depend
together. Each needs *all* of a set to end; some have several such sets, and end if all of *one*
has ended (the AND-OR model). A vertex is deadlocked if in each of its sets one is: what is left
after taking out, again and again, whatever can end. It is not enough to look for cycles: a claim
that waits for a demotion may yet be let in by a request that is on its way.

Of the waits in a cycle of deadlocked ones the youngest is given up, shortest cycles first, until
none is left; then those are taken back that the others have made superfluous. So whoever is denied
would have waited for ever though all the others gave way. Of what waits for one resource only one
is given up at a time; the next search finds what is left.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lockmgr.messages import HoldingClaim, WaitingClaim, Waits
from lockmgr.modes import COMPATIBLE

WAITS_TOLD = 64


class Vertex(NamedTuple):
    """A claim's wait ``number`` of ``node``; or the request with this serial."""

    node: int
    number: int
    request: bool = False


Ends = frozenset[Vertex]
Graph = dict[Vertex, tuple[Ends, ...]]
"""What each vertex needs: the end of all of one of these sets."""
Edges = dict[Vertex, Ends]


def needs(answers: Iterable[Waits]) -> Graph:
    """What each wait needs. Requests that no wait depends on have been cancelled."""
    answers = list(answers)
    waits_of: dict[tuple[int, int], list[Vertex]] = defaultdict(list)
    for answer in answers:
        for claim in answer.waiting:
            waits_of[answer.node, claim.owner].append(Vertex(answer.node, claim.wait))
    graph: Graph = {}
    for answer in answers:
        for claim in answer.waiting:
            wait = Vertex(answer.node, claim.wait)
            graph[wait] = tuple(ends - {wait} for ends in _of_claim(answer.node, claim, waits_of))
            for request in _requests(answer.node, claim):
                graph.setdefault(request, ())
    holding: dict[tuple[bytes, int], list[HoldingClaim]] = defaultdict(list)
    for answer in answers:
        for held in answer.holding:
            holding[held.resource, answer.node].append(held)
    for answer in answers:
        for queued in answer.queued:
            request = Vertex(queued.waiter, queued.serial, True)
            if request not in graph:
                continue
            ends = {Vertex(node, serial, True) for node, serial in queued.behind}
            for node in queued.holders:
                for held in holding[queued.resource, node]:
                    if held.drained or not COMPATIBLE[queued.mode][held.mode]:
                        ends.update(waits_of[node, held.owner])
            graph[request] = (frozenset(ends),)
    return graph


def _requests(node: int, claim: WaitingClaim) -> Iterator[Vertex]:
    if claim.request:
        yield Vertex(node, claim.request, True)


def _of_claim(
    node: int, claim: WaitingClaim, waits_of: dict[tuple[int, int], list[Vertex]]
) -> Iterator[Ends]:
    request = list(_requests(node, claim))

    def of(owners: tuple[int, ...]) -> list[Vertex]:
        return [wait for owner in owners for wait in waits_of[node, owner]]

    behind = [Vertex(node, number) for number in claim.behind]
    yield frozenset([*request, *behind, *of(claim.holders)])
    if claim.instead:
        yield frozenset([*request, *of(claim.instead)])


def common(first: Graph, second: Graph) -> Graph:
    """What both rounds show: only ends that both have, and the sets of either."""
    graph: Graph = {}
    for vertex in first.keys() & second.keys():
        before, after = frozenset().union(*first[vertex]), frozenset().union(*second[vertex])
        sets = [ends & after for ends in first[vertex]] + [ends & before for ends in second[vertex]]
        graph[vertex] = tuple(dict.fromkeys(sets))
    return graph


def deadlocked(graph: Graph) -> Edges:
    """Whatever can never end, each with those of its ends that cannot either."""
    left = {vertex: [set(ends & graph.keys()) for ends in graph[vertex]] for vertex in graph}
    users: dict[Vertex, list[Vertex]] = defaultdict(list)
    for vertex, sets in left.items():
        for end in set().union(*sets):
            users[end].append(vertex)
    ending = [vertex for vertex, sets in left.items() if not all(sets) or not sets]
    while ending:
        ended = ending.pop()
        if left.pop(ended, None) is None:
            continue
        for user in users[ended]:
            sets = left.get(user, [])
            for ends in sets:
                ends.discard(ended)
            if not all(sets):
                ending.append(user)
    return {vertex: frozenset().union(*sets) for vertex, sets in left.items()}


def shortest_cycle(edges: Edges) -> list[Vertex] | None:
    """The vertices of a shortest cycle in order, beginning with the lowest; None: there is none."""
    best: list[Vertex] | None = None
    for start in sorted(edges):
        cycle = cycle_through(edges, start)
        if cycle is not None and (best is None or len(cycle) < len(best)):
            best = cycle
    return best


def cycle_through(edges: Edges, start: Vertex) -> list[Vertex] | None:
    """A shortest cycle that begins with ``start``."""
    before: dict[Vertex, Vertex] = {}
    queue = deque([start])
    while queue and start not in before:
        vertex = queue.popleft()
        for end in sorted(edges.get(vertex, ())):
            if end not in before:
                before[end] = vertex
                queue.append(end)
    if start not in before:
        return None
    cycle = [before[start]]
    while cycle[-1] != start:
        cycle.append(before[cycle[-1]])
    cycle.reverse()
    return cycle


def victims(graph: Graph, answers: Iterable[Waits]) -> list[tuple[Vertex, str]]:
    """Waits to be denied so that no deadlock is left, each with its cycle in words."""
    claims = {
        Vertex(answer.node, claim.wait): claim for answer in answers for claim in answer.waiting
    }
    edges = deadlocked(graph)
    graph = {vertex: graph[vertex] for vertex in edges}
    chosen: list[Vertex] = []
    while (cycle := shortest_cycle(edges)) is not None:
        waits = [vertex for vertex in cycle if not vertex.request]
        chosen.append(min(waits, key=lambda wait: (claims[wait].age_s, wait)))
        edges = deadlocked(_without(graph, chosen, claims))
    told: list[tuple[Vertex, str]] = []
    for victim in chosen[:]:
        others = [other for other in chosen if other != victim]
        edges = deadlocked(_without(graph, others, claims))
        found = cycle_through(edges, victim)
        if found is None:
            chosen.remove(victim)
            continue
        said = [claims[wait].words for wait in found if not wait.request][:WAITS_TOLD]
        told.append((victim, "; waits for ".join([*said, said[0]])))
    return told


def _without(graph: Graph, waits: list[Vertex], claims: dict[Vertex, WaitingClaim]) -> Graph:
    """After these waits have ended. Their requests may be cancelled, and so may the demotions that
    those have caused: whatever else waits for the same resources may have its turn."""
    touched = {claims[wait].resource for wait in waits}
    ended = {wait for wait, claim in claims.items() if claim.resource in touched}
    gone = ended.union(*(_requests(wait.node, claims[wait]) for wait in ended))
    return {vertex: graph[vertex] for vertex in graph.keys() - gone}
