"""Compare image files with the log of acknowledged writes. A program of its own, read only.

    python -m tests.workload.verify LOG IMAGE [IMAGE ...]

A block may be newer than its last acknowledgement (the write was under way), never older, never
torn, never another file's or another slot's. Prints one line; exit status 1 when anything is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from .block import BLOCK_BYTES, parse


@dataclass
class Verdict:
    """What a comparison found."""

    acknowledged: int = 0
    blocks: int = 0
    newer: int = 0
    lost: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is lost, torn or in the wrong place."""
        return not self.lost and not self.foreign


def read_log(path: Path) -> dict[tuple[int, int], int]:
    """(file, slot) -> sequence of the last acknowledged write."""
    last: dict[tuple[int, int], int] = {}
    for line in path.read_text().splitlines():
        file, slot, sequence = map(int, line.split())
        last[file, slot] = max(sequence, last.get((file, slot), 0))
    return last


def compare(log: Path, images: list[Path]) -> Verdict:
    """Read every block of every image and hold it against the log."""
    last = read_log(log)
    verdict = Verdict(acknowledged=len(last))
    for file, image in enumerate(images):
        with image.open("rb") as data:
            slot = 0
            while block := data.read(BLOCK_BYTES):
                _judge(verdict, last, file, slot, block)
                slot += 1
    return verdict


def _judge(
    verdict: Verdict, last: dict[tuple[int, int], int], file: int, slot: int, block: bytes
) -> None:
    expected = last.get((file, slot), 0)
    where = f"file {file} slot {slot}"
    try:
        stamp = parse(block)
    except ValueError as error:
        verdict.foreign.append(f"{where}: {error}")
        return
    if stamp is None:
        if expected:
            verdict.lost.append(f"{where}: zeros, write {expected} was acknowledged")
        return
    verdict.blocks += 1
    if (stamp.file, stamp.slot) != (file, slot):
        verdict.foreign.append(f"{where}: holds {stamp}")
    elif stamp.sequence < expected:
        verdict.lost.append(f"{where}: write {stamp.sequence}, {expected} was acknowledged")
    elif stamp.sequence > expected:
        verdict.newer += 1


def main(log: str, *images: str) -> int:
    """Print the verdict; return the exit status."""
    verdict = compare(Path(log), [Path(image) for image in images])
    for line in (*verdict.lost[:10], *verdict.foreign[:10]):
        print(line)
    print(
        f"verify: {verdict.acknowledged} acknowledged blocks, {verdict.blocks} written, "
        f"{verdict.newer} newer than acknowledged, {len(verdict.lost)} lost, "
        f"{len(verdict.foreign)} foreign or torn"
    )
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
