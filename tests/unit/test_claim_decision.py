"""Every answer to "may I take this volume?", without any I/O."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfs import format as fmt
from csvfs.format import SlotState, ViewSlot, ViewSlotFlag
from csvfs.membership.decision import (
    SILENCE_S,
    Decision,
    Host,
    JoinEmpty,
    Observation,
    RecoverOwnDead,
    Silence,
    SucceedParked,
    WaitSilence,
    decide,
)
from csvfs.membership.refusals import (
    RefuseCopy,
    RefuseFeature,
    RefuseForeign,
    RefuseMountedHere,
    RefuseOther,
    RefuseTooSmall,
)
from csvfs.membership.seat import (
    Seat,
    active_view,
    choose_seat,
    joining_view,
    left_view,
)
from redirector.block.device import LunIdentity, Reservation, ReservationType
from redirector.block.keys import MAX_INCARNATION, PathKey, newcomer_key

VOLUME = bytes(16)
SIZE = 1 << 30
HOST = Host("alpha", b"M" * 16, b"B" * 16, "iqn.x:alpha", ("192.0.2.1:7",))
OTHER = Host("beta", b"N" * 16, b"C" * 16, "iqn.x:beta", ("192.0.2.2:7",))
SUPERBLOCK = fmt.Superblock(VOLUME, fmt.Geometry.for_lun(SIZE, 4), 0, "v", b"device")
IDENTITY = LunIdentity(SIZE, 512, device_id=b"device")
NEWCOMER = newcomer_key(Random(5))
USED = ViewSlotFlag.JOURNAL_USED
FREE = ViewSlot()


def key(slot: int, incarnation: int, generation: int = 2) -> int:
    return PathKey(slot, incarnation, generation).pack()


def active(incarnation: int, host: Host = HOST) -> ViewSlot:
    return ViewSlot(
        incarnation,
        SlotState.ACTIVE,
        node_name=host.node_name,
        flags=USED,
        since_ns=9,
        machine_id=host.machine_id,
        boot_id=host.boot_id,
    )


def slot_block(slot: int, incarnation: int, host: Host = HOST) -> fmt.SlotBlock:
    identity = fmt.Identity(
        incarnation, 2, 0, 9, host.machine_id, host.boot_id, host.node_name, host.addresses
    )
    return fmt.SlotBlock(slot, identity)


def observation(
    *slots: ViewSlot,
    holder: int = 0,
    view_holder: int = 0,
    blocks: tuple[fmt.SlotBlock, ...] = (),
    keys: tuple[int, ...] = (),
) -> Observation:
    entries = (slots + (FREE,) * 4)[:4]
    held = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY if holder else ReservationType.NONE
    return Observation(
        SUPERBLOCK,
        IDENTITY,
        fmt.View(8, view_holder, entries, b"S" * 32),
        Reservation(1, holder, held),
        (*keys, *((holder,) if holder else ())),
        {block.slot: block for block in blocks},
    )


def decided(
    seen: Observation, *, lock: bool = True, quiet: bool = False, own: tuple[int, ...] = ()
) -> Decision:
    return decide(seen, HOST, frozenset(own), has_daemon_lock=lock, quiet=quiet)


REBOOTED = replace(HOST, boot_id=b"D" * 16)


# -- an empty view -------------------------------------------------------------------------------
def test_parked_key_is_succeeded_at_once() -> None:
    parked = key(1, 7)
    assert decided(observation(holder=parked, view_holder=parked)) == SucceedParked(parked)


def test_no_holder_needs_silence() -> None:
    seen = observation(view_holder=key(1, 7))
    assert isinstance(decided(seen), WaitSilence)
    assert decided(seen, quiet=True) == JoinEmpty(0)


@pytest.mark.parametrize("holder", [NEWCOMER, key(1, 8), key(2, 7)])
def test_another_holder_than_the_parked_one_needs_silence(holder: int) -> None:
    seen = observation(holder=holder, view_holder=key(1, 7))
    assert isinstance(decided(seen), WaitSilence)
    assert decided(seen, quiet=True) == JoinEmpty(holder)


def test_own_key_that_holds_is_enough() -> None:
    assert decided(observation(holder=NEWCOMER), own=(NEWCOMER,)) == JoinEmpty(NEWCOMER)


def test_a_view_with_only_replay_left_is_not_parked() -> None:
    waiting = ViewSlot(7, SlotState.NEEDS_REPLAY, 1, flags=USED)
    parked = key(1, 7)
    assert isinstance(decided(observation(waiting, holder=parked, view_holder=parked)), WaitSilence)


# -- somebody is listed --------------------------------------------------------------------------
@pytest.mark.parametrize("holder", [0, key(0, 7), NEWCOMER])
@pytest.mark.parametrize("state", [SlotState.JOINING, SlotState.ACTIVE])
def test_another_host_is_never_succeeded(holder: int, state: SlotState) -> None:
    entry = replace(active(7, OTHER), state=state)
    seen = observation(entry, holder=holder, blocks=(slot_block(0, 7, OTHER),))
    for quiet in (False, True):
        refusal = decided(seen, quiet=quiet)
        assert refusal == RefuseOther(0, "beta", ("192.0.2.2:7",), 9)
        assert "beta (192.0.2.2:7) has the volume in slot 0" in refusal.words


@pytest.mark.parametrize(
    "impostor",
    [replace(HOST, machine_id=b"X" * 16), replace(HOST, node_name="gamma")],
)
def test_both_machine_id_and_name_must_agree(impostor: Host) -> None:
    impostor = replace(impostor, boot_id=b"E" * 16)
    seen = observation(active(7, impostor))
    assert isinstance(decided(seen, quiet=True), RefuseOther)


@pytest.mark.parametrize("blocks", [(), (slot_block(0, 6, OTHER),)])
def test_addresses_of_another_life_are_not_told(blocks: tuple[fmt.SlotBlock, ...]) -> None:
    refusal = decided(observation(active(7, OTHER), blocks=blocks), quiet=True)
    assert refusal == RefuseOther(0, "beta", (), 9)


def test_a_torn_slot_block_hides_nothing() -> None:
    assert decided(observation(active(7), holder=key(0, 7))) == RecoverOwnDead(key(0, 7), (0,))


def test_own_incarnation_before_a_reboot_is_dead() -> None:
    seen = observation(active(7, REBOOTED), holder=key(0, 7))
    assert decided(seen, lock=False) == RecoverOwnDead(key(0, 7), (0,))


def test_own_incarnation_of_this_boot_is_dead_if_the_lock_was_free() -> None:
    seen = observation(active(7), holder=key(0, 7), blocks=(slot_block(0, 7),))
    assert decided(seen) == RecoverOwnDead(key(0, 7), (0,))
    refusal = decided(seen, lock=False, quiet=True)
    assert refusal == RefuseMountedHere()
    assert "mounted on this host" in refusal.words


def test_own_dead_beside_another_host_is_not_taken() -> None:
    seen = observation(
        active(7), active(3, OTHER), blocks=(slot_block(0, 7), slot_block(1, 3, OTHER))
    )
    assert isinstance(decided(seen, quiet=True), RefuseOther)


def test_own_dead_after_the_target_forgot_everything() -> None:
    seen = observation(active(7), blocks=(slot_block(0, 7),), view_holder=key(0, 7))
    assert decided(seen) == RecoverOwnDead(0, (0,))


def test_a_claim_that_died_after_its_slot_block_is_recovered() -> None:
    seen = observation(active(7), holder=key(0, 7), blocks=(slot_block(0, 9),))
    assert decided(seen) == RecoverOwnDead(key(0, 7), (0,))


def test_own_claim_that_died_as_newcomer_holder() -> None:
    joining = replace(active(8), state=SlotState.JOINING)
    seen = observation(joining, holder=NEWCOMER, view_holder=NEWCOMER, blocks=(slot_block(0, 8),))
    assert decided(seen) == RecoverOwnDead(NEWCOMER, (0,))


def test_a_newcomer_that_holds_over_own_dead_is_given_time() -> None:
    seen = observation(
        active(7), holder=NEWCOMER, view_holder=key(0, 7), blocks=(slot_block(0, 7),)
    )
    assert isinstance(decided(seen), WaitSilence)
    assert decided(seen, quiet=True) == RecoverOwnDead(NEWCOMER, (0,))


# -- what is refused whoever asks ----------------------------------------------------------------
@pytest.mark.parametrize("device_id", [b"other", b""])
def test_a_copy_made_by_the_array_is_refused(device_id: bytes) -> None:
    seen = replace(observation(), identity=replace(IDENTITY, device_id=device_id))
    refusal = decided(seen, quiet=True)
    assert refusal == RefuseCopy(b"device", device_id)
    assert "is a copy" in refusal.words


def test_a_volume_without_device_id_is_no_copy() -> None:
    seen = replace(
        observation(),
        superblock=replace(SUPERBLOCK, device_id=b""),
        identity=replace(IDENTITY, device_id=b""),
    )
    assert decided(seen, quiet=True) == JoinEmpty(0)


@pytest.mark.parametrize(
    ("word", "superblock"),
    [
        ("incompat", replace(SUPERBLOCK, incompat=1 << 40)),
        ("ro_compat", replace(SUPERBLOCK, ro_compat=1 << 40)),
    ],
)
def test_unknown_features_are_refused(word: str, superblock: fmt.Superblock) -> None:
    refusal = decided(replace(observation(), superblock=superblock), quiet=True)
    assert isinstance(refusal, RefuseFeature)
    assert f"{word} 0x10000000000" in refusal.words


def test_unknown_compatible_features_are_none_of_our_business() -> None:
    superblock = replace(SUPERBLOCK, compat=1 << 40)
    assert decided(replace(observation(), superblock=superblock), quiet=True) == JoinEmpty(0)


def test_a_lun_that_shrank_is_refused() -> None:
    seen = replace(observation(), identity=replace(IDENTITY, size_bytes=SIZE - 65536))
    assert decided(seen, quiet=True) == RefuseTooSmall(SIZE - 65536, SIZE)


def test_foreign_keys_are_refused_by_name() -> None:
    refusal = decided(observation(keys=(0x1234,)), quiet=True)
    assert refusal == RefuseForeign(0x1234, False, 0)
    assert "0x0000000000001234" in refusal.words
    assert decided(observation(holder=0x1234), quiet=True) == RefuseForeign(0x1234, True, 6)
    stranger = replace(observation(), reservation=Reservation(1, key(0, 1), 5))
    assert decided(stranger, quiet=True) == RefuseForeign(key(0, 1), True, 5)


# -- the seat ------------------------------------------------------------------------------------
def seat(seen: Observation, *dead: int) -> Seat | None:
    return choose_seat(seen, RecoverOwnDead(0, dead) if dead else JoinEmpty(0), HOST)


def left(incarnation: int, host: Host) -> ViewSlot:
    return replace(active(incarnation, host), state=SlotState.FREE)


def test_the_slot_of_the_dead_incarnation_is_taken() -> None:
    seen = observation(FREE, active(7), blocks=(slot_block(1, 7),))
    assert seat(seen, 1) == Seat(1, 8, (1,))


def test_the_slot_that_the_host_had_is_preferred() -> None:
    assert seat(observation(FREE, left(3, OTHER), left(7, HOST))) == Seat(2, 8, ())
    assert seat(observation(left(3, OTHER))) == Seat(0, 4, ())


def test_no_number_is_used_twice() -> None:
    seen = observation(left(7, HOST), blocks=(slot_block(0, 11),), keys=(key(0, 13),))
    assert seat(seen) == Seat(0, 14, ())


def test_a_slot_without_numbers_is_passed_over() -> None:
    assert seat(observation(left(MAX_INCARNATION, HOST))) == Seat(1, 1, ())
    assert seat(observation(*(left(MAX_INCARNATION, HOST),) * 4)) is None


def test_every_journal_that_waits_is_replayed() -> None:
    waiting = ViewSlot(4, SlotState.NEEDS_REPLAY, 2, flags=USED)
    assert seat(observation(waiting, active(7), waiting), 1) == Seat(1, 8, (0, 1, 2))
    assert seat(observation(*(waiting,) * 4)) == Seat(0, 5, (0, 1, 2, 3))


def test_views_of_a_claim() -> None:
    waiting = ViewSlot(4, SlotState.NEEDS_REPLAY, 3, flags=USED)
    before = observation(waiting, active(7)).view
    chosen = Seat(1, 8, (0, 1))
    joining = joining_view(before, chosen, HOST, b"F" * 32, NEWCOMER, 77)
    assert (joining.epoch, joining.holder_key) == (9, NEWCOMER)
    assert joining.slots[1] == ViewSlot(
        8,
        SlotState.JOINING,
        255,
        b"F" * 32,
        "alpha",
        77,
        USED,
        HOST.machine_id,
        HOST.boot_id,
        HOST.addresses,
    )
    assert joining.lock_epoch == 9  # what was active is not any more
    assert joining.slots[0] == replace(waiting, replay_by=1, since_ns=77)
    assert joining.secret == before.secret
    serving = active_view(joining, chosen, key(1, 8), 78)
    assert (serving.epoch, serving.lock_epoch, serving.holder_key) == (10, 10, key(1, 8))
    assert serving.slots[1].state == SlotState.ACTIVE
    assert serving.slots[0].state == SlotState.FREE
    assert serving.slots[0].flags == USED
    empty = left_view(serving, 1, key(1, 8), 79)
    assert (empty.epoch, empty.holder_key, empty.members) == (11, key(1, 8), ())
    assert empty.slots[1].incarnation == 8


def test_a_first_journal_is_marked_used_only_when_active() -> None:
    chosen = Seat(0, 1, ())
    joining = joining_view(observation().view, chosen, HOST, bytes(32), NEWCOMER, 1)
    assert joining.slots[0].flags == ViewSlotFlag.NONE
    assert active_view(joining, chosen, 1, 1).slots[0].flags == USED


# -- silence -------------------------------------------------------------------------------------
def test_silence_lasts_its_time() -> None:
    silence = Silence()
    heard = [silence.hear("same", 100 + n * 0.5) for n in range(12)]
    assert heard == [False] * 10 + [True] * 2
    assert SILENCE_S == 5


def test_any_change_starts_it_afresh() -> None:
    silence = Silence()
    for n in range(10):
        silence.hear("one", n * 0.5)
    assert not silence.hear("two", 5.0)
    assert not silence.hear("two", 5.9)


def test_a_judge_that_slept_has_heard_nothing() -> None:
    silence = Silence()
    silence.hear("same", 0)
    assert not silence.hear("same", 60)
    assert not silence.hear("same", 60.9)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.01, 3)), max_size=40))
def test_silence_is_never_shorter_than_said(steps: list[tuple[int, float]]) -> None:
    silence = Silence()
    now, since = 0.0, 0.0
    last_state, last_time = -1, -100.0
    for state, gap in steps:
        now += gap
        if state != last_state or now - last_time > 1:
            since = now
        last_state, last_time = state, now
        assert silence.hear(state, now) == (now - since >= SILENCE_S)
