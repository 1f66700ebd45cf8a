"""The journal of a node at work: group commit, room, checkpoints, and what happens when it fails.

Theory. Merged transactions gather in the running set (`csvfs.journal.state`). A commit freezes it,
makes the data that it speaks of stable (one flush), writes one record with FUA, and tells everyone
who waits. One commit is on its way at a time: who arrives meanwhile goes with the next. Home
blocks are written later, in the background, from committed images only.

What could go wrong, and why it does not:
  - *A commit's caller is cancelled*: the commit belongs to the commit task and goes on.
  - *A block is changed while its older image is being committed or written home*: images are
    copied on write; home writes of one block never overlap (`csvfs.journal.checkpoint`).
  - *A block is freed, and the node dies before the revoke is stable*: its last committed image is
    still in the journal, because its unhomed entry keeps the tail until the revoke is stable.
  - *Freed while its home write is on its way*: that write may still land; so a freed block becomes
    something else only after the free is stable and `settle` has returned.
  - *Freed and created again in one running set*: the record has a FRESH image and no revoke;
    a FRESH image supersedes all older ones.
  - *The flush of a commit fails after guests' data was written*: nothing was acknowledged, no
    record speaks of the data.
  - *The record's outcome is unknown*: its transactions were not acknowledged; they may be there
    after replay, all or none. Nothing is written after it, so replay cannot find a gap.
  - *Journal full*: whoever needs room waits for a checkpoint. A checkpoint needs no transaction,
    and no commit that waits for room: hooks use images held back in every record.

invariants:
  1. nothing is written to the LUN once `failure` is set, and every waiter has been told
  2. a transaction's callbacks run once, after its record is stable, in the order of merging
  3. `commit` returns only if every transaction merged before it, and all data written before it,
     is stable

Concurrency: two tasks, one that commits and one that checkpoints, both inside `run`. All state is
changed without an await in between by whoever runs. Callers wait for `_progress`, which is set
and replaced at every step forward.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Hashable
from dataclasses import dataclass
from itertools import islice

import trio

from csvfs.errors import VolumeFailed
from csvfs.journal.block_transfer import write_extent
from csvfs.journal.checkpoint import Checkpointer
from csvfs.journal.commit_hooks import CommitHooks
from csvfs.journal.flushing import FlushBatcher
from csvfs.journal.state import JournalState, Room
from csvfs.journal.transaction import (
    MAX_TX_BLOCKS,
    MAX_TX_FREES,
    Transaction,
    TransactionScope,
)
from redirector.block.device import BlockError, BlockIO


@dataclass(frozen=True, slots=True)
class JournalTimes:
    """When the journal acts by itself."""

    commit_interval_s: float = 5.0
    """Nothing that is merged waits longer for its commit."""
    idle_checkpoint_s: float = 30.0
    """After so long without a commit everything goes home, and memory is given back."""


class Journal:
    """One node's journal. `run` must be running while anything else is called."""

    def __init__(
        self,
        device: BlockIO,
        state: JournalState,
        scope: TransactionScope,
        *,
        header_version: int,
        times: JournalTimes,
        on_failed: Callable[[VolumeFailed], None],
    ) -> None:
        self.state = state
        self.failure: VolumeFailed | None = None
        self.flusher = FlushBatcher(device, self._fail)
        self.hooks = CommitHooks()
        self.commits = 0
        self.checkpoints = 0
        self._device = device
        self._scope = scope
        self._times = times
        self._on_failed = on_failed
        self._checkpointer = Checkpointer(
            device, state, self.flusher, header_version, self.raise_if_failed
        )
        self._progress = trio.Event()
        self._commit_kick = trio.Event()
        self._commit_requested = 0
        self._pending_since: float | None = None
        self._checkpoint_kick = trio.Event()
        self._checkpoint_idle = False
        """The checkpoint task waits for a first commit."""
        self._checkpoint_wanted = 0
        self._checkpoint_started = 0
        self._checkpoint_done = 0
        self._last_commit = -math.inf
        self._room_queue = trio.Lock()
        self._room_waiters = 0

    # -- tasks -----------------------------------------------------------------------------
    async def run(self) -> None:
        """Commit and checkpoint until cancelled or failed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._commit_next)
                nursery.start_soon(self._guard, self._checkpoint_next)
        finally:
            if self.failure is None:
                self.failure = VolumeFailed("the volume was stopped")
            self._step()

    async def _guard(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                await loop()
        except VolumeFailed:
            pass
        except BlockError as error:
            self._fail(error)
        except Exception as error:
            self._fail(error)
            raise

    def _fail(self, error: Exception) -> None:
        if self.failure is not None:
            return
        self.failure = VolumeFailed(
            f"this node can no longer write its metadata to the LUN: {error}. Nothing further is"
            " written; what fsync acknowledged is safe. Programs and VMs on this mount see I/O"
            " errors from now on: unmount it, look after the LUN, then mount it again"
        )
        self.failure.__cause__ = error
        self._step()
        self._commit_kick.set()
        self._checkpoint_kick.set()
        self._on_failed(self.failure)

    def raise_if_failed(self) -> None:
        """Raises `VolumeFailed` from the failure on."""
        if self.failure is not None:
            raise VolumeFailed(str(self.failure)) from self.failure.__cause__

    async def wait_failed(self) -> None:
        """Return only by raising `VolumeFailed`, once there is a failure."""
        while True:
            self.raise_if_failed()
            await self._progress.wait()

    def _step(self) -> None:
        """Something went forward: everybody looks again at what they wait for."""
        progress, self._progress = self._progress, trio.Event()
        progress.set()

    # -- room and merging --------------------------------------------------------------------
    def has_room(self, images: int) -> bool:
        """May a transaction of so many images run right now? Nobody overtakes those who wait."""
        return not self._room_waiters and self.state.room(images) is Room.YES

    async def wait_room(self, images: int) -> None:
        """Return when there is room; it is there until the caller awaits. Raises `VolumeFailed`."""
        self._room_waiters += 1
        try:
            async with self._room_queue:
                while (room := self.state.room(images)) is not Room.YES:
                    self.raise_if_failed()
                    if room is Room.COMMIT:
                        self._request_commit(self.state.running.number)
                    else:
                        self._request_checkpoint()
                    await self._progress.wait()
        finally:
            self._room_waiters -= 1

    def merge(self, transaction: Transaction) -> None:
        """Add a transaction to the running set. Room for its bound was there."""
        if transaction.images or transaction.freed or transaction.stable_callbacks:
            self.state.merge(transaction)
            if self._pending_since is None:
                self.note_pending()

    def note_pending(self) -> None:
        """There is something to commit, in time: a hook has it, or the running set."""
        if self._pending_since is None:
            self._pending_since = trio.current_time()
            self._commit_kick.set()

    # -- commit ------------------------------------------------------------------------------
    async def commit(self) -> None:
        """Group commit; see invariant 3. Raises `VolumeFailed`."""
        self.raise_if_failed()
        state, mark = self.state, self.flusher.mark
        if state.running or self.hooks.pending:
            number = state.running.number
            self._request_commit(number)
        else:
            number = state.running.number - 1
        await self.wait_stable(number)
        await self.flush(mark)

    async def wait_stable(self, number: int) -> None:
        """Return when the batch with this number is stable. Raises `VolumeFailed`."""
        while self.state.stable_number < number:
            self.raise_if_failed()
            await self._progress.wait()

    async def flush(self, mark: int | None = None) -> None:
        """`FlushBatcher.flush`, with `VolumeFailed` for a failure."""
        try:
            await self.flusher.flush(mark)
        except BlockError:
            self.raise_if_failed()
            raise

    def _request_commit(self, number: int) -> None:
        if self._commit_requested < number:
            self._commit_requested = number
            self._commit_kick.set()

    async def _commit_next(self) -> None:
        await self._wait_commit_due()
        self.raise_if_failed()
        await self.hooks.fill(self.state, self._scope, self._room_for_hooks)
        self.raise_if_failed()
        frozen = self.state.freeze()
        self._pending_since = None
        # Bodies that speak of data run only after their data was written: this flush covers it.
        await self.flusher.flush()
        self.raise_if_failed()
        if frozen.record is not None:
            address = self.state.place.ring_address(frozen.record.position)
            await write_extent(self._device, address, frozen.data, fua=True)
            self.raise_if_failed()
            self.commits += 1
        self._committed()

    def _committed(self) -> None:
        state = self.state
        batch = state.committed()
        self._last_commit = trio.current_time()
        for callback in batch.callbacks:
            callback()
        if state.running or self.hooks.pending:
            self.note_pending()
        if state.ring.used_blocks * 2 > state.ring.blocks:
            self._request_checkpoint()
        elif self._checkpoint_idle:
            self._checkpoint_kick.set()
        self._step()

    async def _wait_commit_due(self) -> None:
        while self.failure is None and self._commit_requested < self.state.running.number:
            deadline = math.inf
            if self._pending_since is not None:
                deadline = self._pending_since + self._times.commit_interval_s
            self._commit_kick = trio.Event()
            with trio.move_on_at(deadline) as scope:
                await self._commit_kick.wait()
            if scope.cancelled_caught:
                return

    async def _room_for_hooks(self) -> bool:
        """May hooks add to the running set? Waits for a checkpoint if only that is in the way."""
        while not self.state.running and self.state.room(0, 0) is Room.CHECKPOINT:
            self.raise_if_failed()
            self._request_checkpoint()
            await self._progress.wait()
        return self.state.room(0, 0) is Room.YES

    # -- checkpoint --------------------------------------------------------------------------
    async def checkpoint(self) -> None:
        """Everything merged is stable at home, and the tail beyond it. Raises `VolumeFailed`."""
        await self.commit()
        number = self._request_checkpoint()
        while self._checkpoint_done < number:
            self.raise_if_failed()
            await self._progress.wait()

    def _request_checkpoint(self) -> int:
        """Ask for a checkpoint that begins after now; its number."""
        if self._checkpoint_wanted <= self._checkpoint_started:
            self._checkpoint_wanted = self._checkpoint_started + 1
            self._checkpoint_kick.set()
        return self._checkpoint_wanted

    async def _checkpoint_next(self) -> None:
        await self._wait_checkpoint_due()
        self.raise_if_failed()
        self._checkpoint_started += 1
        await self._checkpointer.checkpoint()
        self._checkpoint_done = self._checkpoint_started
        self.checkpoints += 1
        self._step()

    async def _wait_checkpoint_due(self) -> None:
        while self.failure is None and self._checkpoint_wanted <= self._checkpoint_started:
            idle_at = self._idle_at()
            if idle_at <= trio.current_time():
                return
            self._checkpoint_idle = idle_at == math.inf
            self._checkpoint_kick = trio.Event()
            with trio.move_on_at(idle_at):
                await self._checkpoint_kick.wait()

    def _idle_at(self) -> float:
        """When to checkpoint though nobody asks."""
        state = self.state
        if state.committing is not None or (
            not state.unhomed and state.tail_sequence == state.ring.next_sequence
        ):
            return math.inf
        return self._last_commit + self._times.idle_checkpoint_s

    async def settle(self) -> None:
        """Wait for home writes on their way: then freed blocks, whose free is stable, are free."""
        self.raise_if_failed()
        await self._checkpointer.settle()
        self.raise_if_failed()

    # -- giving up a lock ----------------------------------------------------------------------
    async def flush_owned(self, resource: Hashable) -> None:
        """Whatever a lock covers is stable at home, and replay will not touch it any more.

        The caller lets nobody change these blocks meanwhile. Raises `VolumeFailed`.
        """
        state = self.state
        mark = self.flusher.mark
        if state.in_memory(resource):
            await self.commit()
        await self.flush(mark)
        await self._put_to_rest(lambda: state.journaled(resource))

    async def put_to_rest(self, addresses: Collection[int]) -> None:
        """As `flush_owned`, for some blocks whose last change is stable, and which nobody changes
        any more."""
        await self._put_to_rest(lambda: self.state.live(addresses))

    async def _put_to_rest(self, journaled: Callable[[], set[int]]) -> None:
        if not journaled():
            return
        try:
            with trio.CancelScope(shield=True):
                await self._checkpointer.bring_home(journaled())
                # A checkpoint may have picked the same images before they were known to be home,
                # and be writing them a second time: that must not land after the lock is gone, nor
                # be written again then because the target has forgotten it.
                await self.flusher.flush(await self._checkpointer.settle())
                await self._checkpointer.move_tail()
        except BlockError as error:
            self._fail(error)
            self.raise_if_failed()
        left = journaled()
        assert not left & self.state.unhomed.keys(), f"{left} are given up while they are changed"
        await self._revoke(left)

    async def _revoke(self, addresses: set[int]) -> None:
        """The tail could not pass these blocks' records: tell replay to leave them out."""
        waiting = iter(sorted(addresses))
        while chunk := list(islice(waiting, MAX_TX_FREES)):
            if not self.has_room(0):
                await self.wait_room(0)
            self.raise_if_failed()
            self.state.revoke_homed(chunk)
            await self.commit()

    # -- the end -------------------------------------------------------------------------------
    async def close(self) -> None:
        """Everything home, the journal empty: a mount after this replays nothing."""
        while not self.state.idle or self.hooks.pending:
            await self.checkpoint()

    def check(self) -> None:
        """Assert the invariants of the journal's state."""
        self.state.check()
        self.flusher.check()
        assert self._checkpoint_done <= self._checkpoint_started
        assert MAX_TX_BLOCKS + self.state.hook_images < self.state.record_limit
