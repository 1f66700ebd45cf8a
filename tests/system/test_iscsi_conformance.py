"""The suite of block_conformance.py against a real tgtd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from redirector.block.device import ReservationType
from redirector.block.iscsi import IscsiLun
from tests.block_conformance import BLOCK, KEY_A, KEY_B, BlockConformance, Harness, session, settle
from tests.tgt import Tgt

pytestmark = pytest.mark.system


class TgtHarness(Harness):
    """tgtd with a gate before the backing file."""

    leaks = frozenset({"UNMAP", "WRITE SAME"})

    def __init__(self, tgt: Tgt) -> None:
        self.tgt = tgt
        self.lun = IscsiLun("127.0.0.1", tgt.port, tgt.iqn, 1)

    def hold_writes(self) -> None:
        self.tgt.hold_writes()

    async def wait_held(self, writes: int = 1) -> None:
        with trio.fail_after(20):
            while self.tgt.held_writes() < writes:  # noqa: ASYNC110 (another process's file)
                await trio.sleep(0.005)

    def release_writes(self) -> None:
        self.tgt.release_writes()


class TestIscsi(BlockConformance):
    """A fresh target for each test: registrations outlive sessions."""

    @pytest.fixture
    def harness(self) -> Iterator[Harness]:
        with Tgt(late_gate=True) as tgt:
            yield TgtHarness(tgt)

    # tgt 1.0.85 tells of a released reservation otherwise than SPC-4 5.12.11.2 demands: of a
    # RELEASE nobody, of the holder's unregistering only who is not registered, itself included.

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
            await b.write(0, bytes(BLOCK))
            await stranger.write(0, bytes(BLOCK))
            assert sorted((await a.read_keys()).keys) == [KEY_A, KEY_B]

    async def test_unregistering_the_holder_ends_the_reservation(self, harness: Harness) -> None:
        async with session(harness.lun, 1, KEY_A) as a, session(harness.lun, 2, KEY_B) as b:
            await a.reserve(KEY_A)
            await a.register(0, old_key=KEY_A)
            await settle(a)
            assert (await a.read_reservation()).type == ReservationType.NONE
            assert (await b.read_keys()).keys == (KEY_B,)
            await a.write(0, bytes(BLOCK))
