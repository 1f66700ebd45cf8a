"""A host: its environment, commands on it, its mount and its daemon.

A command enters the host's network namespace with nsenter(1) (setns(2) for the network alone) and
runs in everything else of the machine: a mount that it makes is seen by everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from csvctl.lab.processes import Member, Namespace, end, members, namespace_of, send, wait_until
from csvctl.lab.state import NAMESPACES, HostState, LabState
from csvfs.host import mountpoint
from csvfs.host.problems import Kind, Problem

DAEMON: Final = "csvfs.daemon"
SUPERVISOR: Final = "csvfs.supervisor"
_MOUNT_LIMIT_S: Final = 120.0
_UMOUNT_LIMIT_S: Final = 120.0
_END_LIMIT_S: Final = 30.0


def enter(state: LabState, role: str) -> list[str]:
    """The words to put before a command that is to run there."""
    return ["nsenter", f"--net={NAMESPACES / state.namespace(role)}", "--"]


def launch(
    state: LabState, role: str, command: list[str], *, log: Path, environment: dict[str, str]
) -> None:
    """Start a process that outlives this one. Raises `Problem` if it cannot be started."""
    with log.open("ab") as words:
        done = subprocess.run(
            ["setsid", "--fork", *enter(state, role), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            cwd="/",
            check=False,
        )
    if done.returncode:
        raise Problem(Kind.SYSTEM, f"{command[0]} could not be started; see {log}")


class Host:
    """One host of a lab that exists."""

    def __init__(self, lab: LabState, state: HostState) -> None:
        self.lab = lab
        self.state = state
        self.name = state.name
        self.mountpoint = lab.path / state.name
        self.run_directory = lab.path / "run" / state.name
        self.log = lab.path / "log" / f"{state.name}.log"

    @property
    def namespace(self) -> Namespace:
        """Raises `Problem` if the host has none (any more)."""
        found = namespace_of(self.lab.namespace(self.name))
        if found is None:
            raise Problem(Kind.USAGE, f"{self.name} is gone: `csvctl lab down` cleans up")
        return found

    # -- commands ------------------------------------------------------------------------------
    def environment(self) -> dict[str, str]:
        """csvctl keeps this host's things apart from those of the machine and of other hosts."""
        scripts = str(Path(sys.executable).parent)
        return {
            **{name: text for name, text in os.environ.items() if name != "NOTIFY_SOCKET"},
            "PATH": f"{scripts}:{os.environ.get('PATH', os.defpath)}",
            "CSVFS_RUN_DIR": str(self.run_directory),
            "CSVFS_CONFIG_DIR": str(self.lab.path / "etc" / self.name),
            "CSVFS_LOG": str(self.log),
            "CSVFS_MACHINE_ID": self.state.machine_id,
            "CSVFS_BOOT_ID": self.state.boot_id,
        }

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on the host, as `subprocess.Popen` does."""
        return subprocess.Popen(
            [*enter(self.lab, self.name), *command], env=self.environment(), **options
        )

    def csvctl(self, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        """Run csvctl on the host to its end. Raises `Problem` (NO_ANSWER) when it takes longer."""
        command = [sys.executable, "-m", "csvctl.main", *arguments]
        try:
            return subprocess.run(
                [*enter(self.lab, self.name), *command],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Problem(
                Kind.NO_ANSWER,
                f"{self.name}: `csvctl {arguments[0]}` has not ended within {limit_s:g} s",
            ) from None

    # -- the mount -----------------------------------------------------------------------------
    @property
    def is_mounted(self) -> bool:
        """True if a filesystem stands at the mount point, dead or alive. Asks no daemon."""
        return mountpoint.find(str(self.mountpoint)) is not None

    def mount(self) -> None:
        """Mount the volume. Raises `Problem` with csvctl's own words."""
        options = ["--node", self.name, "--initiator", self.state.initiator]
        if len(self.lab.hosts) > 1:
            options += ["--cluster-address", self.state.cluster_address]
        self._succeed("mount", self.lab.lun, str(self.mountpoint), *options, limit_s=_MOUNT_LIMIT_S)

    def umount(self) -> None:
        """Leave the volume; not mounted is no error. Raises `Problem`."""
        if self.is_mounted:
            self._succeed("umount", str(self.mountpoint), limit_s=_UMOUNT_LIMIT_S)

    def status(self) -> dict[str, Any]:
        """What `csvctl status` says of the mount; empty if there is none to speak of."""
        done = self.csvctl("status", str(self.mountpoint), "--json", limit_s=30)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def _succeed(self, *arguments: str, limit_s: float) -> str:
        done = self.csvctl(*arguments, limit_s=limit_s)
        if done.returncode:
            raise Problem(
                Kind.SYSTEM,
                f"{self.name}: `csvctl {' '.join(arguments)}` ended with {done.returncode}: "
                f"{done.stderr.strip()}\n{self._last_logged()}",
            )
        return done.stdout

    def _last_logged(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-3:])

    # -- its processes ---------------------------------------------------------------------------
    def processes(self) -> list[Member]:
        """Everybody who lives on the host."""
        return members([self.namespace])

    def daemon(self) -> Member | None:
        """The daemon, if one lives."""
        return next((each for each in self.processes() if each.module == DAEMON), None)

    def signal_daemon(self, number: signal.Signals) -> None:
        """Raises `Problem` (NOT_MOUNTED) if no daemon lives."""
        daemon = self.daemon()
        if daemon is None or not send(daemon, [self.namespace], number):
            raise Problem(Kind.NOT_MOUNTED, f"no daemon lives on {self.name}")

    def wait_daemon_ended(self, limit_s: float = _END_LIMIT_S) -> None:
        """Return when daemon and supervisor have ended, and so the mount is detached."""

        def ended() -> bool:
            return not any(each.module in (DAEMON, SUPERVISOR) for each in self.processes())

        wait_until(ended, f"the daemon of {self.name} to end", limit_s)

    def kill_everything(self) -> None:
        """SIGKILL everybody on the host, and wait for their end."""
        while found := self.processes():
            end(found, [self.namespace])

    def lose_memory(self, boot_id: str) -> None:
        """What a loss of power leaves: an empty /run, another boot, and no mount."""
        self.state.boot_id = boot_id
        shutil.rmtree(self.run_directory, ignore_errors=True)
        while self.is_mounted:
            mountpoint.detach(str(self.mountpoint))
