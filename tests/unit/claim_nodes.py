"""A simulated LUN with a volume, and hosts that claim it: for the tests of claim and release."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from csvfs import format as fmt
from csvfs.format import SlotState, Superblock
from csvfs.membership.claim import (
    Claim,
    claim_volume,
    release_volume,
)
from csvfs.membership.decision import Host
from csvfs.membership.fixed_area import read_view
from csvfs.membership.seat import JournalTask
from csvfs.mkfs import FormatOptions, make_filesystem
from redirector.block.device import (
    BlockDevice,
    InitiatorPort,
)
from redirector.block.keys import PathKey, newcomer_key
from redirector.block.simulated import SimulatedLun

SIZE = 64 << 20
ALPHA = Host("alpha", b"A" * 16, b"1" * 16, "iqn.2026-11.test:alpha", ("192.0.2.1:7",), b"cert")
BETA = Host("beta", b"B" * 16, b"2" * 16, "iqn.2026-11.test:beta", ("192.0.2.2:7",))


def copy_of(lun: SimulatedLun) -> SimulatedLun:
    """The same LUN, as yet untouched by anybody's session."""
    return lun.crashed(keep=lambda _: True, reservations=True, record=True)


async def formatted(*, slots: int = 4, parked: bool = False, seed: int = 5) -> SimulatedLun:
    lun = SimulatedLun(SIZE, seed=seed)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 1)) as device:
        key = newcomer_key(Random(seed)) if parked else 0
        if parked:
            await device.register(key)
            await device.reserve(key)
        options = FormatOptions(label="v", slots=slots, holder_key=key)
        await make_filesystem(device, options, now_ns=1, rng=Random(seed))
    return lun


@dataclass
class Node:
    """A host's daemon, and what its claims did."""

    host: Host = ALPHA
    rng: Random = field(default_factory=lambda: Random(1))
    lock_is_free: bool = True
    tasks: list[JournalTask] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    async def claim(self, lun: SimulatedLun) -> Claim:
        async def prepare(device: BlockDevice, superblock: Superblock, task: JournalTask) -> None:
            del superblock
            # Fenced before replayed: nobody else is registered, and nothing is on its way.
            assert {PathKey.parse(key) is not None for key in lun.arbiter.registrations.values()}
            assert len(set(lun.arbiter.registrations.values())) == 2
            assert not lun.parked
            await device.write(fmt.byte_offset(fmt.JOURNAL_AREA), bytes(4096), fua=True)
            self.tasks.append(task)

        return await claim_volume(
            lun,
            self.host,
            prepare=prepare,
            take_lock=lambda _volume_id: self.lock_is_free,
            now_ns=lambda: 7,
            rng=self.rng,
            on_wait=self.waits.append,
        )


async def release(claim: Claim) -> None:
    await release_volume(claim, now_ns=lambda: 8)


def registered(lun: SimulatedLun) -> list[int]:
    return sorted(lun.arbiter.registrations.values())


def holder(lun: SimulatedLun) -> int:
    return lun.arbiter.read_reservation().key


async def view_of(lun: SimulatedLun, claim: Claim | None = None) -> fmt.View:
    """What the LUN's medium says."""
    copy = SimulatedLun(SIZE, blocks=lun.blocks)
    device = await copy.login(InitiatorPort("iqn.2026-11.test:look", 9))
    superblock = Superblock.decode(await device.read(0, 4096))
    view = await read_view(device, superblock.volume_id)
    if claim is not None:
        assert view == claim.view
    return view


async def assert_taken(lun: SimulatedLun, claim: Claim) -> None:
    claim.check()
    assert holder(lun) == claim.control.key
    assert registered(lun) == sorted([claim.data.key, claim.control.key])
    view = await view_of(lun, claim)
    entry = view.slots[claim.slot]
    assert entry.state == SlotState.ACTIVE
    assert entry.incarnation == claim.incarnation
    assert entry.flags == fmt.ViewSlotFlag.JOURNAL_USED
    address = claim.superblock.geometry.slot_block(claim.slot)
    block, _ = fmt.SlotBlock.decode(
        lun.blocks[address], address, claim.superblock.volume_id, claim.slot
    )
    assert block.identity.incarnation == claim.incarnation
    assert block.identity.machine_id == claim.host.machine_id
    ports = {
        (session.key, InitiatorPort(session.initiator_name, session.isid))
        for session in block.sessions
    }
    assert ports == {(path.key, path.device.port) for path in (claim.data, claim.control)}
    assert len(lun.sessions) == 2
