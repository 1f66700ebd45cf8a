"""A slot's journal, and its orphan and reclaim lists, in order before a node goes on with them.

A slot that was never active has none of them: they are written here, each complete in itself, and
nothing points at them before the view says that the journal is used. Any other journal is replayed,
the own one of an unclean end included. Both are idempotent: a crash in between costs nothing.
"""

from __future__ import annotations

import logging

from csvfs.btree.tree import TreeRoot
from csvfs.format import Geometry, Superblock, byte_offset, new_block, seal
from csvfs.journal.record import JournalPlace
from csvfs.journal.replay import ReplayReport, initialise_journal, replay
from csvfs.journal.store import JournalStart
from redirector.block.device import BlockIO

_log = logging.getLogger("csvfs.journal.replay")

_FIRST_VERSION = 1


def journal_place(superblock: Superblock, slot: int) -> JournalPlace:
    """Where a slot's journal lies."""
    geometry = superblock.geometry
    return JournalPlace(superblock.volume_id, slot, geometry.journal(slot), geometry.journal_blocks)


async def begin_slot(
    device: BlockIO, superblock: Superblock, slot: int, incarnation: int
) -> JournalStart:
    """Write what a slot's first node finds: empty lists, an empty journal. Stable on return."""
    for root in _lists(superblock.geometry, slot):
        block = new_block(root.block_type, root.address, root.owner, superblock.volume_id)
        root.initialise(block)
        seal(block, _FIRST_VERSION)
        await device.write(byte_offset(root.address), block, fua=True)
    place = journal_place(superblock, slot)
    return await initialise_journal(device, place, incarnation)


async def replay_slot(
    device: BlockIO, superblock: Superblock, slot: int, incarnation: int
) -> ReplayReport:
    """Replay a slot's journal, and say in the log what that did. Raises as `replay` does."""
    report = await replay(device, journal_place(superblock, slot), incarnation)
    if report.records:
        _log.info(
            "slot %d: replayed %d journal records, %d blocks written, %d were home already",
            slot,
            report.records,
            report.written,
            report.skipped,
        )
    return report


def _lists(geometry: Geometry, slot: int) -> tuple[TreeRoot, TreeRoot]:
    return (
        TreeRoot.of_orphans(geometry.orphan_root(slot), slot),
        TreeRoot.of_reclaim(geometry.reclaim_root(slot), slot),
    )
