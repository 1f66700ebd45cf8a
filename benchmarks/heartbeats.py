"""How late heartbeats reach a peer when the machine has more to do than it can.

    python -m benchmarks.heartbeats [SECONDS]

One real node on tgt sends 40 a second, from the event loop ("python") and from the native thread
("native"); four processes per two processors compute. The kernel's time of arrival counts, not when
somebody gets to read. "computes": its own event loop does so as well, 20 ms at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from redirector.block.url import open_lun
from tests.member_nodes import format_lun
from tests.pulse_observer import Observer
from tests.system.test_pulse_tgt import HostProcess
from tests.tgt import Tgt

HEARTBEAT_S = 0.025


@contextmanager
def saturated() -> Iterator[None]:
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def late_ms(gaps: list[float]) -> list[float]:
    """How much longer than it should be, in order of size."""
    return sorted(max(gap - HEARTBEAT_S, 0.0) * 1000 for gap in gaps)


def measure(kind: str, command: str) -> str:
    with Tgt(lun_bytes=1 << 30) as tgt, Observer() as observer:
        trio.run(format_lun, open_lun(tgt.url, None))
        host = HostProcess(tgt.url, "alpha", observer.port, kind, HEARTBEAT_S)
        try:
            host.answer()
            with saturated():
                host.tell(command)
                told = host.answer(600)
        finally:
            host.close()
    late = late_ms(observer.gaps(told["began"], told["ended"])[1:-1])
    at = {part: late[int(part * (len(late) - 1))] for part in (0.5, 0.99, 0.999, 1.0)}
    words = "  ".join(f"{value:9.2f}" for value in at.values())
    return f"{kind:8} {command:14} {len(late):6} {words}  {told['lease_least_left_s']:6.2f}"


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    print("ms later than due                         p50        p99      p99.9       most  lease s")
    for command in (f"idle {seconds}", f"busy {seconds} 0.02"):
        for kind in ("python", "native"):
            print(measure(kind, command), flush=True)


if __name__ == "__main__":
    main()
