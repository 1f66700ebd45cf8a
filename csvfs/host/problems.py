"""What can stand in the way of an admin's wish, by name: the vocabulary of csvctl and the daemon.

Theory. A daemon runs in a process of its own; an exception does not travel to the csvctl that
waits for it, a `Problem` does: its kind, and one sentence that says what happened. What follows
from a kind (exit code, what it means for virtual machines, what to do) is in one table in
`csvctl.outcomes`. `problem_of` is the one place that sorts exceptions into kinds; what it does not
know is `Kind.BUG`.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """One for each row of the table in `csvctl.outcomes`."""

    USAGE = "usage"
    BAD_URL = "bad-url"
    NO_SUCH_LUN = "no-such-lun"
    CHAP_REFUSED = "chap-refused"
    UNREACHABLE = "unreachable"
    NO_ARBITER = "no-arbiter"
    BUG = "bug"
    SYSTEM = "system"
    TOO_SMALL = "too-small"
    NOT_CSVFS = "not-csvfs"
    MEDIUM_ERROR = "medium-error"
    OCCUPIED_LUN = "occupied-lun"
    FOREIGN_KEY = "foreign-key"
    PERMISSION = "permission"
    CREDENTIALS = "credentials"
    NEWER_FORMAT = "newer-format"
    SUPERBLOCK_DESTROYED = "superblock-destroyed"
    OTHER_HOST = "other-host"
    MOUNT_POINT_MISSING = "mount-point-missing"
    MOUNT_POINT_NOT_EMPTY = "mount-point-not-empty"
    MOUNT_POINT_BUSY = "mount-point-busy"
    MOUNTED_TWICE = "mounted-twice"
    NOT_MOUNTED = "not-mounted"
    FILES_OPEN = "files-open"
    DAMAGED = "damaged"
    LUN_COPY = "lun-copy"
    NOT_A_COPY = "not-a-copy"
    NO_ANSWER = "no-answer"
    LUN_LOST = "lun-lost"
    LUN_FULL = "lun-full"
    LUN_REFUSED = "lun-refused"
    ENDED = "ended"
    """The daemon ended without a word."""
    INTERRUPTED = "interrupted"
    VOLUME_OPTIONS = "volume-options"
    NOT_HEARD = "not-heard"


class Problem(Exception):
    """A wish that could not be granted: its kind, and what happened, in one sentence."""

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


def _sorted_kinds() -> list[tuple[type, Kind]]:
    # Late: whoever only needs the words (csvctl --help, the supervisor) loads nothing else.
    from csvfs import errors, mkfs_claim, resignature, resignature_claim
    from csvfs.host import mountpoint
    from csvfs.journal.replay import JournalDamaged
    from csvfs.membership import claim, fixed_area, newcomer, refusals
    from csvfs.ondisk.block import BadBlock
    from csvfs.ondisk.geometry import BadGeometry
    from csvfs.ondisk.view import NoView
    from redirector.block import device
    from redirector.block.probe import ProbeFailed

    return [
        (device.BadUrl, Kind.BAD_URL),
        (device.NoSuchLun, Kind.NO_SUCH_LUN),
        (device.AuthenticationFailed, Kind.CHAP_REFUSED),
        (device.LoginFailed, Kind.UNREACHABLE),
        (device.MediumError, Kind.MEDIUM_ERROR),
        (device.SpaceExhausted, Kind.LUN_FULL),
        (ProbeFailed, Kind.LUN_REFUSED),
        (device.TargetRefused, Kind.LUN_REFUSED),
        (device.BlockError, Kind.LUN_LOST),
        (refusals.RefuseOther, Kind.OTHER_HOST),
        (refusals.RefuseUnexplained, Kind.OTHER_HOST),
        (refusals.RefuseMountedHere, Kind.MOUNTED_TWICE),
        (refusals.RefuseCopy, Kind.LUN_COPY),
        (refusals.RefuseUnfinished, Kind.LUN_COPY),
        (refusals.RefuseFeature, Kind.NEWER_FORMAT),
        (refusals.RefuseTooSmall, Kind.TOO_SMALL),
        (refusals.RefuseForeign, Kind.FOREIGN_KEY),
        (refusals.RefuseExhausted, Kind.VOLUME_OPTIONS),
        (claim.ClaimFailed, Kind.LUN_REFUSED),
        (claim.LeaveIncomplete, Kind.LUN_LOST),
        (newcomer.ForeignReservation, Kind.FOREIGN_KEY),
        (resignature_claim.NotACopy, Kind.NOT_A_COPY),
        (resignature_claim.CopyInUse, Kind.OTHER_HOST),
        (resignature.CopyDamaged, Kind.DAMAGED),
        (mkfs_claim.LunOccupied, Kind.OCCUPIED_LUN),
        (mkfs_claim.KeysInTheWay, Kind.FOREIGN_KEY),
        (mkfs_claim.UnfitTarget, Kind.NO_ARBITER),
        (fixed_area.SuperblocksDestroyed, Kind.SUPERBLOCK_DESTROYED),
        (fixed_area.NoVolume, Kind.NOT_CSVFS),
        (NoView, Kind.DAMAGED),
        (JournalDamaged, Kind.DAMAGED),
        (BadGeometry, Kind.TOO_SMALL),
        (BadBlock, Kind.DAMAGED),
        (errors.DataLost, Kind.MEDIUM_ERROR),
        (errors.Damaged, Kind.DAMAGED),
        (errors.VolumeFailed, Kind.LUN_LOST),
        (mountpoint.Missing, Kind.MOUNT_POINT_MISSING),
        (mountpoint.NotADirectory, Kind.MOUNT_POINT_MISSING),
        (mountpoint.NotEmpty, Kind.MOUNT_POINT_NOT_EMPTY),
        (mountpoint.Occupied, Kind.MOUNT_POINT_BUSY),
        (mountpoint.NotMounted, Kind.NOT_MOUNTED),
        (mountpoint.InUse, Kind.FILES_OPEN),
        (PermissionError, Kind.PERMISSION),
        (OSError, Kind.SYSTEM),
    ]


def problem_of(error: BaseException) -> Problem:
    """``error`` as a `Problem`; of a group, the first member that is understood."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, BaseExceptionGroup):
        inner = [problem_of(each) for each in error.exceptions]
        return next((each for each in inner if each.kind is not Kind.BUG), inner[0])
    reason = getattr(error, "refusal", error)  # `ClaimRefused` says why by an object
    for kind_of_error, kind in _sorted_kinds():
        if isinstance(reason, kind_of_error):
            return Problem(kind, str(error))
    return Problem(Kind.BUG, f"{type(error).__name__}: {error}")
