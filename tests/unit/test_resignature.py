# ruff: noqa: ARG001 (autojump_clock works by being asked for)
"""A copy of a LUN becomes a volume of its own, whenever power is lost, and nothing else does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from trio.testing import MockClock

from csvfs import format as fmt
from csvfs import resignature_sweep
from csvfs.check import check_volume
from csvfs.format import Superblock, UnitState
from csvfs.membership.claim import ClaimRefused
from csvfs.membership.fixed_area import read_superblock, read_view
from csvfs.membership.peek import peek
from csvfs.membership.refusals import (
    RefuseCopy,
    RefuseFeature,
    RefuseForeign,
    RefuseTooSmall,
    RefuseUnfinished,
)
from csvfs.membership.superblock_rebuild import CannotRebuild, derive_superblock
from csvfs.resignature import CopyDamaged, Resigned, Wish, resign_volume
from csvfs.resignature_claim import CopyInUse, NotACopy, Resigner
from csvfs.resignature_sweep import Ids, Run, metadata_runs, rename_block
from redirector.block.arbiter import Op
from redirector.block.device import BlockError, InitiatorPort, OutcomeUnknown
from redirector.block.keys import PathKey, is_newcomer, newcomer_key
from redirector.block.simulated import SimulatedLun
from redirector.block.simulated_faults import Command
from tests.crash import (
    CrashReport,
    CrashRun,
    Cut,
    cut_everywhere,
    deterministic_run,
    record_workload,
    show,
)
from tests.simulated_volume import LUN_BYTES, PORT
from tests.unit.copied_volume import (
    COPY_ID,
    InUse,
    as_device,
    assert_own_volume,
    random_of,
    superblock_of,
    volume_in_use,
)

INITIATOR = "iqn.2026-11.test:admin"
OTHER = InitiatorPort("iqn.2026-11.test:other", 3)
MEMBER = PathKey(1, 1, 1).pack()


@pytest.fixture(scope="module")
def used() -> InUse:
    """Not changed by anybody: tests work on copies."""
    found: list[InUse] = []

    async def make() -> None:
        found.append(await volume_in_use())

    deterministic_run(make, seed=1)
    return found[0]


def resigner(lun: SimulatedLun, *preempt_keys: int, label: str | None = None) -> Resigner:
    return Resigner(
        lun,
        INITIATOR,
        label=label,
        preempt_keys=frozenset(preempt_keys),
        now_ns=7,
        rng=random_of(1),
    )


# -- blocks --------------------------------------------------------------------------------------
FORMER, NEW = b"F" * 16, b"N" * 16
IDS = Ids(FORMER, NEW)


def inode_block(volume_id: bytes = FORMER) -> bytearray:
    block = fmt.new_block(fmt.BlockType.INODE, 77, 77, volume_id)
    block[fmt.INODE_SIZE] = 99
    fmt.seal(block, 41)
    return block


def test_a_block_keeps_all_but_id_and_checksum() -> None:
    block = inode_block()
    before = bytes(block)
    assert rename_block(memoryview(block), 77, IDS)
    assert fmt.verify(block, 77, fmt.BlockType.INODE, NEW, 77) == 41
    assert before[32:] == block[32:] and before[:8] == block[:8]
    assert not rename_block(memoryview(block), 77, IDS), "once is enough"


@pytest.mark.parametrize("wrong", ["address", "volume", "content", "magic", "zeroes"])
def test_what_is_no_block_of_the_former_id_stays(wrong: str) -> None:
    block = inode_block(b"X" * 16 if wrong == "volume" else FORMER)
    if wrong == "content":
        block[1000] ^= 1
    if wrong == "magic":
        block[0] ^= 1
    if wrong == "zeroes":
        block = bytearray(4096)
    before = bytes(block)
    assert not rename_block(memoryview(block), 78 if wrong == "address" else 77, IDS)
    assert block == before


def test_runs_are_the_metadata_units_in_use() -> None:
    geometry = fmt.Geometry.for_lun(4 << 30, 4)
    block = fmt.new_map_block(FORMER, 1, geometry.group_map(1, 2), 2, geometry.group_units(1))
    rng = random_of(2)
    expected: set[int] = set()
    first = geometry.group_first_unit(1) + 2 * fmt.UNITS_PER_MAP
    for position in range(fmt.UNITS_PER_MAP):
        state = rng.choice([*UnitState, *[UnitState.METADATA] * 9])
        fmt.set_unit_state(block, position, state)
        if state is UnitState.METADATA:
            bits = rng.choice((0, 0xFFFF, rng.getrandbits(16)))
            fmt.set_used_blocks(block, position, bits)
            base = (first + position) * fmt.BLOCKS_PER_UNIT
            expected |= {base + i for i in range(16) if bits >> i & 1}
    runs = list(metadata_runs(geometry, 1, 2, memoryview(block)))
    assert {r.address + i for r in runs for i in range(r.blocks) if r.used >> i & 1} == expected
    ends = [run.address + run.blocks for run in runs]
    assert ends == sorted(ends) and max(run.blocks for run in runs) == 64
    assert not list(metadata_runs(geometry, 1, 2, memoryview(bytearray(4096))))


def test_a_run_ends_where_the_neighbour_is_no_metadata() -> None:
    geometry = fmt.Geometry.for_lun(4 << 30, 4)
    block = bytearray(4096)
    for position in (4, 5, 7):
        fmt.set_unit_state(block, position, UnitState.METADATA)
        fmt.set_used_blocks(block, position, 1 << position)
    base = geometry.group_first_unit(0) * 16
    assert list(metadata_runs(geometry, 0, 0, memoryview(block))) == [
        Run(base + 64, 32, 1 << 4 | 1 << 16 + 5),
        Run(base + 7 * 16, 16, 1 << 7),
    ]


# -- the whole -----------------------------------------------------------------------------------
async def test_a_copy_becomes_a_volume_of_its_own(used: InUse, autojump_clock: MockClock) -> None:
    lun = used.copy()
    told: list[tuple[int, int]] = []
    wish = replace(resigner(lun, label="mine"), progress=lambda *step: told.append(step))
    done = await wish.run()
    assert done.former_volume_id == used.superblock.volume_id
    assert not done.resumed and done.replayed_records and done.renamed_blocks > 150
    assert told and told[-1][0] == told[-1][1] and told == sorted(told)
    assert done.superblock == await superblock_of(lun)
    assert done.superblock.label == "mine"
    assert done.superblock.probe & fmt.ProbeFlag.PROBED
    (key,) = lun.arbiter.registrations.values()
    assert is_newcomer(key) and lun.arbiter.read_reservation().key == key
    assert not lun.sessions
    plain = unreserved(lun)
    async with await plain.login(OTHER) as device:
        assert (await read_view(device, done.superblock.volume_id)).holder_key == key
    await assert_own_volume(plain, used, used.superblock)
    seen = await peek(lun, INITIATOR)
    assert seen.superblock == done.superblock
    with pytest.raises(NotACopy):
        await resigner(lun).run()


async def test_the_label_stays_unless_it_is_changed(used: InUse, autojump_clock: MockClock) -> None:
    done = await resigner(used.copy()).run()
    assert done.superblock.label == used.superblock.label
    lun = used.copy()
    before = dict(lun.blocks)
    for bad in ("x" * 65, "a\nb"):
        with pytest.raises(ValueError, match="label"):
            await resigner(lun, label=bad).run()
    assert {a: b for a, b in lun.blocks.items() if any(b)} == {
        a: b for a, b in before.items() if any(b)
    }
    assert not lun.arbiter.registrations


async def test_two_copies_are_two_volumes(used: InUse, autojump_clock: MockClock) -> None:
    first = await Resigner(used.copy(), INITIATOR).run()
    second = await Resigner(used.copy(device_id=b"another"), INITIATOR).run()
    assert first.superblock.volume_id != second.superblock.volume_id


async def test_a_copy_of_a_resignatured_volume_is_a_copy(
    used: InUse, autojump_clock: MockClock
) -> None:
    first = used.copy()
    done = await Resigner(first, INITIATOR).run()
    second = as_device(first.crashed(keep=lambda _: True), b"second")
    again = await Resigner(second, INITIATOR).run()
    assert again.former_volume_id == done.superblock.volume_id
    plain = unreserved(second)
    await assert_own_volume(plain, used, done.superblock)


def unreserved(lun: SimulatedLun) -> SimulatedLun:
    """The same medium, as the one device that it is, at a target that knows nobody."""
    plain = SimulatedLun(LUN_BYTES, blocks=lun.blocks, yields=False)
    return as_device(plain, lun.identity.device_id)


async def at_rest(used: InUse) -> tuple[SimulatedLun, Superblock]:
    """Another copy, of a volume whose journals are empty: nothing mends damage."""
    first = used.copy()
    done = await resigner(first).run()
    return as_device(first.crashed(keep=lambda _: True), b"second"), done.superblock


async def test_a_damaged_block_is_not_sealed_anew(used: InUse, autojump_clock: MockClock) -> None:
    lun, superblock = await at_rest(used)
    address, block = next(
        (a, b)
        for a, b in sorted(lun.blocks.items())
        if fmt.block_type(b) == fmt.BlockType.TREE_NODE and b[16:32] == superblock.volume_id
    )
    damaged = block[:2000] + b"!" + block[2001:]
    lun.blocks[address] = damaged
    done = await Resigner(lun, INITIATOR).run()
    assert lun.blocks[address] == damaged
    async with await unreserved(lun).login(PORT) as device:
        report = await check_volume(device, done.superblock, now_ns=9)
    assert any(f.damage.name == "TREE_NODE" for f in report.findings)


async def test_damaged_maps_are_found_before_anything_is_changed(
    used: InUse, autojump_clock: MockClock
) -> None:
    lun, superblock = await at_rest(used)
    geometry = superblock.geometry
    for address in (geometry.group_map(0, 0), geometry.group_header(0)):
        lun.blocks[address] = b"\xee" * 4096
        with pytest.raises(CopyDamaged, match=rf"block {address} .*copy it again"):
            await Resigner(lun, INITIATOR).run()
        assert await superblock_of(lun) == superblock


@pytest.mark.parametrize("where", ["view", "journal"])
async def test_a_copy_that_cannot_be_read_stays_a_copy(
    where: str, used: InUse, autojump_clock: MockClock
) -> None:
    lun = used.copy()
    geometry = used.superblock.geometry
    places = {
        "view": fmt.VIEW_ADDRESSES,
        "journal": (geometry.journal(1), geometry.journal(1) + 1),
    }
    for address in places[where]:
        lun.blocks[address] = b"\xee" * 4096
    with pytest.raises(CopyDamaged, match="copy it again"):
        await resigner(lun).run()
    assert await superblock_of(lun) == used.superblock
    assert not lun.arbiter.registrations and not lun.sessions


# -- refusals ------------------------------------------------------------------------------------
async def assert_refused(lun: SimulatedLun, error: type[Exception], *keys: int) -> Exception:
    """With nothing written, registered or reserved."""
    before = dict(lun.blocks), dict(lun.arbiter.registrations), lun.arbiter.read_reservation().key
    writes: list[Command] = []

    def is_write(command: Command) -> bool:
        if command.op in (Op.WRITE, Op.UNMAP):
            writes.append(command)
        return False

    lun.inject(is_write, OutcomeUnknown)
    with pytest.raises(error) as caught:
        await resigner(lun, *keys).run()
    assert not writes
    assert before == (
        dict(lun.blocks),
        dict(lun.arbiter.registrations),
        lun.arbiter.read_reservation().key,
    )
    return caught.value


async def test_the_original_is_refused(used: InUse) -> None:
    lun = as_device(used.copy(), used.lun.identity.device_id)
    error = await assert_refused(lun, NotACopy)
    assert "is no copy" in str(error) and used.lun.identity.device_id.hex() in str(error)


async def test_the_original_in_use_is_refused(used: InUse) -> None:
    lun = as_device(used.copy(), used.lun.identity.device_id)
    device = await lun.login(OTHER)
    await device.register(MEMBER)
    await device.reserve(MEMBER)
    await assert_refused(lun, NotACopy)


@pytest.mark.parametrize("reserved", [False, True])
async def test_a_copy_that_a_host_uses_is_refused(
    used: InUse, reserved: bool, autojump_clock: MockClock
) -> None:
    lun = used.copy()
    device = await lun.login(OTHER)
    await device.register(MEMBER)
    if reserved:
        await device.reserve(MEMBER)
    error = await assert_refused(lun, CopyInUse)
    assert f"{MEMBER:#018x}" in str(error) and "--preempt-key" in str(error)
    await assert_refused(lun, CopyInUse, MEMBER + 1)
    done = await resigner(lun, MEMBER).run()
    assert done.superblock.volume_id != used.superblock.volume_id
    assert MEMBER not in lun.arbiter.registrations.values()


async def test_another_systems_key_is_refused(used: InUse) -> None:
    lun = used.copy()
    device = await lun.login(OTHER)
    await device.register(0xABC)
    error = await assert_refused(lun, ClaimRefused)
    assert isinstance(error, ClaimRefused) and isinstance(error.refusal, RefuseForeign)


async def test_an_offline_tool_that_died_is_fenced(used: InUse, autojump_clock: MockClock) -> None:
    lun = used.copy()
    device = await lun.login(OTHER)
    key = newcomer_key(random_of(3))
    await device.register(key)
    await device.reserve(key)
    await resigner(lun).run()
    assert key not in lun.arbiter.registrations.values()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [({"incompat": 1 << 40 | 1}, RefuseFeature), ({"ro_compat": 8}, RefuseFeature)],
)
async def test_a_newer_format_is_refused(
    used: InUse, change: dict[str, int], refusal: type[object]
) -> None:
    lun = used.copy()
    superblock = replace(used.superblock, **change)  # type: ignore[arg-type]  # int fields
    for address in (0, superblock.geometry.backup_superblock):
        lun.blocks[address] = bytes(superblock.encode(address))
    error = await assert_refused(lun, ClaimRefused)
    assert isinstance(error, ClaimRefused) and isinstance(error.refusal, refusal)


async def test_a_smaller_lun_is_refused(used: InUse) -> None:
    lun = used.copy()
    lun.identity = replace(lun.identity, size_bytes=LUN_BYTES - (1 << 20))
    error = await assert_refused(lun, ClaimRefused)
    assert isinstance(error, ClaimRefused) and isinstance(error.refusal, RefuseTooSmall)


async def test_no_session_of_the_original_is_reinstated(
    used: InUse, autojump_clock: MockClock
) -> None:
    """They stand in the copied slot block, and may be alive, on the same target."""
    lun = used.copy()
    alive = await lun.login(PORT)
    await resigner(lun).run()
    assert alive in lun.sessions.values()


# -- cut off -------------------------------------------------------------------------------------
async def resign(lun: SimulatedLun, seed: int) -> Resigned:
    device = await lun.login(PORT)
    superblock, _ = await read_superblock(device)
    try:
        return await resign_volume(device, superblock, Wish(), now_ns=7, rng=random_of(seed))
    finally:
        await device.aclose()


def recorded(used: InUse, seed: int) -> CrashRun:
    lun = used.copy(record=True)

    async def workload(run: CrashRun) -> None:
        superblock, _ = await read_superblock(run.device)
        await resign_volume(run.device, superblock, Wish(), now_ns=7, rng=random_of(seed))

    return record_workload(lun, workload, seed=seed)


async def finish(cut: Cut, used: InUse) -> str:
    """Whatever state it was left in, the next run makes it whole."""
    lun = as_device(cut.lun, COPY_ID)
    found = await superblock_of(lun)
    if not found.resignature_under_way:
        if found.device_id == COPY_ID:
            await assert_own_volume(lun, used, used.superblock)
            return "done"
        assert found == used.superblock
        done = await resign(lun, 99)
        assert not done.resumed
        await assert_own_volume(lun, used, used.superblock)
        return "a copy still"
    done = await resign(lun, 99)
    assert done.resumed and done.former_volume_id == used.superblock.volume_id
    own = await assert_own_volume(lun, used, used.superblock)
    assert own.volume_id == found.volume_id
    return "under way"


@pytest.fixture
def many_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each unit of metadata."""
    monkeypatch.setattr(resignature_sweep, "RUN_UNITS", 1)


def cut_off(used: InUse, seed: int, verify: Callable[[Cut], Awaitable[str]]) -> CrashReport:
    report = cut_everywhere(recorded(used, seed), verify)
    show(report)
    assert report.outcomes["under way"] > report.cuts // 2 > 10
    return report


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8))]
)
def test_cut_off_after_any_write_it_is_finished_by_the_next_run(
    used: InUse, seed: int, many_writes: None
) -> None:
    report = cut_off(used, seed, lambda cut: finish(cut, used))
    assert set(report.outcomes) >= {"a copy still", "under way"}


async def twice(cut: Cut, used: InUse) -> str:
    """The next run is cut off, too, somewhere; the one after that makes it whole."""
    again = as_device(cut.lun.crashed(keep=lambda _: True, record=True), COPY_ID)
    start = again.journal.writes
    try:
        await resign(again, 98)
    except AssertionError:  # it is none any more: the last write had landed
        return "done"
    where = cut.rng.randrange(start, again.journal.writes + 1)
    second = again.crashed(where)
    return await finish(Cut(cut.run, 0, where, second, cut.rng), used)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 14))
def test_cut_off_twice(used: InUse, seed: int, many_writes: None) -> None:
    cut_off(used, seed, lambda cut: twice(cut, used))


async def unfinished(used: InUse) -> SimulatedLun:
    """Cut off between renaming and the views."""
    lun = used.copy()
    device = await lun.login(PORT)
    superblock, _ = await read_superblock(device)

    def is_view(command: Command) -> bool:
        return command.op is Op.WRITE and command.offset_bytes in (
            fmt.byte_offset(address) for address in fmt.VIEW_ADDRESSES
        )

    lun.inject(is_view, OutcomeUnknown, times=1)
    with pytest.raises(BlockError):
        await resign_volume(device, superblock, Wish(), now_ns=7, rng=random_of(4))
    return as_device(lun.crashed(keep=lambda _: True), COPY_ID)


async def test_an_unfinished_one_is_refused_by_everybody_else(
    used: InUse, autojump_clock: MockClock
) -> None:
    lun = await unfinished(used)
    with pytest.raises(ClaimRefused, match="run `csvctl resignature` again") as caught:
        await peek(lun, INITIATOR)
    assert isinstance(caught.value.refusal, RefuseUnfinished)
    assert not lun.arbiter.registrations
    done = await resigner(lun, label="mine").run()
    assert done.resumed and done.superblock.label == "mine"
    plain = unreserved(lun)
    await assert_own_volume(plain, used, used.superblock)


async def test_with_both_superblocks_destroyed_nothing_is_derived(used: InUse) -> None:
    """Not as the original, not as the new volume."""
    lun = await unfinished(used)
    async with await lun.login(OTHER) as device:
        with pytest.raises(CannotRebuild, match="root inode"):
            await derive_superblock(device, "destroyed")


async def test_a_copy_of_an_unfinished_one_gets_an_id_of_its_own(
    used: InUse, autojump_clock: MockClock
) -> None:
    first = await unfinished(used)
    second = as_device(first.crashed(keep=lambda _: True), b"second")
    begun = await superblock_of(first)
    with pytest.raises(ClaimRefused) as caught:
        await peek(second, INITIATOR)
    assert isinstance(caught.value.refusal, RefuseUnfinished)
    one = await Resigner(first, INITIATOR).run()
    assert one.superblock.volume_id == begun.volume_id
    other = await Resigner(second, INITIATOR).run()
    assert other.superblock.volume_id != begun.volume_id
    assert other.superblock.device_id == b"second"
    plain = unreserved(second)
    await assert_own_volume(plain, used, begun)


async def test_a_copy_that_was_not_touched_yet_is_still_refused_as_a_copy(used: InUse) -> None:
    with pytest.raises(ClaimRefused, match="csvctl resignature") as caught:
        await peek(used.copy(), INITIATOR)
    assert isinstance(caught.value.refusal, RefuseCopy)


async def test_the_target_is_lost_at_any_command(used: InUse, autojump_clock: MockClock) -> None:
    """An error, never a wrong end; run again it is whole."""
    number, ended = 3, False
    while not ended:
        lun = used.copy()
        left = number

        def lose(_: Command, lun: SimulatedLun = lun) -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                lun.disconnect()
            return False

        lun.inject(lose, OutcomeUnknown)
        try:
            await resigner(lun).run()
            ended = True
        except (BlockError, NotACopy):
            lun.reconnect()
            await Resigner(lun, INITIATOR).run()
        assert (await superblock_of(lun)).device_id == COPY_ID
        number = number * 5 // 4 + 1
