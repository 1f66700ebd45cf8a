"""The lock manager once more, written to be obviously right rather than quick.

Nothing here uses lockmgr's tables or code. Everything is recomputed from lists after each change,
and one thing at a time is granted: the first in order that the rules allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NL, CR, CW, PR, PW, EX = range(6)

_TOGETHER = {
    frozenset(pair)
    for pair in (
        [(NL, other) for other in (NL, CR, CW, PR, PW, EX)]
        + [(CR, other) for other in (CR, CW, PR, PW)]
        + [(CW, CW), (PR, PR)]
    )
}


def together(a: int, b: int) -> bool:
    """May ``a`` and ``b`` be held by two at once?"""
    return frozenset((a, b)) in _TOGETHER


def at_least(a: int, b: int) -> bool:
    """Is everything that may stand beside ``a`` allowed beside ``b`` too?"""
    return all(together(b, other) for other in range(6) if together(a, other))


@dataclass
class NaiveRequest:
    """A request at the master."""

    node: int
    serial: int
    mode: int


@dataclass
class NaiveMaster:
    """One resource at its master. ``said`` collects what it says, as plain tuples."""

    held: dict[int, int] = field(default_factory=dict)
    converting: list[NaiveRequest] = field(default_factory=list)
    waiting: list[NaiveRequest] = field(default_factory=list)
    told: set[tuple[int, int, int]] = field(default_factory=set)
    """(holder, asking node, serial)"""
    value: tuple[bytes | None, int] = (None, 0)
    said: list[tuple[object, ...]] = field(default_factory=list)

    def _fits(self, request: NaiveRequest) -> bool:
        return all(
            together(request.mode, mode) for node, mode in self.held.items() if node != request.node
        )

    def _allowed(self) -> NaiveRequest | None:
        for position, request in enumerate(self.converting):
            earlier = self.converting[:position]
            blocks_earlier = [
                other for other in earlier if not together(self.held[request.node], other.mode)
            ]
            if self._fits(request) and (not earlier or blocks_earlier):
                return request
        if self.waiting and not self.converting and self._fits(self.waiting[0]):
            return self.waiting[0]
        return None

    def _settle(self) -> None:
        while (request := self._allowed()) is not None:
            (self.converting if request in self.converting else self.waiting).remove(request)
            self._grant(request)
        for request in self.converting + self.waiting:
            for node, mode in self.held.items():
                key = (node, request.node, request.serial)
                if node != request.node and not together(mode, request.mode):
                    if key not in self.told:
                        self.said.append(("blocking", node, request.mode))
                    self.told.add(key)

    def _grant(self, request: NaiveRequest) -> None:
        self.held[request.node] = request.mode
        self.told = {key for key in self.told if key[0] != request.node}
        self.said.append(("granted", request.node, request.serial, request.mode, self.value))

    def request(self, node: int, serial: int, mode: int, queue: bool) -> None:
        """A new lock or a conversion."""
        request = NaiveRequest(node, serial, mode)
        if mode == NL or (node in self.held and at_least(self.held[node], mode)):
            self._grant(request)
        else:
            line = self.converting if node in self.held else self.waiting
            line.append(request)
            while (allowed := self._allowed()) is not None:
                (self.converting if allowed in self.converting else self.waiting).remove(allowed)
                self._grant(allowed)
            if not queue and request in line:
                line.remove(request)
                self.said.append(("refused", node, serial))
        self._settle()

    def cancel(self, node: int, serial: int) -> None:
        """Forget a request that waits."""
        for line in (self.converting, self.waiting):
            for request in list(line):
                if (request.node, request.serial) == (node, serial):
                    line.remove(request)
                    self.said.append(("refused", node, serial))
        self._settle()

    def lower(self, node: int, mode: int | None, value: tuple[bytes | None, int] | None) -> None:
        """Give up a part or all."""
        if value is not None:
            self.value = value
        if mode is None:
            del self.held[node]
            self.told = {key for key in self.told if key[0] != node}
        else:
            self.held[node] = mode
        self._settle()


@dataclass
class NaiveClaim:
    """A claim of a task on a node that is alone in its cluster."""

    number: int
    mode: int
    shared: bool
    wants: int | None = None
    """What it converts to."""
    deadline: float | None = None


@dataclass
class NaiveNode:
    """One resource on a node that is alone: whoever fits beside the others goes in, in order."""

    held: list[NaiveClaim] = field(default_factory=list)
    waiting: list[NaiveClaim] = field(default_factory=list)
    converting: list[NaiveClaim] = field(default_factory=list)
    granted: list[tuple[int, int]] = field(default_factory=list)
    """(number, mode) in the order of grants."""
    denied: list[int] = field(default_factory=list)

    def fits(self, claim: NaiveClaim, mode: int) -> bool:
        """Do the other claims leave room?"""
        return all(
            together(other.mode, mode) or (other.shared and claim.shared)
            for other in self.held
            if other is not claim
        )

    def _turn(self, claim: NaiveClaim) -> bool:
        earlier = self.converting[: self.converting.index(claim)]
        blocks_earlier = [
            other
            for other in earlier
            if other.wants is not None
            and not together(claim.mode, other.wants)
            and not (claim.shared and other.shared)
        ]
        return not earlier or bool(blocks_earlier)

    def _first_fits(self) -> bool:
        return self.fits(self.waiting[0], self.waiting[0].mode)

    def settle(self) -> None:
        """Grant all that can be granted, one at a time."""
        while True:
            ready = [
                claim
                for claim in self.converting
                if claim.wants is not None and self.fits(claim, claim.wants) and self._turn(claim)
            ]
            if ready:
                claim = ready[0]
                assert claim.wants is not None
                claim.mode, claim.wants, claim.deadline = claim.wants, None, None
                self.converting.remove(claim)
            elif not self.converting and self.waiting and self._first_fits():
                claim = self.waiting.pop(0)
                claim.deadline = None
                self.held.append(claim)
            else:
                return
            self.granted.append((claim.number, claim.mode))

    def expire(self, now: float) -> None:
        """Deny whoever has waited long enough, the earliest deadline first."""
        while True:
            late = [
                claim
                for claim in self.converting + self.waiting
                if claim.deadline is not None and claim.deadline <= now
            ]
            if not late:
                return
            claim = min(late, key=lambda claim: (claim.deadline, claim.number))
            self.withdraw(claim)
            self.denied.append(claim.number)
            self.settle()

    def withdraw(self, claim: NaiveClaim) -> None:
        """Forget what it waits for."""
        claim.deadline = None
        if claim in self.converting:
            self.converting.remove(claim)
            claim.wants = None
        else:
            self.waiting.remove(claim)
