"""A node on a simulated LUN, for the tests of the direct path: two sessions, a view, a path."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from redirector.block.device import InitiatorPort, Lun
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration
from redirector.path import DirectPath

BLOCK = 4096
NAME = "iqn.2026-11.test:host"
CONTROL, DATA = (PathKey(3, 9, generation).pack() for generation in (1, 2))


def port(number: int) -> InitiatorPort:
    return InitiatorPort(f"{NAME}{number}", 0x8000_0000_0000 + number)


CONTROL_PORT, DATA_PORT = port(1), port(2)


class OneView:
    """The view, as far as the path asks for it: one block at the start of the LUN."""

    def __init__(self) -> None:
        self.listed = True
        self.asked = 0
        self.moves: list[tuple[int, int]] = []
        self.writes_on_move = False

    async def lists_us(self, path: Registration) -> bool:
        self.asked += 1
        await path.ask(lambda: path.device.read(0, BLOCK))
        return self.listed

    async def moved(self, control: Registration, data: Registration) -> None:
        if self.writes_on_move:
            await control.ask(lambda: control.device.write(0, bytes(BLOCK), fua=True))
        self.moves.append((control.key, data.key))


@contextlib.asynccontextmanager
async def open_path(lun: Lun, view: OneView | None = None) -> AsyncIterator[DirectPath]:
    """A running path; its sessions are dropped at the end."""
    control = await Registration.register(await lun.login(CONTROL_PORT), CONTROL)
    data = await Registration.register(await lun.login(DATA_PORT), DATA)
    await control.reserve()
    path = DirectPath(lun, control, data, view or OneView())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.run)
        try:
            yield path
        finally:
            nursery.cancel_scope.cancel()
    await control.device.aclose()
    await data.device.aclose()
