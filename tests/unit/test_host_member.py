"""The end of a member's volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio

from csvfs.errors import Damaged, VolumeFailed
from csvfs.host.member import ClusterMember, serving_volume
from csvfs.membership.slot_start import begin_slot
from csvfs.volume import Volume
from lockmgr.cluster.view import NodeId
from lockmgr.manager import LockManager, open_lock_manager
from redirector.block.simulated import SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, formatted

ME = NodeId(0, 1)


@dataclass
class Membership:
    """What is asked of the cluster."""

    me: NodeId = ME


@dataclass
class FailingNode:
    """A node whose volume fails in the moment in which it is being left."""

    locks: LockManager
    start: Any
    failure: VolumeFailed | None = None

    async def wait_serving(self) -> tuple[LockManager, Any]:
        return self.locks, self.start

    def fail(self, failure: VolumeFailed) -> None:
        self.failure = self.failure or failure

    async def recover_for_ever(
        self, volume: Volume, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            volume.store.journal._fail(Damaged("a home write failed"))


async def test_who_fails_while_it_leaves_does_not_leave_in_order() -> None:
    """Its journal is not empty: a clean leave would free the slot, and nobody would replay."""
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun)
    device = await lun.login(PORT)
    start = await begin_slot(device, superblock, 0, 1)

    async def live() -> None:
        async with open_lock_manager() as locks:
            node, cluster = FailingNode(locks, start), Membership()
            member = ClusterMember(cast("Any", node), cast("Any", cluster), cast("Any", device))
            async with serving_volume(member, superblock) as volume:
                await volume.mkdir(1, b"d", 0o755, 0, 0)

    with pytest.RaisesGroup(VolumeFailed):
        await live()
