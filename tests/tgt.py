"""A real iSCSI target (`tgtd`) for tests: started on a free port, gone afterwards.

    with Tgt(lun_bytes=256 << 20) as tgt:
        lun = open_lun(tgt.url)

Several run side by side: each has a control socket, a log and backing files in a directory of its
own, and a LUN serial that no other has. The target is tuned for 256 KiB data segments.

Everything here blocks for milliseconds; from trio call `restart` and the like directly.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_TUNING = {
    "MaxRecvDataSegmentLength": "262144",
    "MaxXmitDataSegmentLength": "262144",
    "FirstBurstLength": "262144",
    "MaxBurstLength": "1048576",
    "InitialR2T": "No",
    "ImmediateData": "Yes",
}
_LATE_WRITE_SOURCE = Path(__file__).with_name("late_write.c")
_START_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Connection:
    """One TCP connection of a session, as tgtd numbers them."""

    session: int
    connection: int
    initiator: str


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Return as soon as ``condition`` holds; `TimeoutError` names ``what`` did not come."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {limit_s} s for {what}")
        time.sleep(0.005)


class Tgt:
    """One `tgtd` with one target and LUN 1, and more by `add_lun`."""

    def __init__(
        self,
        *,
        lun_bytes: int = 64 << 20,
        chap: tuple[str, str] | None = None,
        late_ms: int | None = None,
        late_gate: bool = False,
        tuned: bool = True,
        thin: bool = True,
        address: str = "127.0.0.1",
        iqn: str | None = None,
    ) -> None:
        """``chap`` is (user, password). ``late_ms`` and ``late_gate`` hold back writes that begin
        with ``b"SLOW"``: for that long, or while the gate is closed (see `hold_writes`).
        ``address`` is any of 127.0.0.0/8; without ``iqn`` the target's name is a fresh one.
        """
        self.iqn = iqn or f"iqn.2026-11.test.csvfs:{secrets.token_hex(4)}"
        self.address = address
        self.port = 0
        self.chap = chap
        self._tuned = tuned
        self._thin = thin
        memory = Path("/dev/shm")
        root = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="csvfs-tgt-", dir=root))
        self._log = self.directory / "tgtd.log"
        self._gate = self.directory / "gate"
        self._control = secrets.randbelow(30_000)
        self._process: subprocess.Popen[bytes] | None = None
        self._backing: dict[int, Path] = {}
        self._block_bytes: dict[int, int] = {}
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(self.directory / "ctl")}
        atexit.register(self.stop)
        try:
            if late_ms is not None or late_gate:
                self._preload_late_write(late_ms)
            self._backing[1] = self._new_backing(1, lun_bytes)
            self._start(port=None)
        except BaseException:
            self.stop()
            raise

    # -- where it is ------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        """Process id of the running tgtd."""
        if self._process is None:
            raise RuntimeError("tgtd is not running")
        return self._process.pid

    @property
    def portal(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def url(self) -> str:
        """URL of LUN 1, without credentials."""
        return self.lun_url(1)

    def lun_url(self, lun: int) -> str:
        return f"iscsi://{self.portal}/{self.iqn}/{lun}"

    def backing(self, lun: int = 1) -> Path:
        """The file that holds the LUN's bytes, to be read behind the target's back."""
        return self._backing[lun]

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    # -- what it holds ----------------------------------------------------------------------
    def add_lun(
        self,
        size_bytes: int | None = None,
        *,
        path: Path | None = None,
        number: int | None = None,
        block_bytes: int = 512,
    ) -> int:
        """Add a LUN, on a fresh sparse file of that size or on ``path``; return its number."""
        if number is None:
            number = max(self._backing, default=0) + 1
        self._block_bytes[number] = block_bytes
        if path is None:
            path = self._new_backing(number, size_bytes if size_bytes is not None else 64 << 20)
        self._backing[number] = path
        self._create_lun(number, path)
        return number

    def remove_lun(self, lun: int) -> None:
        self.admin("--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", str(lun))
        del self._backing[lun]

    def admin(self, *arguments: str) -> str:
        """Run ``tgtadm`` against this tgtd; `RuntimeError` with its words when it refuses."""
        done = subprocess.run(
            ["tgtadm", "-C", str(self._control), "--lld", "iscsi", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"tgtadm {' '.join(arguments)}: {done.stderr.strip()}\n{self.log()}")
        return done.stdout

    # -- trouble ----------------------------------------------------------------------------
    def connections(self) -> list[Connection]:
        """The sessions that are logged in now."""
        shown = self.admin("--op", "show", "--mode", "conn", "--tid", "1")
        found = re.findall(r"Session: (\d+)\s+Connection: (\d+)\s+Initiator: (\S+)", shown)
        return [Connection(int(s), int(c), initiator) for s, c, initiator in found]

    def cut(self, initiator: str | None = None) -> int:
        """Drop every connection (of ``initiator``); what was in flight still lands. The number."""
        cut = 0
        for each in self.connections():
            if initiator is not None and each.initiator != initiator:
                continue
            sid, cid = str(each.session), str(each.connection)
            with contextlib.suppress(RuntimeError):  # it closed by itself meanwhile
                self.admin(
                    "--op", "delete", "--mode", "conn", "--tid", "1", "--sid", sid, "--cid", cid
                )
                cut += 1
        return cut

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts and acknowledges, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL and reap: every reservation and session is gone, the backing files stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """A fresh tgtd on the same port, with the same name and the same LUNs."""
        self.kill()
        self._start(port=self.port)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def hold_writes(self) -> None:
        """Close the gate (``late_gate=True``): writes that begin with ``b"SLOW"`` wait in tgtd."""
        self._marker.unlink(missing_ok=True)
        self._gate.touch()

    def release_writes(self) -> None:
        self._gate.unlink(missing_ok=True)

    def held_writes(self) -> int:
        """How many writes came to the gate since it was last closed."""
        return self._marker.stat().st_size if self._marker.exists() else 0

    # -- life -------------------------------------------------------------------------------
    def stop(self) -> None:
        """Kill tgtd and remove every file of it. Idempotent."""
        atexit.unregister(self.stop)
        self.release_writes()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _marker(self) -> Path:
        return self._gate.with_name("gate.held")

    def _preload_late_write(self, late_ms: int | None) -> None:
        library = self.directory / "late_write.so"
        command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_LATE_WRITE_SOURCE)]
        subprocess.run([*command, "-ldl"], check=True)
        self._environment |= {"LD_PRELOAD": str(library), "LATE_GATE": str(self._gate)}
        if late_ms is not None:
            self._environment["LATE_MS"] = str(late_ms)

    def _new_backing(self, lun: int, size_bytes: int) -> Path:
        path = self.directory / f"lun{lun}"
        with path.open("xb") as file:
            file.truncate(size_bytes)
        return path

    def _start(self, port: int | None) -> None:
        # Between finding a free port and tgtd's bind another process may take it: tgtd then runs
        # on without a portal, says so in its log, and we choose again.
        end = time.monotonic() + _START_LIMIT_S
        while True:
            self.port = port if port is not None else _free_port(self.address)
            self._launch()
            if "failed to create/bind" not in self.log():
                break
            self.kill()
            if time.monotonic() > end:
                raise RuntimeError(f"tgtd cannot listen on {self.portal}:\n{self.log()}")
            time.sleep(0.05)
        self._configure()

    def _launch(self) -> None:
        for leftover in self.directory.glob("ctl.*"):
            leftover.unlink()
        portal = f"portal={self.portal}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["tgtd", "-f", "-C", str(self._control), "--iscsi", portal],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's ^C is for the test, which then stops tgtd
            )

        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"tgtd ended at once:\n{self.log()}")
            try:
                shown = self.admin("--op", "show", "--mode", "portal")
            except RuntimeError:
                return False
            return self.portal in shown or "failed to create/bind" in self.log()

        wait_until(answers, "tgtd to answer", _START_LIMIT_S)

    def _configure(self) -> None:
        self.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", self.iqn)
        update = ("--op", "update", "--mode", "target", "--tid", "1")
        for name, value in (_TUNING if self._tuned else {}).items():
            self.admin(*update, "--name", name, "--value", value)
        for lun, path in self._backing.items():
            self._create_lun(lun, path)
        if self.chap is not None:
            user, password = self.chap
            account = ("--mode", "account", "--user", user)
            self.admin("--op", "new", *account, "--password", password)
            self.admin("--op", "bind", *account, "--tid", "1")
        self.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def _create_lun(self, lun: int, path: Path) -> None:
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", str(lun))
        block = str(self._block_bytes.get(lun, 512))
        self.admin("--op", "new", *unit, "-b", str(path), "--blocksize", block)
        serial = f"{self.iqn.rpartition(':')[2]}{lun:02x}"
        parameters = f"scsi_sn={serial},scsi_id=CSVFS {serial}"
        if self._thin:
            parameters += ",thin_provisioning=1"
        self.admin("--op", "update", *unit, "--params", parameters)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
