"""The direct path on a file, with real threads and a real clock."""

from __future__ import annotations

from pathlib import Path
from random import Random

import trio

from redirector.block.file import FileLun
from tests.unit.one_node import BLOCK, CONTROL_PORT, DATA_PORT, open_path


async def test_sessions_are_closed_under_load(tmp_path: Path) -> None:
    path_of_lun = tmp_path / "lun"
    with path_of_lun.open("wb") as file:
        file.truncate(16 << 20)
    lun = FileLun(path_of_lun)
    with trio.fail_after(30):
        async with open_path(lun) as path:
            stop = trio.Event()

            async def load(block: int) -> None:
                rng = Random(block)
                while not stop.is_set():
                    data = rng.randbytes(BLOCK)
                    await path.write(block * BLOCK, data, fua=rng.random() < 0.2)
                    assert await path.read(block * BLOCK, BLOCK) == data

            async with trio.open_nursery() as nursery:
                for block in range(1, 9):
                    nursery.start_soon(load, block)
                for port in (DATA_PORT, CONTROL_PORT, DATA_PORT):
                    await trio.sleep(0.05)
                    # Somebody else logs in with our port: the session is closed.
                    thief = await lun.login(port)
                    await thief.aclose()
                    await trio.sleep(0.1)
                    await path._keeper.wait_healthy()
                stop.set()
            await path.flush()
            assert path.status().recoveries == 3
