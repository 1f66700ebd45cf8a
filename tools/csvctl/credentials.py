"""/etc/csvfs/credentials: CHAP users and passwords, for root's eyes only.

    # target or host                        user      password
    iqn.2026-11.org.example:vms             host1     correct horse battery
    *                                       host1     another one

The first line that fits the LUN counts: by target name, by host, or ``*``; and by user, if the URL
names one. The password is the rest of the line.
"""

from __future__ import annotations

import os
import stat

from csvfs.host.places import config_directory
from csvfs.host.problems import Kind, Problem
from redirector.block.device import Credentials
from redirector.block.url import LunUrl


def find_credentials(url: LunUrl) -> Credentials | None:
    """The credentials for a LUN; None if the file has none.

    Raises `Problem` if others may read the file, if a line cannot be read, or if the URL names a
    user that it does not know.
    """
    path = config_directory() / "credentials"
    if url.scheme != "iscsi":
        return None
    try:
        with path.open(encoding="utf-8") as file:
            _check_mode(os.fstat(file.fileno()), str(path))
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    for number, line in enumerate(lines, 1):
        found = _match(line, url, f"{path}, line {number}")
        if found is not None:
            return found
    if url.user:
        raise Problem(
            Kind.CREDENTIALS, f"{path} has no password for user {url.user!r} of {url.target}"
        )
    return None


def _check_mode(found: os.stat_result, path: str) -> None:
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise Problem(Kind.CREDENTIALS, f"{path} has mode {mode:04o}: others can read passwords")
    if found.st_uid not in (0, os.geteuid()):
        raise Problem(Kind.CREDENTIALS, f"{path} belongs to uid {found.st_uid}, not to root")


def _match(line: str, url: LunUrl, where: str) -> Credentials | None:
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    try:
        place, user, password = text.split(None, 2)
    except ValueError:
        raise Problem(Kind.CREDENTIALS, f"{where}: not `TARGET USER PASSWORD`") from None
    if place not in ("*", url.target, url.host) or url.user not in ("", user):
        return None
    return Credentials(user, password)
