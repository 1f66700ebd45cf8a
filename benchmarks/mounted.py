"""Figures of a mount: fio, creates, open of a fragmented image, resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path


def fio_iops(
    file: Path, rw: str, block_bytes: int, depth: int, seconds: int, size_bytes: int
) -> float:
    """Operations a second of one fio job: libaio, O_DIRECT, on a fully written file."""
    done = subprocess.run(
        [
            *("fio", "--name=bench", f"--filename={file}", f"--rw={rw}", f"--bs={block_bytes}"),
            *(f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", f"--size={size_bytes}"),
            *("--time_based", f"--runtime={seconds}", "--ramp_time=1", "--output-format=json"),
            *("--norandommap", "--randrepeat=0", "--overwrite=1"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read" if "read" in rw else "write"]["iops"])


def fill(file: Path, size_bytes: int) -> float:
    """Write the file fully, sequentially; return bytes a second, the final fsync included."""
    chunk = os.urandom(1 << 20)
    started = time.monotonic()
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        for offset in range(0, size_bytes, len(chunk)):
            os.pwrite(descriptor, chunk, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size_bytes / (time.monotonic() - started)


def creates_a_second(directory: Path, seconds: float) -> float:
    """Empty files created one after the other, in one directory."""
    directory.mkdir()
    started = time.monotonic()
    count = 0
    while time.monotonic() - started < seconds:
        os.close(os.open(directory / f"file{count:07}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        count += 1
    return count / (time.monotonic() - started)


def make_fragmented(file: Path, extents: int) -> None:
    """A file with so many extents: every second unit of 64 KiB is written."""
    data = os.urandom(65536)
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        for number in range(extents):
            os.pwrite(descriptor, data, number * 2 * 65536)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_and_read(file: Path) -> float:
    """Seconds to open a file and read its first, middle and last block."""
    started = time.monotonic()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        for offset in (0, size // 2 // 65536 * 65536, size - 65536):
            if len(os.pread(descriptor, 4096, offset)) != 4096:
                raise RuntimeError(f"{file} is shorter than it says")
        return time.monotonic() - started
    finally:
        os.close(descriptor)


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no VmRSS")
