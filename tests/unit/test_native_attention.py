"""Unit attentions that answer a question of the device's own reach its owner all the same."""

from __future__ import annotations

import struct

import pytest

from redirector.block.device import InitiatorPort, UnitAttention
from redirector.block.iscsi import IscsiLun
from tests.scripted_target import Request, ScriptedTarget, Talk

TEST_UNIT_READY, INQUIRY, MODE_SENSE, RESERVE_OUT, READ_CAPACITY = 0x00, 0x12, 0x1A, 0x5F, 0x9E
PORT = InitiatorPort("iqn.2026-11.test:y", 0x80_0000_0000_01)
PREEMPTED = bytes([0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x2A, 0x05, 0, 0, 0, 0])
NO_SUCH_FIELD = bytes([0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0x00, 0, 0, 0, 0])


class Disk:
    """Answers what a login asks; after a REGISTER its next answer is "registrations preempted"."""

    def __init__(self) -> None:
        self.registers = 0
        self._preempted = False

    def answer(self, talk: Talk, request: Request) -> None:
        length = int.from_bytes(request.head[20:24], "big")
        if self._preempted:
            self._preempted = False
            talk.respond(request, 2, PREEMPTED)
        elif request.operation == INQUIRY and not request.head[33] & 1:
            self._data(talk, request, bytes(36), length)
        elif request.operation == READ_CAPACITY:
            self._data(talk, request, struct.pack(">QI20x", 2047, 512), length)
        elif request.operation in (INQUIRY, MODE_SENSE):
            talk.respond(request, 2, NO_SUCH_FIELD)
        else:
            if request.operation == RESERVE_OUT:
                self.registers += 1
                self._preempted = True
            talk.respond(request)

    def _data(self, talk: Talk, request: Request, data: bytes, length: int) -> None:
        talk.data_in(request, data)
        talk.respond(request, flags=0x82, residual_bytes=length - len(data))


async def test_a_preempt_right_after_register_is_told() -> None:
    disk = Disk()
    with ScriptedTarget(disk.answer) as target:
        lun = IscsiLun("127.0.0.1", target.port, target.iqn, 1)
        async with await lun.login(PORT) as device:
            await device.register(0xC5F5)  # it was carried out: that the key is gone comes next
            assert disk.registers == 1
            with pytest.raises(UnitAttention, match=r"READ: .*registrations preempted"):
                await device.read(0, 512)
            await device.test_unit_ready()
            assert device.identity.volatile_cache
