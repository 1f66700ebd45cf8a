"""One iSCSI session on a thread of its own, without the GIL (see session.h for the contract).

Every submitting method takes a *token*, any object, and returns at once. `Session.reap` gives
the token back when the command has ended: exactly once, and never before. Until then the buffer
is pinned (a `bytearray` cannot be resized, a `memoryview` not released) and must not be changed.
"""

from collections.abc import Sequence
from typing import Generic, TypedDict, TypeVar

T = TypeVar("T")

MAX_IN_FLIGHT: int
"""Commands that one session may have on the wire."""

def isid_valid(isid: int) -> bool:
    """Whether libiscsi can log in with this 48-bit ISID: any of type 00b (OUI), and those of types
    01b and 10b (enterprise number, random) whose low six bits of the first byte are 0."""

class Completion:
    """Why a command did not simply succeed."""

    @property
    def unknown(self) -> bool:
        """True: no answer, it may or may not have been done. False: the target answered."""
    @property
    def status(self) -> int:
        """SAM-5 status; of task management the response, of a login status class and detail."""
    @property
    def sense(self) -> bytes:
        """Sense data (SPC-4 4.5), for status 02h."""
    @property
    def residual(self) -> int:
        """Bytes of the buffer that the target did not transfer."""

class Statistics(TypedDict):
    commands: int
    pings: int
    in_flight: int
    peak_in_flight: int
    window: int
    patience_ms: int

class Session(Generic[T]):
    """One I_T nexus. It never reconnects: once `lost`, every command ends as unknown."""

    def __init__(
        self,
        token: T,
        *,
        portal: str,
        target: str,
        initiator: str,
        isid: int,
        lun: int,
        user: str = "",
        password: str = "",
        header_digest: bool = False,
        login_timeout_ms: int = 10_000,
        command_timeout_ms: int = 30_000,
        ping_interval_ms: int = 500,
        ping_timeout_ms: int = 2_000,
        patience_ms: int = 0,
        calm_ms: int = 60_000,
        max_in_flight: int = 120,
    ) -> None:
        """Start to log in; ``token`` comes back when that has ended.

        ``portal`` is numeric. After ``ping_interval_ms`` (0: never) without a byte from the
        target it is pinged; ``ping_timeout_ms`` more without one, or one command unanswered for
        ``command_timeout_ms``, and the session is lost. A longer ``patience_ms`` holds instead of
        ``ping_timeout_ms`` until the target was quick for ``calm_ms`` (see silence.c). Raises
        `ValueError` for a name that is too long or an ISID that is not `isid_valid`, `OSError`
        when there is no thread or descriptor.
        """

    def set_geometry(self, block_bytes: int, max_transfer_bytes: int) -> None:
        """Once, before the first `read` or `write`: they are cut at ``max_transfer_bytes``."""

    def read(self, offset_bytes: int, buffer: bytearray | memoryview, token: T) -> None:
        """READ(16) straight into ``buffer``. Raises `ValueError` unless both are whole blocks."""

    def write(
        self, offset_bytes: int, data: bytes | bytearray | memoryview, fua: bool, token: T
    ) -> None:
        """WRITE(16) straight out of ``data``. Raises `ValueError` unless both are whole blocks."""

    def scsi(
        self,
        cdb: bytes,
        token: T,
        *,
        data_in: bytearray | memoryview | None = None,
        data_out: bytes | bytearray | memoryview | None = None,
        timeout_ms: int = 0,
    ) -> None:
        """Any other command block, 6 to 16 bytes."""

    def task_management(self, function: int, token: T, *, timeout_ms: int = 0) -> None:
        """Task management (RFC 7143 11.5.1) of the logical unit: 5 is LOGICAL UNIT RESET."""

    def logout(self, token: T, *, timeout_ms: int = 0) -> None:
        """Log out when nothing is in flight any more; nothing may be submitted after it."""

    def reap(self) -> list[tuple[T, Completion | None]]:
        """What has ended; None is success. Clears `fileno`'s readiness."""

    def abort(self) -> None:
        """Drop the connection now; every command ends as unknown. Never blocks."""

    def close(self) -> list[tuple[T, Completion | None]]:
        """Abort, end the thread, free everything; returns what had not been reaped. Idempotent."""

    def fileno(self) -> int:
        """Readable when `reap` has something or the session was lost; -1 after `close`."""

    @property
    def lost(self) -> bool: ...
    @property
    def text(self) -> str:
        """Why it was lost, in words."""
    @property
    def portal(self) -> str:
        """Where it logged in, after any redirection; "" after `close`."""
    @property
    def silent_ms(self) -> int:
        """If it was lost because the target was silent, how long that was waited out; else 0."""
    @property
    def outstanding(self) -> int:
        """Tokens that were not given back yet."""

    def statistics(self) -> Statistics: ...

class PulseStatistics(TypedDict):
    sent: int
    not_sent: int
    written: int
    failed: int
    silences: int
    gap_s: float
    gap_most_s: float
    write_s: float
    write_most_s: float

class Pulse:
    """Heartbeats from a thread of their own (see pulse.h). It goes when nobody refers to it, and no
    session that was ever attached. Nothing here waits."""

    def __init__(
        self, socket_fd: int, cluster_id: bytes, *, interval_ms: int, alive_ms: int, lease_ms: int
    ) -> None:
        """``socket_fd``: a UDP socket, which is duplicated. Raises `OSError`, `ValueError`."""

    def address(self, secret: bytes, targets: Sequence[tuple[str, int]]) -> None:
        """Send datagrams under this secret, of 32 bytes, to these numeric hosts and ports. Raises
        `ValueError`."""

    def show(
        self,
        *,
        slot: int,
        incarnation: int,
        flags: int,
        epoch: int,
        hears: int,
        block: bytes,
        now: bool,
    ) -> None:
        """What heartbeats say from now on; the first time, and if ``now``, at once. ``block``, of
        4096 bytes, says the same; version, sequence and checksum are filled in."""

    def stamp(self) -> None:
        """The owner lives."""

    def attach(self, session: Session[T], key: int, offset_bytes: int) -> bool:
        """Write the block there from now on, in place of any other session. False: it is lost."""

    def detach(self) -> None:
        """Write nothing. What is on its way is not told of."""

    @property
    def writing(self) -> bool:
        """A write is on its way, on whatever session."""

    def next_sequence(self) -> int:
        """For a heartbeat that is sent by other means."""

    @property
    def lease_until_s(self) -> float:
        """CLOCK_BOOTTIME: ``lease_ms`` after the sending of the last confirmed write; else -inf."""

    def fileno(self) -> int:
        """Readable when `reap` has something."""

    def reap(self) -> tuple[int, float | None, Completion | None]:
        """The key of the session; when the last confirmed write since the last call was sent
        (None: there was none); why it is not written on any more, if a write failed."""

    def stop(self) -> None:
        """Nothing is sent any more, there is no lease."""

    def statistics(self) -> PulseStatistics: ...
