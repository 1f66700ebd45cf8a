"""A node's side of byte-range locks: what its own processes hold, want and wait for.

Nothing is cached: each operation asks the file's master, and what this node believes changes when
the answer arrives. So its belief is what the master had when it answered, and is the truth from
which a recovery begins.

A POSIX or OFD read lock over bytes that the owner may write is two steps: `RangeLock` where it
has nothing yet, which may fail, wait or be cancelled and then has changed nothing; then
`RangeLower`, which cannot. With no bytes to be gained it is the second step alone, with none to be
lowered the first.

What is claimed in a new epoch (`new_epoch`): what was granted, less what the operations without an
answer give up, for the old master may have carried those out and granted the bytes to others; then
the operations themselves, once more. Nobody has seen their first outcome, so they happen once.

invariants (`check`):
- what an owner holds is in the shortest form, and not empty
- each operation is under its serial; a ticket names at most one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lockmgr.errors import ProtocolViolation
from lockmgr.messages import Resource
from lockmgr.ranges import Holdings
from lockmgr.ranges_events import (
    CancelRange,
    FindConflict,
    ForgetFile,
    OwnerDied,
    RangeDone,
    RangeEffect,
    RangeEvent,
    RangeFound,
    RangeSend,
    SetRange,
)
from lockmgr.ranges_messages import (
    END,
    HOLDS_PER_MESSAGE,
    Access,
    Kind,
    Outcome,
    Owner,
    RangeAnswer,
    RangeCancel,
    RangeForget,
    RangeHold,
    RangeLock,
    RangeLost,
    RangeLower,
    RangeMasterBound,
    RangeNodeBound,
    RangeReassert,
    RangeTest,
    RangeTested,
)

RangeOperation = RangeLock | RangeLower | RangeForget | RangeTest


@dataclass(slots=True)
class Pending:
    """An operation without an answer; ``ticket`` None: nobody waits for the answer any more."""

    ticket: int | None
    message: RangeOperation
    since: float
    cancelled: bool = False


class RangeClient:
    """The byte-range locks of the processes of node ``node``."""

    def __init__(self, node: int, epoch: int, master_of: Callable[[Resource], int]) -> None:
        self.node = node
        self.epoch = epoch
        self.held: dict[Resource, dict[Owner, Holdings]] = {}
        self.pending: dict[int, Pending] = {}
        """By serial, in the order in which they were asked for."""
        self._master_of = master_of
        self._serials = 0
        self._tickets: dict[int, int] = {}
        self._out: list[RangeEffect] = []
        self._now = 0.0

    # -- events ----------------------------------------------------------------------------
    def step(self, event: RangeEvent, now: float) -> list[RangeEffect]:
        """Carry out what a process wants. Raises ValueError for what cannot be locked."""
        self._now = now
        if isinstance(event, SetRange):
            self._set(event)
        elif isinstance(event, FindConflict):
            _check_range(event.owner, event.start_bytes, event.end_bytes)
            if event.access is Access.NONE:
                raise ValueError("F_GETLK asks about a read or a write lock")
            self._ask(
                event.ticket,
                RangeTest(
                    event.resource,
                    self.epoch,
                    self.node,
                    self._serial(),
                    event.owner,
                    event.start_bytes,
                    event.end_bytes,
                    event.access,
                ),
            )
        elif isinstance(event, ForgetFile):
            self._forget(event.ticket, event.resource, event.owner, waits=False)
        elif isinstance(event, OwnerDied):
            self._owner_died(event.owner)
        else:
            self._cancel(event)
        return self._finish()

    def _finish(self) -> list[RangeEffect]:
        out, self._out = self._out, []
        return out

    def _serial(self) -> int:
        self._serials += 1
        return self._serials

    def _send(self, message: RangeMasterBound) -> None:
        self._out.append(RangeSend(self._master_of(message.resource), message))

    def _ask(self, ticket: int | None, message: RangeOperation) -> None:
        if ticket is not None:
            if ticket in self._tickets:
                raise ValueError(f"ticket {ticket} is in use")
            self._tickets[ticket] = message.serial
        self.pending[message.serial] = Pending(ticket, message, self._now)
        self._send(message)

    def _set(self, event: SetRange) -> None:
        start, end, owner = event.start_bytes, event.end_bytes, event.owner
        _check_range(owner, start, end)
        lowers = event.access is Access.READ and self._keeps(event.resource, owner, start, end)
        if event.access is Access.NONE or lowers:
            self._lower(event.ticket, event.resource, owner, start, end, event.access)
            return
        message = RangeLock(
            event.resource,
            self.epoch,
            self.node,
            self._serial(),
            owner,
            start,
            end,
            event.access,
            event.wait,
        )
        self._ask(event.ticket, message)

    def _keeps(self, resource: Resource, owner: Owner, start: int, end: int) -> bool:
        """Has the owner read access to all of it, and has asked to give up nothing?"""
        held = self.held.get(resource, {}).get(owner)
        return (
            held is not None
            and owner.kind is not Kind.FLOCK
            and held.covers(start, end, Access.READ)
            and not any(
                isinstance(pending.message, RangeLower | RangeForget)
                and pending.message.owner == owner
                and pending.message.resource == resource
                for pending in self.pending.values()
            )
        )

    def _lower(
        self,
        ticket: int | None,
        resource: Resource,
        owner: Owner,
        start: int,
        end: int,
        keep: Access,
    ) -> None:
        self._ask(
            ticket,
            RangeLower(resource, self.epoch, self.node, self._serial(), owner, start, end, keep),
        )

    def _forget(self, ticket: int | None, resource: Resource, owner: Owner, *, waits: bool) -> None:
        self._ask(
            ticket, RangeForget(resource, self.epoch, self.node, self._serial(), owner, waits)
        )

    def _owner_died(self, owner: Owner) -> None:
        concerned = {resource: None for resource, held in self.held.items() if owner in held}
        for pending in self.pending.values():
            if pending.message.owner == owner:
                concerned[pending.message.resource] = None
                if isinstance(pending.message, RangeLock):
                    pending.cancelled = True
        for resource in concerned:
            self._forget(None, resource, owner, waits=True)

    def _cancel(self, event: CancelRange) -> None:
        serial = self._tickets.get(event.ticket)
        if serial is None:
            return
        pending = self.pending[serial]
        message = pending.message
        if isinstance(message, RangeLock):
            if not pending.cancelled:
                pending.cancelled = True
                self._send(RangeCancel(message.resource, self.epoch, self.node, serial))
        elif isinstance(message, RangeTest):
            pending.ticket = None
            self._done(event.ticket, Outcome.CANCELLED)

    def _done(self, ticket: int | None, outcome: Outcome) -> None:
        if ticket is not None:
            del self._tickets[ticket]
            self._out.append(RangeDone(ticket, outcome))

    # -- answers ---------------------------------------------------------------------------
    def receive(self, message: RangeNodeBound, now: float) -> list[RangeEffect]:
        """Carry out an answer of this epoch. Raises `ProtocolViolation` if nobody asked."""
        self._now = now
        if isinstance(message, RangeLost):
            self._lost(message)
            return self._finish()
        pending = self.pending.get(message.serial)
        if pending is None or isinstance(message, RangeTested) != isinstance(
            pending.message, RangeTest
        ):
            raise ProtocolViolation(f"nobody asked for {message}")
        del self.pending[message.serial]
        if isinstance(message, RangeAnswer):
            self._answered(pending, message.outcome)
        elif pending.ticket is not None:
            del self._tickets[pending.ticket]
            self._out.append(RangeFound(pending.ticket, message.conflict))
        return self._finish()

    def _lost(self, message: RangeLost) -> None:
        held = self.held.get(message.resource, {}).get(message.owner)
        if held is None:
            raise ProtocolViolation(f"there is nothing to be lost: {message}")
        held.spans.clear()
        self._drop_empty(message.resource, message.owner)

    def _answered(self, pending: Pending, outcome: Outcome) -> None:
        message = pending.message
        owners = self.held.setdefault(message.resource, {})
        holdings = owners.setdefault(message.owner, Holdings())
        if outcome is Outcome.DONE:
            _give_up(message, holdings)
            if isinstance(message, RangeLock):
                holdings.raise_to(message.start_bytes, message.end_bytes, message.access)
        step_two = (
            isinstance(message, RangeLock)
            and outcome is Outcome.DONE
            and message.access is Access.READ
            and any(
                span.access is Access.WRITE
                for span in holdings.overlapping(message.start_bytes, message.end_bytes)
            )
        )
        self._drop_empty(message.resource, message.owner)
        if step_two and isinstance(message, RangeLock):
            ticket = pending.ticket
            if ticket is not None:
                del self._tickets[ticket]
            self._lower(
                ticket,
                message.resource,
                message.owner,
                message.start_bytes,
                message.end_bytes,
                Access.READ,
            )
        else:
            self._done(pending.ticket, outcome)

    def _drop_empty(self, resource: Resource, owner: Owner) -> None:
        owners = self.held[resource]
        if not owners[owner].spans:
            del owners[owner]
        if not owners:
            del self.held[resource]

    # -- recovery --------------------------------------------------------------------------
    def new_epoch(
        self, epoch: int, master_of: Callable[[Resource], int], now: float
    ) -> list[RangeEffect]:
        """A new view: say to each file's new master what is held, and repeat what is unanswered."""
        self._now = now
        self.epoch = epoch
        self._master_of = master_of
        for pending in self.pending.values():
            owners = self.held.get(pending.message.resource, {})
            holdings = owners.get(pending.message.owner)
            if holdings is not None:
                _give_up(pending.message, holdings)
                self._drop_empty(pending.message.resource, pending.message.owner)
        for resource, owners in self.held.items():
            holds = [
                RangeHold(owner, *span)
                for owner, holdings in owners.items()
                for span in holdings.spans
            ]
            for at in range(0, len(holds), HOLDS_PER_MESSAGE):
                part = tuple(holds[at : at + HOLDS_PER_MESSAGE])
                self._send(RangeReassert(resource, epoch, self.node, part))
        for serial, pending in list(self.pending.items()):
            self._repeat(serial, pending)
        return self._finish()

    def _repeat(self, serial: int, pending: Pending) -> None:
        message = pending.message
        if isinstance(message, RangeLock):
            if pending.cancelled:
                del self.pending[serial]
                self._done(pending.ticket, Outcome.CANCELLED)
                return
            waited_ms = max(0, round((self._now - pending.since) * 1000))
            message = replace(message, epoch=self.epoch, waited_ms=waited_ms)
        else:
            message = replace(message, epoch=self.epoch)
        pending.message = message
        self._send(message)

    # -- for people and tests --------------------------------------------------------------
    def holds(self) -> list[tuple[Resource, RangeHold]]:
        """All that this node's owners hold."""
        return [
            (resource, RangeHold(owner, *span))
            for resource, owners in self.held.items()
            for owner, holdings in owners.items()
            for span in holdings.spans
        ]

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for owners in self.held.values():
            assert owners
            for holdings in owners.values():
                assert holdings.spans
                holdings.check()
        for serial, pending in self.pending.items():
            assert pending.message.serial == serial <= self._serials
            assert pending.ticket is None or self._tickets[pending.ticket] == serial
        with_ticket = [p.ticket for p in self.pending.values() if p.ticket is not None]
        assert sorted(with_ticket) == sorted(self._tickets)


def _check_range(owner: Owner, start: int, end: int) -> None:
    if not 0 <= start < end <= END:
        raise ValueError(f"bytes {start} to {end} are no range")
    if owner.kind is Kind.FLOCK and (start, end) != (0, END):
        raise ValueError("flock locks whole files")


def _converts(message: RangeLock, holdings: Holdings) -> bool:
    """Is this the change of a flock lock, which loses the old one?"""
    return (
        message.owner.kind is Kind.FLOCK
        and bool(holdings.spans)
        and holdings.spans[0].access is not message.access
    )


def _give_up(message: RangeOperation, holdings: Holdings) -> None:
    """What the operation takes away, whether or not the master has got to it."""
    if isinstance(message, RangeLower):
        holdings.lower_to(message.start_bytes, message.end_bytes, message.keep)
    elif isinstance(message, RangeForget) or (
        isinstance(message, RangeLock) and _converts(message, holdings)
    ):
        holdings.spans.clear()
