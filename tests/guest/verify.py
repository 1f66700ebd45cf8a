"""Compare a guest's image with what the guest said on its console. A program of its own.

    python -m tests.guest.verify CONSOLE-LOG IMAGE

Every ``ACK SEQUENCE SLOT`` line names a block that the guest wrote *and flushed*: it must be in the
image. Exit status 1 when one is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .image import DATA_START_SECTOR, SECTOR_BYTES
from .machine import ACK

BLOCK_BYTES = 4096


def expected_block(sequence: int, slot: int) -> bytes:
    """What ``init.sh`` writes for this sequence number."""
    line = b"csvfs-guest %010d %010d" % (sequence, slot)
    return (line.ljust(511) + b"\n") * 8


def missing_blocks(log: Path, image: Path) -> tuple[int, list[int]]:
    """(acknowledged writes, sequence numbers of those that the image does not hold).

    A slot may have been written again later: the last acknowledgement counts.
    """
    matches = [ACK.match(line) for line in log.read_text().splitlines()]
    last = {int(found[2]): int(found[1]) for found in matches if found}
    missing = []
    with image.open("rb") as data:
        for slot, sequence in sorted(last.items()):
            data.seek(DATA_START_SECTOR * SECTOR_BYTES + slot * BLOCK_BYTES)
            if data.read(BLOCK_BYTES) != expected_block(sequence, slot):
                missing.append(sequence)
    return len(last), missing


def main(log: str, image: str) -> int:
    """Print the verdict; return the exit status."""
    acknowledged, missing = missing_blocks(Path(log), Path(image))
    print(f"guest verify: {acknowledged} acknowledged writes, {len(missing)} missing {missing[:5]}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
