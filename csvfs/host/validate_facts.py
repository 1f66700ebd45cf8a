"""What `csvctl validate` knows of a LUN, and the form in which it judges it.

`Facts` are gathered by `csvfs.host.validate`, and judged by pure functions: `validate_lun` (what
is on the LUN, and how it is served), `validate_target` (whether the target keeps hosts apart) and
`validate_members` (who is registered).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Generic, TypeVar

from csvfs.format import SlotBlock, Superblock, View
from csvfs.signatures import Signature
from redirector.block.device import LunIdentity
from redirector.block.probe_result import ProbeResult
from redirector.block.reservations import Standing
from redirector.block.scsi import ReserveCapabilities

T = TypeVar("T")


class Verdict(StrEnum):
    """Of one property."""

    PASSED = "passed"
    NOTE = "note"
    """It is not as it could be, and nothing has to be done."""
    WARNING = "warning"
    """The volume works; something is in danger, or unfinished."""
    FAILED = "failed"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, slots=True)
class Property:
    """One property of the LUN or its target.

    invariant: a warning and a failure say what they mean and what to do.
    """

    name: str
    verdict: Verdict
    found: str
    means: str = ""
    """For the virtual machines."""
    to_do: str = ""

    def __post_init__(self) -> None:
        if self.verdict in (Verdict.WARNING, Verdict.FAILED):
            assert self.means and self.to_do, self.name


def passed(name: str, found: str) -> Property:
    return Property(name, Verdict.PASSED, found)


def noted(name: str, found: str) -> Property:
    return Property(name, Verdict.NOTE, found)


def not_tested(name: str, why: str) -> Property:
    return Property(name, Verdict.NOT_TESTED, why)


def warned(name: str, found: str, means: str, to_do: str) -> Property:
    return Property(name, Verdict.WARNING, found, means, to_do)


def failed(name: str, found: str, means: str, to_do: str) -> Property:
    return Property(name, Verdict.FAILED, found, means, to_do)


class Door(Enum):
    """Whether a login gets in that should not."""

    NONE = "there is no login"
    OPEN = "it got in"
    SHUT = "it was refused"
    UNKNOWN = "no answer that tells"


class Refused(Enum):
    """Whether an initiator that is not registered could read."""

    YES = "reservation conflict"
    NO = "it could"


@dataclass(frozen=True, slots=True)
class Copy(Generic[T]):
    """One of two copies on the LUN; None and what is wrong with it, if it cannot be believed."""

    content: T | None
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that was found out. A sequence that was not read is empty."""

    identity: LunIdentity
    standing: Standing
    outsider_read: Refused
    own_key: int = 0
    """Under which all this was read; 0: no registration was needed."""
    readable: bool = True
    """False: another system's reservation keeps everybody else from reading."""
    reservable: bool = True
    """False: the target knows no persistent reservations."""
    superblocks: tuple[Copy[Superblock], ...] = ()
    """The first, and its backup."""
    destroyed: str = ""
    """Not empty: both superblocks are, in this way, but there was a volume."""
    views: tuple[Copy[View], ...] = ()
    slot_blocks: Mapping[int, SlotBlock] = field(default_factory=dict)
    signatures: tuple[Signature, ...] = ()
    """What else is on a LUN without a volume."""
    reads_s: tuple[float, ...] = ()
    """How long each of a few reads of 4 KiB took, in seconds."""
    unreadable: tuple[str, ...] = ()
    """Places that the medium has lost."""
    capabilities: ReserveCapabilities | None = None
    closes_old_session: bool | None = None
    """Whether a login closes the session that the same initiator port had; None: not tried."""
    no_password: Door = Door.NONE
    """A login without user and password."""
    stranger: Door = Door.NONE
    """A login with an initiator name that nobody has ever allowed."""
    probed: ProbeResult | None = None
    """Of a writing probe of just now."""

    @property
    def superblock(self) -> Superblock | None:
        return next((copy.content for copy in self.superblocks if copy.content), None)

    @property
    def view(self) -> View | None:
        """The valid copy with the higher epoch."""
        views = [copy.content for copy in self.views if copy.content]
        return max(views, key=lambda view: view.epoch, default=None)


class KeyState(StrEnum):
    """What a registered key is."""

    MEMBER = "member"
    """A path that a member uses."""
    STALE = "stale"
    """Of a path that is given up, or of a host that is no member: it is to be fenced."""
    PARKED = "parked"
    """Left by the last host that had the volume, or by format, for the next one to take over."""
    NEWCOMER = "newcomer"
    """Of a host that is joining, or of an offline tool."""
    FOREIGN = "foreign"
    """Of another system."""
    UNKNOWN = "unknown"
    """No view can tell."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A registered key (or one that holds), and what is known of it."""

    key: int
    state: KeyState
    holds: bool
    owner: str = ""
    """The member's name; empty: not known."""
    path: str = ""
    """``data`` or ``control``, where its slot block says so."""


@dataclass(frozen=True, slots=True)
class Report:
    """The judgement."""

    facts: Facts
    properties: tuple[Property, ...]
    keys: tuple[KeyUse, ...]

    def having(self, verdict: Verdict) -> Sequence[Property]:
        return [each for each in self.properties if each.verdict is verdict]

    @property
    def verdict(self) -> Verdict:
        """The worst that counts: passed, warning or failed."""
        for worst in (Verdict.FAILED, Verdict.WARNING):
            if self.having(worst):
                return worst
        return Verdict.PASSED
