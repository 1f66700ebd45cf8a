"""Hosts whose claims may rebuild, and ways to destroy what they need: for the tests of that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from csvfs import format as fmt
from csvfs.format import Superblock
from csvfs.membership.claim import Claim, ClaimRefused, claim_volume
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.membership.view_rebuild import Rebuild
from redirector.block.device import BlockDevice
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_nodes import (
    ALPHA,
    BETA,
    Node,
    formatted,
    holder,
    registered,
    release,
)

NOW_NS = 1_800_000_000 << 30
SECRET = b"R" * 32


@dataclass
class Mender(Node):
    """A host whose claims really bring journals in order, and may rebuild."""

    preempt_keys: frozenset[int] = frozenset()

    async def claim(self, lun: SimulatedLun, *, rebuild: bool = True) -> Claim:
        async def prepare(device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
            self.tasks.append(task)
            step = replay_slot if task.used else begin_slot
            await step(device, superblock, task.slot, task.incarnation)

        return await claim_volume(
            lun,
            self.host,
            prepare=prepare,
            take_lock=lambda _volume_id: self.lock_is_free,
            now_ns=lambda: 7,
            rng=self.rng,
            on_wait=self.waits.append,
            rebuild=Rebuild(NOW_NS, SECRET, self.preempt_keys) if rebuild else None,
        )


def alpha(seed: int = 1, **fields: object) -> Mender:
    return replace(Mender(ALPHA, Random(seed)), **fields)  # type: ignore[arg-type]


def beta(seed: int = 2, **fields: object) -> Mender:
    return replace(Mender(BETA, Random(seed)), **fields)  # type: ignore[arg-type]


async def used(*nodes: Mender) -> SimulatedLun:
    """A volume that these hosts had, one after the other, and left."""
    lun = await formatted()
    for node in nodes:
        await release(await node.claim(lun, rebuild=False))
    return lun


def tear_views(lun: SimulatedLun) -> None:
    for address in fmt.VIEW_ADDRESSES:
        lun.blocks[address + 3] = b"\xee" * 4096


def wipe(lun: SimulatedLun, first: int, last: int) -> None:
    """Zeroes, as of ``dd if=/dev/zero``."""
    for address in range(first, last):
        lun.blocks[address] = bytes(4096)


async def assert_refused(lun: SimulatedLun, node: Mender) -> ClaimRefused:
    """Refused, and neither the LUN nor anybody's registration was touched."""
    writes, keys, held = lun.journal.writes, registered(lun), holder(lun)
    with pytest.raises(ClaimRefused) as caught:
        await node.claim(lun)
    assert lun.journal.writes == writes
    assert (registered(lun), holder(lun)) == (keys, held)
    return caught.value
