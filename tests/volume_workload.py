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
from random import Random

import trio

from csvfs.format import Superblock
from csvfs.journal.transaction import Transaction
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.volume import Volume
from tests.crash import CrashRun, Cut
from tests.lock_rival import LockRival
from tests.simulated_volume import PORT, SLOT, formatted, mounted
from tests.volume_actions import BusyUser
from tests.volume_script import assert_clean
from tests.volume_users import XATTR, Begun, Settled, Tree, User, check_content, home_name


class VolumeWorkload:
    """Some users and another node that wants their locks."""

    def __init__(self, users: int, steps: int) -> None:
        self._users = users
        self._steps = steps
        self.users: list[BusyUser] = []
        self.superblock: Superblock
        self.first_write = 0
        self.transactions = 0
        self.units_reclaimed = 0

    async def __call__(self, run: CrashRun) -> None:
        self.superblock = await formatted(run.lun)
        run.device = await run.lun.login(PORT)
        self.users = [BusyUser(number, run, self._steps) for number in range(1, self._users + 1)]
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
        if recovered.trimmed:
            return "with a truncation to finish"
        return "with orphans" if recovered.retired else "without orphans"

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
