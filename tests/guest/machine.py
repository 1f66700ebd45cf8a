"""One QEMU guest, booted from an image by its own boot loader, and what it says on its console."""

from __future__ import annotations

import re
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ACK = re.compile(r"^ACK (\d+) (\d+)$")


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The guest wrote block ``slot`` of its data partition with ``sequence``, and flushed it."""

    sequence: int
    slot: int


class Machine:
    """A running guest; its console is read by a thread and appended to ``log`` (not on the volume).

    Concurrency: one reader thread owns ``_lines``; `wait_for` waits on its condition.
    """

    def __init__(self, image: Path, order: str, log: Path, *, cache: str = "none") -> None:
        self._log = log.open("a")
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-machine", "pc,accel=tcg", "-m", "128", "-smp", "1", "-nodefaults"),
                *("-display", "none", "-no-reboot", "-serial", "stdio"),
                *("-smbios", f"type=1,serial={order}"),
                *(
                    "-drive",
                    f"file={image},format=raw,if=none,id=disk,cache={cache},werror=stop,rerror=stop",
                ),
                *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            self._log.write(line + "\n")
            self._log.flush()
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self._process.pid

    @property
    def acknowledged(self) -> list[Acknowledged]:
        """Every write that the guest has flushed and said so, in its order."""
        with self._changed:
            found = [ACK.match(line) for line in self._lines]
        return [Acknowledged(int(m[1]), int(m[2])) for m in found if m]

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """Wait until a console line matches; return it. Raises `TimeoutError` with the console's
        end when it does not come in time or the machine ends before."""
        wanted = re.compile(pattern)

        def match() -> str | None:
            return next((line for line in self._lines if wanted.search(line)), None)

        with self._changed:
            self._changed.wait_for(lambda: match() is not None or self._ended, timeout_s)
            found = match()
            if found is None:
                tail = "\n".join(self._lines[-15:])
                raise TimeoutError(
                    f"no {pattern!r} on the console in {timeout_s} s; it said:\n{tail}"
                )
            return found

    def wait_for_acknowledged(self, count: int, timeout_s: float) -> None:
        """Wait until the guest has acknowledged ``count`` writes."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: (
                    sum(line.startswith("ACK ") for line in self._lines) >= count or self._ended
                ),
                timeout_s,
            )
        if not enough or len(self.acknowledged) < count:
            raise TimeoutError(f"{len(self.acknowledged)} of {count} writes in {timeout_s} s")

    def wait_ended(self, timeout_s: float) -> int:
        """Wait until QEMU has ended; return its exit status."""
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """Pull the plug."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
