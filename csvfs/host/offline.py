"""Check a volume that nobody has mounted: take it, check, mend, leave it.

Taking it is a claim like a mount's, so nobody else can write meanwhile, and what an unclean end of
this host left in its journals is replayed first: that is recovery, no damage. A journal that cannot
be replayed is damage. Without repair the claim then stops where it is, and nothing is lost; with
repair the journal is given up for an empty one, as its finding says.

Where both copies of the view or of the superblock are destroyed, only a repair may take the volume
(`csvfs.membership.view_rebuild`, `superblock_rebuild`). A check then writes nothing, and its one
finding says what is wrong and whether a repair would mend it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from random import SystemRandom
from secrets import token_bytes

from csvfs.check import Damage, Finding, Report, check_volume
from csvfs.format import SECRET_BYTES, BadBlock, Superblock
from csvfs.host import places
from csvfs.host.daemon_lock import DaemonLock
from csvfs.host.record import records
from csvfs.journal.replay import JournalDamaged, initialise_journal
from csvfs.membership.claim import Claim, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.fixed_area import SuperblocksDestroyed
from csvfs.membership.newcomer import open_newcomer
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot, journal_place, replay_slot
from csvfs.membership.superblock_rebuild import CannotRebuild
from csvfs.membership.view_rebuild import Rebuild, ViewsDestroyed
from redirector.block.device import BlockDevice, Lun

_log = logging.getLogger("csvfs.check")

Say = Callable[[str], None]


class _JournalLost(Exception):
    """A journal that cannot be replayed, and may not be given up."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


async def check_offline(
    lun: Lun,
    url: str,
    *,
    repair: bool,
    preempt_keys: frozenset[int] = frozenset(),
    progress: Say = lambda _: None,
    warn: Say = lambda _: None,
) -> Report:
    """Check the volume on ``lun``, and with ``repair`` mend it.

    ``url`` finds the name under which this host had it mounted. ``preempt_keys``: of owners that
    are gone for good, where no view can tell. Raises what keeps the volume from being taken or
    left: `ClaimRefused`, `ClaimFailed`, `LeaveIncomplete`, `NoVolume`, `LoginFailed`, `BlockError`.
    """
    rebuild = Rebuild(time.time_ns(), token_bytes(SECRET_BYTES), preempt_keys) if repair else None
    journals = _Journals(repair=repair)
    host = Host(_node_name(url), places.machine_id(), places.boot_id(), places.initiator_name())
    with DaemonLock() as lock:
        try:
            claim = await claim_volume(
                lun,
                host,
                prepare=journals.prepare,
                take_lock=lock.take,
                on_wait=lambda reason: progress(f"waiting: {reason}"),
                rebuild=rebuild,
            )
        except _JournalLost as lost:
            return _stopped(lost.finding)
        except ViewsDestroyed as error:
            return _stopped(Finding(Damage.VIEW, "view", str(error), while_taken=error.rebuildable))
        except SuperblocksDestroyed as error:
            return _stopped(await _superblocks_finding(lun, host, error))
        if claim.superblock_trouble:
            warn(f"{claim.superblock_trouble}; the backup superblock is used")
        report = await _check(claim, repair=repair, progress=progress)
        await release_volume(claim)
    report.findings = [*_rebuilt(claim), *journals.given_up, *report.findings]
    report.totals.replayed_records += journals.replayed_records
    return report


def _stopped(finding: Finding) -> Report:
    return Report(findings=[finding], left=[finding], complete=False)


def _rebuilt(claim: Claim) -> list[Finding]:
    """What the claim itself has mended."""
    found = []
    if claim.superblock_rebuilt:
        found.append(_superblocks(claim.superblock_rebuilt, repairable=True))
    if claim.view_rebuilt:
        found.append(Finding(Damage.VIEW, "view", claim.view_rebuilt, while_taken=True))
    return found


def _superblocks(detail: str, *, repairable: bool) -> Finding:
    return Finding(Damage.SUPERBLOCKS, "superblocks", detail, while_taken=repairable)


async def _superblocks_finding(lun: Lun, host: Host, error: SuperblocksDestroyed) -> Finding:
    """Whether a repair could derive them; only read. Raises what keeps the LUN from being read."""
    if isinstance(error, CannotRebuild):
        return _superblocks(str(error), repairable=False)
    try:
        newcomer = await open_newcomer(lun, host.initiator_name, SystemRandom(), derive=True)
    except CannotRebuild as impossible:
        return _superblocks(str(impossible), repairable=False)
    async with newcomer:
        return _superblocks(f"{error}; {newcomer.superblock_rebuilt}", repairable=True)


async def _check(claim: Claim, *, repair: bool, progress: Say) -> Report:
    try:
        return await check_volume(
            claim.data.device,
            claim.superblock,
            repair=repair,
            now_ns=time.time_ns(),
            own_view=claim.view,
            progress=progress,
        )
    except BaseException:
        claim.abort()
        raise


class _Journals:
    """Brings journals in order for the claim, as far as it may."""

    def __init__(self, *, repair: bool) -> None:
        self._repair = repair
        self.given_up: list[Finding] = []
        self.replayed_records = 0

    async def prepare(self, device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
        if not task.used:
            await begin_slot(device, superblock, task.slot, task.incarnation)
            return
        try:
            report = await replay_slot(device, superblock, task.slot, task.incarnation)
            self.replayed_records += report.records
        except (BadBlock, JournalDamaged) as error:
            finding = Finding(
                Damage.JOURNAL, f"journal of slot {task.slot}", str(error), while_taken=True
            )
            if not self._repair:
                raise _JournalLost(finding) from error
            # A sequence that the lost journal cannot have reached (as `csvfs.check.fixed`).
            await initialise_journal(
                device,
                journal_place(superblock, task.slot),
                task.incarnation,
                first_sequence=time.time_ns() >> 20,
            )
            self.given_up.append(finding)


def _node_name(url: str) -> str:
    """Under which name this host had the volume; its incarnation is recovered under no other."""
    return next((each.node for each in records() if each.url == url), places.node_name())
