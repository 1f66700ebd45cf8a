"""The master's side of byte-range locks: all files that one node masters, in one lock space.

A message changes one file; then whoever can be granted is, and what that and new waits do to the
graph of waits (`lockmgr.ranges_waits`) is resolved: deadlocks of POSIX owners, and fairness that
would be one. Circles through several masters are not seen here: `waits` exports this master's
part, and the coordinator ends a circle with a verdict (`lockmgr.ranges_deadlock`).

Recovery. `freeze` begins an epoch with nothing known: every node says what it holds
(`RangeReassert`), then repeats what it had no answer to. Nothing is answered before `thaw`, except
cancellations, which change nothing. After it, ``may_grant`` may still keep some files closed, for
what a departed node held may not be granted yet; there only giving up is served, until `reopened`.

invariants (`check`), beside those of each file and of the graph of waits:
- a file that nobody holds or awaits is forgotten
- frozen: nothing waits but in ``later``
"""

from __future__ import annotations

from collections.abc import Callable

from lockmgr.errors import ProtocolViolation
from lockmgr.messages import Resource
from lockmgr.ranges import RangeLocks, Waiting
from lockmgr.ranges_messages import (
    END,
    WAITS_PER_MESSAGE,
    Access,
    AskRangeWaits,
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
    RangeVerdict,
    RangeWaits,
)
from lockmgr.ranges_snapshot import RangeSnapshot, RangeWait
from lockmgr.ranges_waits import WaitGraph

RANGES_PER_OWNER = 16_384
"""In one file; a request beyond it gets NO_LOCKS."""


class RangeMaster:
    """All files whose byte-range locks this node masters."""

    def __init__(
        self,
        epoch: int,
        *,
        may_grant: Callable[[Resource], bool] = lambda _resource: True,
        ranges_per_owner: int = RANGES_PER_OWNER,
    ) -> None:
        self.epoch = epoch
        self.frozen = False
        self.files: dict[bytes, RangeLocks] = {}
        self.later: dict[bytes, list[RangeMasterBound]] = {}
        """What has to wait for `thaw` or `reopened`, by name, in the order of arrival."""
        self._may_grant = may_grant
        self._ranges_per_owner = ranges_per_owner
        self._graph = WaitGraph()
        self._changed: list[Owner] = []
        """Owners whose waits may have closed a circle: they began to wait, or were granted."""
        self._out: list[RangeNodeBound] = []
        self._now = 0.0

    # -- messages --------------------------------------------------------------------------
    def step(self, message: RangeMasterBound, now: float) -> list[RangeNodeBound]:
        """Carry out one message of this epoch and return the answers that it causes, in order.

        Raises `ProtocolViolation` for what no correct node sends.
        """
        self._now = now
        _validate(message)
        name = message.resource.name
        if isinstance(message, RangeForget) and message.waits:
            self._cancel_owner_later(message)
        if isinstance(message, RangeCancel):
            self._cancel(message)
        elif isinstance(message, RangeReassert):
            self._reassert(message)
        elif self.frozen or not (_gives_up(message) or self._may_grant(message.resource)):
            self.later.setdefault(name, []).append(message)
        else:
            self._carry_out(message)
        return self._finish()

    def _carry_out(self, message: RangeMasterBound) -> None:
        name = message.resource.name
        file = self.files.get(name)
        if file is None:
            file = self.files[name] = self._new_file(message.resource)
        if isinstance(message, RangeLock):
            self._lock(file, message)
        elif isinstance(message, RangeLower):
            outcome = file.lower(
                message.owner, message.start_bytes, message.end_bytes, message.keep
            )
            self._answer(message, outcome)
            self._serve(file)
        elif isinstance(message, RangeForget):
            self._forget(file, message)
        elif isinstance(message, RangeTest):
            conflict = file.test(message)
            self._out.append(
                RangeTested(message.resource, self.epoch, message.node, message.serial, conflict)
            )
        if file.empty:
            del self.files[name]

    def _new_file(self, resource: Resource) -> RangeLocks:
        return RangeLocks(resource, self._ranges_per_owner, self._graph.holders)

    def _lock(self, file: RangeLocks, message: RangeLock) -> None:
        left = file.leave_flock(message)
        if left:
            self._out.append(RangeLost(message.resource, self.epoch, message.node, message.owner))
        held_back = (
            message.wait
            and not file.has(message)
            and any(True for _ in file.ahead_of(Waiting(message, self._now)))
        )
        outcome = Outcome.WOULD_BLOCK if held_back else file.attempt(message)
        if outcome is Outcome.WOULD_BLOCK and message.wait:
            if message.owner.kind is Kind.POSIX and self._graph.deadlock(file, message):
                self._answer(message, Outcome.DEADLOCK)
            else:
                self._graph.add(file, file.enqueue(message, self._now), self._now)
                self._changed.append(message.owner)
        else:
            self._answer(message, outcome)
            self._changed.append(message.owner)
        if left:
            self._serve(file)

    def _forget(self, file: RangeLocks, message: RangeForget) -> None:
        file.forget(message.owner)
        if message.waits:
            for waiting in [w for w in file.waiting if w.message.owner == message.owner]:
                self._end_wait(file, waiting, Outcome.CANCELLED)
        self._answer(message, Outcome.DONE)
        self._serve(file)

    def _cancel(self, message: RangeCancel) -> None:
        name = message.resource.name
        for late in self.later.get(name, ()):
            if isinstance(late, RangeLock) and (late.node, late.serial) == (
                message.node,
                message.serial,
            ):
                self._keep_later(name, [other for other in self.later[name] if other is not late])
                self._answer(late, Outcome.CANCELLED)
                return
        self._give_up(message.resource, message.node, message.serial, Outcome.CANCELLED)

    def _keep_later(self, name: bytes, messages: list[RangeMasterBound]) -> None:
        if messages:
            self.later[name] = messages
        else:
            self.later.pop(name, None)

    def _cancel_owner_later(self, message: RangeForget) -> None:
        """The owner's requests that came before it ends, and none that a namesake makes after."""
        name = message.resource.name
        late: list[RangeLock] = []
        rest: list[RangeMasterBound] = []
        for other in self.later.get(name, ()):
            if isinstance(other, RangeLock) and other.owner == message.owner:
                late.append(other)
            else:
                rest.append(other)
        self._keep_later(name, rest)
        for request in late:
            self._answer(request, Outcome.CANCELLED)

    def _give_up(self, resource: Resource, node: int, serial: int, outcome: Outcome) -> bool:
        file = self.files.get(resource.name)
        for waiting in file.waiting if file is not None else ():
            if (waiting.message.node, waiting.message.serial) == (node, serial):
                assert file is not None
                self._end_wait(file, waiting, outcome)
                self._serve(file)
                if file.empty:
                    del self.files[resource.name]
                return True
        return False

    def _answer(self, message: RangeLock | RangeLower | RangeForget, outcome: Outcome) -> None:
        self._out.append(
            RangeAnswer(message.resource, self.epoch, message.node, message.serial, outcome)
        )

    # -- waits -----------------------------------------------------------------------------
    def _end_wait(self, file: RangeLocks, waiting: Waiting, outcome: Outcome) -> None:
        file.waiting.remove(waiting)
        self._graph.remove(file, waiting)
        self._answer(waiting.message, outcome)

    def _serve(self, file: RangeLocks) -> None:
        while (waiting := file.next_grantable()) is not None:
            self._end_wait(file, waiting, file.attempt(waiting.message))
            self._changed.append(waiting.message.owner)

    def _finish(self) -> list[RangeNodeBound]:
        while self._changed:
            owner = self._changed.pop()
            self._resolve_deadlocks(owner)
            if self._graph.in_circle(owner):
                self._end_patience()
        out, self._out = self._out, []
        return out

    def _resolve_deadlocks(self, owner: Owner) -> None:
        while (victim := self._graph.victim(owner)) is not None:
            file, waiting = victim
            self._end_wait(file, waiting, Outcome.DEADLOCK)
            self._serve(file)

    def _end_patience(self) -> None:
        held_back = self._graph.held_back_in_circle()
        for _file, waiting in held_back:
            waiting.patient = False
        for file, _waiting in held_back:
            self._serve(file)

    # -- circles through several masters ---------------------------------------------------
    def next_timer(self) -> float | None:
        """When `take_doubts` is due; None: no time matters."""
        return self._graph.next_doubt()

    def take_doubts(self, now: float) -> bool:
        """Has something waited for so long that all masters' waits should be looked at?"""
        return self._graph.take_doubts(now)

    def doubt_anew(self, now: float) -> None:
        """Whoever looked at all masters' waits does so no more."""
        self._graph.doubt_anew(now)

    def waits(self, asked: AskRangeWaits, node: int, now: float) -> list[RangeWaits]:
        """This master's answer, in parts."""
        edges = list(self._graph.edges(now))
        parts = [
            tuple(edges[at : at + WAITS_PER_MESSAGE])
            for at in range(0, len(edges), WAITS_PER_MESSAGE)
        ]
        return [
            *(RangeWaits(self.epoch, node, asked.round, part, last=False) for part in parts),
            RangeWaits(self.epoch, node, asked.round, (), last=True),
        ]

    def judge(self, verdict: RangeVerdict, now: float) -> list[RangeNodeBound]:
        """A circle of waits ends here. Nothing if that request does not wait any more."""
        self._now = now
        waiter = (verdict.waiter, verdict.serial)
        if not verdict.overtake:
            self._give_up(verdict.resource, *waiter, Outcome.DEADLOCK)
            return self._finish()
        file = self.files.get(verdict.resource.name)
        for waiting in file.waiting if file is not None else ():
            if (waiting.message.node, waiting.message.serial) == waiter:
                assert file is not None
                waiting.patient = False
                self._serve(file)
                break
        return self._finish()

    # -- recovery --------------------------------------------------------------------------
    def freeze(self, epoch: int) -> None:
        """A new view: forget everything, answer nothing until `thaw`."""
        self.epoch = epoch
        self.frozen = True
        self.files.clear()
        self.later.clear()
        self._graph.clear()

    def _reassert(self, message: RangeReassert) -> None:
        if not self.frozen:
            raise ProtocolViolation(f"node {message.node} re-asserts after the thaw: {message}")
        name = message.resource.name
        file = self.files.get(name)
        if file is None:
            file = self.files[name] = self._new_file(message.resource)
        for hold in message.holds:
            file.assert_held(hold)
        if file.empty:
            del self.files[name]

    def thaw(self, now: float) -> list[RangeNodeBound]:
        """Everybody has said what it holds: answer what came meanwhile.

        First what is given up, then the requests, the longest wait first.
        """
        self.frozen = False
        for messages in self.later.values():
            messages.sort(key=_thaw_order)
        return self.reopened(now)

    def reopened(self, now: float) -> list[RangeNodeBound]:
        """``may_grant`` may have changed its mind for some files."""
        self._now = now
        for name, messages in list(self.later.items()):
            closed = not self._may_grant(messages[0].resource)
            del self.later[name]
            if closed:
                self._keep_later(name, [m for m in messages if not _gives_up(m)])
            for message in filter(_gives_up, messages) if closed else messages:
                self._carry_out(message)
        return self._finish()

    # -- for people ------------------------------------------------------------------------
    def snapshot(self, now: float) -> tuple[RangeSnapshot, ...]:
        """All files that somebody holds or awaits ranges of."""
        self._now = now
        return tuple(
            RangeSnapshot(
                file.resource,
                tuple(
                    RangeHold(owner, *span)
                    for owner, holdings in file.held.items()
                    for span in holdings.spans
                ),
                tuple(self._describe(file, waiting) for waiting in file.waiting),
            )
            for file in self.files.values()
        )

    def _describe(self, file: RangeLocks, waiting: Waiting) -> RangeWait:
        return RangeWait(
            file.resource,
            waiting.message,
            max(0.0, self._now - waiting.since),
            tuple(file.obstacles(waiting.message)),
            tuple(ahead.message.owner for ahead in file.ahead_of(waiting)),
        )

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        for name, file in self.files.items():
            assert file.resource.name == name
            assert not file.empty, file.resource
            file.check()
        self._graph.check(self.files.values())
        assert not self.frozen or not any(file.waiting for file in self.files.values())
        assert all(self.later.values())


def _gives_up(message: RangeMasterBound) -> bool:
    return isinstance(message, RangeLower | RangeForget)


def _thaw_order(message: RangeMasterBound) -> tuple[bool, int]:
    return not _gives_up(message), -message.waited_ms if isinstance(message, RangeLock) else 0


def _claims(message: RangeMasterBound) -> tuple[RangeHold, ...]:
    """What the message is about, as if it were held."""
    if isinstance(message, RangeReassert):
        return message.holds
    if isinstance(message, RangeLock | RangeTest):
        start, end = message.start_bytes, message.end_bytes
        return (RangeHold(message.owner, start, end, message.access),)
    if isinstance(message, RangeLower):
        return (RangeHold(message.owner, message.start_bytes, message.end_bytes, Access.READ),)
    if isinstance(message, RangeForget):
        return (RangeHold(message.owner, 0, END, Access.READ),)
    return ()


def _validate(message: RangeMasterBound) -> None:
    for hold in _claims(message):
        start, end = hold.start_bytes, hold.end_bytes
        if hold.owner.node != message.node:
            raise ProtocolViolation(f"node {message.node} speaks for another: {message}")
        if hold.access is Access.NONE or not 0 <= start < end <= END:
            raise ProtocolViolation(f"nothing that can be locked: {message}")
        if hold.owner.kind is Kind.FLOCK and (start, end) != (0, END):
            raise ProtocolViolation(f"flock has whole files only: {message}")
