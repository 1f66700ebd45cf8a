"""Check a volume, and mend it.

`check_volume` needs the volume for itself: nobody else writes meanwhile. It reads everything that
is metadata, believes nothing, and names each kind of damage (`csvfs.check.finding`). With repair
it mends stage after stage, each time from what it then sees, until nothing is left to mend, and
writes the result at the end of each round. The phases, in order:

    fixed places    superblocks, views, slot blocks, journals (`fixed`)
    maps            what the allocation maps say (`space`)
    walk            every name from the root, every list of a slot; what they own (`walk`, `lists`)
    lost            inodes that the maps know and nobody names
    counts          links, entries, parents
    comparison      the maps against what is owned
"""

from __future__ import annotations

from collections.abc import Callable

from csvfs.check.claims import Claims
from csvfs.check.finding import Damage, Finding, Report, Stage, Totals
from csvfs.check.fixed import check_journals, check_slot_blocks, check_superblocks, check_views
from csvfs.check.image import VolumeImage
from csvfs.check.lists import walk_lists
from csvfs.check.lost import walk_lost
from csvfs.check.space import Space
from csvfs.check.walk import Visit, Walk
from csvfs.check.workbench import Workbench
from csvfs.format import ROOT_INODE, Superblock, View, ViewSlotFlag
from redirector.block.device import BlockDevice

__all__ = ["Damage", "Finding", "Report", "Stage", "Totals", "check_volume"]

MAX_ROUNDS = 12
"""Each stage is mended within one or two; more means that repairs do not hold."""

Progress = Callable[[str], None]


async def check_volume(
    device: BlockDevice,
    superblock: Superblock,
    *,
    repair: bool = False,
    now_ns: int,
    own_view: View | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Check, and with ``repair`` mend, the volume that ``superblock`` describes.

    ``own_view`` is given by a caller that is itself the volume's only member: the views are then
    its own and are left alone. Raises `BlockError` when the LUN fails; damage is never an
    exception.
    """
    report = Report()
    for _ in range(MAX_ROUNDS):
        checker = _Round(device, superblock, own_view, now_ns, progress, repair=repair)
        await checker.look()
        if not report.findings:
            report.findings, report.totals = checker.findings, checker.totals
        report.left = checker.findings
        if not repair or not checker.findings:
            break
        if not await checker.mend():
            break
        report.repaired_blocks += await checker.image.write_back()
    return report


class _Round:
    """One look at the volume, and the repairs that follow from it."""

    def __init__(
        self,
        device: BlockDevice,
        superblock: Superblock,
        own_view: View | None,
        now_ns: int,
        progress: Progress,
        *,
        repair: bool,
    ) -> None:
        self.device = device
        self.superblock = superblock
        self.geometry = superblock.geometry
        self.own_view = own_view
        self.now_ns = now_ns
        self.progress = progress
        self.repair = repair
        self.image = VolumeImage(device, superblock.volume_id)
        self.claims = Claims(self.geometry)
        self.bench = Workbench(self.image, self.geometry, self.claims, now_ns)
        self.findings: list[Finding] = []
        self.totals = Totals()

    async def look(self) -> None:
        """All phases."""
        found = self.findings.append
        self.progress("superblocks, views and journals")
        await check_superblocks(self.image, self.superblock, found)
        view = self.own_view or await check_views(
            self.image, self.device, self.superblock, self.now_ns, found
        )
        slots = await self._used_slots(view)
        self.progress("allocation maps")
        space = Space(self.image, self.geometry, found)
        await space.read()
        walk = Walk(self.image, self.geometry, self.claims, self.totals, found, space.state_of)
        self.progress("directories and files")
        await walk.run([Visit(ROOT_INODE, None)])
        self.progress("orphan and reclaim lists")
        await walk_lists(walk, slots)
        self.progress("files without a name")
        await walk_lost(walk, space.unclaimed_blocks(self.claims))
        self.progress("counts")
        walk.finish_names()
        self.totals.data_units = self.claims.data_units
        self.totals.metadata_blocks = self.claims.metadata_blocks
        self.progress("free space")
        space.compare(self.claims)

    async def _used_slots(self, view: View | None) -> list[int]:
        if view is None:
            return []
        used = {
            n: slot.incarnation
            for n, slot in enumerate(view.slots)
            if slot.flags & ViewSlotFlag.JOURNAL_USED
        }
        found = self.findings.append
        await check_slot_blocks(self.image, self.geometry, view, sorted(used), found)
        self.totals.replayed_records = await check_journals(
            self.image, self.device, self.geometry, used, found, repair=self.repair
        )
        return sorted(used)

    async def mend(self) -> bool:
        """Run the repairs of the lowest stage; False if there are none."""
        stage = min(finding.damage.stage for finding in self.findings)
        repairs = [
            finding.repair
            for finding in self.findings
            if finding.damage.stage == stage and finding.repair is not None
        ]
        for repair in repairs:
            await repair(self.bench)
        return bool(repairs)
