"""One suite that every kind of LUN passes: data, persistent reservations, sessions, fences.

A test module subclasses `BlockConformance` and provides the fixture ``harness``:

    class TestFile(BlockConformance):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> Iterator[Harness]: ...
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from random import Random

import pytest
import trio

from redirector.block.device import (
    BlockDevice,
    IllegalRequest,
    InitiatorPort,
    Lun,
    OutcomeUnknown,
    ReservationConflict,
    ReservationType,
    UnitAttention,
)

TYPE_6 = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
BLOCK = 4096
STILL_S = 0.05
"""How long a test watches that something does *not* happen."""
SLOW = b"SLOW" + b"s" * (BLOCK - 4)
KEY_A, KEY_B, KEY_C = 0xC5F5_0001_0000_0101, 0xC5F5_0002_0000_0201, 0xC5F5_0003_0000_0301


class Harness(ABC):
    """What the suite needs of one kind of LUN, beyond its interface."""

    lun: Lun
    """Fresh, at least 16 MiB, nothing registered."""
    leaks: frozenset[str] = frozenset()
    """Commands that the reservation is known to let through: "UNMAP", "WRITE SAME"."""

    @abstractmethod
    def hold_writes(self) -> None:
        """From now on a write that begins with ``SLOW`` is admitted, and kept from landing."""

    @abstractmethod
    async def wait_held(self, writes: int = 1) -> None:
        """Return when so many writes are held."""

    @abstractmethod
    def release_writes(self) -> None:
        """Let the held writes land; hold no more."""


def port(number: int) -> InitiatorPort:
    """An initiator port of this suite; the ISID has the random form (RFC 7143 10.12.5)."""
    return InitiatorPort(f"iqn.2026-11.test.csvfs:host{number}", 0x80_0000_0000_00 + number)


@contextlib.asynccontextmanager
async def session(lun: Lun, number: int, key: int = 0) -> AsyncIterator[BlockDevice]:
    """A session of ``port(number)``, registered if there is a key; unregistered at the end."""
    device = await lun.login(port(number))
    try:
        if key:
            await device.register(key)
        yield device
    finally:
        with trio.CancelScope(shield=True):
            await device.aclose()


async def settle(device: BlockDevice) -> None:
    """Fetch the unit attentions that are pending."""
    for _ in range(8):
        try:
            await device.test_unit_ready()
        except UnitAttention:
            continue
        return
    raise AssertionError("unit attentions without end")


class BlockConformance:
    """See the module's docstring."""

    # -- identity --------------------------------------------------------------------------------
    async def test_identity_tells_size_and_name(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as a, session(harness.lun, 2) as b:
            assert a.identity.size_bytes >= 16 << 20
            assert a.identity.logical_block_bytes in (512, 4096)
            assert a.identity.size_bytes % a.identity.logical_block_bytes == 0
            assert a.identity.device_id
            assert a.identity.device_id == b.identity.device_id
            assert a.identity.serial == b.identity.serial != ""
            assert a.identity.max_transfer_bytes >= 1 << 16
            assert a.port == port(1)

    async def test_url_of_the_lun_opens_the_same_lun(self, harness: Harness) -> None:
        assert "@" not in harness.lun.url

    # -- data ------------------------------------------------------------------------------------
    async def test_reads_what_was_written(self, harness: Harness) -> None:
        rng = Random(1)
        async with session(harness.lun, 1) as device:
            model = bytearray(4 << 20)
            for _ in range(60):
                length = rng.choice((512, 4096, 65536, 300 * 512, 1 << 20))
                offset = rng.randrange(0, (len(model) - length) // 512 + 1) * 512
                data = rng.randbytes(length)
                await device.write(offset, data, fua=rng.random() < 0.3)
                model[offset : offset + length] = data
            for offset in range(0, len(model), 1 << 20):
                assert await device.read(offset, 1 << 20) == model[offset : offset + (1 << 20)]
            window = memoryview(bytearray(3 * BLOCK))[BLOCK : 2 * BLOCK]
            await device.read_into(BLOCK, window)
            assert window == model[BLOCK : 2 * BLOCK]

    async def test_takes_every_kind_of_buffer(self, harness: Harness) -> None:
        data = Random(2).randbytes(2 * BLOCK)
        async with session(harness.lun, 1) as device:
            await device.write(0, bytearray(data))
            await device.write(2 * BLOCK, memoryview(data))
            await device.write(4 * BLOCK, memoryview(bytes(512) + data)[512:])
            for at in (0, 2, 4):
                assert await device.read(at * BLOCK, 2 * BLOCK) == data

    async def test_other_sessions_see_what_was_written(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as a, session(harness.lun, 2) as b:
            await a.write(0, b"x" * BLOCK)
            assert await b.read(0, BLOCK) == b"x" * BLOCK
            await a.flush()

    async def test_many_commands_at_once(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as device:

            async def turn(number: int) -> None:
                data = bytes([number]) * BLOCK
                for step in range(4):
                    at = (number * 4 + step) * BLOCK
                    await device.write(at, data)
                    assert await device.read(at, BLOCK) == data

            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(turn, number)
            await device.flush()

    async def test_large_transfers(self, harness: Harness) -> None:
        data = Random(3).randbytes(8 << 20)
        async with session(harness.lun, 1) as device:
            await device.write(4096, data)
            assert await device.read(4096, len(data)) == data

    @pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (511, 513), (-512, 512)])
    async def test_refuses_parts_of_blocks(
        self, harness: Harness, offset: int, length: int
    ) -> None:
        async with session(harness.lun, 1) as device:
            with pytest.raises(ValueError, match="block"):
                await device.read(offset, length)
            with pytest.raises(ValueError, match="block"):
                await device.write(offset, bytes(length))
            await device.write(0, bytes(BLOCK))

    async def test_refuses_what_lies_beyond_the_end(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as device:
            end = device.identity.size_bytes
            for offset in (end - BLOCK, end, end + (1 << 30)):
                with pytest.raises(IllegalRequest):
                    await device.write(offset, bytes(2 * BLOCK))
                with pytest.raises(IllegalRequest):
                    await device.read(offset, 2 * BLOCK)
            assert not device.lost
            await device.write(end - BLOCK, b"e" * BLOCK)
            assert await device.read(end - BLOCK, BLOCK) == b"e" * BLOCK

    async def test_flush_and_fua_are_answered(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as device:
            await device.flush()
            await device.write(0, b"f" * BLOCK, fua=True)
            await device.write(BLOCK, b"g" * BLOCK)
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(device.flush)

    async def test_unmap_touches_its_ranges_only(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as device:
            size = 1 << 20
            await device.write(0, b"u" * 4 * size)
            if not device.identity.unmap_granularity_bytes:
                with pytest.raises(IllegalRequest):
                    await device.unmap([(0, size)])
                return
            await device.unmap([(size, size), (3 * size, 65536)])
            assert await device.read(0, size) == b"u" * size
            assert await device.read(2 * size, size) == b"u" * size
            rest = size - 65536
            assert await device.read(3 * size + 65536, rest) == b"u" * rest
            await device.write(size, b"v" * BLOCK)
            assert await device.read(size, BLOCK) == b"v" * BLOCK
            await device.unmap([])

    # -- registrations and reservations ------------------------------------------------------------
    async def test_register_replace_and_unregister(self, harness: Harness) -> None:
        async with session(harness.lun, 1) as device:
            start = (await device.read_keys()).generation
            await device.register(KEY_A)
            keys = await device.read_keys()
            assert keys.keys == (KEY_A,)
            assert keys.generation == start + 1
            with pytest.raises(ReservationConflict):
                await device.register(KEY_B)
            with pytest.raises(ReservationConflict):
                await device.register(KEY_B, old_key=KEY_C)
            await device.register(KEY_B, old_key=KEY_A)
            assert (await device.read_keys()).keys == (KEY_B,)
            await device.register(0, old_key=KEY_B)
            assert (await device.read_keys()).keys == ()
            assert await device.read_reservation() == await device.read_reservation()

    async def test_one_key_may_be_registered_twice(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_A):
            assert (await a.read_keys()).keys == (KEY_A, KEY_A)

    async def test_reservation_excludes_the_unregistered(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2) as b:
            await b.write(0, b"0" * BLOCK)
            assert (await a.read_reservation()).type == ReservationType.NONE
            await a.reserve(KEY_A)
            held = await b.read_reservation()
            assert (held.key, held.type) == (KEY_A, TYPE_6)
            await a.write(0, b"a" * BLOCK)
            with pytest.raises(ReservationConflict):
                await b.read(0, BLOCK)
            with pytest.raises(ReservationConflict):
                await b.write(0, b"b" * BLOCK)
            with pytest.raises(ReservationConflict):
                await b.flush()
            with pytest.raises(ReservationConflict):
                await b.reserve(KEY_B)
            with pytest.raises(ReservationConflict):
                await b.preempt(KEY_B, KEY_A)
            await b.test_unit_ready()
            assert not b.lost
            await b.register(KEY_B)
            await b.write(BLOCK, b"b" * BLOCK)
            assert await b.read(0, BLOCK) == b"a" * BLOCK
            with pytest.raises(ReservationConflict):
                await b.reserve(KEY_B)
            await a.reserve(KEY_A)

    async def test_unmap_and_write_same_of_the_unregistered(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2) as b:
            await a.reserve(KEY_A)
            await a.write(0, b"a" * (1 << 20))
            outcome = {}
            for name in ("UNMAP", "WRITE SAME"):
                try:
                    if name == "UNMAP":
                        await b.unmap([(0, 1 << 20)])
                    else:
                        block = bytes(b.identity.logical_block_bytes)
                        await b.write_same(0, len(block) * 2, block)
                    outcome[name] = "done"
                except ReservationConflict:
                    outcome[name] = "conflict"
                except IllegalRequest:
                    outcome[name] = "not supported"
            for name, what in outcome.items():
                if what != "not supported":
                    assert what == ("done" if name in harness.leaks else "conflict"), name

    async def test_release_ends_the_reservation(self, harness: Harness) -> None:
        async with (
            session(harness.lun, 1, KEY_A) as a,
            session(harness.lun, 2, KEY_B) as b,
            session(harness.lun, 3) as stranger,
        ):
            await a.reserve(KEY_A)
            await b.release(KEY_B)
            assert (await a.read_reservation()).key == KEY_A
            await a.release(KEY_A)
            assert (await a.read_reservation()).type == ReservationType.NONE
            with pytest.raises(UnitAttention) as caught:
                await b.write(0, bytes(BLOCK))
            assert caught.value.asc_ascq == 0x2A04
            await b.write(0, bytes(BLOCK))
            await stranger.write(0, bytes(BLOCK))
            assert sorted((await a.read_keys()).keys) == [KEY_A, KEY_B]

    async def test_unregistering_the_holder_ends_the_reservation(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B) as b:
            await a.reserve(KEY_A)
            await a.register(0, old_key=KEY_A)
            assert (await a.read_reservation()).type == ReservationType.NONE
            with pytest.raises(UnitAttention) as caught:
                await b.test_unit_ready()
            assert caught.value.asc_ascq == 0x2A04

    # -- PREEMPT -----------------------------------------------------------------------------------
    async def test_preempt_of_the_holder_takes_the_reservation_once(self, harness: Harness) -> None:
        async with (
            session(harness.lun, 1, KEY_A) as a,
            session(harness.lun, 2, KEY_B) as b,
            session(harness.lun, 3, KEY_C) as c,
        ):
            await a.reserve(KEY_A)
            before = (await b.read_keys()).generation
            await b.preempt(KEY_B, KEY_A)
            with pytest.raises(ReservationConflict):
                await c.preempt(KEY_C, KEY_A)
            held = await c.read_reservation()
            assert (held.key, held.type, held.generation) == (KEY_B, TYPE_6, before + 1)
            assert sorted((await c.read_keys()).keys) == [KEY_B, KEY_C]
            with pytest.raises(UnitAttention) as caught:
                await a.write(0, bytes(BLOCK))
            assert caught.value.asc_ascq == 0x2A03
            with pytest.raises(ReservationConflict):
                await a.write(0, bytes(BLOCK))
            with pytest.raises(ReservationConflict):
                await a.read(0, BLOCK)
            assert not a.lost
            await c.write(0, b"c" * BLOCK)

    async def test_preempt_of_another_takes_nothing(self, harness: Harness) -> None:
        async with (
            session(harness.lun, 1, KEY_A) as a,
            session(harness.lun, 2, KEY_B) as b,
            session(harness.lun, 3, KEY_C) as c,
        ):
            await a.reserve(KEY_A)
            await b.preempt(KEY_B, KEY_C)
            held = await b.read_reservation()
            assert held.key == KEY_A
            assert sorted((await b.read_keys()).keys) == [KEY_A, KEY_B]
            await settle(c)
            with pytest.raises(ReservationConflict):
                await c.write(0, bytes(BLOCK))
            await a.write(0, bytes(BLOCK))

    async def test_preempt_of_an_unregistered_key_conflicts(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a:
            await a.reserve(KEY_A)
            with pytest.raises(ReservationConflict):
                await a.preempt(KEY_A, KEY_B)
            assert (await a.read_keys()).keys == (KEY_A,)

    async def test_preempt_removes_every_registration_of_the_key(self, harness: Harness) -> None:
        async with (
            session(harness.lun, 1, KEY_A) as a,
            session(harness.lun, 2, KEY_B),
            session(harness.lun, 3, KEY_B),
        ):
            await a.reserve(KEY_A)
            await a.preempt(KEY_A, KEY_B)
            assert (await a.read_keys()).keys == (KEY_A,)

    async def test_preempt_without_a_holder_takes_nothing(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B):
            await a.preempt(KEY_A, KEY_B)
            assert (await a.read_reservation()).type == ReservationType.NONE
            assert (await a.read_keys()).keys == (KEY_A,)

    async def test_an_evicted_nexus_may_register_again(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B) as b:
            await a.reserve(KEY_A)
            await a.preempt(KEY_A, KEY_B)
            await settle(b)
            await b.register(KEY_C)
            await b.write(0, bytes(BLOCK))

    # -- sessions ----------------------------------------------------------------------------------
    async def test_a_registration_outlives_logout_and_belongs_to_the_session(
        self, harness: Harness
    ) -> None:
        async with session(harness.lun, 1, KEY_A) as a:
            await a.reserve(KEY_A)
        assert a.lost
        async with session(harness.lun, 1) as again:
            assert (await again.read_keys()).keys == (KEY_A,)
            assert (await again.read_reservation()).key == KEY_A
            with pytest.raises(ReservationConflict):
                await again.write(0, bytes(BLOCK))
            await again.register(KEY_B)
            await again.preempt(KEY_B, KEY_A)
            held = await again.read_reservation()
            assert held.key == KEY_B
            assert (await again.read_keys()).keys == (KEY_B,)

    async def test_login_with_the_same_port_closes_the_old_session(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as old, session(harness.lun, 2) as other:
            async with session(harness.lun, 1) as new:
                with trio.fail_after(10):
                    await old.wait_lost()
                assert old.lost
                with pytest.raises(OutcomeUnknown):
                    await old.write(0, bytes(BLOCK))
                with pytest.raises(OutcomeUnknown):
                    await old.read_keys()
                assert (await new.read_keys()).keys == (KEY_A,)
                await new.write(0, b"n" * BLOCK)
            assert not other.lost
            await other.test_unit_ready()

    async def test_a_port_with_another_isid_is_another_session(self, harness: Harness) -> None:
        twin = InitiatorPort(port(1).name, port(1).isid + 0x100)
        async with session(harness.lun, 1) as a, await harness.lun.login(twin) as b:
            await a.write(0, bytes(BLOCK))
            await b.write(0, bytes(BLOCK))
            assert not a.lost
            assert not b.lost

    async def test_nothing_works_on_a_lost_session(self, harness: Harness) -> None:
        device = await harness.lun.login(port(1))
        device.abort()
        with trio.fail_after(10):
            await device.wait_lost()
        assert device.lost
        for _ in range(2):
            with pytest.raises(OutcomeUnknown):
                await device.read(0, BLOCK)
            with pytest.raises(OutcomeUnknown):
                await device.write(0, bytes(BLOCK))
            with pytest.raises(OutcomeUnknown):
                await device.flush()
            with pytest.raises(OutcomeUnknown):
                await device.register(KEY_A)
        await device.aclose()
        async with session(harness.lun, 1) as again:
            await again.write(0, bytes(BLOCK))

    async def test_closing_waits_for_what_is_in_flight(self, harness: Harness) -> None:
        harness.hold_writes()
        device = await harness.lun.login(port(1))
        closed = trio.Event()

        async def close() -> None:
            await device.aclose()
            closed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.write, 0, SLOW)
            await harness.wait_held()
            nursery.start_soon(close)
            await trio.sleep(STILL_S)
            assert not closed.is_set()
            harness.release_writes()
        assert closed.is_set()
        async with session(harness.lun, 2) as other:
            assert await other.read(0, BLOCK) == SLOW

    async def test_a_cancelled_write_is_waited_for(self, harness: Harness) -> None:
        harness.hold_writes()
        async with session(harness.lun, 1) as device:
            ended = trio.Event()
            scope = trio.CancelScope()

            async def write() -> None:
                with scope:
                    await device.write(0, SLOW)
                ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await harness.wait_held()
                scope.cancel()
                await trio.sleep(STILL_S)
                assert not ended.is_set()
                harness.release_writes()
                await ended.wait()
            assert await device.read(0, BLOCK) == SLOW

    async def test_commands_in_flight_end_when_the_connection_drops(self, harness: Harness) -> None:
        harness.hold_writes()
        device = await harness.lun.login(port(1))

        async def write() -> None:
            with pytest.raises(OutcomeUnknown):
                await device.write(0, SLOW)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await harness.wait_held()
            device.abort()
            assert device.lost
            # A file's write is a system call of this process: it ends before its caller goes on.
            harness.release_writes()
        await device.aclose()
        await harness.lun.reset(timeout_s=10)
        async with session(harness.lun, 2) as other:
            assert await other.read(0, BLOCK) == SLOW

    async def test_a_loss_is_told_before_what_it_leaves_unanswered(self, harness: Harness) -> None:
        harness.hold_writes()
        device = await harness.lun.login(port(1))
        told: list[str] = []

        async def write() -> None:
            with pytest.raises(OutcomeUnknown):
                await device.write(0, SLOW)
            told.append("answered")

        device.on_lost = lambda: told.append("lost")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.wait_lost)
            for _ in range(3):
                nursery.start_soon(write)
            await harness.wait_held()
            async with session(harness.lun, 1):  # closes the other one
                with trio.fail_after(10):
                    await device.wait_lost()
                harness.release_writes()
        device.abort()
        assert told == ["lost", *["answered"] * 3]

    async def test_an_own_end_is_told_as_well(self, harness: Harness) -> None:
        told: list[str] = []
        for end in ("abort", "aclose"):
            device = await harness.lun.login(port(1))
            device.on_lost = lambda end=end: told.append(end)
            if end == "abort":
                device.abort()
            await device.aclose()
        assert told == ["abort", "aclose"]

    # -- reset and fence ---------------------------------------------------------------------------
    async def test_reset_keeps_reservations_and_tells_everyone(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B) as b:
            await a.reserve(KEY_A)
            await harness.lun.reset(timeout_s=10)
            for device in (a, b):
                with pytest.raises(UnitAttention) as caught:
                    await device.write(0, bytes(BLOCK))
                assert caught.value.asc_ascq == 0x2900
                await device.write(0, bytes(BLOCK))
            assert (await a.read_reservation()).key == KEY_A
            assert sorted((await a.read_keys()).keys) == [KEY_A, KEY_B]

    async def test_reset_waits_for_what_is_on_its_way(self, harness: Harness) -> None:
        """PREEMPT lets an admitted write land; PREEMPT and reset together do not."""
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B) as b:
            await a.reserve(KEY_A)
            harness.hold_writes()
            drained = trio.Event()

            async def victim() -> None:
                with contextlib.suppress(OutcomeUnknown):
                    await b.write(0, SLOW)

            async def drain() -> None:
                await harness.lun.reset(timeout_s=30)
                drained.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(victim)
                await harness.wait_held()
                await a.preempt(KEY_A, KEY_B)
                assert await a.read(0, BLOCK) == bytes(BLOCK)
                nursery.start_soon(drain)
                await trio.sleep(STILL_S)
                assert not drained.is_set()
                harness.release_writes()
                await drained.wait()
                await settle(a)
                assert await a.read(0, BLOCK) == SLOW
                await a.write(0, b"a" * BLOCK)
            await settle(b)
            with pytest.raises(ReservationConflict):
                await b.write(0, SLOW)
            assert await a.read(0, BLOCK) == b"a" * BLOCK

    async def test_reset_gives_up_in_time(self, harness: Harness) -> None:
        harness.hold_writes()
        async with session(harness.lun, 1) as device, trio.open_nursery() as nursery:
            nursery.start_soon(device.write, 0, SLOW)
            await harness.wait_held()
            with pytest.raises(TimeoutError):
                await harness.lun.reset(timeout_s=1)
            harness.release_writes()

    async def test_the_whole_fence_of_a_path(self, harness: Harness) -> None:
        """Reinstatement, PREEMPT, reset: afterwards nothing of the victim lands any more."""
        async with session(harness.lun, 1, KEY_A) as a:
            victim = await harness.lun.login(port(2))
            await victim.register(KEY_B)
            await a.reserve(KEY_A)
            harness.hold_writes()

            async def write() -> None:
                with pytest.raises(OutcomeUnknown):
                    await victim.write(0, SLOW)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await harness.wait_held()
                async with session(harness.lun, 2):
                    await a.preempt(KEY_A, KEY_B)
                harness.release_writes()
                await harness.lun.reset(timeout_s=10)
                await settle(a)
                await a.write(0, b"a" * BLOCK)
            assert victim.lost
            with pytest.raises(OutcomeUnknown):
                await victim.write(0, SLOW)
            await victim.aclose()
            await harness.lun.reset(timeout_s=10)
            await settle(a)
            assert await a.read(0, BLOCK) == b"a" * BLOCK
