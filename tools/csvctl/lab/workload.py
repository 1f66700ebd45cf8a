"""The programs that write and read on a lab's hosts: processes outside of any daemon.

    python -m csvctl.lab.workload write|read|verify JOB

JOB is a `Job` in JSON. All I/O is O_DIRECT, a block at a time. What happens goes to the job's log
(`csvctl.lab.history`), outside the volume. SIGTERM ends the program after what it is about. It ends
with 0, or with 3 at the first error of the filesystem, which is in the log. ``verify`` prints one
JSON object: what stands in each place.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from csvctl.lab.block import Foreign, Stamp, build, version_of

FAILED: Final = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What one program is to do."""

    mountpoint: str
    """Nothing is done if no filesystem stands there: a detached mount would leave a directory."""
    path: str
    file: int
    """The file's number in the scenario."""
    blocks: int
    log: str
    block_bytes: int = 4096
    term: int = 0
    """Of a writer: greater than that of any writer before."""
    batch: int = 8
    """Blocks a writer writes, at most, before it calls fsync."""
    rewrite: bool = False
    """A writer first looks at every block, then writes every block once."""
    once: bool = False
    """A writer ends after that."""
    until_full: bool = False
    """A writer ends, well, with ENOSPC."""
    pause_s: float = 0.0
    """Between two writes, or reads."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Job:
        """Raises ValueError, TypeError."""
        return cls(**json.loads(text))


def mounted_device(mountpoint: str) -> int:
    """The device number of what is mounted there. Raises OSError (ENOTCONN) if nothing is."""
    here = os.stat(mountpoint).st_dev
    if here == os.stat(Path(mountpoint).parent).st_dev:
        raise OSError(errno.ENOTCONN, "nothing is mounted there")
    return here


class _File:
    """A file of aligned blocks, open for direct I/O."""

    def __init__(self, job: Job, flags: int) -> None:
        self._job = job
        here = mounted_device(job.mountpoint)
        self.handle = os.open(job.path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o644)
        if os.fstat(self.handle).st_dev != here:
            raise OSError(errno.ENOTCONN, "the mount went away")
        self._buffer = mmap.mmap(-1, job.block_bytes)

    def read(self, offset: int) -> bytes:
        """A block; zeros behind the end. Raises OSError."""
        got = os.preadv(self.handle, [self._buffer], offset)
        return self._buffer[:got] + bytes(self._job.block_bytes - got)

    def write(self, offset: int, block: bytes) -> None:
        """Raises OSError."""
        self._buffer[:] = block
        written = os.pwritev(self.handle, [self._buffer], offset)
        if written != len(block):
            raise OSError(errno.EIO, f"{written} of {len(block)} bytes were written")


class Program:
    """What writer and reader have in common: the log, and the end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stopped = False
        self._log = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def say(self, *lines: str) -> None:
        """Log, in one write."""
        os.write(self._log, "".join(line + "\n" for line in lines).encode())

    def run(self) -> int:
        """The exit status."""
        signal.signal(signal.SIGTERM, self._stop)
        try:
            self.work()
        except OSError as error:
            self.say(f"ERROR {type(self).__name__.lower()} {error.errno} {time.monotonic_ns()}")
            return FAILED
        self.say(f"ENDED {time.monotonic_ns()}")
        return 0

    def work(self) -> None:
        """Until `stopped`. Raises OSError."""
        raise NotImplementedError

    def _stop(self, *_: object) -> None:
        self.stopped = True


class Writer(Program):
    """The one writer of a file, in its term."""

    def work(self) -> None:
        job = self.job
        self._file = _File(job, os.O_RDWR | os.O_CREAT)
        self._sequence = 0
        self._chooser = random.Random(job.term << 16 | job.file)
        if job.rewrite:
            self._look()
            for first in range(0, job.blocks, job.batch):
                if self.stopped or not self._write(
                    range(first, min(first + job.batch, job.blocks))
                ):
                    return
        while not (job.once or self.stopped):
            count = self._chooser.randint(1, min(job.batch, job.blocks))
            self._write(self._chooser.sample(range(job.blocks), count))
            time.sleep(job.pause_s)

    def _look(self) -> None:
        job = self.job
        for number in range(job.blocks):
            offset = number * job.block_bytes
            try:
                term, sequence = version_of(self._file.read(offset), job.file, offset)
            except Foreign as error:
                self.say(f"FOREIGN {job.file} {offset} {time.monotonic_ns()} {error}")
                continue
            about = f"{job.file} {offset} {term} {sequence}"
            self.say(f"FOUND {about} {job.term} {time.monotonic_ns()}")

    def _write(self, blocks: list[int] | range) -> bool:
        """Write blocks and fsync; False if the volume is full, and the job was to fill it."""
        job, events = self.job, []
        for number in blocks:
            offset = number * job.block_bytes
            self._sequence += 1
            events.append(f"{job.file} {offset} {job.term} {self._sequence}")
        self.say(*(f"ISSUED {event}" for event in events))
        written: list[int] = []
        first = self._sequence - len(events) + 1
        try:
            for position, number in enumerate(blocks):
                offset = number * job.block_bytes
                stamp = Stamp(job.file, offset, (job.term, first + position))
                self._file.write(offset, build(stamp, job.block_bytes))
                written.append(time.monotonic_ns())
            full = False
        except OSError as error:
            full = True
            if error.errno != errno.ENOSPC or not job.until_full:
                raise
        os.fsync(self._file.handle)
        now = time.monotonic_ns()
        done = zip(events, written, strict=False)
        self.say(*(f"ACKED {event} {each} {now}" for event, each in done))
        return not full


class Reader(Program):
    """Reads blocks at random."""

    def work(self) -> None:
        job = self.job
        file = _File(job, os.O_RDONLY)
        chooser = random.Random(os.getpid())
        while not self.stopped:
            offset = chooser.randrange(job.blocks) * job.block_bytes
            begun = time.monotonic_ns()
            block = file.read(offset)
            ended = time.monotonic_ns()
            try:
                term, sequence = version_of(block, job.file, offset)
            except Foreign as error:
                self.say(f"FOREIGN {job.file} {offset} {ended} {error}")
            else:
                self.say(f"READ {job.file} {offset} {term} {sequence} {begun} {ended}")
            time.sleep(job.pause_s)


def verify(job: Job) -> str:
    """What stands in each place: {"versions": {OFFSET: [TERM, SEQUENCE]}, "foreign": {...}}."""
    file = _File(job, os.O_RDONLY)
    versions: dict[int, tuple[int, int]] = {}
    foreign: dict[int, str] = {}
    for number in range(job.blocks):
        offset = number * job.block_bytes
        try:
            versions[offset] = version_of(file.read(offset), job.file, offset)
        except Foreign as error:
            foreign[offset] = str(error)
    return json.dumps({"versions": versions, "foreign": foreign})


def main(what: str, job: Job) -> int:
    """Do the job; the exit status."""
    if what == "verify":
        print(verify(job))
        return 0
    return {"write": Writer, "read": Reader}[what](job).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Job.decode(sys.argv[2])))
