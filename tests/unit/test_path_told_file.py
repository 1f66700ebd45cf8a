"""The told data path on a file, with real threads and a real clock."""

from __future__ import annotations

from pathlib import Path
from random import Random

import trio

from redirector.block.file import FileLun
from tests.unit.told_path import BLOCK, COORDINATOR_PORT, DATA_PORT, told_path


async def test_sessions_are_closed_under_load(tmp_path: Path) -> None:
    path_of_lun = tmp_path / "lun"
    with path_of_lun.open("wb") as file:
        file.truncate(16 << 20)
    lun = FileLun(path_of_lun)
    with trio.fail_after(30):
        async with told_path(lun) as (path, told):
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
                for losses, port in enumerate((DATA_PORT, COORDINATOR_PORT, DATA_PORT)):
                    # Somebody else logs in with that port: the session is closed.
                    thief = await lun.login(port)
                    await thief.aclose()
                    while path.status().losses < (losses + 2) // 2:  # noqa: ASYNC110
                        await trio.sleep(0.005)
                    while not path.status().flows:  # noqa: ASYNC110
                        await trio.sleep(0.005)
                stop.set()
            await path.flush()
            path.check()
            assert path.status().losses == 2
            assert told.proofs == 3
