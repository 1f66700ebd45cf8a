"""Check a volume that nobody has mounted: take it, check, mend, leave it.

Taking it is a claim like a mount's, so nobody else can write meanwhile, and what an unclean end of
this host left in its journals is replayed first: that is recovery, no damage. A journal that cannot
be replayed is damage. Without repair the claim then stops where it is, and nothing is lost; with
repair the journal is given up for an empty one, as its finding says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from csvfs.check import Damage, Finding, Report, check_volume
from csvfs.format import BadBlock, Superblock
from csvfs.host import places
from csvfs.host.daemon_lock import DaemonLock
from csvfs.host.record import records
from csvfs.journal.replay import JournalDamaged, initialise_journal
from csvfs.membership.claim import Claim, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot, journal_place, replay_slot
from redirector.block.device import BlockDevice, Lun

_log = logging.getLogger("csvfs.check")

Say = Callable[[str], None]


class _JournalLost(Exception):
    """A journal that cannot be replayed, and may not be given up."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


async def check_offline(
    lun: Lun, url: str, *, repair: bool, progress: Say = lambda _: None, warn: Say = lambda _: None
) -> Report:
    """Check the volume on ``lun``, and with ``repair`` mend it.

    ``url`` finds the name under which this host had it mounted. Raises what keeps the volume from
    being taken or left: `ClaimRefused`, `ClaimFailed`, `LeaveIncomplete`, `NoVolume`, `NoView`,
    `LoginFailed`, `BlockError`.
    """
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
            )
        except _JournalLost as lost:
            return Report(findings=[lost.finding], left=[lost.finding])
        if claim.superblock_trouble:
            warn(f"{claim.superblock_trouble}; the backup superblock is used")
        report = await _check(claim, repair=repair, progress=progress)
        await release_volume(claim)
    report.findings = [*journals.given_up, *report.findings]
    report.totals.replayed_records += journals.replayed_records
    return report


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
            finding = Finding(Damage.JOURNAL, f"journal of slot {task.slot}", str(error))
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
