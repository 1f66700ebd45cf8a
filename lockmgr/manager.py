"""The trio shell of the lock manager: tasks wait, owners demote, the clock ticks.

    async with open_lock_manager() as manager:
        manager.register_owner(b"inode", owner)
        async with manager.acquire(resource, Mode.EX, shared_here=True) as lock:
            ...

What is decided, and why, is in `lockmgr.core`; here are only tasks. Concurrency: all state belongs
to the core and changes only in `LockCore.step` and the two shortcuts of `NodeLocks`, none of which
awaits. One task sleeps until the core's next timer. Each run of an owner's ``demote`` or
``glimpse`` is a task of the nursery; an exception that escapes from one ends the nursery, because
a lock whose data could not be written back must neither be given up nor kept in silence.

Cancellation: a task that waits may be cancelled at any time. Its claim is then withdrawn within
the same instant, or it had been granted before and the task is told so; never both, never neither.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from lockmgr import events
from lockmgr.carried import Carried
from lockmgr.claim import Claim, ClaimState
from lockmgr.core import LockCore
from lockmgr.errors import LockDeadlock, LockTimeout, ManagerClosed
from lockmgr.events import Patience
from lockmgr.gather import Told
from lockmgr.lock import Acquisition, Lock
from lockmgr.messages import Resource
from lockmgr.modes import COVERS, Mode
from lockmgr.owner import ResourceOwner
from lockmgr.ranges_events import RangeDone, RangeFound
from lockmgr.settings import Settings
from lockmgr.snapshot import LockSnapshot, Statistics

__all__ = ["Lock", "LockManager", "ResourceOwner", "open_lock_manager"]

log = logging.getLogger("lockmgr")

CLOSE_REMINDER_S = 10.0


@dataclass(slots=True)
class _Drain:
    done: trio.Event
    empty: bool = False


SendTo = Callable[[int, Carried], None]
"""Take a message for a node of the view. It must not wait, and must not call the manager back."""


def _nobody_there(to: int, message: Carried) -> None:
    raise AssertionError(f"a cluster of one node has nobody for {message} to {to}")


def _tell_nobody(*_what: object) -> None:
    """Nobody wants to know."""


class RangeWaits(Protocol):
    """Tasks that wait for byte ranges (`lockmgr.ranges_manager.RangeLocks`)."""

    def answered(self, answer: RangeDone | RangeFound) -> None:
        """That operation has ended."""

    def abandon(self, why: str) -> None:
        """Nothing is answered any more."""


class LockManager:
    """The locks of one node of the cluster.

    ``nursery`` runs timers and owners; see `open_lock_manager`. ``node``, ``epoch`` and ``members``
    come from the cluster's view (`LockCore`); later views through `view_changed`. What ``send``
    takes must reach the other node's `deliver` in order and without loss, as long as both are in
    the view of its epoch. ``on_thawed`` is told each epoch whose locks are recovered,
    ``on_unresponsive`` who is to be evicted and why (`Unresponsive`). Neither may wait, nor call
    the manager back.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        node: int = 0,
        epoch: int = 1,
        settings: Settings | None = None,
        members: Sequence[int] | None = None,
        send: SendTo = _nobody_there,
        on_thawed: Callable[[int], None] = _tell_nobody,
        on_unresponsive: Callable[[events.Unresponsive], None] = _tell_nobody,
    ) -> None:
        self.core = LockCore(node, epoch, settings, members)
        self._send = send
        self._on_thawed = on_thawed
        self._on_unresponsive = on_unresponsive
        self._nursery = nursery
        self._owners: dict[bytes, ResourceOwner] = {}
        self._prefixes: list[bytes] = []
        self._timer = trio.CancelScope()
        self._glimpses: dict[int, tuple[trio.Event, list[bytes | None]]] = {}
        self._drains: dict[bytes, _Drain] = {}
        self._gathered: dict[int, trio.Event] = {}
        self._ticket = 0
        self._emptied = trio.Event()
        self._closed = False
        self._ranges: RangeWaits | None = None
        nursery.start_soon(self._tick, name="lockmgr timer")

    @property
    def node(self) -> int:
        """The number of this node (`lockmgr.mastering.node_number`)."""
        return self.core.node

    def register_owner(self, prefix: bytes, owner: ResourceOwner) -> None:
        """``owner`` demotes and glimpses resources whose name begins with ``prefix``.

        The longest prefix that fits decides. Resources without an owner are given up as they are.
        Raises `ValueError` if the prefix has an owner.
        """
        if prefix in self._owners:
            raise ValueError(f"resources {prefix!r} have an owner already")
        self._owners[prefix] = owner
        self._prefixes = sorted(self._owners, key=len, reverse=True)

    # -- locking ---------------------------------------------------------------------------
    def acquire(
        self,
        resource: Resource,
        mode: Mode,
        shared_here: bool = False,
        timeout_s: float | None = None,
        owner: Hashable | None = None,
    ) -> Acquisition:
        """Await a `Lock` on ``resource``, or hold it with ``async with``.

        ``shared_here``: stand beside every other claim of this node that says so too, whatever
        the modes; towards other nodes and other claims the mode counts as it is. ``timeout_s`` 0:
        ask the master, but wait for no holder. A task that already holds the resource must not
        acquire it again; it converts. ``owner``: who holds this and awaits other locks meanwhile,
        under the same name there; what is to be found in a cycle of waits has one.

        Raises `LockTimeout`, `LockDeadlock`, `ManagerClosed`.
        """
        return Acquisition(self, Lock(self, resource, mode, shared_here, owner), timeout_s)

    def try_acquire(
        self,
        resource: Resource,
        mode: Mode,
        shared_here: bool = False,
        owner: Hashable | None = None,
    ) -> Lock | None:
        """A `Lock` within this instant, or None: it would have to wait, be it for a holder, for
        a demotion, or for the answer of a master on another node. To be called in a trio task.
        """
        lock = Lock(self, resource, mode, shared_here, owner)
        lock.holder = trio.lowlevel.current_task().name
        if self.core.locks.try_claim(lock, trio.current_time()):
            return lock
        self._refuse_if_closed()
        self._step(events.Acquire(lock, Patience.NONE))
        return lock if lock.lock is not None else None

    async def _acquire(self, lock: Lock, timeout_s: float | None) -> Lock:
        await trio.lowlevel.checkpoint_if_cancelled()
        lock.holder = trio.lowlevel.current_task().name
        if self.core.locks.try_claim(lock, trio.current_time()):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return lock
        self._refuse_if_closed()
        patience = Patience.NO_QUEUE if timeout_s == 0 else Patience.QUEUE
        event = events.Acquire(lock, patience, timeout_s)
        await self._wait(lock, event, f"{lock.mode}{' shared here' * lock.shared_here}")
        return lock

    async def _wait(self, lock: Lock, event: events.Event, what: str) -> None:
        started = trio.current_time()
        before = lock.state
        lock._snapshot = None
        self._step(event)
        if lock.state is ClaimState.WAITING or lock.state is ClaimState.CONVERTING:
            lock._task = trio.lowlevel.current_task()

            def withdraw(_raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
                lock._task = None
                self._step(events.Withdraw(lock))
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(withdraw)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        snapshot = lock._snapshot
        if snapshot is not None:
            lock._snapshot = None
            if lock._deadlock is not None:
                raise LockDeadlock(f"{lock.holder} could not have {what}: {lock._deadlock}")
            waited_s = trio.current_time() - started
            verb = "acquire" if before is ClaimState.NEW else "convert to"
            raise LockTimeout(
                f"{lock.holder} could not {verb} {what} within {waited_s:.1f} s", snapshot
            )

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ManagerClosed("the lock manager has been closed")

    async def drain(self, resource: Resource) -> bool:
        """From within ``demote``: from now on claims above its mode wait; return when none is left.

        Then none comes until ``demote`` has returned: what the owner writes back now is the last
        that there is, it may forget what it has cached, and is not called a second time. Nothing
        that it still awaits may need such a claim. False, where CW is used: a claim is left that
        waits for this demotion to end; write back, forget nothing, another call follows.
        """
        drain = self._drains.setdefault(resource.name, _Drain(trio.Event()))
        self._step(events.AwaitDrain(resource))
        await drain.done.wait()
        return drain.empty

    async def glimpse(self, resource: Resource) -> bytes | None:
        """What the owner at the node that holds PW or EX says; that node gives nothing up.

        None: nobody holds them, so acquire the lock instead.
        """
        return (await self.glimpse_all([resource]))[resource]

    async def glimpse_all(self, resources: Iterable[Resource]) -> dict[Resource, bytes | None]:
        """`glimpse` of each; one message to each master, and one to each holder, for 128 or so."""
        asked: dict[int, Resource] = {}
        for resource in dict.fromkeys(resources):
            self._ticket += 1
            asked[self._ticket] = resource
            self._glimpses[self._ticket] = (trio.Event(), [])
        questions = tuple(events.Glimpse(resource, ticket) for ticket, resource in asked.items())
        try:
            self._step(questions[0] if len(questions) == 1 else events.GlimpseAll(questions))
            for ticket in asked:
                await self._glimpses[ticket][0].wait()
            return {asked[ticket]: self._glimpses[ticket][1][0] for ticket in asked}
        finally:
            for ticket in asked:
                del self._glimpses[ticket]

    def node_holds(self, resource: Resource, mode: Mode) -> bool:
        """Does this node have ``mode`` or more, in use or cached? Then what it allows to cache
        is true.
        """
        lock = self.core.locks.locks.get(resource.name)
        return lock is not None and lock.held is not None and COVERS[lock.held][mode]

    def wait_for_ranges(self, ranges: RangeWaits) -> None:
        """``ranges`` is told how operations on byte ranges end."""
        self._ranges = ranges

    # -- the cluster -----------------------------------------------------------------------
    def deliver(self, message: Carried) -> None:
        """A message from another node. Raises `ProtocolViolation` for what no correct peer says."""
        self._step(events.Deliver(message))

    def view_changed(self, view: events.ViewChanged) -> None:
        """The node goes by another view: the locks are recovered, while those held go on."""
        self._step(view)

    def cleared(self, nodes: Iterable[int]) -> None:
        """These departed nodes may be granted over: their leases are over (`events.Cleared`)."""
        self._step(events.Cleared(frozenset(nodes)))

    def replayed(self, nodes: Iterable[int]) -> None:
        """The journals of these departed nodes are replayed (`events.JournalsReplayed`)."""
        self._step(events.JournalsReplayed(frozenset(nodes)))

    def stalled(self, stalled: bool) -> None:
        """This node's owners wait for what may never come, a path to the LUN; or no longer.

        While they do, the node does not answer for what others want of it, and is named to
        their ``on_unresponsive`` after ``evict_after_s``; and to its own, since it may be the one
        that would have to notice.
        """
        self._step(events.Stalled(stalled))

    # -- what there is ---------------------------------------------------------------------
    def statistics(self) -> Statistics:
        """Counters and gauges."""
        return self.core.statistics()

    def snapshot(self) -> list[LockSnapshot]:
        """Every lock this node has or awaits, with the tasks that use and await it."""
        now = trio.current_time()
        return [lock.snapshot(now) for lock in self.core.locks.locks.values()]

    async def gather(self, timeout_s: float, cached: bool = False) -> dict[int, Told]:
        """What every member tells of its locks within ``timeout_s``, for
        `lockmgr.cluster_snapshot.cluster_locks`. ``cached``: also what nobody uses or awaits.
        """
        self._ticket += 1
        ticket = self._ticket
        done = self._gathered[ticket] = trio.Event()
        try:
            self._step(events.GatherLocks(ticket, cached))
            with trio.move_on_after(timeout_s):
                await done.wait()
            return self.core.gathered[ticket].told
        finally:
            del self._gathered[ticket]
            self._step(events.StopGathering(ticket))

    async def aclose(self) -> None:
        """Give up every lock through its owner; return when nothing is held.

        Owners may still acquire locks meanwhile. Waits for locks that tasks hold, and logs who
        they are every 10 s.
        """
        if self._closed:
            return
        self._step(events.Close())
        while self.core.locks.locks:
            if self._emptied.is_set():  # an owner has taken a lock since
                self._emptied = trio.Event()
            with trio.move_on_after(CLOSE_REMINDER_S):
                await self._emptied.wait()
            for lock in self.snapshot():
                if lock.holders or lock.waiters:
                    log.warning("still closing: %s", lock.sentence())
        self._closed = True
        self._timer.cancel()
        await trio.lowlevel.checkpoint()

    # -- effects ---------------------------------------------------------------------------
    def _step(self, event: events.Event) -> None:
        questions: dict[ResourceOwner | None, list[events.Answer]] = {}
        for effect in self.core.step(event, trio.current_time()):
            match effect:
                case events.Grant(claim):
                    self._wake(claim)
                case events.Deny(claim, snapshot, deadlock):
                    assert isinstance(claim, Lock)
                    claim._snapshot = snapshot
                    claim._deadlock = deadlock
                    self._wake(claim)
                case events.Demote(resource, to_mode):
                    self._nursery.start_soon(self._demote, resource, to_mode)
                case events.Drained(resource, empty):
                    self._drained(resource, empty)
                case events.Answer(resource):
                    questions.setdefault(self._owner(resource), []).append(effect)
                case events.Glimpsed(ticket, answer):
                    self._glimpsed(ticket, answer)
                case events.Emptied():
                    self._emptied.set()
                case events.Send(to, message):
                    self._send(to, message)
                case events.Gathered(ticket):
                    self._gathered[ticket].set()
                case events.Thawed(epoch):
                    self._on_thawed(epoch)
                case events.Unresponsive():
                    self._on_unresponsive(effect)
                case RangeDone() | RangeFound():
                    assert self._ranges is not None
                    self._ranges.answered(effect)
                case events.EpochRefused(message):
                    log.debug("of an earlier epoch: %s", message)
                case _:
                    raise AssertionError(f"{effect} is no effect of a lock manager")
        for owner, asked in questions.items():
            self._nursery.start_soon(self._answer, owner, asked)
        due = _or_never(self.core.next_timer())
        if due != self._timer.deadline:
            self._timer.deadline = due

    def _wake(self, claim: Claim) -> None:
        assert isinstance(claim, Lock)
        task, claim._task = claim._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _drained(self, resource: Resource, empty: bool) -> None:
        waiting = self._drains.pop(resource.name, None)  # None: the owner was cancelled
        if waiting is not None:
            waiting.empty = empty
            waiting.done.set()

    def _glimpsed(self, ticket: int, answer: bytes | None) -> None:
        waiter = self._glimpses.get(ticket)  # None: its task was cancelled
        if waiter is not None:
            waiter[1].append(answer)
            waiter[0].set()

    def _owner(self, resource: Resource) -> ResourceOwner | None:
        for prefix in self._prefixes:
            if resource.name.startswith(prefix):
                return self._owners[prefix]
        return None

    async def _demote(self, resource: Resource, to_mode: Mode) -> None:
        owner = self._owner(resource)
        if owner is not None:
            await owner.demote(resource, to_mode)
        self._drains.pop(resource.name, None)
        self._step(events.Demoted(resource))

    async def _answer(self, owner: ResourceOwner | None, asked: list[events.Answer]) -> None:
        said = []
        for each in asked:
            answer = b"" if owner is None else await owner.glimpse(each.resource)
            said.append(events.Answered(each.resource, each.asker, each.serial, answer))
        self._step(said[0] if len(said) == 1 else events.AnsweredAll(tuple(said)))

    async def _tick(self) -> None:
        try:
            while not self._closed:
                self._timer = trio.CancelScope(deadline=_or_never(self.core.next_timer()))
                with self._timer:
                    await trio.sleep_forever()
                if not self._closed:
                    self._step(events.TimerDue())
        finally:
            if self._ranges is not None:
                self._ranges.abandon("the lock manager has ended")


def _or_never(when: float | None) -> float:
    return float("inf") if when is None else when


@asynccontextmanager
async def open_lock_manager(
    *,
    node: int = 0,
    epoch: int = 1,
    settings: Settings | None = None,
    members: Sequence[int] | None = None,
    send: SendTo = _nobody_there,
    on_thawed: Callable[[int], None] = _tell_nobody,
    on_unresponsive: Callable[[events.Unresponsive], None] = _tell_nobody,
) -> AsyncIterator[LockManager]:
    """A lock manager with a nursery of its own; the arguments are those of `LockManager`.

    At the end of the block every lock is given up through its owner. If the block raises, nothing
    is: owners are cancelled, and what only they knew is lost as in a crash.
    """
    async with trio.open_nursery() as nursery:
        manager = LockManager(
            nursery,
            node=node,
            epoch=epoch,
            settings=settings,
            members=members,
            send=send,
            on_thawed=on_thawed,
            on_unresponsive=on_unresponsive,
        )
        yield manager
        await manager.aclose()
        nursery.cancel_scope.cancel()
