"""Byte-range locks a second time, slow and plain: a file has ``SIZE`` bytes, each owner an array.

The last byte stands for all behind it. What the real one finds by looking at what has changed,
this one finds by looking at everything, again and again, until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lockmgr.ranges_messages import END, Access, Kind, Outcome, Owner

SIZE = 12


def byte_range(start: int, end: int) -> range:
    """The bytes of the array that a range covers."""
    return range(start, SIZE if end == END else end)


@dataclass(eq=False)
class NaiveWait:
    ticket: int
    file: int
    owner: Owner
    covered: range
    access: Access
    patient: bool = True


def flock(owner: Owner) -> bool:
    return owner.kind is Kind.FLOCK


@dataclass
class NaiveRanges:
    """All files of one master."""

    bytes: dict[tuple[int, Owner], list[Access]] = field(default_factory=dict)
    waits: list[NaiveWait] = field(default_factory=list)
    lowers: list[NaiveWait] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def access(self, file: int, owner: Owner) -> list[Access]:
        return self.bytes.setdefault((file, owner), [Access.NONE] * SIZE)

    # -- what stands in the way
    def holders(self, file: int, owner: Owner, covered: range, access: Access) -> set[Owner]:
        return {
            other
            for (where, other), held in self.bytes.items()
            if where == file
            and other != owner
            and flock(other) == flock(owner)
            and any(
                held[byte] is Access.WRITE or (held[byte] is Access.READ and access is Access.WRITE)
                for byte in covered
            )
        }

    def hard(self, wait: NaiveWait) -> set[Owner]:
        return self.holders(wait.file, wait.owner, wait.covered, wait.access)

    def soft(self, wait: NaiveWait) -> set[Owner]:
        earlier = self.waits[: self.waits.index(wait)] if wait in self.waits else self.waits
        return {
            other.owner
            for other in earlier
            if wait.patient
            and other.file == wait.file
            and other.owner != wait.owner
            and flock(other.owner) == flock(wait.owner)
            and set(other.covered) & set(wait.covered)
            and Access.WRITE in (other.access, wait.access)
        }

    # -- who waits for whom
    def closure(self, edges: set[tuple[object, object]]) -> set[tuple[object, object]]:
        while True:
            more = {(a, d) for a, b in edges for c, d in edges if b == c} - edges
            if not more:
                return edges
            edges = edges | more

    def owners_wait(self, extra: NaiveWait | None = None) -> set[tuple[object, object]]:
        waits = [*self.waits, extra] if extra else self.waits
        return self.closure({(wait.owner, other) for wait in waits for other in self.hard(wait)})

    def end_patience(self) -> bool:
        def process(owner: Owner) -> object:
            return (owner.node, owner.pid) if owner.pid else owner

        depends = self.closure(
            {
                (process(wait.owner), process(other))
                for wait in self.waits
                for other in self.hard(wait) | self.soft(wait)
            }
        )
        ended = [
            wait
            for wait in self.waits
            if any(
                process(other) == process(wait.owner)
                or (process(other), process(wait.owner)) in depends
                for other in self.soft(wait)
            )
        ]
        for wait in ended:
            wait.patient = False
        return bool(ended)

    # -- operations
    def set(
        self, ticket: int, file: int, owner: Owner, start: int, end: int, access: Access, wait: bool
    ) -> None:
        covered = byte_range(start, end)
        held = self.access(file, owner)
        if access is Access.NONE:
            for byte in covered:
                held[byte] = Access.NONE
            self.outcomes[ticket] = Outcome.DONE
        else:
            if flock(owner) and held[0] not in (Access.NONE, access):
                held[:] = [Access.NONE] * SIZE
                if wait:
                    self.settle()
            request = NaiveWait(ticket, file, owner, covered, access)
            enough = all(held[byte] >= access for byte in covered)
            if not self.hard(request) and (enough or not (wait and self.soft(request))):
                self.grant(request)
            elif not wait:
                self.outcomes[ticket] = Outcome.WOULD_BLOCK
            elif owner.kind is Kind.POSIX and (owner, owner) in self.owners_wait(request):
                self.outcomes[ticket] = Outcome.DEADLOCK
            else:
                self.waits.append(request)
        self.settle()

    def grant(self, request: NaiveWait) -> None:
        held = self.access(request.file, request.owner)
        if flock(request.owner):
            held[:] = [request.access] * SIZE
        elif request.access is Access.READ and Access.WRITE in [held[b] for b in request.covered]:
            self.lowers.append(request)
        for byte in request.covered:
            held[byte] = max(held[byte], request.access)
        self.outcomes[request.ticket] = Outcome.DONE

    def settle(self) -> None:
        while self.serve_one() or self.refuse_one() or self.end_patience() or self.lower_one():
            pass

    def lower_one(self) -> bool:
        """The second step to a read lock over written bytes comes when all else is done."""
        if not self.lowers:
            return False
        request = self.lowers.pop(0)
        held = self.access(request.file, request.owner)
        for byte in request.covered:
            held[byte] = min(held[byte], Access.READ)
        return True

    def serve_one(self) -> bool:
        for wait in self.waits:
            if not self.hard(wait) and not self.soft(wait):
                self.waits.remove(wait)
                self.grant(wait)
                return True
        return False

    def refuse_one(self) -> bool:
        """Of what waits in a circle of owners, the newest of POSIX kind."""
        circles = self.owners_wait()
        for wait in reversed(self.waits):
            reached = {b for other in self.hard(wait) for a, b in circles if a == other}
            if wait.owner.kind is Kind.POSIX and wait.owner in reached:
                self.waits.remove(wait)
                self.outcomes[wait.ticket] = Outcome.DEADLOCK
                return True
        return False

    def cancel(self, ticket: int) -> None:
        for wait in list(self.waits):
            if wait.ticket == ticket:
                self.waits.remove(wait)
                self.outcomes[ticket] = Outcome.CANCELLED
        self.settle()

    def close(self, file: int, owner: Owner) -> None:
        self.access(file, owner)[:] = [Access.NONE] * SIZE
        self.settle()

    def died(self, owner: Owner, files: list[int]) -> None:
        """One file after another, which others may see."""
        for file in files:
            for wait in list(self.waits):
                if wait.owner == owner and wait.file == file:
                    self.waits.remove(wait)
                    self.outcomes[wait.ticket] = Outcome.CANCELLED
            self.close(file, owner)
