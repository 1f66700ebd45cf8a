"""How csvctl ends: the one table of exit codes, and what each bad end means and asks for.

| code | meaning                          | code | meaning                                   |
|------|----------------------------------|------|-------------------------------------------|
| 0    | done                             | 80   | both superblocks destroyed                |
| 64   | the command line                 | 81   | another host has the volume               |
| 65   | the LUN's URL                    | 82   | mount point missing, or no directory      |
| 66   | no such target or LUN            | 83   | mount point not empty                     |
| 67   | CHAP refused                     | 84   | mount point busy                          |
| 68   | target unreachable               | 85   | volume mounted on this host already       |
| 69   | the target's arbiter does not    | 86   | not mounted                               |
|      | hold                             | 87   | files are open                            |
| 70   | a bug in csvfs                   | 88   | volume damaged                            |
| 71   | the system refused something     | 89   | the LUN is a copy made by the array       |
| 72   | LUN too small                    | 90   | the daemon does not answer                |
| 73   | not a csvfs volume               | 91   | connection to the LUN lost                |
| 74   | medium error                     | 92   | thin LUN full                             |
| 75   | something is on the LUN already  | 93   | the target refused a command              |
| 76   | a foreign reservation key        | 94   | the daemon ended                          |
| 77   | not root                         | 95   | interrupted                               |
| 78   | credentials file                 | 96   | no free slot, or options of the volume    |
| 79   | newer format                     | 97   | the LUN is no copy                        |
|      |                                  | 98   | the other hosts do not hear this one      |

`csvctl check` ends like fsck(8) instead: 0 clean, 1 errors corrected, 4 errors left, 8 it could
not be done, 16 the command line, 32 interrupted. `csvctl validate` that could look ends with 0
(nothing failed), 1 (warnings only) or 2 (something failed), else as the table. `mount.csvfs` ends
as mount(8) wants: 0, 1 for the command line, 2 the system, 4 a bug, 8 interrupted, 32 not mounted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from csvfs.host.problems import Kind


@dataclass(frozen=True, slots=True)
class Outcome:
    """A bad end: its exit code, what it means for virtual machines, and what to do next."""

    code: int
    means: str
    next_step: str


_NOTHING_CHANGED: Final = "Nothing was changed on the LUN."
_VMS_STAY: Final = "Virtual machines of this volume cannot be started on this host until then."

OUTCOMES: Final[dict[Kind, Outcome]] = {
    Kind.USAGE: Outcome(64, "Nothing was done.", "See `csvctl COMMAND --help`."),
    Kind.BAD_URL: Outcome(
        65,
        "Nothing was contacted.",
        "Write iscsi://[user@]host[:port]/target-iqn/lun, or file:///absolute/path.",
    ),
    Kind.NO_SUCH_LUN: Outcome(
        66,
        _VMS_STAY,
        "Check target name and LUN number, and on the array that the LUN is mapped to this "
        "host's initiator name.",
    ),
    Kind.CHAP_REFUSED: Outcome(
        67,
        _VMS_STAY,
        "Put user and password into /etc/csvfs/credentials (mode 0600), a line "
        "`TARGET-IQN USER PASSWORD`; compare them with the array's.",
    ),
    Kind.UNREACHABLE: Outcome(
        68,
        _VMS_STAY,
        "Check address and port, the route to the storage network, and that the target runs "
        "(`nc -vz HOST 3260`).",
    ),
    Kind.NO_ARBITER: Outcome(
        69,
        "With such a target two hosts could write the same image at once, and destroy it.",
        'Use a target whose persistent reservations work (see README, "Targets").',
    ),
    Kind.BUG: Outcome(
        70,
        "What fsync acknowledged is safe. The volume may have to be mounted again.",
        "Please report it, with the daemon's log and the output of `csvctl status --json`.",
    ),
    Kind.SYSTEM: Outcome(71, _VMS_STAY, "Mend what the system complains of, and try again."),
    Kind.TOO_SMALL: Outcome(72, _NOTHING_CHANGED, "Make the LUN larger, or choose other sizes."),
    Kind.NOT_CSVFS: Outcome(
        73,
        _NOTHING_CHANGED,
        "If this is the right LUN and it is new, `csvctl format` makes a volume of it.",
    ),
    Kind.MEDIUM_ERROR: Outcome(
        74,
        "The array lost data: files that lay there may be damaged, others are not concerned.",
        "Look at the array's log; restore the files that are named; then `csvctl check`.",
    ),
    Kind.OCCUPIED_LUN: Outcome(
        75,
        _NOTHING_CHANGED,
        "Make sure that it is the right LUN. Only if nobody needs what is on it: "
        "`csvctl format --force` destroys it.",
    ),
    Kind.FOREIGN_KEY: Outcome(
        76,
        f"{_NOTHING_CHANGED} Somebody else uses, or used, this LUN.",
        "Find out who it is. A key whose owner is gone for good is removed by "
        "`csvctl format --preempt-key KEY`.",
    ),
    Kind.PERMISSION: Outcome(77, "Nothing was done.", "Run it as root (sudo)."),
    Kind.CREDENTIALS: Outcome(
        78,
        "Nothing was contacted.",
        "`chown root /etc/csvfs/credentials; chmod 600 /etc/csvfs/credentials`; each line is "
        "`TARGET-IQN USER PASSWORD` (`*` for every target).",
    ),
    Kind.NEWER_FORMAT: Outcome(
        79,
        f"{_NOTHING_CHANGED} {_VMS_STAY}",
        "Install the csvfs that the other hosts run.",
    ),
    Kind.SUPERBLOCK_DESTROYED: Outcome(
        80,
        f"{_NOTHING_CHANGED} The images may be intact behind it.",
        "Find out what wrote to the LUN before anything else does. Then `csvctl check LUN` says "
        "whether they can be derived from the rest; `csvctl check --repair LUN` does it.",
    ),
    Kind.OTHER_HOST: Outcome(
        81,
        f"{_NOTHING_CHANGED} Its virtual machines run on, undisturbed.",
        "Mount it on each host with --cluster-address, or unmount it there first.",
    ),
    Kind.MOUNT_POINT_MISSING: Outcome(82, "Nothing was mounted.", "Make it: `mkdir -p DIR`."),
    Kind.MOUNT_POINT_NOT_EMPTY: Outcome(
        83,
        "Nothing was mounted: the mount would hide these files.",
        "Move them away, or choose another directory.",
    ),
    Kind.MOUNT_POINT_BUSY: Outcome(
        84, "Nothing was mounted.", "`umount DIR`, or choose another directory."
    ),
    Kind.MOUNTED_TWICE: Outcome(
        85,
        "The first mount goes on, undisturbed.",
        "Use it where it is (`csvctl status`), or unmount it there first.",
    ),
    Kind.NOT_MOUNTED: Outcome(86, "Nothing was done.", "`csvctl status` shows what is mounted."),
    Kind.FILES_OPEN: Outcome(
        87,
        "The volume stays mounted and its virtual machines run on.",
        "Shut down or migrate the virtual machines and close the files; then unmount again.",
    ),
    Kind.DAMAGED: Outcome(
        88,
        "Files on the volume may not be readable. Nothing more is written to it.",
        "Unmount it and run `csvctl check LUN`; `csvctl check --repair LUN` mends it.",
    ),
    Kind.LUN_COPY: Outcome(
        89,
        f"{_NOTHING_CHANGED} The original may be in use: two of one kind would be confused.",
        "Mount the original, or make the copy a volume of its own: `csvctl resignature LUN`.",
    ),
    Kind.NOT_A_COPY: Outcome(
        97,
        f"{_NOTHING_CHANGED} Whoever has it mounted goes on, undisturbed.",
        "Look at the array whether it is the right LUN; this one is mounted as it is.",
    ),
    Kind.NO_ANSWER: Outcome(
        90,
        "The daemon may be waiting for the LUN; virtual machines then wait, too.",
        "Look at its log and at the path to the target.",
    ),
    Kind.LUN_LOST: Outcome(
        91,
        "What fsync acknowledged is on the LUN; what was not may be missing.",
        "Look at the network and the target; then mount again: the journal is replayed.",
    ),
    Kind.LUN_FULL: Outcome(
        92,
        "The array has no room behind a thin LUN: writes cannot be carried out.",
        "Give the array more room.",
    ),
    Kind.LUN_REFUSED: Outcome(
        93, _VMS_STAY, "Look at the array's log; `csvctl status` and the message say which command."
    ),
    Kind.ENDED: Outcome(
        94,
        "What fsync acknowledged is on the LUN.",
        "Its log says why it ended; then mount again: the journal is replayed.",
    ),
    Kind.INTERRUPTED: Outcome(95, "Nothing is mounted.", "Run it again."),
    Kind.VOLUME_OPTIONS: Outcome(96, _NOTHING_CHANGED, "Choose other options."),
    Kind.NOT_HEARD: Outcome(
        98,
        "Nothing is mounted. The other hosts go on, undisturbed.",
        "See that --cluster-address is an address of this host that all others reach, and that "
        "nothing between them stops its port, TCP and UDP, in either direction.",
    ),
}

VALID: Final = 0
VALID_WITH_WARNINGS: Final = 1
NOT_VALID: Final = 2

FSCK_CLEAN: Final = 0
FSCK_CORRECTED: Final = 1
FSCK_ERRORS_LEFT: Final = 4
FSCK_OPERATIONAL: Final = 8
FSCK_USAGE: Final = 16
FSCK_INTERRUPTED: Final = 32

_MOUNT_CODES: Final = {
    Kind.USAGE: 1,
    Kind.BAD_URL: 1,
    Kind.PERMISSION: 1,
    Kind.SYSTEM: 2,
    Kind.BUG: 4,
    Kind.INTERRUPTED: 8,
}


def mount_code(kind: Kind) -> int:
    """The exit code of mount.csvfs (mount(8) EXIT STATUS)."""
    return _MOUNT_CODES.get(kind, 32)


def fsck_code(kind: Kind) -> int:
    """The exit code of `csvctl check` that could not check (fsck(8) EXIT CODE)."""
    if kind in (Kind.USAGE, Kind.BAD_URL):
        return FSCK_USAGE
    return FSCK_INTERRUPTED if kind is Kind.INTERRUPTED else FSCK_OPERATIONAL
