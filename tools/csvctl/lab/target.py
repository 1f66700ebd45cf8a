"""The lab's tgtd, in a namespace of its own: one target, LUN 1 on a sparse file.

Killed and started again it has forgotten every session and reservation, and kept the bytes: that is
the fault `target-restart`. It is tuned for data segments of 256 KiB.
"""

from __future__ import annotations

import os
import subprocess
from typing import Final

from csvctl.lab.host import launch
from csvctl.lab.processes import Member, end, members, namespace_of, wait_until
from csvctl.lab.state import LabState
from csvfs.host.problems import Kind, Problem

_TUNING: Final = {
    "MaxRecvDataSegmentLength": "262144",
    "MaxXmitDataSegmentLength": "262144",
    "FirstBurstLength": "262144",
    "MaxBurstLength": "1048576",
    "InitialR2T": "No",
    "ImmediateData": "Yes",
}
_START_LIMIT_S: Final = 20.0


def make_lun(state: LabState) -> None:
    """The LUN's bytes: none yet. Raises OSError."""
    with (state.path / "target" / "lun1").open("xb") as file:
        file.truncate(state.size_bytes)


def start(state: LabState) -> None:
    """Start it, and return when the LUN is served. Raises `Problem`, OSError."""
    for leftover in (state.path / "target").glob("ctl.*"):
        leftover.unlink()
    portal = f"portal={state.target_address}:3260"
    launch(
        state,
        "target",
        ["tgtd", "-f", "-C", "0", "--iscsi", portal],
        log=state.path / "log" / "tgtd.log",
        environment=_environment(state),
    )
    wait_until(lambda: _answers(state), "tgtd to answer", _START_LIMIT_S)
    _configure(state)


def kill(state: LabState) -> None:
    """SIGKILL; returns when it has ended."""
    namespace = namespace_of(state.namespace("target"))
    if namespace is not None:
        end(processes(state), [namespace])


def processes(state: LabState) -> list[Member]:
    """The tgtd, if it runs."""
    namespace = namespace_of(state.namespace("target"))
    if namespace is None:
        return []
    return [each for each in members([namespace]) if each.command[:1] == ("tgtd",)]


def _environment(state: LabState) -> dict[str, str]:
    return {**os.environ, "TGT_IPC_SOCKET": str(state.path / "target" / "ctl")}


def _answers(state: LabState) -> bool:
    shown = _tgtadm(state, "--op", "show", "--mode", "portal")
    return shown.returncode == 0 and state.target_address in shown.stdout


def _configure(state: LabState) -> None:
    update = ("--op", "update", "--mode", "target", "--tid", "1")
    unit = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
    serial = f"{state.id}01"
    steps: list[tuple[str, ...]] = [
        ("--op", "new", "--mode", "target", "--tid", "1", "-T", state.target_iqn)
    ]
    steps += [(*update, "--name", name, "--value", value) for name, value in _TUNING.items()]
    steps += [
        ("--op", "new", *unit, "-b", str(state.path / "target" / "lun1")),
        (
            *("--op", "update", *unit),
            *("--params", f"scsi_sn={serial},scsi_id=CSVFS {serial},thin_provisioning=1"),
        ),
        ("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"),
    ]
    for step in steps:
        done = _tgtadm(state, *step)
        if done.returncode:
            raise Problem(Kind.SYSTEM, f"tgtadm {' '.join(step)}: {done.stderr.strip()}")


def _tgtadm(state: LabState, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["tgtadm", "-C", "0", "--lld", "iscsi", *arguments],
        env=_environment(state),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
