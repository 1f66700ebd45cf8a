"""The metadata of a mounted volume: cache, journal and device under one roof.

    value = await store.transact(body)      change blocks, atomically
    value = await store.run(body)           only read them
    await store.commit()                    everything merged so far is stable

A body is a synchronous function of a `Transaction` (or a `BlockReader`); see
`csvfs.journal.transaction` for what it may do. It may be run several times before it succeeds once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Hashable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from csvfs.errors import VolumeFailed
from csvfs.journal.cache import DEFAULT_CLEAN_BYTES, BlockCache, ResourceOf
from csvfs.journal.commit_hooks import PreCommit
from csvfs.journal.journal import Journal, JournalTimes
from csvfs.journal.record import JournalPlace, Ring
from csvfs.journal.state import JournalState
from csvfs.journal.transaction import (
    MAX_TX_BLOCKS,
    BlockReader,
    Holds,
    LockHolder,
    LockSource,
    NeedBlocks,
    NeedLock,
    Transaction,
    TransactionScope,
)
from redirector.block.device import BlockIO

T = TypeVar("T")

PATIENT_ROUNDS: Final = 8
"""A body that was sent for blocks more often than this loses no more of them to eviction."""


@dataclass(frozen=True, slots=True)
class JournalStart:
    """Where an empty journal goes on: what replay found, or what initialising it wrote."""

    next_sequence: int
    header_version: int
    ring_position: int = 0
    greatest_version: int = 0
    """Greatest version seen on any block so far."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What may be chosen at mount time."""

    clean_cache_bytes: int = DEFAULT_CLEAN_BYTES
    times: JournalTimes = field(default_factory=JournalTimes)


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Counts of blocks by stage (a block may be in several), and what was done so far."""

    cached: int
    running: int
    committing: int
    unhomed: int
    ring: int
    """Blocks of the journal's ring, and how many of them are in use."""
    ring_used: int
    commits: int
    checkpoints: int
    flushes: int
    loads: int


class Store:
    """Made by `open_store`. All methods may be called by many tasks at once."""

    def __init__(
        self,
        device: BlockIO,
        cache: BlockCache,
        journal: Journal,
        scope: TransactionScope,
        locks: LockSource | None,
    ) -> None:
        self.device = device
        self.cache = cache
        self.journal = journal
        self._scope = scope
        self._locks = locks
        self._closed = False

    # -- bodies ----------------------------------------------------------------------------
    async def transact(
        self,
        body: Callable[[Transaction], T],
        *,
        bound: int = MAX_TX_BLOCKS,
        privileged: bool = False,
    ) -> T:
        """Run ``body`` until it has all it needs, merge what it changed, return its value.

        On return the changes are visible to everyone on this node, and stable after `commit` (or
        within 5 s). ``bound``: images that it may hold, at most `MAX_TX_BLOCKS`. Raises what the
        body raises (then nothing was changed), `BadBlock` and `BlockError` for a block that
        cannot be read, `VolumeFailed`.
        """
        assert not self._closed, "the store is closed"
        journal, scope = self.journal, self._scope
        if journal.failure is not None:
            journal.raise_if_failed()
        holder = None if self._locks is None else LockHolder(self._locks)
        rounds = 0
        try:
            with ExitStack() as stack:
                while True:
                    if not journal.has_room(bound):
                        await journal.wait_room(bound)
                    journal.raise_if_failed()
                    tx = Transaction(scope, bound=bound, privileged=privileged, locks=holder)
                    try:
                        value = body(tx)
                        break
                    except NeedBlocks as need:
                        wanted = need.wanted
                    except NeedLock as need:
                        assert holder is not None
                        await holder.wait(need.resource, need.mode)
                        continue
                    rounds += 1
                    if rounds == PATIENT_ROUNDS:
                        stack.enter_context(self.cache.eviction_off())
                    await self.cache.load(wanted)
            self._merge(tx)
            return value
        finally:
            if holder is not None:
                holder.release()

    def _merge(self, tx: Transaction) -> None:
        holds = self._scope.holds
        if holds is not None:
            for address in tx.freed:
                key = self.cache.key_of(address)
                assert key is None or holds(key.kind, key.owner, key.flags), (
                    f"block {address} of {key.owner} is freed without its lock"
                )
        self.journal.merge(tx)
        for callback in tx.merge_callbacks:
            callback()

    async def run(self, body: Callable[[BlockReader], T]) -> T:
        """Run a body that only reads. Raises as `transact` does."""
        rounds = 0
        with ExitStack() as stack:
            while True:
                self.journal.raise_if_failed()
                try:
                    return body(self.cache)
                except NeedBlocks as need:
                    wanted = need.wanted
                rounds += 1
                if rounds == PATIENT_ROUNDS:
                    stack.enter_context(self.cache.eviction_off())
                await self.cache.load(wanted)

    # -- durability ------------------------------------------------------------------------
    async def commit(self) -> None:
        """All transactions merged so far, and all data written so far, are stable on return.

        Group commit: those who call it meanwhile share one flush and one record. Raises
        `VolumeFailed`: what is stable then is for replay to say.
        """
        await self.journal.commit()

    async def flush(self) -> None:
        """All data written so far (see `note_write`) is stable on return; transactions are not."""
        await self.journal.flush()

    async def wait_stable(self) -> None:
        """As `commit`, for transactions only, and without hurrying the commit."""
        state = self.journal.state
        await self.journal.wait_stable(state.running.number - (not state.running))

    def note_write(self) -> None:
        """A data write without FUA was answered by the device. Every writer of data says so,
        before it runs a body that speaks of that data."""
        self.journal.flusher.note_write()

    def note_pending(self) -> None:
        """A commit hook has something to add: commit within the usual interval."""
        self.journal.note_pending()

    def add_hook(self, hook: PreCommit) -> None:
        """Let ``hook`` add to every record just before it is frozen."""
        self.journal.hooks.add(hook)

    async def checkpoint(self) -> None:
        """All transactions merged so far are stable at home, and the journal's tail beyond."""
        await self.journal.checkpoint()

    async def settle(self) -> None:
        """Wait for home writes on their way.

        A block whose free was stable before the call may become anything else after it.
        """
        await self.journal.settle()

    async def put_to_rest(self, addresses: Collection[int]) -> None:
        """Blocks that were changed for the last time, stably, are at home, and replay of this
        node's journal touches them no more. `forget_block` follows when they are given away."""
        await self.journal.put_to_rest(addresses)

    def forget_block(self, address: int) -> None:
        """A block that was put to rest is nobody's any more."""
        assert address not in self.journal.state.unhomed, f"block {address} is given away unhomed"
        self.cache.forget(address)

    # -- locks -----------------------------------------------------------------------------
    async def flush_owned(self, resource: Hashable) -> None:
        """Before a lock is lowered from EX: its blocks are stable at home, and replay of this
        node's journal touches them no more. Nobody may change them meanwhile."""
        await self.journal.flush_owned(resource)

    def drop_owned(self, resource: Hashable) -> None:
        """After a lock was given up: forget its blocks. `flush_owned` came first."""
        self.cache.drop(resource)

    # -- the end ---------------------------------------------------------------------------
    @property
    def failure(self) -> VolumeFailed | None:
        """Why nothing is written any more, if so."""
        return self.journal.failure

    async def wait_failed(self) -> None:
        """Return only by raising `VolumeFailed`, once nothing is written any more."""
        await self.journal.wait_failed()

    def statistics(self) -> StoreStatistics:
        """What the store holds now, for people and tests."""
        journal, state = self.journal, self.journal.state
        return StoreStatistics(
            cached=len(self.cache),
            running=len(state.running.images),
            committing=len(state.committing.batch.images) if state.committing else 0,
            unhomed=len(state.unhomed),
            ring=state.ring.blocks,
            ring_used=state.ring.used_blocks,
            commits=journal.commits,
            checkpoints=journal.checkpoints,
            flushes=journal.flusher.flushes,
            loads=self.cache.loads,
        )

    async def close(self) -> None:
        """Leave an empty journal. No transaction may run meanwhile or after. Raises
        `VolumeFailed`."""
        if not self._closed:
            await self.journal.close()
            self._closed = True

    def check(self) -> None:
        """Assert the invariants of cache and journal."""
        self.cache.check()
        self.journal.check()


def _nothing(_failure: VolumeFailed) -> None:
    return None


@asynccontextmanager
async def open_store(
    device: BlockIO,
    place: JournalPlace,
    incarnation: int,
    start: JournalStart,
    *,
    resource_of: ResourceOf,
    locks: LockSource | None = None,
    holds: Holds | None = None,
    options: StoreOptions | None = None,
    on_failed: Callable[[VolumeFailed], None] = _nothing,
) -> AsyncIterator[Store]:
    """A store whose journal is empty (`csvfs.journal.replay` comes first), and its tasks.

    Leaving the block without an exception closes the store, unless it has failed; with an
    exception it just stops, as a crash would. ``on_failed`` is called once, when the LUN can no
    longer be written; it must not raise.
    """
    options = options or StoreOptions()
    cache = BlockCache(device, place.volume_id, resource_of, clean_bytes=options.clean_cache_bytes)
    cache.greatest_version = start.greatest_version
    ring = Ring(place.ring_blocks, start.next_sequence, start.ring_position)
    scope = TransactionScope(cache, place.volume_id, holds)
    journal = Journal(
        device,
        JournalState(place, incarnation, ring, cache),
        scope,
        header_version=start.header_version,
        times=options.times,
        on_failed=on_failed,
    )
    store = Store(device, cache, journal, scope, locks)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.run)
            yield store
            if store.failure is None:
                await store.close()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # That there is a nursery inside is nobody's business: one error comes out as itself.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__
