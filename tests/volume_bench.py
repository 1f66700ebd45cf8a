"""A volume, and a look at the commands that reach its LUN."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from csvfs.namespace.handle import Handle
from csvfs.volume import Volume
from redirector.block.arbiter import Op
from redirector.block.simulated import Command, SimulatedLun
from tests.simulated_volume import LUN_BYTES, PORT, formatted, mounted

GROUPS_BYTE = 4 << 20
"""Fixed area and journals end before."""


class Bench:
    """A volume, and a look at the commands that reach its LUN."""

    def __init__(self, lun: SimulatedLun, volume: Volume) -> None:
        self.lun = lun
        self.volume = volume
        self.commands: list[Command] = []
        lun.hold(self._see)

    def _see(self, command: Command) -> bool:
        self.commands.append(command)
        return False

    def data_writes(self) -> list[tuple[int, int]]:
        """(offset, length) of the writes of whole units, or of parts of them, since the last."""
        seen = [
            (command.offset_bytes, len(command.data))
            for command in self.commands
            if command.op is Op.WRITE and command.offset_bytes >= GROUPS_BYTE
        ]
        self.commands.clear()
        return seen

    async def read(self, handle: Handle, offset: int, length: int) -> bytes:
        return bytes(await self.volume.read(handle, offset, length))


@asynccontextmanager
async def bench(**options: int) -> AsyncIterator[Bench]:
    lun = SimulatedLun(LUN_BYTES, yields=False, **options)  # type: ignore[arg-type]
    superblock = await formatted(lun)
    async with mounted(await lun.login(PORT), superblock) as (volume, _):
        yield Bench(lun, volume)
