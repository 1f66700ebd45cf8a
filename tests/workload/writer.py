"""Write stamped blocks to image files at random, fsync, and log each acknowledged write.

    python -m tests.workload.writer LOG IMAGE [IMAGE ...]

The log lies outside the volume: a line ``FILE SLOT SEQUENCE`` is appended (in one write) only after
fsync has returned. A writer that goes on with a log numbers its writes behind those of an earlier
one. Ends at the first error of the filesystem (the daemon was killed) or at SIGTERM, and prints how
many writes were acknowledged.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from .block import BLOCK_BYTES, Stamp, build
from .verify import read_log

BATCH = 8


def batch_of_writes(
    descriptors: list[int], slots: int, chooser: random.Random, sequence: int
) -> list[Stamp]:
    """Write up to `BATCH` blocks into one file and fsync it; return what is now acknowledged."""
    file = chooser.randrange(len(descriptors))
    stamps = [
        Stamp(file, slot, sequence + position)
        for position, slot in enumerate(chooser.sample(range(slots), chooser.randint(1, BATCH)))
    ]
    for stamp in stamps:
        os.pwrite(descriptors[file], build(stamp), stamp.slot * BLOCK_BYTES)
    if chooser.random() < 0.5:
        os.fsync(descriptors[file])
    else:
        os.fdatasync(descriptors[file])
    return stamps


def main(log_path: str, *images: str) -> int:
    """Run until an error or SIGTERM; return the exit status."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    chooser = random.Random(os.getpid())
    descriptors = [os.open(image, os.O_RDWR) for image in images]
    slots = min(os.fstat(descriptor).st_size for descriptor in descriptors) // BLOCK_BYTES
    log_file = Path(log_path)
    earlier = read_log(log_file).values() if log_file.exists() else ()
    # The last batch of an earlier writer may have been written without being acknowledged.
    first = sequence = max(earlier, default=0) + BATCH + 1
    why = "stopped"
    with log_file.open("ab", buffering=0) as log:
        try:
            while not stopped:
                stamps = batch_of_writes(descriptors, slots, chooser, sequence)
                sequence += len(stamps)
                log.write(b"".join(b"%d %d %d\n" % (s.file, s.slot, s.sequence) for s in stamps))
        except OSError as error:
            why = str(error.strerror)
    print(f"writer: {why} after {sequence - first} acknowledged writes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
