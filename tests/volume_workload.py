"""A crash test's workload on a volume: several users at once, each in a directory of its own.

What a user may expect after a power loss, and `VolumeVerifier` holds every cut against:

names    Each operation on names or attributes is one transaction, and transactions are stable in
         their order. So a user's directory is exactly as after one of the operations that it had
         begun, and not before the last one that a `sync` covered.
data     A record (128 bytes of a file, which say whose they are, where they belong and which
         operation wrote them) has the value that it had when the file was last synced, or one
         that a later operation, begun before the cut, would have given it. Nothing else: nothing
         of another file, nothing older, nothing torn.
space    `csvfs.check` finds nothing wrong, and nothing is left to be reclaimed once the volume
         was left.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field
from random import Random
from struct import Struct
from typing import Any, Final

import trio

from csvfs.format import Superblock
from csvfs.format_geometry import ROOT_INODE
from csvfs.handle import Handle
from csvfs.inode import SetAttributes
from csvfs.rename import EXCHANGE
from csvfs.transaction import Transaction
from csvfs.volume import Volume
from tests.crash import CrashRun, Cut
from tests.lock_rival import LockRival
from tests.simulated_volume import PORT, SLOT, UNIT, formatted, mounted
from tests.volume_script import assert_clean

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

    # -- names -------------------------------------------------------------------------------
    async def do_create(self) -> str:
        if len(self.files) > 14:
            return ""
        folder, name = self.free_place()
        uid = self.new_uid()
        handle, attributes = await self.volume.create(
            folder.ino, name, 0o644, os.O_RDWR | os.O_EXCL, uid, 0
        )
        self.volume.remember(attributes.ino, 1)
        file = File(uid, attributes.ino, handle, 0o644, self.step)
        folder.names[name] = self.files[uid] = self.all_files[uid] = file
        return "create"

    async def do_mkdir(self) -> str:
        if len(self.folders()) > 8:
            return ""
        folder, name = self.free_place()
        uid = self.new_uid()
        made = await self.volume.mkdir(folder.ino, name, 0o755, uid, 0)
        self.volume.remember(made.ino, 1)
        folder.names[name] = Folder(made.ino, uid)
        return "mkdir"

    async def do_symlink(self) -> str:
        folder, name = self.free_place()
        target, uid = b"t" * self.rng.choice((5, 3840, 4095)), self.new_uid()
        await self.volume.symlink(folder.ino, name, target, uid, 0)
        folder.names[name] = Special(stat.S_IFLNK | 0o777, uid, target)
        return "symlink" if len(target) < 3841 else "long symlink"

    async def do_mknod(self) -> str:
        folder, name = self.free_place()
        mode, uid = stat.S_IFIFO | 0o600, self.new_uid()
        await self.volume.mknod(folder.ino, name, mode, 0, uid, 0)
        folder.names[name] = Special(mode, uid)
        return "mknod"

    async def do_link(self) -> str:
        place = self.place(File)
        if place is None:
            return ""
        folder, name = self.free_place()
        file = place[0].names[place[1]]
        await self.volume.link(file.ino, folder.ino, name)
        file.nlink += 1
        folder.names[name] = file
        return "link"

    async def do_unlink(self) -> str:
        place = self.place(File) if self.rng.random() < 0.5 else self.place(Special)
        if place is None:
            return ""
        folder, name = place
        await self.volume.unlink(folder.ino, name)
        node = folder.names.pop(name)
        if isinstance(node, Special):
            return "unlink"
        node.nlink -= 1
        return "unlink of what is open"

    async def do_rmdir(self) -> str:
        empty = [(f, n) for f, n in self.places(Folder) if not f.names[n].names]
        if not empty:
            return ""
        folder, name = self.rng.choice(empty)
        await self.volume.rmdir(folder.ino, name)
        del folder.names[name]
        return "rmdir"

    async def do_rename(self) -> str:
        return await self._rename(self.place())

    async def do_rename_directory(self) -> str:
        return await self._rename(self.place(Folder))

    async def _rename(self, place: tuple[Folder, bytes] | None) -> str:
        if place is None:
            return ""
        old, name = place
        new, new_name = self.free_place()
        moved = old.names[name]
        if isinstance(moved, Folder) and new in folders_below(moved):
            return ""
        await self.volume.rename(old.ino, name, new.ino, new_name)
        del old.names[name]
        new.names[new_name] = moved
        where = "" if old is new else " across directories"
        return f"rename of a directory{where}" if isinstance(moved, Folder) else f"rename{where}"

    async def do_replace_directory(self) -> str:
        empty = [(f, n) for f, n in self.places(Folder) if not f.names[n].names]
        source = self.place(Folder)
        if source is None or not empty:
            return ""
        (old, name), (new, new_name) = source, self.rng.choice(empty)
        moved, victim = old.names[name], new.names[new_name]
        if moved is victim or new in folders_below(moved):
            return ""
        await self.volume.rename(old.ino, name, new.ino, new_name)
        del old.names[name]
        new.names[new_name] = moved
        return "rename over a directory"

    do_replace_directory_again = do_replace_directory

    async def do_replace(self) -> str:
        source, target = self.place(File), self.place(File)
        if source is None or target is None:
            return ""
        (old, name), (new, new_name) = source, target
        moved, victim = old.names[name], new.names[new_name]
        await self.volume.rename(old.ino, name, new.ino, new_name)
        if moved is not victim:
            del old.names[name]
            new.names[new_name] = moved
            victim.nlink -= 1
        return "rename over a file"

    async def do_exchange(self) -> str:
        source, target = self.place(), self.place(File)
        if source is None or target is None:
            return ""
        (old, name), (new, new_name) = source, target
        moved, other = old.names[name], new.names[new_name]
        if isinstance(moved, Folder) and new in folders_below(moved):
            return ""
        await self.volume.rename(old.ino, name, new.ino, new_name, EXCHANGE)
        old.names[name], new.names[new_name] = other, moved
        return "exchange"

    # -- attributes --------------------------------------------------------------------------
    async def do_chmod(self) -> str:
        place = self.place(File)
        if place is None:
            return ""
        file = place[0].names[place[1]]
        mode = self.rng.choice((0o600, 0o640, 0o755))
        await self.volume.setattr(file.ino, SetAttributes(mode=mode, gid=self.step))
        file.mode, file.gid = mode, self.step
        return "setattr"

    async def do_setxattr(self) -> str:
        place = self.place(File) if self.rng.random() < 0.6 else self.place(Folder)
        if place is None:
            return ""
        node = place[0].names[place[1]]
        kind = "setxattr" if node.tag is None else "setxattr again"
        value = b"%d" % self.step * self.rng.choice((1, 300))
        await self.volume.setxattr(node.ino, XATTR, value)
        node.tag = value
        return kind

    async def do_removexattr(self) -> str:
        tagged = [(f, n) for f, n in self.places() if getattr(f.names[n], "tag", None) is not None]
        if not tagged:
            return ""
        folder, name = self.rng.choice(tagged)
        await self.volume.removexattr(folder.names[name].ino, XATTR)
        folder.names[name].tag = None
        return "removexattr"

    # -- data --------------------------------------------------------------------------------
    def any_file(self) -> File | None:
        """Also one that has no name any more."""
        return self.rng.choice(list(self.files.values())) if self.files else None

    async def _write(self, file: File, first: int, count: int) -> None:
        data = b"".join(record(file.uid, first + i, self.step) for i in range(count))
        end, before = (first + count) * RECORD_BYTES, file.size_before(self.step)
        size, alone = max(file.size, end), max(before, end)
        file.ops.append(DataOp(self.step, first, first + count, size, alone))
        written = await self.volume.write(file.handle, first * RECORD_BYTES, data)
        assert written == len(data)

    async def do_write(self) -> str:
        file = self.any_file()
        if file is None:
            return ""
        count = self.rng.choice((1, 3, 4, 32, 512, 700))
        await self._write(file, self.rng.randrange(MOST_RECORDS), count)
        return "write"

    do_write_more = do_write

    async def do_write_again(self) -> str:
        file = self.any_file()
        if file is None or file.size < RECORD_BYTES:
            return ""
        end = file.size // RECORD_BYTES
        first = self.rng.randrange(end)
        await self._write(file, first, min(self.rng.choice((1, 4, 64)), end - first))
        return "write within the file"

    async def do_append(self) -> str:
        file = self.any_file()
        if file is None or file.size > MOST_RECORDS * RECORD_BYTES:
            return ""
        await self._write(file, file.size // RECORD_BYTES, self.rng.choice((1, 32, 600)))
        return "append"

    async def do_write_at_once(self) -> str:
        file = self.any_file()
        if file is None:
            return ""
        start = self.rng.randrange(MOST_RECORDS)
        parts = [(start + 200 * i, self.rng.choice((7, 64, 200))) for i in range(4)]
        self.rng.shuffle(parts)
        async with trio.open_nursery() as nursery:
            for first, count in parts:
                nursery.start_soon(self._write, file, first, count)
        return "writes at once"

    async def do_truncate(self) -> str:
        file = self.any_file()
        if file is None:
            return ""
        records = self.rng.choice((0, self.rng.randrange(MOST_RECORDS)))
        size = records * RECORD_BYTES
        kind = "truncate" if size <= file.size else "truncate to more"
        file.ops.append(DataOp(self.step, records, 1 << 62, size, size, truncates=True))
        await self.volume.setattr(file.ino, SetAttributes(size=size))
        return kind

    async def do_fragment(self) -> str:
        """Every second unit: many extents, so that taking them out needs several transactions."""
        file = self.any_file()
        if file is None or self.rng.random() < 0.7:
            return ""
        for unit in range(0, 80, 2):
            await self._write(file, unit * UNIT // RECORD_BYTES, 4)
        return "fragment"

    async def do_open_truncating(self) -> str:
        file = self.any_file()
        if file is None or self.rng.random() < 0.5:
            return ""
        file.ops.append(DataOp(self.step, 0, 1 << 62, 0, 0, truncates=True))
        handle = await self.volume.open(file.ino, os.O_WRONLY | os.O_TRUNC, 0)
        await self.volume.release(handle)
        return "open with truncation"

    async def do_read(self) -> str:
        file = self.any_file()
        if file is None:
            return ""
        content = bytes(await self.volume.read(file.handle, 0, file.size + 1))
        check_content(file, content, self.step, self.step)
        return ""

    # -- durability --------------------------------------------------------------------------
    async def do_fsync(self) -> str:
        file = self.any_file()
        if file is None:
            return ""
        datasync = self.rng.random() < 0.5
        await self.volume.fsync(file.ino, datasync)
        self.run.acknowledge(Synced(file.uid, self.step))
        self.run.acknowledge(Settled(self.number, file.created))
        return "fdatasync" if datasync else "fsync"

    async def do_sync(self) -> str:
        if self.rng.random() < 0.5:
            return ""
        await self.volume.sync()
        self.run.acknowledge(Settled(self.number, self.step - 1))
        for uid in self.files:
            self.run.acknowledge(Synced(uid, self.step))
        return "sync"

    async def do_close(self) -> str:
        gone = [file for file in self.files.values() if file.nlink == 0]
        if not gone:
            return ""
        file = self.rng.choice(gone)
        del self.files[file.uid]
        await self.volume.release(file.handle)
        await self.volume.forget(file.ino, 1)
        return "last close of what has no name"


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


class VolumeWorkload:
    """Some users and another node that wants their locks."""

    def __init__(self, users: int, steps: int) -> None:
        self._users = users
        self._steps = steps
        self.users: list[User] = []
        self.superblock: Superblock
        self.first_write = 0
        self.transactions = 0
        self.units_reclaimed = 0

    async def __call__(self, run: CrashRun) -> None:
        self.superblock = await formatted(run.lun)
        run.device = await run.lun.login(PORT)
        self.users = [User(number, run, self._steps) for number in range(1, self._users + 1)]
        async with mounted(run.device, self.superblock) as (volume, locks):
            self.first_write = run.lun.journal.writes
            self._count_transactions(volume)
            rival = LockRival(locks)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_locks, rival, Random(run.seed))
                async with trio.open_nursery() as users:
                    for user in self.users:
                        users.start_soon(user.work, volume)
                nursery.cancel_scope.cancel()
            run.types["lock taken away"] += rival.taken
            self.units_reclaimed = volume.reclaimer.units_freed
            volume.check()

    def _count_transactions(self, volume: Volume) -> None:
        merge = volume.store.journal.merge

        def counting(transaction: Transaction) -> None:
            self.transactions += bool(transaction.images)
            merge(transaction)

        volume.store.journal.merge = counting  # type: ignore[method-assign]  # only to count

    async def _take_locks(self, rival: LockRival, rng: Random) -> None:
        while True:
            await trio.sleep(rng.uniform(0, 0.02))
            await rival.take_some(rng)


class VolumeVerifier:
    """Recovers the volume on a cut and holds it against what the users may expect."""

    def __init__(self, workload: VolumeWorkload) -> None:
        self._workload = workload

    async def __call__(self, cut: Cut) -> str:
        begun: dict[int, int] = defaultdict(int)
        settled: dict[int, int] = defaultdict(lambda: -1)
        synced: dict[int, int] = defaultdict(int)
        for promise in cut.promises():
            if isinstance(promise, Begun):
                begun[promise.user] = promise.step
            elif isinstance(promise, Settled):
                settled[promise.user] = max(settled[promise.user], promise.step)
            else:
                synced[promise.uid] = promise.step
        device = await cut.lun.login(PORT)
        superblock = self._workload.superblock
        async with mounted(device, superblock, incarnation=2, recover=False) as (volume, _):
            recovered = await volume.recover(SLOT)
            for user in self._workload.users:
                if settled[user.number] >= 0:
                    low, high = settled[user.number], begun[user.number]
                    await self._verify(volume, user, low, high, synced)
        await assert_clean(device, superblock, 2)
        return "with orphans" if recovered.retired or recovered.trimmed else "without orphans"

    async def _verify(
        self, volume: Volume, user: User, low: int, high: int, synced: dict[int, int]
    ) -> None:
        home = await volume.lookup(ROOT_INODE, home_name(user.number))
        files: dict[int, int] = {}
        tree = await read_tree(volume, home.ino, b"", files)
        matching = [step for step in range(low, high + 1) if user.trees[step] == tree]
        if not matching:
            nearest = min(
                range(low, high + 1), key=lambda s: len(user.trees[s].items() ^ tree.items())
            )
            raise AssertionError(
                f"user {user.number} has the names of no step from {low} to {high}; to step"
                f" {nearest} differ {user.trees[nearest].items() ^ tree.items()}"
            )
        for uid, ino in files.items():
            handle = await volume.open(ino, os.O_RDONLY, 0)
            content = bytes(await volume.read(handle, 0, 1 << 30))
            await volume.release(handle)
            try:
                check_content(user.all_files[uid], content, max(synced[uid], low), high)
            except AssertionError as error:
                raise AssertionError(f"file {uid} of user {user.number}: {error}") from None


async def read_tree(volume: Volume, ino: int, path: bytes, files: dict[int, int]) -> Tree:
    """What stands below a directory, and the inodes of its files by their owners' numbers."""
    tree: Tree = {}
    cookie = 0
    while entries := await volume.readdir(ino, cookie, 20):
        cookie = entries[-1].cookie
        for entry in entries:
            if entry.name in (b".", b".."):
                continue
            here, found = path + b"/" + entry.name, entry.attributes
            is_link = stat.S_ISLNK(found.mode)
            target = await volume.readlink(found.ino) if is_link else b""
            names = await volume.listxattr(found.ino)
            tag = await volume.getxattr(found.ino, XATTR) if names else None
            tree[here] = (found.mode, found.uid, found.gid, found.nlink, tag, target)
            if found.is_directory:
                tree |= await read_tree(volume, found.ino, here, files)
            elif stat.S_ISREG(found.mode):
                files[found.uid] = found.ino
    return tree
