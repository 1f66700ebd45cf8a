"""The LUN of a command line: its URL, and the credentials that go with it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from csvctl import password
from csvctl.console import warn
from csvctl.credentials import find_credentials
from csvfs.host.problems import Kind, Problem
from redirector.block.device import Credentials, Lun
from redirector.block.url import LunUrl, parse_lun_url


@dataclass(frozen=True, slots=True)
class LunArgument:
    """A LUN that a command is about."""

    text: str
    """As it was given, but never with a password."""
    url: LunUrl
    credentials: Credentials | None

    def open(self) -> Lun:
        """The LUN; nothing is contacted. Raises `BadUrl`, `AuthenticationFailed`."""
        from redirector.block.url import open_lun

        return open_lun(self.url, self.credentials)


def read_lun(text: str) -> LunArgument:
    """Read the URL of a command line. Raises `BadUrl` and `Problem` (kind CREDENTIALS)."""
    plain, secret = password.split(text)  # not from the command line: `hide` has been there
    secret = secret or password.taken()
    url = parse_lun_url(plain)
    if secret:
        warn(password.WARNING)
        return LunArgument(plain, url, Credentials(url.user, secret))
    return LunArgument(plain, url, find_credentials(url))


def require_root() -> None:
    """Raises `Problem` (kind PERMISSION) for anybody else."""
    if os.geteuid() != 0:
        raise Problem(Kind.PERMISSION, "only root may do this")
