"""A volume of a LUN, from its URL to a `Volume` that answers, and back to a LUN that is left.

    lock file, claim (journals replayed meanwhile), path, lock manager, volume, recovery
    ... the caller serves ...
    volume closed, locks given up, journal empty, path flushed and detached, claim released

Leaving the block leaves the volume cleanly. Leaving it with an exception, or after the volume has
failed, stops as a crash would: sessions dropped, nothing released; the next mount here recovers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from csvfs.errors import VolumeFailed
from csvfs.format import Superblock
from csvfs.host import mountpoint, places
from csvfs.host.daemon_lock import DaemonLock, daemon_lives
from csvfs.host.events import Reporter
from csvfs.host.problems import Kind, Problem
from csvfs.host.record import MountState, records
from csvfs.host.settings import MountSettings
from csvfs.journal.store import JournalStart
from csvfs.membership.claim import Claim, ClaimRefused, claim_volume, release_volume
from csvfs.membership.decision import Host
from csvfs.membership.membership import ClaimMembership
from csvfs.membership.refusals import RefuseMountedHere
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.volume import Volume, open_volume
from lockmgr.manager import open_lock_manager
from redirector.block.device import BlockDevice
from redirector.block.url import open_lun
from redirector.path import DirectPath

_log = logging.getLogger("csvfs.host.attach")

_LEAVING_POLL_S = 0.1


class Attached:
    """A volume that this host has taken and may serve."""

    def __init__(self, claim: Claim, path: DirectPath, volume: Volume) -> None:
        self.claim = claim
        self.path = path
        self.volume = volume
        self.volume_id = claim.superblock.volume_id
        self.label = claim.superblock.label
        self._failure: VolumeFailed | None = None
        self._failed = trio.Event()

    def note_failed(self, failure: VolumeFailed) -> None:
        """The volume cannot go on."""
        self._failure = self._failure or failure
        self._failed.set()

    async def wait_failed(self) -> VolumeFailed:
        """Wait until it cannot."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def status(self) -> dict[str, Any]:
        """What `csvctl status` tells of the volume."""
        claim, identity, path = self.claim, self.path.identity, self.path.status()
        return {
            "path": "direct" if path.healthy else f"waiting: {path.trouble}",
            "path_losses": path.recoveries,
            "unflushed_bytes": path.retained_bytes,
            "slot": claim.slot,
            "incarnation": claim.incarnation,
            "epoch": claim.view.epoch,
            "key": f"{path.control_key:#018x}",
            "initiator": claim.host.initiator_name,
            "lun_vendor": f"{identity.vendor} {identity.product}".strip(),
            "lun_serial": identity.serial,
            "lun_bytes": identity.size_bytes,
        }


@asynccontextmanager
async def attach(
    settings: MountSettings, reporter: Reporter, starting: trio.CancelScope
) -> AsyncIterator[Attached]:
    """Take the volume, have it ready, and leave it at the end; see the module's text.

    Cancelling ``starting`` ends the wait for the LUN or for other hosts. Raises what stands in
    the way: errors of claim, replay and LUN, or `Problem`.
    """
    with DaemonLock() as lock:
        journals = _Journals(reporter)
        with starting:
            claim = await _claim(settings, reporter, lock, journals)
        if starting.cancelled_caught:
            raise Problem(Kind.INTERRUPTED, "stopped by a signal before it was mounted")
        if claim.superblock_trouble:
            reporter.warning(
                f"the superblock is damaged ({claim.superblock_trouble}); its backup was used. "
                "Run `csvctl check --repair` when the volume is not mounted"
            )
            _log.warning("superblock: %s; the backup is used", claim.superblock_trouble)
        path = DirectPath(claim.lun, claim.control, claim.data, ClaimMembership(claim))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(path.run)
                async with _volume(claim, path, journals, reporter) as attached:
                    yield attached
                    if attached.volume.failure is not None:
                        raise attached.volume.failure
                claim.control, claim.data = await path.detach()
        except BaseException:
            path.abort()
            raise
        await release_volume(claim)


@asynccontextmanager
async def _volume(
    claim: Claim, path: DirectPath, journals: _Journals, reporter: Reporter
) -> AsyncIterator[Attached]:
    made: list[Attached] = []

    def note(failure: VolumeFailed) -> None:
        for each in made:
            each.note_failed(failure)

    async with (
        open_lock_manager(node=claim.slot, epoch=claim.view.epoch) as locks,
        open_volume(
            path,
            claim.superblock,
            claim.slot,
            claim.incarnation,
            journals.own_start(),
            locks,
            on_failed=note,
        ) as volume,
        trio.open_nursery() as nursery,
    ):
        attached = Attached(claim, path, volume)
        made.append(attached)
        for slot in journals.replayed:
            reporter.step(f"finishing what slot {slot} left undone")
            await volume.recover(slot)
        nursery.start_soon(_watch_path, path, attached)
        yield attached
        nursery.cancel_scope.cancel()


async def _watch_path(path: DirectPath, attached: Attached) -> None:
    """An idle volume learns of its eviction at once, not with the next guest's write."""
    evicted = await path.wait_evicted()
    attached.note_failed(VolumeFailed(str(evicted)))


class _Journals:
    """What `claim_volume` has done with each journal, and with the own one."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._own: JournalStart | None = None
        self.replayed: list[int] = []
        """Slots whose orphans and reclaim lists are to be looked at."""

    async def prepare(self, device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
        if task.used:
            self._reporter.step(f"replaying the journal of slot {task.slot}")
            report = await replay_slot(device, superblock, task.slot, task.incarnation)
            start = report.start
            if task.slot not in self.replayed:  # a claim may begin again
                self.replayed.append(task.slot)
        else:
            start = await begin_slot(device, superblock, task.slot, task.incarnation)
        if task.own:
            self._own = start

    def own_start(self) -> JournalStart:
        assert self._own is not None, "a claim prepares the journal of its own slot"
        return self._own


async def _claim(
    settings: MountSettings, reporter: Reporter, lock: DaemonLock, journals: _Journals
) -> Claim:
    """Claim; waits for a daemon of this host that is just leaving the volume."""
    lun = open_lun(settings.url, settings.credentials)
    host = Host(settings.node, places.machine_id(), places.boot_id(), settings.initiator)
    wanted: list[bytes] = []

    def take_lock(volume_id: bytes) -> bool:
        wanted.append(volume_id)
        return lock.take(volume_id)

    while True:
        reporter.step(f"connecting to {settings.url}")
        try:
            return await claim_volume(
                lun,
                host,
                prepare=journals.prepare,
                take_lock=take_lock,
                on_wait=lambda reason: reporter.step(f"waiting: {reason}"),
            )
        except ClaimRefused as error:
            if not isinstance(error.refusal, RefuseMountedHere) or not wanted:
                raise
        await _wait_while_leaving(wanted[-1], reporter)


async def _wait_while_leaving(volume_id: bytes, reporter: Reporter) -> None:
    """Return when the daemon that holds the lock has left. Raises `Problem` if it stays."""
    while daemon_lives(volume_id):
        record = next((r for r in records() if r.volume_id == volume_id.hex()), None)
        if record is None:
            raise Problem(Kind.MOUNTED_TWICE, "another daemon of this host has the volume")
        # umount(8) returns before the daemon has noticed: then the directory tells.
        gone = record.state is MountState.LEAVING or mountpoint.find(record.directory) is None
        if not gone:
            raise Problem(
                Kind.MOUNTED_TWICE,
                f"{record.label} is mounted on this host already, at {record.directory} "
                f"(pid {record.pid})",
            )
        reporter.step(f"waiting: the daemon of {record.directory} is leaving the volume")
        await trio.sleep(_LEAVING_POLL_S)
