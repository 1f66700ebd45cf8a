"""A host that mounts volumes, as far as a test needs one: real csvctl, daemon, FUSE mount.

    with Tgt(lun_bytes=1 << 30) as tgt, Host() as host:
        host.format(tgt.url)
        with host.mounted(tgt.url) as mnt:
            (mnt.path / "file").write_text("x")

Each `Host` has a /run, an /etc/csvfs, a log, a machine id and a name of its own, so that several
can be played on one machine, and run side by side with other tests. At its end nothing of it is
left: no process, no mount. `Host.close` fails if the log holds a warning that the test has not
expected; a machine that does not let the daemon harden itself is not one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from csvfs.host import mountpoint
from csvfs.host.fuse import Connection
from tests.tgt import wait_until

CSVCTL = str(Path(sys.executable).with_name("csvctl"))
MOUNT_HELPER = str(Path(sys.executable).with_name("mount.csvfs"))
_UNHARDENED = ("not fully protected", "the OOM killer may take the supervisor")


class CsvctlFailed(AssertionError):
    """csvctl ended with a code that the test did not expect."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted volume."""

    host: Host
    url: str
    path: Path

    def status(self) -> dict[str, Any]:
        """What `csvctl status --json` says."""
        found: dict[str, Any] = json.loads(
            self.host.csvctl("status", str(self.path), "--json").stdout
        )
        return found

    @property
    def pid(self) -> int:
        """Of the daemon."""
        return int(self.status()["pid"])

    @property
    def supervisor(self) -> int:
        """Process id of the supervisor: the daemon's parent."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        parent = int(stat.rpartition(")")[2].split()[1])
        assert b"csvfs.supervisor" in Path(f"/proc/{parent}/cmdline").read_bytes()
        return parent

    @property
    def connection(self) -> Connection:
        """The FUSE connection."""
        return Connection.of(str(self.path))

    def kill(self) -> None:
        """SIGKILL the daemon, and wait until its mount was taken away."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: mountpoint.find(str(self.path)) is None, "the dead mount to be detached")

    def remount(self) -> None:
        """Mount the volume again where it was."""
        self.host.mount(self.url, self.path)

    def umount(self) -> None:
        self.host.csvctl("umount", str(self.path))


class Host:
    """One host; use it as a context manager."""

    def __init__(self, name: str = "host1", cluster_address: str = "") -> None:
        self.name = name
        self.cluster_address = cluster_address
        self.directory = Path(tempfile.mkdtemp(prefix=f"csvfs-{name}-"))
        self.directory.chmod(0o755)  # for tests that come as another user
        self.run = self.directory / "run"
        self.config = self.directory / "etc"
        self.config.mkdir()
        self.log_file = self.directory / "log"
        self.initiator = f"iqn.2026-11.test.csvfs:{name}-{secrets.token_hex(4)}"
        self.environment = {
            **os.environ,
            "CSVFS_RUN_DIR": str(self.run),
            "CSVFS_CONFIG_DIR": str(self.config),
            "CSVFS_LOG": str(self.log_file),
            "CSVFS_MACHINE_ID": secrets.token_hex(16),
            "PYTHONWARNINGS": "error",
        }
        # A process that may keep its bytecode starts in half the time.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._expected: list[str] = []
        self._mountpoints: list[Path] = []

    # -- running things ----------------------------------------------------------------------
    def csvctl(
        self, *arguments: str, code: int = 0, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run csvctl; `CsvctlFailed` with its words if it does not end with ``code``."""
        return self.command(CSVCTL, *arguments, code=code, timeout_s=timeout_s)

    def command(
        self, *argv: str, code: int = 0, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this host's environment."""
        done = subprocess.run(
            argv,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != code:
            raise CsvctlFailed(
                f"{' '.join(argv)} ended with {done.returncode}, not {code}:\n"
                f"{done.stdout}{done.stderr}\n{self.log()}"
            )
        return done

    def format(self, url: str, *options: str, label: str = "test") -> None:
        self.csvctl("format", url, "--label", label, *options)

    def mount(self, url: str, path: Path) -> None:
        arguments = ["--node", self.name]
        if self.cluster_address:
            arguments += ["--cluster-address", self.cluster_address]
        if url.startswith("iscsi:"):
            arguments += ["--initiator", self.initiator]
        self.csvctl("mount", url, str(path), *arguments)

    def mountpoint(self, name: str = "mnt") -> Path:
        """An empty directory, cleaned up in the end."""
        path = self.directory / name
        path.mkdir()
        self._mountpoints.append(path)
        return path

    @contextmanager
    def mounted(self, url: str, name: str = "mnt") -> Iterator[Mount]:
        """Mount; at the end unmount, if it is still mounted and the block did not fail."""
        path = self.directory / name
        if not path.exists():
            self.mountpoint(name)
        self.mount(url, path)
        found = Mount(self, url, path)
        yield found
        if mountpoint.find(str(path)) is not None:
            found.umount()

    # -- what it says ------------------------------------------------------------------------
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def expect(self, pattern: str) -> None:
        """Warnings and errors that match ``pattern`` are part of the test, and must come."""
        self._expected.append(pattern)

    def wait_logged(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self.log()) is not None, f"{pattern!r} in the log")

    def complaints(self) -> list[str]:
        """Warnings and errors in the log that were not expected."""
        found = re.findall(r"^\d[^\n]* (?:WARNING|ERROR|CRITICAL) .*$", self.log(), re.MULTILINE)
        ours = [line for line in found if not any(word in line for word in _UNHARDENED)]
        return [line for line in ours if not any(re.search(p, line) for p in self._expected)]

    # -- the end -----------------------------------------------------------------------------
    def daemons(self) -> list[int]:
        """Processes of this host's daemons and supervisors, by the directory they serve."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = any(word.startswith(bytes(self.directory) + b"/") for word in words)
            if ours and words[1:3] in ([b"-m", b"csvfs.daemon"], [b"-m", b"csvfs.supervisor"]):
                found.append(int(pid))
        return found

    def close(self, *, failed: bool = False) -> None:
        """Kill and detach what is left, and say so if something was."""
        left = [path for path in self._mountpoints if mountpoint.find(str(path)) is not None]
        for pid in self.daemons():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for path in left:
            while mountpoint.find(str(path)) is not None:
                mountpoint.detach(str(path))
        wait_until(lambda: not self.daemons(), "the daemons of the test to end")
        log, complaints = self.log(), self.complaints()
        shutil.rmtree(self.directory)
        if failed:
            print(log, file=sys.stderr)
            return
        assert not left, f"still mounted at the end of the test: {left}\n{log}"
        assert not complaints, "unexpected in the log:\n" + "\n".join(complaints) + f"\n\n{log}"
        for pattern in self._expected:
            assert re.search(pattern, log), f"{pattern!r} did not come in the log:\n{log}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=error is not None)
