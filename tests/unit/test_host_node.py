"""A host's node between membership, locks, journals and volume: what it does when things fail."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import trio
import trio.testing

from csvfs.errors import Damaged
from csvfs.format import BLOCK_BYTES, BadBlock, Superblock
from csvfs.host.node import REPLAY_AGAIN_S, ClusterNode
from csvfs.membership.slot_start import begin_slot, journal_place
from csvfs.volume import Volume
from lockmgr.cluster.effects import ReplayWanted, ViewInstalled
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlot, ViewSlotFlag
from redirector.block.arbiter import Op
from redirector.block.simulated import Command, SimulatedLun
from redirector.data_path import DataPath
from tests.simulated_volume import LUN_BYTES, PORT, formatted

ME, OTHER, THIRD = NodeId(0, 1), NodeId(1, 1), NodeId(2, 1)
USED = ViewSlotFlag.JOURNAL_USED


@dataclass
class Membership:
    """What a node says to its cluster."""

    me: NodeId = ME
    said: list[NodeId] = field(default_factory=list)
    thawed: list[int] = field(default_factory=list)

    def replayed(self, node: NodeId) -> None:
        self.said.append(node)

    def locks_thawed(self, epoch: int) -> None:
        self.thawed.append(epoch)


def view(*states: SlotState, epoch: int = 1) -> View:
    """Slots in their first incarnation, in these states, all used."""
    slots = tuple(ViewSlot(1, state, flags=USED) for state in states)
    return View(epoch, 0, slots, lock_epoch=1)


ACTIVE, JOINING, FREE, NEEDS_REPLAY = (
    SlotState.ACTIVE,
    SlotState.JOINING,
    SlotState.FREE,
    SlotState.NEEDS_REPLAY,
)


@dataclass
class Played:
    lun: SimulatedLun
    superblock: Superblock
    node: ClusterNode
    cluster: Membership

    def installed(self, seen: View) -> None:
        self.node.on_effect(ViewInstalled(seen, ME))


@asynccontextmanager
async def a_node() -> AsyncIterator[Played]:
    """A node in slot 0, with journals in slots 0 and 1."""
    lun = SimulatedLun(LUN_BYTES)
    superblock = await formatted(lun, slots=3)
    device = await lun.login(PORT)
    for slot in (0, 1):
        await begin_slot(device, superblock, slot, 1)
    async with trio.open_nursery() as nursery:
        node, cluster = ClusterNode(nursery, superblock, lambda _words: None), Membership()
        node.use(cast("Any", None), cast("DataPath", device))
        node.begin(cast("Any", cluster))
        yield Played(lun, superblock, node, cluster)
        nursery.cancel_scope.cancel()


def damage(played: Played, slot: int) -> dict[int, bytes]:
    """Neither copy of a journal's header can be read; what was there."""
    address = journal_place(played.superblock, slot).address
    before = {address + n: bytes(played.lun.blocks[address + n]) for n in (0, 1)}
    for each in before:
        played.lun.blocks[each] = bytes(BLOCK_BYTES)
    return before


# -- journals that cannot be replayed ------------------------------------------------------------
async def test_a_journal_of_another_that_is_damaged_ends_nobody(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 -- waits cost nothing
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The node goes on, says what is wrong, once, and tries again; else each survivor in turn
    would replay it, and die of it."""
    async with a_node() as played:
        node, cluster = played.node, played.cluster
        node.on_effect(ReplayWanted(ME, True))
        played.installed(view(ACTIVE, NEEDS_REPLAY))
        before = damage(played, 1)
        with caplog.at_level(logging.ERROR):
            node.on_effect(ReplayWanted(OTHER, True))
            await trio.sleep(3.5 * REPLAY_AGAIN_S)
        assert cluster.said == [ME] and node.failure is None
        assert sum("cannot be replayed" in each.message for each in caplog.records) == 1
        played.lun.blocks.update(before)
        await trio.sleep(REPLAY_AGAIN_S)
        assert cluster.said == [ME, OTHER]


async def test_who_leaves_does_not_wait_for_a_journal_that_is_damaged(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 -- waits cost nothing
) -> None:
    async with a_node() as played:
        played.installed(view(ACTIVE, NEEDS_REPLAY))
        damage(played, 1)
        played.node.on_effect(ReplayWanted(OTHER, True))
        await trio.sleep(1)
        with trio.fail_after(1):
            await played.node.end_replays()
        assert not played.cluster.said


async def test_a_node_that_is_joining_says_what_is_in_its_way() -> None:
    with pytest.RaisesGroup(BadBlock):
        async with a_node() as played:
            played.installed(view(JOINING, NEEDS_REPLAY))
            damage(played, 1)
            played.node.on_effect(ReplayWanted(OTHER, True))
            await trio.sleep_forever()


# -- order ---------------------------------------------------------------------------------------
async def test_what_a_replay_wrote_is_flushed_before_anybody_is_told() -> None:
    async with a_node() as played:
        played.installed(view(ACTIVE, NEEDS_REPLAY))
        flush = played.lun.hold(lambda command: command.op is Op.SYNCHRONIZE_CACHE, limit=1)
        played.node.on_effect(ReplayWanted(OTHER, True))
        await flush.wait_held()
        await trio.testing.wait_all_tasks_blocked()
        early = list(played.cluster.said)
        flush.lift()
        await trio.testing.wait_all_tasks_blocked()
        assert not early and played.cluster.said == [OTHER]


async def test_who_leaves_ends_its_replays_and_begins_no_other() -> None:
    async with a_node() as played:
        node = played.node
        played.installed(view(ACTIVE, NEEDS_REPLAY))

        def reads_the_journal(command: Command) -> bool:
            place = journal_place(played.superblock, OTHER.slot)
            return command.op is Op.READ and command.offset_bytes == place.address * BLOCK_BYTES

        hold = played.lun.hold(reads_the_journal, limit=1)
        node.on_effect(ReplayWanted(OTHER, True))
        await hold.wait_held()
        left = trio.Event()

        async def leave() -> None:
            await node.end_replays()
            left.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
            await trio.testing.wait_all_tasks_blocked()
            early = left.is_set()
            hold.lift()
        assert not early and played.cluster.said == [OTHER]
        node.on_effect(ReplayWanted(THIRD, True))
        await trio.testing.wait_all_tasks_blocked()
        assert played.cluster.said == [OTHER], "the path may be gone by now"


# -- what others left undone -----------------------------------------------------------------------
@dataclass
class Lists:
    """A volume as far as its recovery is concerned."""

    damaged: frozenset[int] = frozenset()
    recovered: list[int] = field(default_factory=list)

    async def recover(self, slot: int) -> None:
        await trio.lowlevel.checkpoint()
        self.recovered.append(slot)
        if slot in self.damaged:
            raise Damaged(f"the orphan list of slot {slot} is damaged")


@asynccontextmanager
async def recovering(played: Played, lists: Lists) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(played.node.recover_for_ever, cast("Volume", lists))
        yield
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_the_lowest_looks_after_the_lists_of_who_left() -> None:
    """A node that leaves cleanly leaves orphans that others have open; one that dies after a
    replay, before it has seen to the lists, leaves those of two slots. No replay tells of them."""
    async with a_node() as played:
        lists = Lists()
        played.installed(view(ACTIVE, ACTIVE, FREE))
        async with recovering(played, lists):
            await trio.testing.wait_all_tasks_blocked()
            assert lists.recovered == [2], "free when this node came"
            played.installed(view(ACTIVE, FREE, FREE, epoch=2))
        assert lists.recovered == [2, 1], "each once"


async def test_the_others_leave_them_to_the_lowest() -> None:
    async with a_node() as played:
        lists = Lists()
        played.cluster.me = OTHER
        played.installed(view(ACTIVE, ACTIVE, FREE))
        async with recovering(played, lists):
            await trio.testing.wait_all_tasks_blocked()
            assert not lists.recovered
            gone = view(FREE, ACTIVE, FREE, epoch=2)
            played.node.on_effect(ViewInstalled(gone, OTHER))
        assert lists.recovered == [0, 2]


async def test_a_slot_that_was_never_used_has_no_lists() -> None:
    async with a_node() as played:
        lists = Lists()
        seen = view(ACTIVE, FREE, FREE)
        unused = replace(seen.slots[2], flags=ViewSlotFlag.NONE)
        played.installed(replace(seen, slots=(*seen.slots[:2], unused)))
        async with recovering(played, lists):
            pass
        assert lists.recovered == [1]


async def test_damaged_lists_of_another_end_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with a_node() as played:
        lists = Lists(damaged=frozenset({1}))
        played.installed(view(ACTIVE, NEEDS_REPLAY))
        with caplog.at_level(logging.ERROR):
            async with recovering(played, lists):
                played.node.on_effect(ReplayWanted(OTHER, True))
        assert lists.recovered == [1] and "stay as they are" in caplog.text


async def test_damaged_lists_of_its_own_end_the_mount() -> None:
    async with a_node() as played:
        lists = Lists(damaged=frozenset({0}))
        played.node.on_effect(ReplayWanted(ME, True))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.RaisesGroup(Damaged):
            async with recovering(played, lists):
                pass
