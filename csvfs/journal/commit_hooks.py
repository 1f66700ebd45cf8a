"""What is added to a record just before it is frozen: the dirty times of inodes.

Times that change with every read or write are not worth a transaction each. Whoever keeps them in
memory is asked at each commit, and adds them to the running set, in room that every record holds
back for this (`JournalState.hook_images`): so a hook never waits for room that only the commit
which it is part of could make.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from csvfs.journal.state import JournalState
from csvfs.journal.transaction import BlockKey, NeedBlocks, Transaction, TransactionScope
from csvfs.ondisk.block import BadBlock
from redirector.block.device import BlockError, OutcomeUnknown


class PreCommit(Protocol):
    """Somebody who adds to each record just before it is frozen: dirty times of inodes."""

    @property
    def pending(self) -> bool:
        """Is there something to add?"""

    def fill(self, tx: Transaction) -> None:
        """Add what fits into ``tx.blocks_left``; the rest goes with the next commit.

        A transaction body like any other: no effect but through ``tx``; no locks, no frees.
        """

    def unreadable(self, key: BlockKey, error: Exception) -> None:
        """A block that `fill` needs cannot be read: it must not ask for it again."""


class CommitHooks:
    """All hooks of one journal."""

    def __init__(self) -> None:
        self._hooks: list[PreCommit] = []

    def add(self, hook: PreCommit) -> None:
        """Ask ``hook`` from now on."""
        self._hooks.append(hook)

    @property
    def pending(self) -> bool:
        """Has any hook something to add?"""
        return any(hook.pending for hook in self._hooks)

    async def fill(
        self,
        state: JournalState,
        scope: TransactionScope,
        room: Callable[[], Awaitable[bool]],
    ) -> None:
        """Let the hooks add to the running set what fits; the rest waits for the next commit.

        ``room`` answers, after waiting if need be, whether `JournalState.hook_images` more fit.
        """
        for hook in self._hooks:
            if hook.pending:
                with state.cache.eviction_off():
                    await self._fill(hook, state, scope, room)

    async def _fill(
        self,
        hook: PreCommit,
        state: JournalState,
        scope: TransactionScope,
        room: Callable[[], Awaitable[bool]],
    ) -> None:
        while await room():
            tx = Transaction(scope, bound=state.hook_images)
            try:
                hook.fill(tx)
            except NeedBlocks as need:
                await _load(hook, state, need.wanted)
                continue
            assert not tx.freed, "a commit hook frees nothing"
            state.merge(tx)
            for callback in tx.merge_callbacks:
                callback()
            return


async def _load(hook: PreCommit, state: JournalState, wanted: tuple[BlockKey, ...]) -> None:
    """Load for a hook. One unreadable inode must not stop the commits of all others."""
    try:
        await state.cache.load(wanted)
    except OutcomeUnknown:
        raise
    except (BadBlock, BlockError):
        for key in wanted:
            try:
                await state.cache.load((key,))
            except OutcomeUnknown:
                raise
            except (BadBlock, BlockError) as error:
                hook.unreadable(key, error)
