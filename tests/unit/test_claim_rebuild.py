# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""A claim that may rebuild: both copies of the view, or of the superblock, are destroyed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import SlotState, Superblock
from csvfs.membership.claim import Claim, ClaimRefused, claim_volume
from csvfs.membership.decision import SILENCE_S
from csvfs.membership.fixed_area import SuperblocksDestroyed
from csvfs.membership.predecessors import succeed
from csvfs.membership.refusals import RefuseMountedHere, RefuseOther, RefuseUnexplained
from csvfs.membership.seat import JournalTask
from csvfs.membership.slot_start import begin_slot, replay_slot
from csvfs.membership.superblock_rebuild import LABEL, CannotRebuild
from csvfs.membership.view_rebuild import LEAP, Rebuild, ViewsDestroyed
from csvfs.mkfs import FormatOptions, make_filesystem
from redirector.block.device import BlockDevice, BlockError, InitiatorPort
from redirector.block.keys import PathKey, newcomer_key
from redirector.block.reservations import Registration
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_nodes import (
    ALPHA,
    BETA,
    SIZE,
    Node,
    assert_taken,
    copy_of,
    formatted,
    holder,
    registered,
    release,
    view_of,
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


# -- the view ------------------------------------------------------------------------------------
async def test_without_repair_nothing_is_written(autojump_clock: MockClock) -> None:
    lun = await used(alpha())
    tear_views(lun)
    writes, keys = lun.journal.writes, registered(lun)
    with pytest.raises(ViewsDestroyed, match="csvctl check --repair") as caught:
        await alpha(2).claim(lun, rebuild=False)
    assert caught.value.rebuildable
    assert (lun.journal.writes, registered(lun)) == (writes, keys)


async def test_a_view_that_this_host_left_is_rebuilt(autojump_clock: MockClock) -> None:
    lun = await used(alpha(), alpha(2))
    before = await view_of(lun)
    tear_views(lun)
    node = alpha(3)
    started = trio.current_time()
    claim = await node.claim(lun)
    assert SILENCE_S <= trio.current_time() - started < SILENCE_S + 1
    await assert_taken(lun, claim)
    assert "block 16" in claim.view_rebuilt
    # Its own slot, under the next incarnation, with the journal replayed.
    assert (claim.slot, claim.incarnation) == (0, 3)
    assert node.tasks == [JournalTask(0, 3, used=True, own=True)]
    assert claim.view.epoch > max(before.epoch, NOW_NS >> 20)
    assert claim.view.secret == SECRET
    await release(claim)
    assert (await view_of(lun)).members == ()
    claim = await alpha(4).claim(lun, rebuild=False)
    assert claim.incarnation == 4
    claim.abort()


async def test_a_volume_that_was_never_used(autojump_clock: MockClock) -> None:
    lun = await formatted()
    tear_views(lun)
    node = alpha()
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert [task.used for task in node.tasks] == [False]
    # A slot block of zeroes may have been wiped: its incarnations do not begin again.
    assert {entry.incarnation for entry in claim.view.slots[1:]} == {LEAP}
    assert claim.incarnation == LEAP + 1
    claim.abort()


async def test_own_dead_is_recovered(autojump_clock: MockClock) -> None:
    lun = await used(alpha())
    (await alpha(2).claim(lun, rebuild=False)).abort()
    tear_views(lun)
    claim = await alpha(3).claim(lun)
    await assert_taken(lun, claim)
    assert (claim.slot, claim.incarnation) == (0, 3)
    claim.abort()


async def test_a_daemon_of_this_host_that_lives_is_not_succeeded(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await alpha().claim(lun, rebuild=False)
    tear_views(lun)
    refused = await assert_refused(lun, alpha(2, lock_is_free=False))
    assert isinstance(refused.refusal, RefuseMountedHere)
    await claim.data.device.write(SIZE // 2, bytes(4096))
    claim.abort()


@pytest.mark.parametrize("alive", [True, False])
async def test_another_hosts_key_is_refused_and_named(
    alive: bool, autojump_clock: MockClock
) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    if not alive:
        await release(theirs)  # the parked key looks the same: only the view could tell
    tear_views(lun)
    refused = await assert_refused(lun, alpha())
    assert isinstance(refused.refusal, RefuseUnexplained)
    assert f"{theirs.control.key:#018x}" in str(refused)
    assert "beta (192.0.2.2:7)" in str(refused)
    if alive:
        await theirs.data.device.write(SIZE // 2, bytes(4096))
        theirs.abort()


async def test_a_live_host_that_leaves_writes_a_view_again(autojump_clock: MockClock) -> None:
    """What the refusal tells the administrator to do."""
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    tear_views(lun)
    await release(theirs)
    claim = await alpha().claim(lun, rebuild=False)
    await assert_taken(lun, claim)
    claim.abort()


async def test_a_key_whose_slot_block_is_gone_is_refused_even_if_it_was_ours(
    autojump_clock: MockClock,
) -> None:
    lun = await used(alpha())
    wipe(lun, fmt.VIEW_ADDRESSES[0], fmt.JOURNAL_AREA)
    key = holder(lun)
    refused = await assert_refused(lun, alpha(2))
    assert f"{key:#018x}" in str(refused)
    assert "no slot block names" in str(refused)
    node = alpha(3, preempt_keys=frozenset({key}))
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert JournalTask(0, LEAP + 1, used=True, own=False) in node.tasks
    claim.abort()


async def test_a_key_that_the_administrator_names_is_removed(autojump_clock: MockClock) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    keys = frozenset({theirs.data.key, theirs.control.key})
    tear_views(lun)
    await assert_refused(lun, alpha(preempt_keys=frozenset({theirs.data.key})))
    node = alpha(2, preempt_keys=keys)
    claim = await node.claim(lun)
    await assert_taken(lun, claim)
    assert claim.slot == 1
    assert node.tasks[0] == JournalTask(0, theirs.incarnation, used=True, own=False)
    with pytest.raises(BlockError):
        await theirs.data.device.write(SIZE // 2, bytes(4096))
    assert not claim.view.lists(theirs.slot, theirs.incarnation)


async def test_named_keys_count_only_where_no_view_can_tell(autojump_clock: MockClock) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    keys = frozenset({theirs.data.key, theirs.control.key})
    refused = await assert_refused(lun, alpha(preempt_keys=keys))
    assert isinstance(refused.refusal, RefuseOther)
    theirs.abort()


@pytest.mark.parametrize("comes_back_after_s", [0.5, 4.9])
async def test_a_host_that_comes_back_within_the_silence_is_found(
    comes_back_after_s: float, autojump_clock: MockClock
) -> None:
    """The target restarted: nobody is registered, and beta's virtual machines wait."""
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    tear_views(lun)
    lun.restart()
    key = PathKey(theirs.slot, theirs.incarnation, 7).pack()

    async def come_back() -> None:
        await trio.sleep(comes_back_after_s)
        device = await lun.login(InitiatorPort(BETA.initiator_name, 99))
        await device.register(key)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        with pytest.raises(ClaimRefused, match="beta") as caught:
            await alpha().claim(lun)
    assert isinstance(caught.value.refusal, RefuseUnexplained)
    assert (registered(lun), holder(lun)) == ([key], 0)


async def test_a_host_that_comes_back_later_is_not_listed(autojump_clock: MockClock) -> None:
    """Not even where every trace of it was wiped: no number comes again."""
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    journal = theirs.superblock.geometry.journal(0)
    wipe(lun, fmt.VIEW_ADDRESSES[0], journal + 3)
    lun.restart()
    claim = await alpha().claim(lun)
    assert claim.slot == theirs.slot
    assert not claim.view.lists(theirs.slot, theirs.incarnation)
    assert claim.incarnation > LEAP
    claim.abort()


async def test_a_host_that_comes_back_in_the_last_moment_is_found_before_the_fence(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    tear_views(lun)
    lun.restart()
    key = PathKey(theirs.slot, theirs.incarnation, 7).pack()
    device = await lun.login(InitiatorPort(BETA.initiator_name, 99))

    async def come_back_meanwhile(registration: Registration, victim_key: int) -> None:
        await succeed(registration, victim_key)
        await device.register(key)

    monkeypatch.setattr("csvfs.membership.claim.succeed", come_back_meanwhile)
    with pytest.raises(ClaimRefused, match="beta"):
        await alpha().claim(lun)
    assert (registered(lun), holder(lun)) == ([key], 0)


async def test_of_two_repairs_one_wins(autojump_clock: MockClock) -> None:
    lun = await formatted()
    tear_views(lun)
    won: list[Claim] = []
    lost: list[ClaimRefused] = []

    async def repair(node: Mender) -> None:
        try:
            won.append(await node.claim(lun))
        except ClaimRefused as error:
            lost.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(repair, alpha())
        nursery.start_soon(repair, beta())
    assert (len(won), len(lost)) == (1, 1)
    await assert_taken(lun, won[0])
    won[0].abort()


async def test_a_parked_newcomers_key_is_nobodys(autojump_clock: MockClock) -> None:
    """A volume that was formatted, elsewhere, and never mounted."""
    lun = await formatted(parked=True)
    tear_views(lun)
    claim = await beta().claim(lun)
    await assert_taken(lun, claim)
    claim.abort()


async def test_views_of_another_volume_are_not_replaced(autojump_clock: MockClock) -> None:
    lun, other = await formatted(), await formatted(seed=9)
    for address in fmt.VIEW_ADDRESSES:
        for block in range(address, address + 16):
            lun.blocks[block] = other.blocks[block]
    writes = lun.journal.writes
    with pytest.raises(ViewsDestroyed, match="two volumes") as caught:
        await alpha().claim(lun)
    assert not caught.value.rebuildable
    assert lun.journal.writes == writes


async def test_two_rebuilds_never_give_a_number_twice(autojump_clock: MockClock) -> None:
    lun = await used(alpha(), beta())
    seen: set[tuple[int, int]] = set()
    epochs: list[int] = []
    for seed in range(3, 7):
        tear_views(lun)
        lun.restart()
        claim = await (alpha if seed % 2 else beta)(seed).claim(lun)
        assert (claim.slot, claim.incarnation) not in seen
        seen.add((claim.slot, claim.incarnation))
        epochs.append(claim.view.epoch)
        claim.abort()
    assert epochs == sorted(epochs)
    assert len(set(epochs)) == len(epochs)


async def test_a_torn_copy_still_says_its_epoch(autojump_clock: MockClock) -> None:
    lun = await formatted()
    claim = await alpha().claim(lun, rebuild=False)
    geometry, volume_id = claim.superblock.geometry, claim.superblock.volume_id
    view = replace(claim.view, epoch=(NOW_NS >> 20) + 1000)
    block = view.encode(volume_id)
    for at in range(16):
        lun.blocks[view.address + at] = bytes(block[at * 4096 : at * 4096 + 4096])
    tear_views(lun)
    claim.abort()
    claim = await alpha(2).claim(lun)
    assert claim.view.epoch > view.epoch
    assert geometry == claim.superblock.geometry
    claim.abort()


async def test_a_repair_that_is_cut_off_anywhere_is_repeated(autojump_clock: MockClock) -> None:
    start = await used(beta(), alpha())
    tear_views(start)
    whole = copy_of(start)
    (await alpha(3).claim(whole)).abort()
    writes = whole.journal.writes
    assert writes == 4
    for cut in range(writes + 1):
        lun = copy_of(start)
        await _claim_until(lun, alpha(3), cut)
        again = copy_of(lun)
        node = alpha(4)
        claim = await node.claim(again)
        await assert_taken(again, claim)
        view = await view_of(again, claim)
        assert {n for n, slot in enumerate(view.slots) if slot.state != SlotState.FREE} == {
            claim.slot
        }
        claim.abort()


async def _claim_until(lun: SimulatedLun, node: Mender, writes: int) -> None:
    """Let a claim run until it has made so many writes; then its host dies."""
    with trio.CancelScope() as life:
        done = trio.Event()

        async def watch() -> None:
            while lun.journal.writes < writes and not done.is_set():
                await trio.lowlevel.checkpoint()
            life.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            claim = await node.claim(lun)
            done.set()
            claim.abort()


# -- the superblock --------------------------------------------------------------------------------
@asynccontextmanager
async def rebuilt(lun: SimulatedLun, node: Mender) -> AsyncIterator[Claim]:
    claim = await node.claim(lun)
    try:
        yield claim
    finally:
        claim.abort()


def lose_superblocks(lun: SimulatedLun, size: int = SIZE) -> Superblock:
    old = Superblock.decode(lun.blocks[0])
    for address in (0, size // 4096 - 16):
        lun.blocks[address] = b"\xee" * 4096
    return old


@pytest.mark.parametrize(
    ("size", "slots", "journal_bytes"),
    [(SIZE, 4, None), (64 << 20, 1, 3 << 20), (5 << 30, 16, None), (5 << 30, 7, 100 << 20)],
)
async def test_a_superblock_is_derived(
    size: int, slots: int, journal_bytes: int | None, autojump_clock: MockClock
) -> None:
    lun = SimulatedLun(size, yields=False)
    options = FormatOptions(label="v", slots=slots, journal_bytes=journal_bytes)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 1)) as device:
        await make_filesystem(device, options, now_ns=77, rng=Random(5))
    old = lose_superblocks(lun, size)
    with pytest.raises(SuperblocksDestroyed):
        await alpha().claim(lun, rebuild=False)
    async with rebuilt(lun, alpha()) as claim:
        assert claim.superblock == replace(old, label=LABEL)
        for words in ("label", "UNMAP", "copy"):
            assert words in claim.superblock_rebuilt
        # It lies in memory only: who has the claim writes it.
        assert lun.blocks[0] == b"\xee" * 4096


async def test_what_cannot_be_derived_promises_least(autojump_clock: MockClock) -> None:
    lun = await formatted()
    old = Superblock.decode(lun.blocks[0])
    best = replace(
        old, probe=fmt.ProbeFlag.PROBED | fmt.ProbeFlag.UNMAP_WORKS, write_cache=fmt.WriteCache(1)
    )
    lun.blocks[0] = bytes(best.encode(0))
    lose_superblocks(lun)
    async with rebuilt(lun, alpha()) as claim:
        assert not claim.superblock.unmap_allowed
        assert claim.superblock.write_cache is fmt.WriteCache.VOLATILE


async def test_the_device_id_is_that_of_the_lun_it_lies_on(autojump_clock: MockClock) -> None:
    lun = await formatted()
    lose_superblocks(lun)
    copy = SimulatedLun(SIZE, seed=6, blocks=dict(lun.blocks))
    async with rebuilt(copy, alpha()) as claim:
        device_id = claim.data.device.identity.device_id
        assert claim.superblock.device_id == device_id
        assert device_id.hex() in claim.superblock_rebuilt


async def test_others_are_respected_under_a_derived_superblock(autojump_clock: MockClock) -> None:
    lun = await formatted()
    theirs = await beta().claim(lun, rebuild=False)
    lose_superblocks(lun)
    refused = await assert_refused(lun, alpha())
    assert isinstance(refused.refusal, RefuseOther)
    await release(theirs)
    async with rebuilt(lun, alpha()) as claim:
        claim.check()
        assert registered(lun) == sorted([claim.data.key, claim.control.key])


def no_views(lun: SimulatedLun, old: Superblock) -> None:
    tear_views(lun)


def no_groups(lun: SimulatedLun, old: Superblock) -> None:
    lun.blocks[old.geometry.group_header(0)] = b"\xee" * 4096


def root_of_another(lun: SimulatedLun, old: Superblock) -> None:
    block = bytearray(lun.blocks[fmt.ROOT_INODE])
    block[fmt.VOLUME_ID_OFFSET] ^= 1
    fmt.seal(block, 5)
    lun.blocks[fmt.ROOT_INODE] = bytes(block)


def view_of_another(lun: SimulatedLun, old: Superblock) -> None:
    view = fmt.View.empty(4, 8, SECRET).encode(b"other volume    ")
    for at in range(16):
        lun.blocks[fmt.VIEW_ADDRESSES[0] + at] = bytes(view[at * 4096 : at * 4096 + 4096])


def forged_group(lun: SimulatedLun, old: Superblock) -> None:
    """As a guest can write it into its image, where journals one unit longer would end."""
    geometry = old.geometry
    false = fmt.Geometry.of_units(geometry.size_units, geometry.slots, geometry.journal_units + 1)
    header = fmt.GroupHeader.fresh(0, false.group_first_unit(0), false.group_units(0))
    lun.blocks[header.address] = bytes(header.encode(old.volume_id, 1))


def other_size(lun: SimulatedLun, old: Superblock) -> None:
    """The group ends elsewhere than the LUN: it was made larger or smaller."""
    geometry = old.geometry
    count = geometry.group_units(0) - 64
    header = fmt.GroupHeader.fresh(0, geometry.group_first_unit(0), count)
    lun.blocks[header.address] = bytes(header.encode(old.volume_id, 9))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_views, "number of slots"),
        (no_groups, "group headers"),
        (root_of_another, "root inode"),
        (view_of_another, "one view is of volume"),
        (forged_group, "forgery"),
        (other_size, "resized"),
    ],
)
async def test_ambiguous_evidence_is_refused(
    damage: Callable[[SimulatedLun, Superblock], None], reason: str, autojump_clock: MockClock
) -> None:
    lun = await formatted()
    old = lose_superblocks(lun)
    damage(lun, old)
    writes = lun.journal.writes
    with pytest.raises(CannotRebuild, match=reason):
        await alpha().claim(lun)
    assert lun.journal.writes == writes
    assert registered(lun) == []


async def test_half_of_the_groups_are_enough(autojump_clock: MockClock) -> None:
    lun = SimulatedLun(7 << 30, yields=False)
    async with await lun.login(InitiatorPort("iqn.2026-11.test:format", 1)) as device:
        await make_filesystem(device, FormatOptions(label="v", slots=64), now_ns=1, rng=Random(5))
    old = lose_superblocks(lun, 7 << 30)
    count = old.geometry.group_count
    assert count == 5
    for group in (0, 2):
        lun.blocks[old.geometry.group_header(group)] = b"\xee" * 4096
    async with rebuilt(lun, alpha()) as claim:
        assert claim.superblock.geometry == old.geometry
        assert "3 of 5 group headers" in claim.superblock_rebuilt
    lun.blocks[old.geometry.group_header(3)] = b"\xee" * 4096
    with pytest.raises(CannotRebuild, match="half of the group headers"):
        await alpha(2).claim(lun)
    lun.blocks[old.geometry.group_header(0)] = bytes(
        fmt.GroupHeader.fresh(
            0, old.geometry.group_first_unit(0), old.geometry.group_units(0)
        ).encode(old.volume_id, 3)
    )
    lun.blocks[old.geometry.group_header(4)] = b"\xee" * 4096
    with pytest.raises(CannotRebuild):
        await alpha(3).claim(lun)


async def test_a_stranger_keeps_even_a_repair_out(autojump_clock: MockClock) -> None:
    lun = await formatted()
    tear_views(lun)
    stranger = await lun.login(InitiatorPort("iqn.2026-11.test:pacemaker", 1))
    await stranger.register(0xABC)
    with pytest.raises(ClaimRefused, match="0x0000000000000abc"):
        await alpha(preempt_keys=frozenset({0xABC})).claim(lun)
    assert registered(lun) == [0xABC]


async def test_a_newcomer_that_holds_and_stays_silent_is_fenced(autojump_clock: MockClock) -> None:
    lun = await formatted()
    tear_views(lun)
    other = await lun.login(InitiatorPort("iqn.2026-11.test:other", 1))
    key = newcomer_key(Random(77))
    await other.register(key)
    await other.reserve(key)
    claim = await alpha().claim(lun)
    assert registered(lun) == sorted([claim.data.key, claim.control.key])
    claim.abort()
