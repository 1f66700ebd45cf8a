"""How soon given-up space comes back."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from csvfs.errors import NoSpace
from csvfs.namespace.inode import SetAttributes
from csvfs.volume import Volume
from tests.simulated_volume import ROOT, UNIT, create, fresh_volume

CHUNK = bytes(16 * UNIT)


async def fill(volume: Volume, name: bytes, chunks: int | None = None) -> int:
    """A file of so many chunks, or of all space that is left; its number. It is closed again."""
    handle = await create(volume, name)
    size = 0
    try:
        while chunks is None or size < chunks * len(CHUNK):
            size += await volume.write(handle, size, CHUNK)
    except NoSpace:
        assert chunks is None
    await volume.release(handle)
    return handle.ino


@pytest.mark.parametrize("given_up", ["unlinked", "truncated", "both"])
def test_a_writer_does_not_wait_for_the_timer(given_up: str) -> None:
    """Space that was given up a moment ago is there for a write that needs it, though the
    reclaimer's round under way had set out to wait for the commit that comes by itself."""
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with fresh_volume() as volume:
            first = await fill(volume, b"first", 20)
            second = await fill(volume, b"second")
            if given_up != "truncated":
                await volume.unlink(ROOT, b"first")
                await volume.forget(first, 1)
                await trio.testing.wait_all_tasks_blocked()
            if given_up != "unlinked":
                await volume.setattr(second, SetAttributes(size=20 * len(CHUNK)))
                await trio.testing.wait_all_tasks_blocked()
                await volume.setattr(second, SetAttributes(size=10 * len(CHUNK)))
            clock.autojump_threshold = 0
            begun = trio.current_time()
            handle = await create(volume, b"third", flags=os.O_RDWR)
            for number in range(8):
                assert await volume.write(handle, number * len(CHUNK), CHUNK) == len(CHUNK)
            assert trio.current_time() - begun < 1.0
            await volume.release(handle)

    trio.run(main, clock=clock)
