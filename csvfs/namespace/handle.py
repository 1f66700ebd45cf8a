"""An open file, as `csvfs.namespace.open_files` makes it and `csvfs.data.path` uses it."""

from __future__ import annotations

import os

from csvfs.namespace.inode_table import FileState, InodeState


class Handle:
    """One open(2). What its flags ask for is decided here once, not with each request."""

    __slots__ = (
        "append",
        "closed",
        "file",
        "ino",
        "keeps_privileges",
        "readable",
        "state",
        "writable",
    )

    def __init__(self, state: InodeState, file: FileState, flags: int, uid: int) -> None:
        self.state = state
        self.file = file
        self.ino = state.ino
        access = flags & os.O_ACCMODE
        self.readable = access in (os.O_RDONLY, os.O_RDWR)
        self.writable = access in (os.O_WRONLY, os.O_RDWR)
        self.append = bool(flags & os.O_APPEND)
        self.keeps_privileges = uid == 0
        """Root's writes leave set-ID bits alone (CAP_FSETID). Nobody tells who writes: so it is
        decided by who opened."""
        self.closed = False
