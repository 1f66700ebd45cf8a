"""``iscsi://``: a LUN behind an iSCSI target, over the native session engine.

What is retried: nothing that could change the LUN. Only the questions of a login (INQUIRY and the
like) are asked again when a unit attention came in between.
"""

from __future__ import annotations

import secrets
from copy import copy
from dataclasses import dataclass, replace

import trio
from trio.lowlevel import current_task

from redirector.block import scsi
from redirector.block.device import (
    AuthenticationFailed,
    Credentials,
    IllegalRequest,
    InitiatorPort,
    LoginFailed,
    LostAfterLogin,
    Lun,
    NoSuchLun,
    OutcomeUnknown,
    TargetRefused,
    Unreachable,
)
from redirector.block.iscsi_device import IscsiDevice
from redirector.block.patience import Patience
from redirector.block.url import ISCSI_PORT, LunUrl
from redirector.native.nexus import Nexus, milliseconds_until, wait

_CLOCK_GRAIN_S = 0.05
"""Between trio's clock and the session's, which counts milliseconds."""
_ANONYMOUS_INITIATOR = "iqn.2026-11.org.csvfs:anonymous"

# Login status class and detail (RFC 7143 11.13.5).
_AUTHENTICATION = (0x0201, 0x0202)
_NOT_FOUND = (0x0203, 0x0204)
_LOGIN_WORDS = {
    0x0201: "the target refused the CHAP user or password, or asks for one",
    0x0202: "the target does not allow this initiator to log in",
    0x0203: "the portal has no such target",
    0x0204: "the target was removed",
    0x0206: "the target allows no more connections",
    0x0300: "the target has an error",
    0x0301: "the target is not in service now",
    0x0302: "the target is out of resources",
}


@dataclass(frozen=True, slots=True)
class IscsiOptions:
    """How patient a session is, and how deep. A target that answers slowly is not lost."""

    ping_interval_s: float = 0.5
    """Ping after so long without a byte from the target; 0: never."""
    ping_timeout_s: float = 2.0
    """So long after a ping without a byte, the nexus is lost."""
    most_patience_s: float = 30.0
    """After such a loss the next nexus waits twice as long, but never longer than this."""
    calm_s: float = 60.0
    """A target that was quick for so long is waited for as at first."""
    command_timeout_s: float = 30.0
    """So long without an answer to one command, the nexus is lost."""
    max_in_flight: int = 120
    """Commands on the wire; more wait here, and so they do beyond the target's own window."""
    header_digest: bool = False
    """Insist on CRC32C header digests."""


class IscsiLun(Lun):
    """A logical unit of an iSCSI target."""

    def __init__(
        self,
        host: str,
        port: int = ISCSI_PORT,
        target: str = "",
        lun: int = 0,
        credentials: Credentials | None = None,
        *,
        options: IscsiOptions | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.target = target
        self.lun = lun
        self.credentials = credentials
        self.options = options = options or IscsiOptions()
        self._patience = Patience(options.ping_timeout_s, options.most_patience_s, options.calm_s)
        user = credentials.user if credentials else ""
        self.url = str(LunUrl("iscsi", host=host, port=port, target=target, lun=lun, user=user))
        self._initiator = ""
        self._portal = ""

    def with_patience(self, most_s: float) -> IscsiLun:
        """See `Lun.with_patience`."""
        options = replace(self.options, most_patience_s=most_s)
        return IscsiLun(
            self.host, self.port, self.target, self.lun, self.credentials, options=options
        )

    def through(self, portal: str) -> IscsiLun:
        """See `Lun.through`. What is known of the target's slowness is shared."""
        lun = copy(self)
        lun._portal = portal
        return lun

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> IscsiDevice:
        """See `Lun.login`. Raises `ValueError` for an ISID that `isid_valid` denies."""
        self._initiator = self._initiator or port.name
        deadline = trio.current_time() + timeout_s
        nexus = await self._connect(port, deadline)
        device = IscsiDevice(self.url, port, nexus)
        try:
            await device.identify(deadline)
        except BaseException as error:
            await nexus.drop()
            if isinstance(error, OutcomeUnknown):
                raise LostAfterLogin(str(error)) from error
            if isinstance(error, TargetRefused | ValueError):
                raise LoginFailed(f"{self.url}: {error}") from error
            raise
        return device

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`. The session has the initiator name of the first `login`: later ones may
        have been reinstatements in the name of others."""
        deadline = trio.current_time() + timeout_s
        isid = 0x80 << 40 | secrets.randbits(40)
        name = self._initiator or _ANONYMOUS_INITIATOR
        nexus = await self._connect(InitiatorPort(name, isid), deadline)
        try:
            if nexus.lost.is_set():
                raise Unreachable(f"{self.url}: {nexus.why}")
            nexus.session.task_management(
                scsi.LOGICAL_UNIT_RESET, current_task(), timeout_ms=milliseconds_until(deadline)
            )
            completion = await wait()
            if completion is not None and completion.unknown:
                if trio.current_time() < deadline - _CLOCK_GRAIN_S:
                    raise Unreachable(f"{self.url}: {nexus.why}")
                raise TimeoutError(
                    f"{self.url}: LOGICAL UNIT RESET was not answered within {timeout_s} s"
                )
            if completion is not None:
                words = f"task management response {completion.status}"
                raise IllegalRequest("LOGICAL UNIT RESET", status=0, words=words)
            with trio.move_on_at(deadline):  # it is done: whoever waits is not kept for a goodbye
                await nexus.logout()
        finally:
            await nexus.drop()

    async def _connect(self, port: InitiatorPort, deadline: float) -> Nexus:
        """A session at the first of the host's addresses that answers."""
        failure: LoginFailed = Unreachable(f"{self.url}: no time to try")
        addresses = await self._addresses(deadline)
        for number, portal in enumerate(addresses, 1):
            share_ms = milliseconds_until(deadline) // (len(addresses) - number + 1)
            try:
                nexus, completion = await Nexus.open(
                    self._fell_silent, **self._session_config(port, portal, share_ms)
                )
            except OSError as error:
                raise LoginFailed(f"{self.url}: no thread or descriptor: {error}") from error
            if completion is None:
                return nexus
            failure = self._login_failure(completion.status, nexus.why)
            if not isinstance(failure, Unreachable):
                break
        raise failure

    def _fell_silent(self, waited_s: float) -> None:
        self._patience.lost(waited_s, trio.current_time())

    async def _addresses(self, deadline: float) -> list[str]:
        if self._portal:
            return [self._portal]
        found = None
        with trio.move_on_at(deadline):
            try:
                found = await trio.socket.getaddrinfo(
                    self.host, self.port, type=trio.socket.SOCK_STREAM
                )
            except OSError as error:
                raise Unreachable(f"{self.url}: {self.host}: {error.strerror}") from error
        if not found:
            raise Unreachable(f"{self.url}: the name {self.host} was not resolved in time")
        portals = []
        for *_, address in found:
            host = str(address[0])
            portals.append(f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}")
        return list(dict.fromkeys(portals))

    def _session_config(
        self, port: InitiatorPort, portal: str, login_ms: int
    ) -> dict[str, str | int | bool]:
        options = self.options
        config: dict[str, str | int | bool] = {
            "portal": portal,
            "target": self.target,
            "initiator": port.name,
            "isid": port.isid,
            "lun": self.lun,
            "header_digest": options.header_digest,
            "login_timeout_ms": max(login_ms, 1),
            "command_timeout_ms": int(options.command_timeout_s * 1000),
            "ping_interval_ms": int(options.ping_interval_s * 1000),
            "ping_timeout_ms": int(options.ping_timeout_s * 1000),
            "patience_ms": int(self._patience.of_next(trio.current_time()) * 1000),
            "calm_ms": int(options.calm_s * 1000),
            "max_in_flight": options.max_in_flight,
        }
        if self.credentials is not None:
            config |= {"user": self.credentials.user, "password": self.credentials.password}
        return config

    def _login_failure(self, status: int, why: str) -> LoginFailed:
        if not status:
            return Unreachable(f"{self.url}: {why}")
        text = f"{self.url}: {_LOGIN_WORDS.get(status, why)} (login status {status:04X}h)"
        if status in _AUTHENTICATION:
            return AuthenticationFailed(text)
        return NoSuchLun(text) if status in _NOT_FOUND else LoginFailed(text)
