"""The iSCSI device on a real tgtd: what it tells of a LUN, how a login fails, what refusals say."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from redirector.block import scsi
from redirector.block.device import (
    AuthenticationFailed,
    Credentials,
    IllegalRequest,
    InitiatorPort,
    LoginFailed,
    NoSuchLun,
    ReservationConflict,
    TargetRefused,
    UnitAttention,
    Unreachable,
)
from redirector.block.iscsi import IscsiLun, IscsiOptions
from redirector.block.url import open_lun
from tests.tgt import Tgt

pytestmark = pytest.mark.system

PASSWORD = "a-secret-of-16+"
A = InitiatorPort("iqn.2026-11.test.csvfs:a", 0x80_0000_0000_01)
B = InitiatorPort("iqn.2026-11.test.csvfs:b", 0x00_0231_0000_02)
C = InitiatorPort("iqn.2026-11.test.csvfs:c", 0x40_0000_0000_03)


@pytest.fixture(scope="module")
def tgt() -> Iterator[Tgt]:
    with Tgt() as running:
        yield running


def lun_of(tgt: Tgt, lun: int = 1, credentials: Credentials | None = None) -> IscsiLun:
    return IscsiLun("127.0.0.1", tgt.port, tgt.iqn, lun, credentials)


async def test_identity(tgt: Tgt) -> None:
    lun = open_lun(tgt.url)
    async with await lun.login(A) as device:
        identity = device.identity
        assert device.portal == tgt.portal
    assert lun.url == tgt.url
    assert (identity.vendor, identity.product) == ("IET", "VIRTUAL-DISK")
    assert identity.size_bytes == 64 << 20
    assert identity.serial == tgt.iqn.rpartition(":")[2] + "01"
    assert identity.device_id.hex().endswith(identity.serial)
    assert identity.thin
    assert identity.unmap_granularity_bytes == 512
    assert identity.max_unmap_bytes > 1 << 20
    assert identity.volatile_cache


async def test_a_lun_that_is_not_thin_has_no_unmap() -> None:
    with Tgt(thin=False, lun_bytes=16 << 20) as tgt:
        async with await lun_of(tgt).login(A) as device:
            assert not device.identity.thin
            assert device.identity.unmap_granularity_bytes == 0
            with pytest.raises(IllegalRequest, match="UNMAP"):
                await device.unmap([(0, 4096)])


async def test_a_lun_of_4096_byte_blocks_with_a_large_number(tgt: Tgt) -> None:
    number = tgt.add_lun(16 << 20, number=1000, block_bytes=4096)
    async with await lun_of(tgt, number).login(A) as device:
        assert device.identity.logical_block_bytes == 4096
        assert device.identity.size_bytes == 16 << 20
        await device.write(8192, b"f" * 4096)
        with pytest.raises(ValueError, match="block"):
            await device.write(8192, b"f" * 512)
        await device.unmap([(12288, 4096)])
    assert tgt.backing(number).read_bytes()[8192:12289] == b"f" * 4096 + b"\0"
    tgt.remove_lun(number)


async def test_data_reaches_the_backing_file(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        await device.write(1 << 20, b"stable" + bytes(506), fua=True)
        await device.write(2 << 20, b"flushed" + bytes(505))
        await device.flush()
        await device.write_same(3 << 20, 8192, b"same" * 128)
        await device.unmap([(1 << 20, 512), (2 << 20, 512)])
    raw = tgt.backing().read_bytes()
    assert raw[1 << 20 : (1 << 20) + 512] == bytes(512)
    assert raw[2 << 20 : (2 << 20) + 512] == bytes(512)
    assert raw[3 << 20 : (3 << 20) + 8192] == b"same" * 2048


async def test_unmap_is_cut_to_what_the_target_takes(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        await device.write(0, b"u" * (1 << 20))
        ranges = [(number * 1024, 512) for number in range(1000)]
        await device.unmap(ranges)
        left = await device.read(0, 1 << 20)
        assert left[: 1000 * 1024] == (bytes(512) + b"u" * 512) * 1000
        assert left[1000 * 1024 :] == b"u" * (24 << 10)


async def test_the_write_cache_is_asked_for_again_once_registered() -> None:
    """Under a type 6 reservation MODE SENSE conflicts before REGISTER."""
    with Tgt(lun_bytes=16 << 20) as other:
        lun = lun_of(other)
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
        page = "mode_page=8:0:18:0x10:0:0xff:0xff:0:0:0xff:0xff:0xff:0xff:0x80:0x14:0:0:0:0:0:0"
        other.admin("--op", "update", *unit, "--params", page)
        async with await lun.login(A) as a:
            assert not a.identity.volatile_cache
            await a.register(1)
            await a.reserve(1)
            async with await lun.login(B) as b:
                assert b.identity.volatile_cache
                with pytest.raises(ReservationConflict):
                    await b.read(0, 512)
                await b.register(2)
                assert not b.identity.volatile_cache


async def test_many_keys_are_all_read() -> None:
    with Tgt(lun_bytes=16 << 20) as other:
        lun = lun_of(other)
        async with await lun.login(A) as a:
            for number in range(20):
                port = InitiatorPort(B.name, B.isid + number)
                async with await lun.login(port) as device:
                    await device.register(100 + number)
            registered = await a.read_keys()
            assert sorted(registered.keys) == list(range(100, 120))
            await a.register_ignoring(7)
            await a.register_ignoring(8)
            assert 8 in (await a.read_keys()).keys
            assert (await a.report_capabilities()).exclusive_access_registrants_only
            await a.clear(8)
            assert (await a.read_keys()).keys == ()


# -- logins that fail ------------------------------------------------------------------------------
async def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        lun = IscsiLun("127.0.0.1", closed.getsockname()[1], "iqn.2026-11.test:x", 1)
        with pytest.raises(Unreachable, match="refused"):
            await lun.login(A)
        with pytest.raises(LoginFailed):
            await lun.reset(timeout_s=1)


async def test_nobody_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        lun = IscsiLun("127.0.0.1", silent.getsockname()[1], "iqn.2026-11.test:x", 1)
        with trio.fail_after(5), pytest.raises(Unreachable, match="no answer"):
            await lun.login(A, timeout_s=0.2)


async def test_the_name_is_unknown() -> None:
    lun = IscsiLun("no-such-host.invalid", 3260, "iqn.2026-11.test:x", 1)
    with pytest.raises(Unreachable, match="no-such-host"):
        await lun.login(A)


async def test_a_peer_that_does_not_speak_iscsi() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(48)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 40)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        with trio.fail_after(10), pytest.raises(LoginFailed):
            await IscsiLun("127.0.0.1", port, "iqn.2026-11.test:x", 1).login(A, timeout_s=1)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_login_is_dropped() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        lun = IscsiLun("127.0.0.1", silent.getsockname()[1], "iqn.2026-11.test:x", 1)
        with trio.fail_after(5), trio.move_on_after(0.05) as scope:
            await lun.login(A, timeout_s=60)
        assert scope.cancelled_caught


async def test_no_such_target(tgt: Tgt) -> None:
    with pytest.raises(NoSuchLun, match="no such target"):
        await IscsiLun("127.0.0.1", tgt.port, tgt.iqn + "x", 1).login(A)


async def test_no_such_lun(tgt: Tgt) -> None:
    with pytest.raises(NoSuchLun):
        await lun_of(tgt, 7).login(A)
    with pytest.raises(NoSuchLun, match="not a disk"):
        await lun_of(tgt, 0).login(A)


async def test_an_isid_that_cannot_be_expressed(tgt: Tgt) -> None:
    with pytest.raises(ValueError, match="ISID"):
        await lun_of(tgt).login(InitiatorPort(A.name, 0xC0_0000_0000_01))


async def test_chap() -> None:
    with Tgt(chap=("keeper", PASSWORD), lun_bytes=16 << 20) as tgt:
        right = lun_of(tgt, 1, Credentials("keeper", PASSWORD))
        async with await right.login(A) as device:
            await device.write(0, bytes(512))
        await right.reset(timeout_s=5)
        for credentials in (
            None,
            Credentials("keeper", PASSWORD + "x"),
            Credentials("stranger", PASSWORD),
        ):
            lun = lun_of(tgt, 1, credentials)
            with pytest.raises(AuthenticationFailed) as caught:
                await lun.login(A)
            assert PASSWORD not in str(caught.value)
            assert PASSWORD not in lun.url


async def test_header_digests() -> None:
    with Tgt(lun_bytes=16 << 20) as tgt:
        options = IscsiOptions(header_digest=True)
        lun = IscsiLun("127.0.0.1", tgt.port, tgt.iqn, 1, options=options)
        data = bytes(range(256)) * 4096
        async with await lun.login(A) as device:
            await device.write(512, data)
            assert await device.read(512, len(data)) == data


async def test_a_redirected_login_is_followed() -> None:
    with (
        Tgt(lun_bytes=16 << 20) as front,
        Tgt(lun_bytes=16 << 20, address="127.0.0.2", iqn=front.iqn) as back,
    ):
        update = ("--op", "update", "--mode", "target", "--tid", "1", "--name")
        front.admin(*update, "RedirectAddress", "--value", back.address)
        front.admin(*update, "RedirectPort", "--value", str(back.port))
        front.admin(*update, "RedirectReason", "--value", "Temporary")
        async with await IscsiLun(front.address, front.port, front.iqn, 1).login(A) as device:
            await device.write(0, b"redirected" + bytes(502))
            assert front.connections() == []
        assert back.backing().read_bytes()[:10] == b"redirected"


# -- refusals --------------------------------------------------------------------------------------
async def test_refusals_are_told_in_words(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        with pytest.raises(IllegalRequest) as beyond:
            await device.read(64 << 20, 4096)
        assert str(beyond.value) == (
            "READ: illegal request: logical block address out of range (sense 5/2100)"
        )
        with pytest.raises(IllegalRequest) as unknown:
            await device.scsi("COMPARE AND WRITE", bytes([0x89]) + bytes(15))
        assert unknown.value.asc_ascq == 0x2000
        with pytest.raises(ReservationConflict) as conflict:
            await device.register(5, old_key=4)
        assert str(conflict.value) == "REGISTER: reservation conflict"
        await device.write(0, bytes(512))
        assert not device.lost


async def test_a_refused_part_ends_a_large_transfer(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as device:
        with pytest.raises(IllegalRequest):
            await device.read(32 << 20, 64 << 20)
        with pytest.raises(IllegalRequest):
            await device.write(60 << 20, bytes(64 << 20))
        assert not device.lost
        await device.read(0, 4096)


async def test_legacy_reserve_of_a_stranger(tgt: Tgt) -> None:
    """It excludes a registrant too, and a reset releases it."""
    lun = lun_of(tgt)
    async with await lun.login(A) as a, await lun.login(B) as b:
        await b.scsi("RESERVE(6)", scsi.RESERVE_6)
        with pytest.raises(ReservationConflict):
            await a.write(0, bytes(512))
        await lun.reset(timeout_s=5)
        with pytest.raises(UnitAttention) as caught:
            await a.write(0, bytes(512))
        assert caught.value.asc_ascq == 0x2900
        await a.write(0, bytes(512))


async def test_preempt_and_abort_is_refused_by_tgt(tgt: Tgt) -> None:
    async with await lun_of(tgt).login(A) as a:
        await a.register(1)
        with pytest.raises(TargetRefused) as caught:
            await a.preempt(1, 2, abort=True)
        assert caught.value.asc_ascq == 0x2400
        await a.register(0, old_key=1)


async def test_all_forms_of_isid_log_in_and_reinstate(tgt: Tgt) -> None:
    for port in (A, B, C):
        old = await lun_of(tgt).login(port)
        async with await lun_of(tgt).login(port) as new:
            with trio.fail_after(10):
                await old.wait_lost()
            await new.read(0, 512)
        await old.aclose()
