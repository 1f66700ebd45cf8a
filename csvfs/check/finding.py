"""What can be wrong with a volume: each kind of damage has a name, a meaning and a remedy.

A *finding* is one piece of damage at one place. It may carry a repair: a function that mends the
blocks on the `Workbench`. Findings have a stage, because one piece of damage makes others: space
that a destroyed directory owned looks leaked. Repairs of a later stage wait until no finding of an
earlier one is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csvfs.check.workbench import Workbench

Repair = Callable[["Workbench"], Awaitable[None]]


class Stage(IntEnum):
    """The order of repairs."""

    FIXED = 0
    """Superblock, view, slots, journals, list roots: what is at a known place."""
    STRUCTURE = 1
    """Inodes, trees, directories: what leads to everything else."""
    COUNTS = 2
    """Numbers that follow from the structure: links, entries, units."""
    SPACE = 3
    """Allocation maps: what is in use follows from all of the above."""


class Damage(Enum):
    """(stage, what is wrong, what repair does)."""

    SUPERBLOCKS = (Stage.FIXED, "both superblocks are destroyed", "derived from the rest")
    SUPERBLOCK = (Stage.FIXED, "the superblock is damaged", "written anew")
    BACKUP_SUPERBLOCK = (Stage.FIXED, "the backup superblock is damaged", "written anew")
    VIEW_COPY = (Stage.FIXED, "one of the two views is damaged", "written anew from the other")
    VIEW = (Stage.FIXED, "both views are damaged", "made anew of slot blocks and journals")
    SLOT_BLOCK = (Stage.FIXED, "a slot block is damaged", "written anew, without sessions")
    JOURNAL = (Stage.FIXED, "a journal cannot be read", "emptied: its last changes are lost")
    LIST_ROOT = (Stage.FIXED, "the root of an orphan or reclaim list is damaged", "emptied")
    LIST_ENTRY = (Stage.STRUCTURE, "an entry of an orphan or reclaim list is wrong", "removed")
    ROOT_DIRECTORY = (Stage.STRUCTURE, "the root directory is damaged", "an empty one")
    INODE = (Stage.STRUCTURE, "an inode is damaged: the file is lost", "its names are removed")
    TREE_NODE = (Stage.STRUCTURE, "a B-tree node is damaged", "the tree is rebuilt of the rest")
    EXTENT = (Stage.STRUCTURE, "an extent record is wrong", "removed: those bytes read as zeros")
    DOUBLE_UNITS = (Stage.STRUCTURE, "two owners claim the same space", "the later one loses it")
    DOUBLE_BLOCK = (Stage.STRUCTURE, "two owners claim the same block", "the later one loses it")
    XATTRS = (Stage.STRUCTURE, "an xattr block is damaged", "the attributes are removed")
    SYMLINK = (Stage.STRUCTURE, "a symbolic link's target is damaged", "the link is removed")
    ENTRY = (Stage.STRUCTURE, "a directory entry is wrong", "removed")
    DANGLING_ENTRY = (Stage.STRUCTURE, "a name leads to nothing", "removed")
    STALE_ENTRY = (Stage.STRUCTURE, "a name leads to another file's inode", "removed")
    ENTRY_TYPE = (Stage.COUNTS, "a name shows the wrong type", "corrected")
    SECOND_NAME = (Stage.STRUCTURE, "a directory has a second name", "the later one is removed")
    LOST_INODE = (Stage.STRUCTURE, "a file has no name", "named #NUMBER in /lost+found")
    PARENT = (Stage.COUNTS, "a directory names the wrong parent", "corrected")
    LINK_COUNT = (Stage.COUNTS, "a link count is wrong", "corrected")
    ENTRY_COUNT = (Stage.COUNTS, "a directory's entry count is wrong", "corrected")
    UNIT_COUNT = (Stage.COUNTS, "a file's count of units or blocks is wrong", "corrected")
    GROUP_HEADER = (Stage.SPACE, "a group header is damaged", "written anew")
    GROUP_MAP = (Stage.SPACE, "an allocation map is damaged", "written anew")
    LEAKED = (Stage.SPACE, "space is marked in use that nobody owns", "freed")
    UNMARKED = (Stage.SPACE, "space in use is marked free", "marked")
    FREE_COUNT = (Stage.SPACE, "a group's free count is wrong", "corrected")

    @property
    def stage(self) -> Stage:
        """When it is repaired."""
        return self.value[0]

    @property
    def words(self) -> str:
        """What is wrong, for people."""
        return self.value[1]

    @property
    def remedy(self) -> str:
        """What repair does about it."""
        return self.value[2]


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of damage at one place."""

    damage: Damage
    where: str
    detail: str
    repair: Repair | None = field(default=None, compare=False, repr=False)
    while_taken: bool = False
    """It is mended while the volume is taken, before there is a workbench."""

    @property
    def repairable(self) -> bool:
        """A repair mends it."""
        return self.repair is not None or self.while_taken

    def __str__(self) -> str:
        return f"{self.where}: {self.damage.words}: {self.detail}"


@dataclass(slots=True)
class Totals:
    """What a volume holds."""

    directories: int = 0
    files: int = 0
    others: int = 0
    extents: int = 0
    data_units: int = 0
    metadata_blocks: int = 0
    orphans: int = 0
    reclaim_entries: int = 0
    replayed_records: int = 0


@dataclass(slots=True)
class Report:
    """The result of a check: what was found, what was mended, what is left."""

    totals: Totals = field(default_factory=Totals)
    findings: list[Finding] = field(default_factory=list)
    """Everything found on the volume as it was."""
    left: list[Finding] = field(default_factory=list)
    """What is still wrong now: all of it without repair."""
    repaired_blocks: int = 0
    complete: bool = True
    """False: the check could not go beyond what it found; ``totals`` say nothing."""

    @property
    def clean(self) -> bool:
        """Nothing was wrong."""
        return not self.findings

    @property
    def exit_code(self) -> int:
        """As fsck(8): 0 clean, 1 damage was repaired, 4 damage is left."""
        if self.left:
            return 4
        return 0 if self.clean else 1

    def counts(self) -> Counter[Damage]:
        """How often each kind of damage was found."""
        return Counter(finding.damage for finding in self.findings)
