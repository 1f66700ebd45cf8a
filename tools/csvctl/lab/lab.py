"""A lab from nothing to mounted hosts, and back to nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from csvctl.lab import network, processes, state, target
from csvctl.lab.host import Host
from csvctl.lab.state import PREFIX, LabState
from csvfs.host import mountpoint
from csvfs.host.problems import Kind, Problem

_PROGRAMS: Final = {"tgtd": "tgt", "tgtadm": "tgt", "nsenter": "util-linux", "setsid": "util-linux"}
_PARTS: Final = ("run", "etc", "log", "target", "work")
"""Directories below the lab's own; the hosts' mount points stand beside them."""
_FORMAT_LIMIT_S: Final = 120.0
_MOUNTS_AT_ONCE: Final = 4
_FLAGS: Final = struct.Struct("@l")
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IMMUTABLE_FL: Final = 0x10

Told = Callable[[str], None]


def up(directory: Path, hosts: int, size_bytes: int, tell: Told) -> LabState:
    """Make a lab, format its LUN and mount it on every host.

    What there is of it when something goes wrong is taken away again. Raises `Problem`, OSError,
    TimeoutError.
    """
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise Problem(Kind.SYSTEM, f"a lab needs {program} (Debian package {package})")
    lab = state.new_state(directory, hosts, size_bytes)
    state.begin(lab)
    try:
        _build(lab, tell)
    except BaseException:
        down(lab.id, lab.path)
        raise
    return lab


def _build(lab: LabState, tell: Told) -> None:
    for part in _PARTS:
        (lab.path / part).mkdir(mode=0o700)
    for member in lab.hosts:
        (lab.path / member.name).mkdir()
        _set_immutable(lab.path / member.name, on=True)
        (lab.path / "etc" / member.name).mkdir()
    tell("network")
    network.make(lab)
    tell("target")
    target.make_lun(lab)
    target.start(lab)
    first, *others = (Host(lab, member) for member in lab.hosts)
    tell("format")
    done = first.csvctl("format", lab.lun, "--label", "lab", limit_s=_FORMAT_LIMIT_S)
    if done.returncode:
        raise Problem(Kind.SYSTEM, f"`csvctl format` failed: {done.stderr.strip()}")
    tell("mount on host1")
    first.mount()
    tell(f"mount on {len(others)} more")
    mount_all(others)


def _set_immutable(directory: Path, *, on: bool) -> None:
    """So that a program that goes on after its mount was detached writes to nowhere (chattr(1) +i).

    A filesystem that cannot do that does without.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (flags,) = _FLAGS.unpack(fcntl.ioctl(handle, _FS_IOC_GETFLAGS, bytes(_FLAGS.size)))
        flags = flags | _FS_IMMUTABLE_FL if on else flags & ~_FS_IMMUTABLE_FL
        fcntl.ioctl(handle, _FS_IOC_SETFLAGS, _FLAGS.pack(flags))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def mount_all(hosts: list[Host]) -> None:
    """Mount on several hosts at once. Raises the first `Problem`."""
    with ThreadPoolExecutor(_MOUNTS_AT_ONCE) as pool:
        for done in [pool.submit(host.mount) for host in hosts]:
            done.result()


def describe(lab: LabState) -> dict[str, Any]:
    """What there is; asks no daemon, so that a frozen one does not hold it up."""
    return {
        "id": lab.id,
        "directory": lab.directory,
        "lun": lab.lun,
        "size_bytes": lab.size_bytes,
        "target": {
            "namespace": lab.namespace("target"),
            "address": lab.target_address,
            "pids": [each.pid for each in target.processes(lab)],
        },
        "hosts": [_describe_host(Host(lab, member)) for member in lab.hosts],
    }


def _describe_host(host: Host) -> dict[str, Any]:
    daemon = host.daemon()
    if daemon is None:
        mount = "dead" if host.is_mounted else "none"
    else:
        mount = "frozen" if _is_stopped(daemon.pid) else "mounted"
    return {
        "name": host.name,
        "namespace": host.lab.namespace(host.name),
        "san_address": host.state.san_address,
        "cluster_address": host.state.cluster_address,
        "initiator": host.state.initiator,
        "directory": str(host.mountpoint),
        "log": str(host.log),
        "mount": mount,
        "pid": daemon.pid if daemon else None,
        "faults": dict(host.state.faults),
    }


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- the end -----------------------------------------------------------------------------------
def find(directory: Path) -> tuple[str, Path]:
    """The id and directory of the lab there, whatever is left of it. Raises `Problem`."""
    for lab_id, place in state.known().items():
        if place == directory:
            return lab_id, place
    return state.read(directory).id, directory


def down(lab_id: str, directory: Path) -> None:
    """Take a lab away, whatever there is of it; nothing is no error. Raises OSError, TimeoutError.

    ``directory`` is empty (``Path()``) for a lab of which only namespaces are left.
    """
    try:
        found = state.read(directory) if directory != Path() else None
    except Problem:  # its maker was killed before it was written, or its down after it went
        found = None
    if found is not None and found.id != lab_id:
        found = None
    names = network.names(lab_id, PREFIX)
    # Held by number: when the names are gone nobody can enter any more, and who did is still seen.
    spaces = [each for name in names if (each := processes.namespace_of(name)) is not None]
    _kill_all(spaces)
    if directory != Path():
        _detach(directory)
    network.remove(names)
    _kill_all(spaces)
    left = found or LabState(lab_id, str(directory), 0, made_directory=False)
    if directory != Path():
        _remove_files(directory)
    state.forget(left)
    if left.made_directory and directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _kill_all(spaces: list[processes.Namespace]) -> None:
    while found := processes.members(spaces):
        processes.end(found, spaces)


def _detach(directory: Path) -> None:
    prefix = mountpoint.resolve(str(directory)).rstrip("/") + "/"
    for mounted in reversed(mountpoint.mounts()):
        if mounted.path.startswith(prefix):
            mountpoint.detach(mounted.path)


def _remove_files(directory: Path) -> None:
    """Remove what a lab makes; never what lies on another filesystem."""
    if not directory.is_dir():
        return
    device = os.stat(directory).st_dev
    ours = [directory / part for part in _PARTS]
    ours += [path for path in directory.glob("host*") if path.name[4:].isdigit()]
    for path in ours:
        if path.is_dir() and os.stat(path).st_dev == device:
            if path.name not in _PARTS:
                _set_immutable(path, on=False)
            shutil.rmtree(path)
    for leftover in directory.glob("lab.json.*"):
        leftover.unlink()
