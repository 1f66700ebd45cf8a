"""What the users of the crash tests do: one operation a step, chosen by their dice."""

from __future__ import annotations

import os
import stat

import trio

from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.rename import EXCHANGE
from tests.simulated_volume import UNIT
from tests.volume_users import (
    MOST_RECORDS,
    RECORD_BYTES,
    XATTR,
    DataOp,
    File,
    Folder,
    Settled,
    Special,
    Synced,
    User,
    check_content,
    folders_below,
    record,
)


class BusyUser(User):
    """Each ``do_`` method is one step; it returns its kind, "" if there was nothing to do."""

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
