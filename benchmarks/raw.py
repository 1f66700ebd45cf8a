"""The raw LUN, without a filesystem: iscsi-perf reads, qemu-img bench writes.

There is no kernel initiator to give fio a block device, and fio has no iSCSI engine here; these are
the programs of libiscsi and of QEMU.
"""

from __future__ import annotations

import re
import subprocess

SECTOR_BYTES = 512
SCATTER_BYTES = 1052672
"""Step between writes that stands for random: wraps around the LUN at another place each time."""


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_iops(url: str, block_bytes: int, depth: int, seconds: int, *, random: bool) -> float:
    """Reads a second by iscsi-perf."""
    said = _output(
        "iscsi-perf",
        *(["-r"] if random else []),
        *("-m", str(depth), "-b", str(block_bytes // SECTOR_BYTES), "-t", str(seconds), url),
    )
    found = re.findall(r"iops average (\d+)", said)
    if not found:
        raise RuntimeError(f"iscsi-perf said nothing that can be read:\n{said}")
    return float(found[-1])


def write_iops(url: str, block_bytes: int, depth: int, seconds: int, *, random: bool) -> float:
    """Writes a second by qemu-img bench, without a flush. Destroys what is on the LUN."""

    def run(count: int) -> float:
        step = SCATTER_BYTES if random else block_bytes
        said = _output(
            "qemu-img",
            *("bench", "-w", "-f", "raw", "-t", "none", "-c", str(count), "-d", str(depth)),
            *("-s", str(block_bytes), "-S", str(step), url),
        )
        found = re.search(r"Run completed in ([\d.]+) seconds", said)
        if found is None:
            raise RuntimeError(f"qemu-img bench said nothing that can be read:\n{said}")
        return count / max(float(found[1]), 1e-3)

    return run(max(200, int(run(200 if block_bytes > 65536 else 5000) * seconds)))
