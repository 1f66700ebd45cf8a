"""Users of a volume for the crash tests: what they do, and what they remember of it.

`tests.volume_workload` says what they may expect after a power loss.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from random import Random
from struct import Struct
from typing import Any, Final

from csvfs.namespace.handle import Handle
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.volume import Volume
from tests.crash import CrashRun
from tests.simulated_volume import UNIT

RECORD_BYTES: Final = 128
RECORD: Final = Struct("<IIQ")
MOST_RECORDS: Final = 6 * UNIT // RECORD_BYTES
XATTR: Final = b"user.tag"

Shown = tuple[int, int, int, int, bytes | None, bytes]
"""mode, uid, gid, nlink, attribute, target: what is compared of an inode."""
Tree = dict[bytes, Shown]
"""By path below the user's directory."""


def record(owner: int, index: int, sequence: int) -> bytes:
    return RECORD.pack(owner, index, sequence) * (RECORD_BYTES // RECORD.size)


@dataclass(frozen=True)
class Begun:
    """A user's step has begun: its effect may be there."""

    user: int
    step: int


@dataclass(frozen=True)
class Settled:
    """All names are stable as they were after this step."""

    user: int
    step: int


@dataclass(frozen=True)
class Synced:
    """What was written to a file up to this step is stable."""

    uid: int
    step: int


@dataclass(frozen=True)
class DataOp:
    """``first`` to ``end``: records written; a truncation makes zeroes of them."""

    step: int
    first: int
    end: int
    size: int
    """Of the file in bytes, after this and all before it."""
    alone: int
    """The same, if of its step this is the only one that is there."""
    truncates: bool = False


@dataclass(eq=False)
class File:
    """A regular file of a user, named or not. Its owner's number tells files apart."""

    uid: int
    ino: int
    handle: Handle
    mode: int
    created: int
    """In which step."""
    gid: int = 0
    nlink: int = 1
    tag: bytes | None = None
    ops: list[DataOp] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.ops[-1].size if self.ops else 0

    def size_before(self, step: int) -> int:
        """What it was when a step began."""
        return next((op.size for op in reversed(self.ops) if op.step < step), 0)


@dataclass(eq=False)
class Folder:
    """A directory, and what stands in it: files, folders, and the rest as it is shown."""

    ino: int
    uid: int
    names: dict[bytes, Any] = field(default_factory=dict)
    tag: bytes | None = None


@dataclass(eq=False)
class Special:
    """A symbolic link or a FIFO."""

    mode: int
    uid: int
    target: bytes = b""


class User:
    """One task of the workload, and all that it did."""

    def __init__(self, number: int, run: CrashRun, steps: int) -> None:
        self.number = number
        self.run = run
        self.rng = Random(f"{run.seed} {number}")
        self.steps = steps
        self.step = 0
        self.trees: list[Tree] = []
        """After step i."""
        self.files: dict[int, File] = {}
        """Those that are open: also some without a name."""
        self.all_files: dict[int, File] = {}
        self.next_uid = number * 100_000
        self.home = Folder(0, 0)
        self.volume: Volume

    # -- what there is -----------------------------------------------------------------------
    def shown(self) -> Tree:
        tree: Tree = {}
        self._show(self.home, b"", tree)
        return tree

    def _show(self, folder: Folder, path: bytes, tree: Tree) -> None:
        for name, node in folder.names.items():
            here = path + b"/" + name
            if isinstance(node, Folder):
                below = sum(isinstance(each, Folder) for each in node.names.values())
                tree[here] = (stat.S_IFDIR | 0o755, node.uid, 0, 2 + below, node.tag, b"")
                self._show(node, here, tree)
            elif isinstance(node, File):
                mode = stat.S_IFREG | node.mode
                tree[here] = (mode, node.uid, node.gid, node.nlink, node.tag, b"")
            else:
                tree[here] = (node.mode, node.uid, 0, 1, None, node.target)

    def folders(self) -> list[Folder]:
        return folders_below(self.home)

    def places(self, kind: type | None = None) -> list[tuple[Folder, bytes]]:
        """Names that are taken, by something of a kind."""
        return [
            (folder, name)
            for folder in self.folders()
            for name, node in folder.names.items()
            if kind is None or isinstance(node, kind)
        ]

    def place(self, kind: type | None = None) -> tuple[Folder, bytes] | None:
        """One of them."""
        places = self.places(kind)
        return self.rng.choice(places) if places else None

    def free_place(self) -> tuple[Folder, bytes]:
        folder = self.rng.choice(self.folders())
        names = [b"n%02d" % i + b"x" * (self.rng.random() < 0.2) * 90 for i in range(40)]
        return folder, self.rng.choice([name for name in names if name not in folder.names])

    def new_uid(self) -> int:
        self.next_uid += 1
        return self.next_uid

    # -- running -----------------------------------------------------------------------------
    async def work(self, volume: Volume) -> None:
        self.volume = volume
        made = await volume.mkdir(ROOT_INODE, home_name(self.number), 0o755, 0, 0)
        volume.remember(made.ino, 1)
        self.home.ino = made.ino
        await volume.sync()
        self.trees.append(self.shown())
        self.run.acknowledge(Settled(self.number, 0))
        actions = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        while self.step < self.steps:
            self.step += 1
            self.run.acknowledge(Begun(self.number, self.step))
            kind = await self.rng.choice(actions)()
            if kind:
                self.run.count(kind)
            self.trees.append(self.shown())


def home_name(number: int) -> bytes:
    return b"user%d" % number


def folders_below(folder: Folder) -> list[Folder]:
    """The folder itself, and all in it."""
    found = [folder]
    for each in found:
        found += [node for node in each.names.values() if isinstance(node, Folder)]
    return found


def check_content(file: File, content: bytes, synced: int, begun: int) -> None:
    """What a file may hold if it was synced after step ``synced`` and ``begun`` was the last one
    begun. Raises AssertionError."""
    base = [op for op in file.ops if op.step <= synced]
    later = [op for op in file.ops if synced < op.step <= begun]
    sizes = {base[-1].size if base else 0}
    for op in later:
        sizes |= {op.size, op.alone}
    assert len(content) in sizes, f"size {len(content)}, not one of {sorted(sizes)}"
    touched: set[int] = set()
    for op in file.ops:
        if not op.truncates:
            touched.update(range(op.first, min(op.end, len(content) // RECORD_BYTES)))
    rest = bytearray(content)
    for index in touched:
        place = slice(index * RECORD_BYTES, (index + 1) * RECORD_BYTES)
        check_record(file.uid, index, content[place], base, later)
        rest[place] = bytes(RECORD_BYTES)
    assert rest.count(0) == len(rest), "there is something where nothing was ever written"


def check_record(
    uid: int, index: int, found: bytes, base: list[DataOp], later: list[DataOp]
) -> None:
    """A record is what the last of ``base`` or any of ``later`` made of it."""
    allowed = {0}
    for op in base:
        if op.first <= index < op.end:
            allowed = {0 if op.truncates else op.step}
    allowed |= {0 if op.truncates else op.step for op in later if op.first <= index < op.end}
    if found == bytes(RECORD_BYTES):
        assert 0 in allowed, f"record {index} is lost: it is of one of the steps {allowed}"
        return
    owner, place, step = RECORD.unpack_from(found)
    assert found == record(owner, place, step), f"record {index} is torn"
    assert (owner, place) == (uid, index), f"record {index} is {place} of file {owner}"
    assert step in allowed, f"record {index} is of step {step}, not one of {allowed}"
