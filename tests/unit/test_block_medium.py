"""The images that crashes leave: against a naive model, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from redirector.block.arbiter import Op
from redirector.block.device import InitiatorPort, OutcomeUnknown, Unreachable
from redirector.block.medium import (
    BLOCK_BYTES,
    Blocks,
    Journal,
    Written,
    discard,
    keep_all,
    keep_by,
    keep_none,
    keep_only,
    load_into,
    store,
)
from redirector.block.simulated import SimulatedLun

SECTOR = 512
SECTORS = 32


def read_all(blocks: Blocks) -> bytes:
    buffer = bytearray(SECTORS * SECTOR)
    load_into(blocks, 0, memoryview(buffer))
    return bytes(buffer)


# -- content ---------------------------------------------------------------------------------------
ranges = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, SECTORS)).map(
    lambda pair: (pair[0], min(pair[1], SECTORS - pair[0]))
)


@given(st.lists(st.tuples(st.booleans(), ranges, st.integers(1, 255)), max_size=30))
def test_store_and_discard_are_what_a_bytearray_does(
    course: list[tuple[bool, tuple[int, int], int]],
) -> None:
    blocks: Blocks = {}
    model = bytearray(SECTORS * SECTOR)
    for writes, (first, count), value in course:
        at, length = first * SECTOR, count * SECTOR
        data = bytes([value]) * length if writes else bytes(length)
        if writes:
            store(blocks, at, data)
        else:
            discard(blocks, at, length)
        model[at : at + length] = data
    assert read_all(blocks) == model


def test_discard_of_everything_costs_what_is_there() -> None:
    blocks: Blocks = {5: bytes(BLOCK_BYTES), 1 << 40: bytes(BLOCK_BYTES)}
    discard(blocks, 0, 1 << 60)
    assert blocks == {}


# -- crashes ---------------------------------------------------------------------------------------
@dataclass
class Model:
    """Per sector: the values that a crash may leave there."""

    versions: list[list[tuple[int, int]]] = field(
        default_factory=lambda: [[(-1, 0)] for _ in range(SECTORS)]
    )
    stable: set[int] = field(default_factory=lambda: {-1})
    answered_at: dict[int, int] = field(default_factory=dict)

    def possible(self, sector: int) -> set[int]:
        versions = self.versions[sector]
        last = max(n for n, (index, _) in enumerate(versions) if index in self.stable)
        return {value for _, value in versions[last:]}


events = st.lists(
    st.one_of(
        st.tuples(st.just("write"), ranges, st.booleans()),
        st.tuples(st.just("answer"), st.integers(0, 5), st.none()),
        st.tuples(st.just("begin"), st.none(), st.none()),
        st.tuples(st.just("end"), st.integers(0, 3), st.none()),
    ),
    max_size=40,
)


@given(events, st.integers(0, 1 << 30))
@settings(max_examples=200)
def test_every_image_is_possible_and_keeps_what_is_stable(
    course: list[tuple[str, object, object]], seed: int
) -> None:
    journal = Journal({}, record=True)
    model = Model()
    rng = Random(seed)
    open_writes: list[tuple[int, bool]] = []
    open_flushes: list[tuple[int, int]] = []
    cuts: list[tuple[int, list[set[int]]]] = []
    for kind, first, second in course:
        if kind == "write":
            assert isinstance(first, tuple)
            at, count = first
            value = journal.writes % 250 + 1
            data = bytes([value]) * (count * SECTOR)
            index = journal.written(at * SECTOR, len(data), data, bool(second))
            for sector in range(at, at + count):
                model.versions[sector].append((index, value))
            open_writes.append((index, bool(second)))
        elif kind == "answer" and open_writes:
            assert isinstance(first, int)
            index, fua = open_writes.pop(first % len(open_writes))
            model.answered_at[index] = journal.position
            if fua:
                model.stable.add(index)
            journal.answered(index)
        elif kind == "begin":
            open_flushes.append((journal.flush_begun(), journal.position - 1))
        elif kind == "end" and open_flushes:
            assert isinstance(first, int)
            number, began = open_flushes.pop(first % len(open_flushes))
            journal.flush_ended(number)
            model.stable |= {i for i, at in model.answered_at.items() if at < began}
        cuts.append((journal.position, [model.possible(sector) for sector in range(SECTORS)]))
    rng.shuffle(cuts)  # the cursor goes back and forth
    for position, possible in cuts:
        for keep in (keep_all, keep_none, keep_by(rng), keep_by(rng)):
            blocks, _ = journal.image_at(position, keep)
            image = read_all(blocks)
            for sector in range(SECTORS):
                piece = image[sector * SECTOR : (sector + 1) * SECTOR]
                assert piece == piece[:1] * SECTOR
                assert piece[0] in possible[sector]


def test_random_images_show_every_outcome() -> None:
    journal = Journal({}, record=True)
    for value in (1, 2, 3):
        journal.written(0, 4096, bytes([value]) * 4096, False)
    rng = Random(4)
    first_sectors, torn = set(), 0
    for _ in range(300):
        image = journal.image_at(journal.position, keep_by(rng))[0].get(0, bytes(4096))
        first_sectors.add(image[0])
        torn += image != image[:1] * 4096
    assert first_sectors == {0, 1, 2, 3}
    assert torn > 20


def test_keep_only() -> None:
    journal = Journal({}, record=True)
    for value in (1, 2):
        journal.written(0, 512, bytes([value]) * 512, False)
    blocks, _ = journal.image_at(journal.position, keep_only({0}))
    assert blocks[0][:1] == b"\x01"
    assert [written.index for written in journal.unstable_at(journal.position)] == [0, 1]
    assert isinstance(journal.events[0], Written)


def test_positions_of_writes() -> None:
    journal = Journal({}, record=True)
    for index in range(3):
        journal.written(0, 512, bytes(512), False)
        journal.answered(index)
    assert [journal.position_after(n) for n in range(4)] == [0, 1, 3, 5]
    assert [journal.writes_before(position) for position in range(7)] == [0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="position"):
        journal.image_at(7, keep_all)
    unrecorded = Journal({}, record=False)
    unrecorded.written(0, 512, bytes(512), False)
    with pytest.raises(RuntimeError, match="record"):
        unrecorded.position_after(1)


# -- a LUN that is cut off -------------------------------------------------------------------------
PORT = InitiatorPort("iqn.2026-11.test:a", 1)


async def test_crash_after_writes() -> None:
    lun = SimulatedLun(1 << 20, record=True)
    device = await lun.login(PORT)
    await device.register(7)
    await device.reserve(7)
    lun.crash_after_writes(3)
    for number in range(2):
        await device.write(number * 4096, b"x" * 4096, fua=True)
    for number in (2, 3):
        with pytest.raises(OutcomeUnknown):
            await device.write(number * 4096, b"x" * 4096, fua=True)
    assert lun.journal.writes == 3
    with pytest.raises(Unreachable):
        await lun.login(PORT)
    assert set(lun.crashed(keep=keep_none).blocks) == {0, 1}
    assert set(lun.crashed(keep=keep_all).blocks) == {0, 1, 2}
    heir = lun.crashed(keep=keep_all, reservations=True)
    assert heir.identity == lun.identity
    assert heir.arbiter.read_reservation().key == 7
    assert lun.crashed(keep=keep_all).arbiter.read_keys().keys == ()
    fresh = await heir.login(PORT)
    assert (await fresh.read_keys()).keys == (7,)


async def test_images_do_not_share_what_is_written_to_them() -> None:
    lun = SimulatedLun(1 << 20, record=True)
    device = await lun.login(PORT)
    await device.write(0, b"a" * 4096)
    await device.flush()
    first, second = lun.crashed(), lun.crashed()
    writer = await first.login(PORT)
    await writer.write(0, b"b" * 4096)
    assert second.blocks[0] == b"a" * 4096
    assert lun.blocks[0] == b"a" * 4096
    assert lun.crashed(0).blocks == {}


async def test_power_loss_of_a_target_that_goes_on() -> None:
    lun = SimulatedLun(1 << 20)
    device = await lun.login(PORT)
    await device.write(0, b"a" * 4096)
    await device.flush()
    await device.write(0, b"b" * 4096)
    await device.write(4096, b"c" * 4096, fua=True)
    lun.restart(power_lost=True, keep=keep_none)
    with pytest.raises(OutcomeUnknown):
        await device.read(0, 4096)
    device = await lun.login(PORT)
    assert await device.read(0, 8192) == b"a" * 4096 + b"c" * 4096


async def test_a_flush_does_not_cover_what_is_answered_while_it_runs() -> None:
    lun = SimulatedLun(1 << 20, record=True)
    device = await lun.login(PORT)
    hold = lun.hold(lambda command: command.op is Op.SYNCHRONIZE_CACHE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.flush)
        await hold.wait_held()
        await device.write(0, b"w" * 4096)
        hold.lift()
    assert lun.crashed(keep=keep_none).blocks == {}


async def test_space_and_medium() -> None:
    lun = SimulatedLun(1 << 20)
    lun.medium_errors = [range(600, 700), range(9000, 9001)]
    device = await lun.login(PORT)
    await device.read(1024, 512)
    await device.write(512, bytes(512))
    assert lun.medium_errors == [range(9000, 9001)]
