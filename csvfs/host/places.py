"""Where csvfs keeps what is not on the LUN, and who this host is.

    /run/csvfs/<volume id>.lock     held by the daemon: the proof that it lives on this host
    /run/csvfs/<volume id>.sock     its admin socket (`csvfs.host.admin`)
    /run/csvfs/<volume id>.obituary whom to tell that the daemon is dead
    /run/csvfs/<volume id>.json     what is mounted where, and how it ended (`csvfs.host.record`)
    /etc/csvfs/credentials          CHAP users and passwords, mode 0600
    /etc/iscsi/initiatorname.iscsi  the host's InitiatorName, as open-iscsi keeps it

CSVFS_RUN_DIR and CSVFS_CONFIG_DIR move the first two kinds elsewhere: for tests, and for two hosts
that are played on one machine (then with CSVFS_MACHINE_ID as well). CSVFS_BOOT_ID plays a reboot.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_INITIATOR_FILE: Final = Path("/etc/iscsi/initiatorname.iscsi")
_INITIATOR: Final = re.compile(r"^\s*InitiatorName\s*=\s*(\S+)\s*$", re.MULTILINE)


def run_directory() -> Path:
    """Root's directory of sockets, locks and records; it need not exist yet."""
    return Path(os.environ.get("CSVFS_RUN_DIR", "/run/csvfs"))


def make_run_directory() -> Path:
    """The same, made if absent, open to root only. Raises OSError."""
    directory = run_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def config_directory() -> Path:
    return Path(os.environ.get("CSVFS_CONFIG_DIR", "/etc/csvfs"))


def lock_path(volume_id: bytes) -> Path:
    return run_directory() / f"{volume_id.hex()}.lock"


def socket_path(volume_id: bytes) -> Path:
    return run_directory() / f"{volume_id.hex()}.sock"


def obituary_path(volume_id: bytes) -> Path:
    return run_directory() / f"{volume_id.hex()}.obituary"


def record_path(volume_id: bytes) -> Path:
    return run_directory() / f"{volume_id.hex()}.json"


def node_name() -> str:
    """This host's name, up to the first dot."""
    return socket.gethostname().partition(".")[0] or "localhost"


def machine_id() -> bytes:
    """16 bytes that are this installation's, for ever (machine-id(5)). Raises OSError."""
    text = os.environ.get("CSVFS_MACHINE_ID") or Path("/etc/machine-id").read_text().strip()
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return bytes.fromhex(text)
    # Empty in images that were never booted: the host's name has to do.
    return hashlib.sha256(b"csvfs machine " + socket.gethostname().encode()).digest()[:16]


def boot_id() -> bytes:
    """16 bytes that are new with every boot. Raises OSError."""
    text = os.environ.get("CSVFS_BOOT_ID") or _BOOT_ID.read_text().strip()
    return bytes.fromhex(text.replace("-", ""))


def initiator_name() -> str:
    """This host's iSCSI InitiatorName: open-iscsi's, or one made from the machine id."""
    try:
        found = _INITIATOR.search(_INITIATOR_FILE.read_text())
    except OSError:
        found = None
    if found is not None:
        return found[1]
    return f"iqn.2026-11.org.csvfs:{machine_id().hex()[:16]}"
