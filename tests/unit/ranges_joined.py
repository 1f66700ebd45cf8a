"""A cluster whose view changes, and programs on its nodes that lock byte ranges.

Every owner is a program of one thread, so what it has is certain whenever it waits for nothing:
what it was told, no more and no less, whatever views come and go. Beside what
`tests.unit.lockmgr_changing` asserts, after every step:
- nobody is deceived: what a node believes is what its programs were told
- no two programs exclude each other, be they on a node that was evicted and does not know it
"""

from __future__ import annotations

from collections.abc import Iterator

from lockmgr.events import Effect, Event
from lockmgr.messages import Resource
from lockmgr.ranges import Holdings
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeFound,
    SetRange,
)
from lockmgr.ranges_messages import Access, Kind, Outcome, Owner, RangeForget, RangeLock, RangeLower
from tests.unit.lockmgr_changing import ChangingCluster

Key = tuple[Resource, Owner]
KINDS = [Kind.POSIX, Kind.POSIX, Kind.OFD, Kind.FLOCK]


class RangesCluster(ChangingCluster):
    """``busy``: what each owner waits for; ``truth``: what it was told."""

    def __init__(self, nodes: int) -> None:
        self.busy: dict[Owner, SetRange | FindConflict | ForgetFile] = {}
        self.truth: dict[Key, Holdings] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._tickets = 0
        super().__init__(nodes)

    def owners_of(self, node: int) -> list[Owner]:
        return [
            Owner(kind, node, 10 * node + number, pid=100 + number)
            for number, kind in enumerate(KINDS)
        ]

    def free(self) -> list[Owner]:
        """Programs that wait for nothing."""
        owners = (owner for node in sorted(self.alive) for owner in self.owners_of(node))
        return [owner for owner in owners if owner not in self.busy]

    # -- what programs do --------------------------------------------------------------------
    def lock(
        self, file: Resource, owner: Owner, start: int, end: int, access: Access, wait: bool = True
    ) -> int:
        self._tickets += 1
        self._begin(SetRange(self._tickets, file, owner, start, end, access, wait))
        return self._tickets

    def find(self, file: Resource, owner: Owner, start: int, end: int, access: Access) -> None:
        self._tickets += 1
        self._begin(FindConflict(self._tickets, file, owner, start, end, access))

    def close_file(self, file: Resource, owner: Owner) -> None:
        self._tickets += 1
        self._begin(ForgetFile(self._tickets, file, owner))

    def _begin(self, event: SetRange | FindConflict | ForgetFile) -> None:
        self.busy[event.owner] = event
        self.step(event.owner.node, event)

    def cancel_range(self, owner: Owner) -> None:
        self.step(owner.node, CancelRange(self.busy[owner].ticket))

    def owner_died(self, owner: Owner) -> None:
        self._forget(owner)
        self.step(owner.node, OwnerDied(owner))

    def _forget(self, owner: Owner) -> None:
        self.busy.pop(owner, None)
        for key in [key for key in self.truth if key[1] == owner]:
            del self.truth[key]

    def kill(self, node: int, keep: int = 0) -> None:
        for owner in self.owners_of(node):
            self._forget(owner)
        super().kill(node, keep)

    # -- what they are told ------------------------------------------------------------------
    def _carry_out(self, node: int, effect: Effect) -> None:
        if isinstance(effect, RangeDone):
            self._done(node, effect)
        elif isinstance(effect, RangeFound):
            for owner in [o for o, event in self.busy.items() if event.ticket == effect.ticket]:
                del self.busy[owner]
        else:
            super()._carry_out(node, effect)

    def _done(self, node: int, effect: RangeDone) -> None:
        found = [owner for owner, event in self.busy.items() if event.ticket == effect.ticket]
        if not found:
            return  # of an owner that has died
        self.outcomes[effect.ticket] = effect.outcome
        event = self.busy.pop(found[0])
        key = (event.resource, event.owner)
        if effect.outcome is not Outcome.DONE:
            assert isinstance(event, SetRange | FindConflict)
            if event.owner.kind is Kind.FLOCK and not self._dying(key):
                # A conversion that failed has lost the old lock, unless nobody had looked at it.
                client = self.cores[node].ranges.client
                left = client.held.get(event.resource, {}).get(event.owner, Holdings()).spans
                assert left in ([], self.truth.get(key, Holdings()).spans)
                self.truth[key] = Holdings(list(left))
        elif isinstance(event, SetRange):
            holdings = self.truth.setdefault(key, Holdings())
            holdings.assign(event.start_bytes, event.end_bytes, event.access)
        else:
            self.truth.pop(key, None)

    # -- what must be true -------------------------------------------------------------------
    def check(self) -> None:
        super().check()
        self._check_nobody_is_deceived()
        self._check_exclusion()

    def step(self, node: int, event: Event) -> list[Effect]:
        effects = super().step(node, event)
        self.check()
        return effects

    def believed(self) -> dict[Key, Holdings]:
        return {
            (resource, owner): holdings
            for _, core in self.living
            for resource, owners in core.ranges.client.held.items()
            for owner, holdings in owners.items()
        }

    def _dying(self, key: Key) -> bool:
        """An owner of that name has died, and what it had of that file is being given up."""
        resource, owner = key
        return any(
            pending.ticket is None
            and pending.message.owner == owner
            and pending.message.resource == resource
            for pending in self.cores[owner.node].ranges.client.pending.values()
        )

    def _check_nobody_is_deceived(self) -> None:
        believed = self.believed()
        for key in believed.keys() | self.truth.keys():
            owner = key[1]
            if owner in self.busy or owner.node not in self.alive or self._dying(key):
                continue
            told = self.truth.get(key, Holdings()).spans
            assert believed.get(key, Holdings()).spans == told, key

    def _check_exclusion(self) -> None:
        claims = {key: holdings.copy() for key, holdings in self.believed().items()}
        for core in (core for _, core in self.living):
            for pending in core.ranges.client.pending.values():
                message = pending.message
                held = claims.get((message.resource, message.owner))
                if held is None:
                    continue
                if isinstance(message, RangeLower):
                    held.lower_to(message.start_bytes, message.end_bytes, message.keep)
                elif isinstance(message, RangeForget) or (
                    isinstance(message, RangeLock) and message.owner.kind is Kind.FLOCK
                ):
                    held.spans.clear()
        for (file, owner), (other_file, other) in _pairs(list(claims)):
            if file == other_file and (owner.kind is Kind.FLOCK) == (other.kind is Kind.FLOCK):
                for span in claims[file, owner].spans:
                    clash = claims[file, other].obstacle(*span)
                    assert clash is None, (file, owner, span, other, clash)

    def end(self) -> None:
        """No more failures, then no more programs: everything comes to an end."""
        self.recover_all()
        mastered = {
            (file.resource, owner): holdings.spans
            for _, core in self.living
            for file in core.ranges.master.files.values()
            for owner, holdings in file.held.items()
        }
        assert mastered == {key: holdings.spans for key, holdings in self.believed().items()}
        for _, core in self.living:
            assert not core.ranges.master.later, "closed though nobody owes"
        for node in sorted(self.alive):
            for owner in self.owners_of(node):
                self.owner_died(owner)
        self.settle()
        for _, core in self.living:
            assert not core.ranges.client.held and not core.ranges.client.pending
            assert not core.ranges.master.files and not core.ranges.master.later


def _pairs(keys: list[Key]) -> Iterator[tuple[Key, Key]]:
    for position, key in enumerate(keys):
        for other in keys[:position]:
            yield key, other
