"""What is locked in the whole cluster, as people want to see it. Pure.

One row for each resource: who holds it in which mode, who waits for it in which order, and who
waits for whom. Rows are joined from what each node says of its own locks and what each master says
of its queues; they are of slightly different moments, and where they disagree both are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lockmgr.deadlock_graph import deadlocked, needs, victims
from lockmgr.gather import Told
from lockmgr.mastering import Choose, Mastering, rendezvous
from lockmgr.messages import Resource, Waits
from lockmgr.modes import COMPATIBLE, Mode
from lockmgr.ranges_messages import END, Owner, RangeHold
from lockmgr.snapshot_messages import ToldClaim, ToldLock, ToldQueue, ToldRanges, ToldRangeWait

ResourceWords = Callable[[bytes], str]
"""A resource's name in words."""
NodeWords = Callable[[int], str]
"""A node's name in words."""


@dataclass(frozen=True, slots=True)
class Party:
    """A node that holds or awaits a resource, and for which tasks. ``age_s`` None: not known."""

    node: str
    mode: str
    age_s: float | None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One resource. ``waits_for``: who waits for whom, a sentence each."""

    resource: str
    master: str
    holders: tuple[Party, ...]
    waiters: tuple[Party, ...]
    waits_for: tuple[str, ...]

    @property
    def longest_wait_s(self) -> float:
        """0.0 if nobody waits."""
        return max((party.age_s or 0.0 for party in self.waiters), default=0.0)


@dataclass(frozen=True, slots=True)
class ClusterLocks:
    """The rows, the longest wait first; then by name.

    ``deadlocks``: cycles, in words, as far as one look shows them. ``silent``: members that did not
    tell all. ``truncated``: there is more than is told. ``recovering``: the view has changed, and
    masters grant nothing yet.
    """

    locks: tuple[Row, ...]
    deadlocks: tuple[str, ...]
    silent: tuple[str, ...]
    truncated: bool
    recovering: bool

    def as_json(self) -> dict[str, Any]:
        """What `csvctl lock list --json` prints."""
        return asdict(self)


@dataclass(slots=True)
class _About:
    """All that was told of one resource."""

    resource: Resource
    locks: dict[int, ToldLock] = field(default_factory=dict)
    queue: ToldQueue | None = None
    ranges: ToldRanges | None = None
    master: int | None = None
    """Who has told of it as its master; nobody does if nobody waits."""


def cluster_locks(
    told: Mapping[int, Told],
    resource_words: ResourceWords,
    node_words: NodeWords,
    choose: Choose = rendezvous,
) -> ClusterLocks:
    """Join what the members have told (`lockmgr.gather.Gathering.told`). ``choose``: how the
    members agree on masters.
    """
    about: dict[bytes, _About] = {}

    def entry_of(resource: Resource) -> _About:
        return about.setdefault(resource.name, _About(resource))

    for node, one in told.items():
        for lock in one.locks:
            entry_of(lock.resource).locks[node] = lock
        for queue in one.queues:
            entry = entry_of(queue.resource)
            entry.queue, entry.master = queue, node
        for ranges in one.ranges:
            entry = entry_of(ranges.resource)
            entry.ranges, entry.master = ranges, node
    mastering = Mastering(sorted(told), choose)
    for entry in about.values():
        if entry.master is None:
            entry.master = mastering.master_of(entry.resource)
    rows = [_row(resource_words(name), entry, node_words) for name, entry in sorted(about.items())]
    rows.sort(key=lambda row: -row.longest_wait_s)
    return ClusterLocks(
        tuple(rows),
        _deadlocks(one.waits for one in told.values()),
        tuple(node_words(node) for node, one in sorted(told.items()) if one.next is not None),
        any(one.truncated for one in told.values()),
        any(one.frozen for one in told.values()),
    )


def _deadlocks(told: Iterable[Waits | None]) -> tuple[str, ...]:
    waits = [one for one in told if one is not None]
    graph = needs(waits)
    return tuple(words for _, words in victims(graph, waits)) if deadlocked(graph) else ()


# -- one row ---------------------------------------------------------------------------------
def _row(resource: str, about: _About, node_words: NodeWords) -> Row:
    holders: list[Party] = []
    waiters: list[Party] = []
    words: list[str] = []
    for node, lock in sorted(about.locks.items()):
        if lock.held is not None:
            tasks = tuple(_task(claim) for claim in lock.holders)
            holders.append(Party(node_words(node), _held(lock), lock.age_s, tasks + _more(lock)))
    queue = about.queue
    if queue is not None:
        for node, mode in queue.granted:
            known = about.locks.get(node)
            if known is None:
                holders.append(Party(node_words(node), str(mode), None))
        for node, mode in queue.owed:
            holders.append(Party(f"{node_words(node)} (departed)", str(mode), None))
        for node, mode in queue.waiting:
            waiters.append(_waiting_node(node, mode, about.locks.get(node), node_words))
            words += _who(node, mode, queue, node_words)
    asked = {node for node, _ in queue.waiting} if queue is not None else set()
    for node, lock in sorted(about.locks.items()):
        if lock.waiters and node not in asked:
            mode = lock.waiters[0].wanted or Mode.NL
            waiters.append(_waiting_node(node, mode, lock, node_words))
        words += _here(node_words(node), lock)
    if about.ranges is not None:
        _add_ranges(about.ranges, node_words, holders, waiters, words)
    master = "" if about.master is None else node_words(about.master)
    return Row(resource, master, tuple(holders), tuple(waiters), tuple(words))


def _held(lock: ToldLock) -> str:
    if lock.demoting_to is None:
        return str(lock.held)
    return f"{lock.held}, being lowered to {lock.demoting_to}"


def _task(claim: ToldClaim) -> str:
    task = claim.task or "a task"
    if claim.wanted is None:
        return f"{task} {claim.mode} {claim.age_s:.1f} s"
    had = "" if claim.mode is Mode.NL else f"{claim.mode}->"
    return f"{task} {had}{claim.wanted} {claim.age_s:.1f} s"


def _more(lock: ToldLock) -> tuple[str, ...]:
    return (f"and {lock.more} more",) if lock.more else ()


def _waiting_node(node: int, mode: Mode, lock: ToldLock | None, node_words: NodeWords) -> Party:
    waiting = lock.waiters if lock is not None else ()
    age_s = max((claim.age_s for claim in waiting), default=None)
    return Party(node_words(node), str(mode), age_s, tuple(map(_task, waiting)))


def _who(node: int, mode: Mode, queue: ToldQueue, node_words: NodeWords) -> list[str]:
    """Whom a request at the master waits for: holders in its way, departed ones, the queue."""
    in_the_way = [
        f"{node_words(other)} ({held})"
        for other, held in queue.granted
        if other != node and not COMPATIBLE[mode][held]
    ]
    in_the_way += [f"{node_words(other)} (departed)" for other, _held in queue.owed]
    if not in_the_way:
        before = [other for other, _mode in queue.waiting]
        in_the_way = [f"{node_words(n)} (before it)" for n in before[: before.index(node)][-1:]]
    if not in_the_way:
        return []
    return [f"{node_words(node)} (wants {mode}) waits for {', '.join(in_the_way)}"]


def _here(node: str, lock: ToldLock) -> list[str]:
    """Whom tasks wait for on their own node."""
    found: list[str] = []
    for claim in lock.waiters:
        wanted = claim.wanted or Mode.NL
        blocked_by = [
            other.task or "a task"
            for other in lock.holders
            if other.task != claim.task and not COMPATIBLE[wanted][other.mode]
        ]
        if blocked_by:
            found.append(
                f"{claim.task or 'a task'} on {node} (wants {wanted}) waits for "
                f"{', '.join(blocked_by)} on the same node"
            )
    return found


# -- byte ranges -----------------------------------------------------------------------------
def _add_ranges(
    ranges: ToldRanges,
    node_words: NodeWords,
    holders: list[Party],
    waiters: list[Party],
    words: list[str],
) -> None:
    holders.extend(_range_party(hold, None, node_words) for hold in ranges.holds)
    for wait in ranges.waits:
        waiters.append(_range_party(wait.wanted, wait.age_s, node_words))
        words.append(_range_words(wait, node_words))
    if ranges.more:
        words.append(f"and {ranges.more} more ranges held or awaited")


def _range_party(hold: RangeHold, age_s: float | None, node_words: NodeWords) -> Party:
    end = "end" if hold.end_bytes == END else str(hold.end_bytes)
    mode = f"{hold.access.name} {hold.start_bytes}..{end}"
    return Party(node_words(hold.owner.node), mode, age_s, (_owner(hold.owner),))


def _owner(owner: Owner) -> str:
    pid = f"pid {owner.pid}" if owner.pid else f"owner {owner.number:#x}"
    return f"{pid} ({owner.kind.name})"


def _range_words(wait: ToldRangeWait, node_words: NodeWords) -> str:
    owner = wait.wanted.owner
    behind = ", ".join(f"{_owner(one)} on {node_words(one.node)}" for one in wait.behind)
    return f"{_owner(owner)} on {node_words(owner.node)} waits for {behind or 'nobody now'}"
