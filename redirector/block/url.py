"""LUNs by URL: ``iscsi://[user@]host[:port]/target/lun`` and ``file:///path``.

A password in a URL is accepted, flagged (`LunUrl.password`), and never shown again: neither
``str`` nor ``repr`` of a `LunUrl` holds it, nor does `Lun.url`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from redirector.block.device import AuthenticationFailed, BadUrl, Credentials, Lun

ISCSI_PORT = 3260
_MAX_LUN = 16383
_TARGET = re.compile(r"(iqn|eui|naa)\.[A-Za-z0-9.:_-]{1,219}")
_EXPECTED = "expected iscsi://[user@]host[:port]/target-iqn/lun or file:///absolute/path"


@dataclass(frozen=True, slots=True)
class LunUrl:
    """A parsed LUN URL. ``str`` gives it back in its one canonical form, without a password."""

    scheme: Literal["iscsi", "file"]
    host: str = ""
    """Name or address; IPv6 without brackets."""
    port: int = ISCSI_PORT
    target: str = ""
    lun: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    """Not empty: the URL carried one, which a user interface should warn of."""
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{quote(self.path)}"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == ISCSI_PORT else f":{self.port}"
        return f"iscsi://{user}{host}{port}/{self.target}/{self.lun}"


def parse_lun_url(text: str) -> LunUrl:
    """Read a LUN URL. Raises `BadUrl`, whose message never repeats a password."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        hint = f"; for a file write file://{text}" if text.startswith("/") else ""
        raise BadUrl(f"this is not a LUN URL: {_shown(text)}{hint} ({_EXPECTED})")
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in text):
        raise BadUrl("a LUN URL holds no blanks and no control characters; write a blank as %20")
    if scheme == "file":
        return _parse_file(text)
    if scheme == "iscsi":
        return _parse_iscsi(text)
    raise BadUrl(f"{scheme}:// is not a kind of LUN that csvfs knows ({_EXPECTED})")


def _shown(text: str) -> str:
    return re.sub(r":(?!//).*@", ":***@", text)


def _parse_file(text: str) -> LunUrl:
    rest = text[len("file://") :]
    if not rest.startswith("/"):
        raise BadUrl(f"{text}: a file LUN is on this machine and by absolute path, file:///path")
    path = unquote(rest)
    if path.endswith("/") or "\0" in path:
        raise BadUrl(f"{text}: this names no file")
    return LunUrl("file", path=path)


def _parse_iscsi(text: str) -> LunUrl:
    shown = _shown(text)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise BadUrl(f"{shown}: the port or the address cannot be read ({_EXPECTED})") from error
    if not parts.hostname:
        raise BadUrl(f"{shown}: the host is missing ({_EXPECTED})")
    if port == 0:
        raise BadUrl(f"{shown}: port 0 is not a port; leave it out for {ISCSI_PORT}")
    if parts.query or parts.fragment:
        raise BadUrl(f"{shown}: nothing may follow the LUN number ({_EXPECTED})")
    target, slash, lun = parts.path.removeprefix("/").partition("/")
    if not _TARGET.fullmatch(target):
        raise BadUrl(f"{shown}: {target!r} is not a target name such as iqn.2026-11.org.example:x")
    if not slash or not lun.isascii() or not lun.isdecimal() or int(lun) > _MAX_LUN:
        raise BadUrl(f"{shown}: the LUN must be a number from 0 to {_MAX_LUN}, after the target")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if password and not user:
        raise BadUrl(f"{shown}: a password without a user")
    return LunUrl(
        "iscsi",
        host=parts.hostname,
        port=ISCSI_PORT if port is None else port,
        target=target,
        lun=int(lun),
        user=user,
        password=password,
    )


def open_lun(url: str | LunUrl, credentials: Credentials | None = None) -> Lun:
    """The LUN behind a URL; nothing is contacted yet.

    ``credentials`` take precedence over those in the URL. Raises `BadUrl`, and
    `AuthenticationFailed` when the URL names a user for whom there is no password.
    """
    where = parse_lun_url(url) if isinstance(url, str) else url
    if where.scheme == "file":
        from redirector.block.file import FileLun

        return FileLun(Path(where.path))
    if credentials is None and where.password:
        credentials = Credentials(where.user, where.password)
    if credentials is None and where.user:
        raise AuthenticationFailed(f"{where}: there is no password for user {where.user!r}")
    # Late, so that files and simulations work where the native extension was not built.
    from redirector.block.iscsi import IscsiLun

    return IscsiLun(where.host, where.port, where.target, where.lun, credentials)
