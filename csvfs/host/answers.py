"""The one place that maps errors to errno, and the shape in which FUSE wants attributes.

`Answers.to` turns whatever a volume raised into the `FUSEError` that its caller sees. Errors of
the filesystem have their errno in a table. Anything else is a bug: it is logged with its
traceback and answered EIO, because an exception that leaves a handler ends the mount.

ENOENT or ESTALE. Between the LOOKUP that gave the kernel an inode number and the request that uses
it another host may have removed the inode, by a rename over the name, too. Who had a path in hand
must not be told ENOENT, for the name may always have been there. ESTALE makes the kernel walk the
path once more (Linux, retry_estale), and what is really gone is ENOENT then; that second walk is
not disturbed again (`csvfs.namespace.second_look`). So ENOENT is said of
names, ESTALE of numbers:

    request                                     of what                             gone
    lookup, unlink, rmdir, rename               the name                            ENOENT
    the same, and mkdir, mknod, symlink,        the directory they go by, removed
      create; link                                by another host                   ESTALE
                                                  by this host                      ENOENT
    open, opendir, getattr, setattr, readlink,  the inode
      getxattr, setxattr, listxattr,
      removexattr, link (what is linked)                                            ESTALE
    readdir                                     the open directory                  ENOENT
    read, write, fsync, release                 an open file is never gone          -

A directory that this host removed is in the kernel's hands: nothing walks through it. What readdir
answers is what getdents(2) tells of a removed directory; nobody walks a path then. Whoever works
without a path (a working directory, an O_PATH descriptor) whose inode another host removed is
told ESTALE in the end, as on NFS.
"""

from __future__ import annotations

import errno
import logging
from typing import Final, Protocol

from pyfuse3 import EntryAttributes, FUSEError, StatvfsData

from csvfs import errors
from csvfs.namespace.inode import Attributes
from lockmgr.cluster.errors import ClusterStopped
from redirector.block.device import BlockError, SpaceExhausted

_log = logging.getLogger("csvfs.operations")

ERRNO: Final[dict[type[BaseException], int]] = {
    errors.NotFound: errno.ENOENT,
    errors.NameExists: errno.EEXIST,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.NotEmpty: errno.ENOTEMPTY,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.TooManyLinks: errno.EMLINK,
    errors.InvalidArgument: errno.EINVAL,
    errors.NotPermitted: errno.EPERM,
    errors.NotSupported: errno.EOPNOTSUPP,
    errors.BadHandle: errno.EBADF,
    errors.FileTooBig: errno.EFBIG,
    errors.NoSpace: errno.ENOSPC,
    errors.NoXattrSpace: errno.ENOSPC,
    errors.NoEntrySpace: errno.ENOSPC,
    errors.NoAttribute: errno.ENODATA,
    errors.StaleInode: errno.ESTALE,
    errors.DataLost: errno.EIO,
    errors.Damaged: errno.EIO,
    errors.VolumeFailed: errno.EIO,
    ClusterStopped: errno.EIO,
    SpaceExhausted: errno.ENOSPC,
    BlockError: errno.EIO,
}
"""By the nearest class in the error's method resolution order."""


def errno_of(error: BaseException) -> int | None:
    """The errno of ``error``; None when it is nothing that a volume may raise.

    A group of errors (a nursery inside the volume) answers as its first known member.
    """
    if isinstance(error, errors.AttributeTooBig):
        return errno.E2BIG if error.value else errno.ERANGE
    if isinstance(error, BaseExceptionGroup):
        found = [errno_of(each) for each in error.exceptions]
        return None if None in found else found[0]
    for kind in type(error).__mro__:
        if kind in ERRNO:
            return ERRNO[kind]
    return None


class Answers:
    """Turns errors into answers, and tells the log what the caller cannot be told."""

    def __init__(self) -> None:
        self._failure_told = False

    def to(self, request: str, error: BaseException) -> FUSEError:
        """The answer to ``request`` (its name, and what it is about) that ended in ``error``."""
        number = errno_of(error)
        if number is None:
            _log.error("%s: unexpected error, answered EIO", request, exc_info=error)
            return FUSEError(errno.EIO)
        if number == errno.EIO and not self._repeats(error):
            _log.error("%s: answered EIO: %s", request, error)
        return FUSEError(number)

    def _repeats(self, error: BaseException) -> bool:
        # A failed volume answers every request like this, and so does a lease that is over for
        # good; the first one is enough for the log.
        if not isinstance(error, (errors.VolumeFailed, ClusterStopped)):
            return False
        told, self._failure_told = self._failure_told, True
        return told


BLKSIZE: Final = 65536
"""The preferred I/O size that stat(2) shows: one data unit; stdio takes it for its buffers."""


def entry_attributes(attributes: Attributes) -> EntryAttributes:
    """``attributes`` for a reply that the kernel must not keep."""
    entry = EntryAttributes()
    entry.st_ino = attributes.ino
    entry.generation = attributes.generation
    entry.entry_timeout = 0
    entry.attr_timeout = 0
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = BLKSIZE
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


class Space(Protocol):
    """What a volume tells of its space (statvfs(3); blocks are blocks of ``block_bytes``)."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def available_blocks(self) -> int: ...
    @property
    def files(self) -> int: ...
    @property
    def free_files(self) -> int: ...


def statvfs_data(space: Space, name_max_bytes: int) -> StatvfsData:
    """``space`` as statvfs(3) wants it."""
    data = StatvfsData()
    data.f_bsize = data.f_frsize = space.block_bytes
    data.f_blocks = space.blocks
    data.f_bfree = space.free_blocks
    data.f_bavail = space.available_blocks
    data.f_files = space.files
    data.f_ffree = data.f_favail = space.free_files
    data.f_namemax = name_max_bytes
    return data
