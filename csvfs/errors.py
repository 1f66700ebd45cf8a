"""What a filesystem call can answer instead of a result.

    FilesystemError
    +-- NotFound                no such name                                     ENOENT
    +-- NameExists              the name is taken                                EEXIST
    +-- NotADirectory           a directory was needed                           ENOTDIR
    +-- IsADirectory            a directory was not                              EISDIR
    +-- NotEmpty                the directory has entries                        ENOTEMPTY
    +-- NameTooLong             more than 255 bytes, or a target above 4095      ENAMETOOLONG
    +-- TooManyLinks            nlink cannot grow                                EMLINK
    +-- InvalidArgument         the call cannot mean anything                    EINVAL
    +-- NotPermitted            never allowed on this kind of inode              EPERM
    +-- NotSupported            this filesystem does not do that                 EOPNOTSUPP
    +-- BadHandle               the handle was not opened for this               EBADF
    +-- FileTooBig              beyond the largest file                          EFBIG
    +-- NoSpace                 no unit, or no block, is free in any group       ENOSPC
    +-- NoXattrSpace            the inode's one attribute block is full          ENOSPC
    +-- NoEntrySpace            256 names in the directory have this one's hash  ENOSPC
    +-- NoAttribute             no such extended attribute                       ENODATA
    +-- AttributeTooBig         a name or value beyond the kernel's limits       ERANGE, E2BIG
    +-- StaleInode              the inode that had this number is gone           ESTALE
    +-- DataLost                the medium lost bytes of this file               EIO
    +-- Damaged                 metadata on disk is not what it must be          EIO
    `-- VolumeFailed            the node cannot write its journal, or lost the
                                LUN: every call answers this from now on         EIO

The errno stands here for the reader only: `csvfs.host.answers` has the one place that maps them.
"""

from __future__ import annotations


class FilesystemError(Exception):
    """Any answer of the filesystem that is not the result."""


class NotFound(FilesystemError):
    """No such entry (POSIX ENOENT)."""


class NameExists(FilesystemError):
    """The entry exists already."""


class NotADirectory(FilesystemError):
    """Something that is no directory stands where one is needed."""


class IsADirectory(FilesystemError):
    """A directory stands where something else is needed."""


class NotEmpty(FilesystemError):
    """The directory to remove or replace has entries."""


class NameTooLong(FilesystemError):
    """A name above 255 bytes, or a symbolic link's target above 4095."""


class TooManyLinks(FilesystemError):
    """The link count cannot grow further."""


class InvalidArgument(FilesystemError):
    """The call cannot mean anything: a directory moved below itself, unknown flags."""


class NotPermitted(FilesystemError):
    """Not allowed on this kind of inode for anybody: a second name for a directory."""


class NotSupported(FilesystemError):
    """This filesystem has no such thing: an xattr namespace that it does not know."""


class BadHandle(FilesystemError):
    """Read through a handle opened for writing only, or the reverse."""


class FileTooBig(FilesystemError):
    """The file would end beyond `csvfs.namespace.inode.MAX_FILE_BYTES`."""


class NoSpace(FilesystemError):
    """Every group was tried and every reclaim list is empty."""


class NoXattrSpace(FilesystemError):
    """All extended attributes of an inode share one block, which is full.

    No kind of `NoSpace`: the volume may be empty, so freeing what there is would not help.
    """


class NoEntrySpace(FilesystemError):
    """No more names of one hash fit in a directory. As above: the volume may be empty."""


class NoAttribute(FilesystemError):
    """The inode has no extended attribute of this name."""


class AttributeTooBig(FilesystemError):
    """Name above 255 bytes or value above 64 KiB (xattr(7)); `value` tells which of the two."""

    def __init__(self, message: str, *, value: bool) -> None:
        super().__init__(message)
        self.value = value


class StaleInode(FilesystemError):
    """The number names no inode any more, or one of another generation than is asked for.

    Whoever has the number from a name looks the name up again: something else may have it now.
    """


class DataLost(FilesystemError):
    """The medium answered an error for bytes of this file. Other files are not concerned."""


class Damaged(FilesystemError):
    """A metadata block fails its checks, or contradicts another one. `csvctl check` says more."""


class VolumeFailed(FilesystemError):
    """The journal cannot be written, or the LUN is gone for good. Nothing is answered any more."""
