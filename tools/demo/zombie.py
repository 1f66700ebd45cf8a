"""What a host that was evicted can still do to the LUN: try a write over a session of its own.

    python -m tools.demo.zombie LUN INITIATOR-NAME

Logs in as that host, as any program of it could, and writes a heartbeat block that nobody has.
Prints how the target answered. Exit status 0 if it refused, 1 if it did not.
"""

from __future__ import annotations

import sys
from random import SystemRandom

import trio

from csvfs.format import MAX_SLOTS, byte_offset
from csvfs.ondisk.geometry import HEARTBEAT_AREA
from redirector.block.device import ReservationConflict
from redirector.block.keys import choose_port
from redirector.block.reservations import patiently
from redirector.block.url import open_lun


async def write(url: str, initiator: str) -> int:
    """One write; the exit status."""
    async with await open_lun(url).login(choose_port(initiator, SystemRandom())) as device:
        offset = byte_offset(HEARTBEAT_AREA + MAX_SLOTS - 1)
        try:
            await patiently(lambda: device.write(offset, b"zombie".ljust(4096, b"\0")))
        except ReservationConflict as refusal:
            print(f"a write on a fresh session: {refusal}")
            return 0
    print("a write on a fresh session was carried out")
    return 1


if __name__ == "__main__":
    sys.exit(trio.run(write, sys.argv[1], sys.argv[2]))
