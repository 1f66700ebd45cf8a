# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""A claim that may rebuild: both copies of the view are destroyed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs.format import SlotState
from csvfs.membership.claim import Claim, ClaimRefused
from csvfs.membership.decision import SILENCE_S, Host
from csvfs.membership.predecessors import succeed
from csvfs.membership.refusals import RefuseMountedHere, RefuseOther, RefuseUnexplained
from csvfs.membership.seat import JournalTask
from csvfs.membership.view_rebuild import (
    LEAP,
    ViewsDestroyed,
)
from redirector.block.device import BlockError, InitiatorPort
from redirector.block.keys import PathKey, newcomer_key
from redirector.block.reservations import Registration
from redirector.block.simulated import SimulatedLun
from tests.unit.claim_menders import (
    NOW_NS,
    SECRET,
    Mender,
    alpha,
    assert_refused,
    beta,
    tear_views,
    used,
    wipe,
)
from tests.unit.claim_nodes import (
    ALPHA,
    BETA,
    SIZE,
    assert_taken,
    copy_of,
    formatted,
    holder,
    registered,
    release,
    view_of,
)


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


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        (replace(ALPHA, node_name="a"), True),
        (replace(ALPHA, boot_id=b"9" * 16), True),
        (replace(ALPHA, node_name="a", boot_id=b"9" * 16), False),
        (replace(ALPHA, machine_id=b"C" * 16), False),
    ],
)
async def test_which_key_is_ours(host: Host, ours: bool, autojump_clock: MockClock) -> None:
    """One machine and name, or one machine and boot: ids of machines are copied with images."""
    lun = await used(alpha())
    tear_views(lun)
    if ours:
        claim = await alpha(2, host=host).claim(lun)
        assert (claim.slot, claim.incarnation) == (0, 2)
        claim.abort()
    else:
        await assert_refused(lun, alpha(2, host=host))


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
    block = fmt.encode_view(view, volume_id)
    for at in range(16):
        lun.blocks[fmt.view_address(view.epoch) + at] = bytes(block[at * 4096 : at * 4096 + 4096])
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
