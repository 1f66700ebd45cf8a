"""What every kind of LUN answers: one interface, one error contract.

Theory. A `Lun` is the shared disk as seen by URL. Logging in to it through an `InitiatorPort`
gives a `BlockDevice`: one I_T nexus (SPC-4 3.1.63, RFC 7143 "session"), the thing that a
persistent reservation knows. A nexus never heals: once an outcome was unknown it is *lost*, and
whoever owns it logs in again, as a new nexus. Nothing is ever sent twice by this layer.

Every command ends in exactly one of three ways:

    returns                 the target did it (for a write: it is in the target's cache, or with
                            ``fua`` on stable storage)
    raises TargetRefused    the target answered "no": it did nothing, and the nexus lives on
    raises OutcomeUnknown   no answer, and none will come: the command may have been carried out,
                            may be carried out at any later time until the nexus is fenced

    BlockError
    +-- TargetRefused               status and sense, in words
    |   +-- ReservationConflict     status 18h
    |   +-- UnitAttention           sense key 6 (2900 reset, 2A03 preempted, 2A04 released, ...)
    |   +-- MediumError             sense key 3: these bytes are gone
    |   +-- SpaceExhausted          07/2707: a thin array is full
    |   +-- TargetBusy              BUSY, TASK SET FULL, TASK ABORTED: nothing was done, ask again
    |   `-- IllegalRequest          sense key 5: the target does not know the command
    +-- OutcomeUnknown              the nexus is lost
    `-- LoginFailed
        +-- Unreachable             no TCP connection, or no answer
        |   `-- LostAfterLogin      the target had let it in
        +-- AuthenticationFailed    CHAP was refused
        `-- NoSuchLun               target or LUN does not exist
    BadUrl (ValueError)

Cancellation: a command that was issued cannot be called back. A cancelled caller is held until
its command has ended, because the target may still write into, or read from, its buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from redirector.native._native import Completion, Session

Buffer = bytes | bytearray | memoryview


class BlockError(Exception):
    """Anything that a LUN can do to its user."""


@dataclass(eq=False)
class TargetRefused(BlockError):
    """The target answered, and did not do it (SAM-5 status, SPC-4 4.5 sense data)."""

    what: str
    status: int = 0x02
    sense_key: int = 0
    asc_ascq: int = 0
    words: str = ""

    def __str__(self) -> str:
        detail = self.words or f"status {self.status:02X}h"
        if self.sense_key or self.asc_ascq:
            detail += f" (sense {self.sense_key:X}/{self.asc_ascq:04X})"
        return f"{self.what}: {detail}"


class ReservationConflict(TargetRefused):
    """Status 18h: another nexus holds a reservation that excludes this command."""


class UnitAttention(TargetRefused):
    """Sense key 6: something happened to the nexus; the command was not carried out."""


class MediumError(TargetRefused):
    """Sense key 3: the medium lost these bytes."""


class SpaceExhausted(TargetRefused):
    """07/2707: a thinly provisioned array is full."""


class TargetBusy(TargetRefused):
    """BUSY, TASK SET FULL or TASK ABORTED: nothing was done, the command may be issued again."""


class IllegalRequest(TargetRefused):
    """Sense key 5: the target does not support the command or a field of it."""


class OutcomeUnknown(BlockError):
    """The nexus was lost before the answer. The command may still be carried out."""


class LoginFailed(BlockError):
    """No nexus came to be."""


class Unreachable(LoginFailed):
    """Nobody answers at the portal."""


class LostAfterLogin(Unreachable):
    """The target has answered the login; then the nexus was lost. Whatever the port had before is
    closed, perhaps by whom it belongs to: who logs in with it again closes this one."""


class AuthenticationFailed(LoginFailed):
    """CHAP: the target refused the user or the password, or asks for one."""


class NoSuchLun(LoginFailed):
    """The portal answers, but has no such target, or the target no such LUN."""


class BadUrl(ValueError):
    """The LUN's URL cannot be read; the message says which part and what is expected."""


@dataclass(frozen=True, slots=True)
class InitiatorPort:
    """SCSI initiator port: iSCSI name and ISID (RFC 7143 10.12.5, 48 bits)."""

    name: str
    isid: int

    def __post_init__(self) -> None:
        if not 0 <= self.isid < 1 << 48:
            raise ValueError(f"ISID {self.isid:#x} is not 48 bits")


@dataclass(frozen=True, slots=True)
class Credentials:
    """CHAP user and password. The password never appears in ``repr``."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LunIdentity:
    """What INQUIRY, its VPD pages and READ CAPACITY(16) tell of a LUN."""

    size_bytes: int
    logical_block_bytes: int
    vendor: str = ""
    product: str = ""
    revision: str = ""
    serial: str = ""
    device_id: bytes = b""
    """The designator of VPD page 83h with association LUN: NAA before EUI-64 before T10."""
    thin: bool = False
    unmap_granularity_bytes: int = 0
    """0: the target does not support UNMAP."""
    max_unmap_bytes: int = 0
    max_transfer_bytes: int = 1 << 20
    volatile_cache: bool = True
    """The target may lose writes that were neither flushed nor FUA: assumed until it denies it."""


class ReservationType(IntEnum):
    """SPC-4 table 77; csvfs uses one."""

    NONE = 0
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6


@dataclass(frozen=True, slots=True)
class Reservation:
    """READ RESERVATION: the holder's key, or type NONE and key 0."""

    generation: int
    key: int
    type: ReservationType | int


@dataclass(frozen=True, slots=True)
class RegisteredKeys:
    """READ KEYS: PRGENERATION, and one key for each registered nexus (so a key may repeat)."""

    generation: int
    keys: tuple[int, ...]


class BlockIO(ABC):
    """Data I/O on a LUN, by whatever way. Offsets and lengths are bytes, multiples of the logical
    block; anything else raises ValueError, and what lies beyond the end `IllegalRequest`.

    All methods may be called by many tasks at once; commands are not ordered among each other.
    """

    identity: LunIdentity

    @abstractmethod
    async def read_into(self, offset_bytes: int, buffer: bytearray | memoryview) -> None:
        """READ(16) straight into ``buffer``."""

    async def read(self, offset_bytes: int, length_bytes: int) -> bytearray:
        """READ(16) into a fresh buffer."""
        buffer = bytearray(length_bytes)
        await self.read_into(offset_bytes, buffer)
        return buffer

    @abstractmethod
    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        """WRITE(16). Without ``fua`` it is stable only after the next `flush` that starts later.

        The caller must not change ``data`` until this returns. One that is longer than
        ``identity.max_transfer_bytes`` and refused may have been done in part.
        """

    @abstractmethod
    async def flush(self) -> None:
        """SYNCHRONIZE CACHE(16) of the whole LUN: every write that was answered is stable."""

    @abstractmethod
    async def unmap(self, ranges: Sequence[tuple[int, int]]) -> None:
        """UNMAP of (offset, length) pairs: a hint, after which the bytes are unspecified.

        Raises `IllegalRequest` where ``identity.unmap_granularity_bytes`` is 0.
        """


class BlockDevice(BlockIO):
    """One I_T nexus to a LUN. After `OutcomeUnknown` every method raises `OutcomeUnknown`."""

    port: InitiatorPort
    portal: str = ""
    """``address:port`` of the target that the nexus was made through; empty where there is none."""
    on_lost: Callable[[], None] | None = None
    """Called once, when the nexus is seen to be lost or is closed, before any command ends that it
    leaves without an answer. It must neither wait nor raise."""

    @property
    @abstractmethod
    def lost(self) -> bool:
        """True once an outcome was unknown or the connection was seen to close."""

    @abstractmethod
    async def wait_lost(self) -> None:
        """Return as soon as the nexus is lost (at once if it is)."""

    @property
    def native_session(self) -> Session[Any] | None:
        """For whoever writes on it from C; None: there is none, or it is lost."""
        return None

    def refused_elsewhere(self, what: str, completion: Completion) -> None:
        """The target refused what was sent on the `native_session`: a unit attention, which it
        tells only once, is raised by the next command here."""
        del what, completion

    async def write_same(self, offset_bytes: int, length_bytes: int, block: Buffer) -> None:
        """WRITE SAME(16): fill the range with one logical block. Only the probe sends it.

        Raises `IllegalRequest` where it is not supported, as this default does.
        """
        what = f"WRITE SAME of {length_bytes} bytes ({len(block)} given) at {offset_bytes}"
        raise IllegalRequest(what, sense_key=5, asc_ascq=0x2000, words="not supported")

    # -- persistent reservations (SPC-4 5.12) ------------------------------------------------
    @abstractmethod
    async def read_keys(self) -> RegisteredKeys:
        """PERSISTENT RESERVE IN, READ KEYS."""

    @abstractmethod
    async def read_reservation(self) -> Reservation:
        """PERSISTENT RESERVE IN, READ RESERVATION."""

    @abstractmethod
    async def register(self, key: int, *, old_key: int = 0) -> None:
        """REGISTER ``key`` for this nexus, which had ``old_key`` (0: none); key 0 unregisters.

        A wrong ``old_key`` raises `ReservationConflict`.
        """

    @abstractmethod
    async def reserve(self, key: int) -> None:
        """RESERVE, type 6. Raises `ReservationConflict` while another nexus holds it."""

    @abstractmethod
    async def release(self, key: int) -> None:
        """RELEASE, type 6: the reservation is gone, the registrations stay."""

    @abstractmethod
    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        """PREEMPT (AND ABORT): remove every registration of ``victim_key``.

        If that was the holder's, this nexus holds the reservation (type 6) afterwards. Raises
        `ReservationConflict` when nobody has registered ``victim_key``. It does *not* wait for
        commands of the victim that the target had admitted before: see `Lun.reset`.
        """

    @abstractmethod
    async def test_unit_ready(self) -> None:
        """TEST UNIT READY: also fetches a pending unit attention."""

    @abstractmethod
    async def aclose(self) -> None:
        """Log out. Commands in flight end first. The registration stays ("parked")."""

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection now; every command in flight ends with `OutcomeUnknown`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class Lun(ABC):
    """A shared disk, by URL: where nexuses come from."""

    url: str
    """Never holds a password."""

    def with_patience(self, most_s: float) -> Lun:
        """The same LUN, for nexuses that never wait longer than so for a silent target."""
        del most_s
        return self

    def through(self, portal: str) -> Lun:
        """The same LUN, only through this portal (`BlockDevice.portal`), wherever the URL leads.

        A session is reinstated by a login to *its* target portal group; another group has sessions
        of its own under the same initiator port (RFC 7143 6.3.5).
        """
        del portal
        return self

    @abstractmethod
    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> BlockDevice:
        """A new nexus. If ``port`` has a session already, this replaces it (session
        reinstatement, RFC 7143 6.3.5): the old one is closed, what it sent may still land.

        Raises `LoginFailed` and its kinds. Pending unit attentions of a fresh nexus are consumed.
        """

    @abstractmethod
    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """LOGICAL UNIT RESET over an unregistered session of its own.

        Returns when nothing that any nexus sent earlier is on its way any more; reservations
        survive; other nexuses see a unit attention 2900. Raises `TimeoutError` when the target
        does not answer in time, `LoginFailed` when it cannot be reached.
        """
