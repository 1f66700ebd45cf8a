"""The side file of a ``file://`` LUN: its arbiter's state, shared by the daemons of one machine.

Theory. What a target keeps in its own memory is kept here in a file beside the data: sessions,
registrations, holder, unit attentions. It outlives processes, so the key of a killed daemon stays
registered to a nexus that nobody can use, as on a target. Three advisory locks order everything
(open file description locks, so that they bind to one session and die with its process):

    STATE       exclusive while the state is read or changed; held for microseconds
    TURNSTILE   exclusive while a reset waits; later I/O queues behind it, so a reset cannot starve
    TRAFFIC     shared by a session while it has I/O in flight, exclusive for a moment by a reset:
                when a reset gets it, nothing that was admitted earlier is on its way

and one byte per session, locked for as long as its process lives.

Layout: a header of 4 KiB (magic, version, resets pending, next nexus), then two slots for the
state as JSON with length and CRC; the version, raised last, names the valid slot, so a process
killed in the middle of an update leaves the older state. A state that cannot be read (the machine
lost power) is a target that restarted: no sessions, no registrations.

invariants:
  1. ``version`` grows with every change of the state; equal versions mean equal state
  2. the state is changed under STATE only
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from redirector.block.arbiter import Arbiter, ArbiterState
from redirector.block.device import BlockError

_MAGIC = int.from_bytes(b"CSVFSPR1", "little")
_HEADER_BYTES = 4096
_SLOT_BYTES = 1 << 20
_SIZE_BYTES = _HEADER_BYTES + 2 * _SLOT_BYTES
_SLOT_HEAD = struct.Struct("<II")
_FLOCK = struct.Struct("hhqqi4x")

_MAGIC_WORD, _VERSION_WORD, _RESETS_WORD, _NEXT_WORD = range(4)

STATE = 0
TURNSTILE = 1
TRAFFIC = 2
_LIVENESS = 1 << 32


@dataclass(slots=True)
class TargetState:
    """What the target of this file knows."""

    arbiter: Arbiter = field(default_factory=Arbiter)
    sessions: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Open sessions: nexus to initiator name and ISID."""

    def close_session(self, nexus: int) -> None:
        """End a session; its registration stays."""
        if self.sessions.pop(nexus, None) is not None:
            self.arbiter.close(nexus)

    def encode(self) -> bytes:
        sessions = [[nexus, name, isid] for nexus, (name, isid) in self.sessions.items()]
        return json.dumps({"arbiter": self.arbiter.state(), "sessions": sessions}).encode()

    @classmethod
    def decode(cls, data: bytes) -> TargetState:
        """Raises `ValueError` and `KeyError` for anything that `encode` did not write."""
        raw = json.loads(data)
        state = cls()
        state.arbiter.restore(cast(ArbiterState, raw["arbiter"]))
        state.sessions = {nexus: (name, isid) for nexus, name, isid in raw["sessions"]}
        state.arbiter.check()
        return state


class SideFile:
    """One open description of a side file: the locks taken through it are this session's."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises `OSError`; waits for nothing but a creator next to us."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(self._fd).st_size < _SIZE_BYTES:
                os.truncate(self._fd, _SIZE_BYTES)
            self._map = mmap.mmap(self._fd, _SIZE_BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._words = self._view[: 4 * 8].cast("Q")

    def close(self) -> None:
        """Let go of every lock."""
        if self._fd >= 0:
            self._words.release()
            self._view.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        return self._fd

    # -- header --------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """Grows with every change of the state; reading it takes no lock."""
        return self._words[_VERSION_WORD]

    @property
    def reset_pending(self) -> bool:
        """A hint that somebody may hold TURNSTILE; it stays if that process was killed."""
        return self._words[_RESETS_WORD] != 0

    @reset_pending.setter
    def reset_pending(self, pending: bool) -> None:
        self._words[_RESETS_WORD] = int(pending)

    # -- locks ---------------------------------------------------------------------------------
    def try_lock(self, byte: int, *, exclusive: bool) -> bool:
        """Take a lock without waiting; shared and exclusive convert into each other."""
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self, byte: int) -> None:
        """Let go of a lock, held or not."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, 1, 0))

    def claim_liveness(self, nexus: int) -> None:
        """Lock the byte of this session until `close` or death."""
        if not self.try_lock(_LIVENESS + nexus, exclusive=True):
            raise BlockError(f"session {nexus} of the side file is claimed twice")

    def is_alive(self, nexus: int) -> bool:
        """Whether the process of another session still has it open."""
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LIVENESS + nexus, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, question)
        return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK

    # -- state, under STATE ----------------------------------------------------------------------
    def new_nexus(self) -> int:
        """A number that no session of this file had before."""
        self._words[_NEXT_WORD] += 1
        return self._words[_NEXT_WORD]

    def load(self) -> TargetState:
        """The state; an empty one if the file is new or was damaged by a power loss."""
        if self._words[_MAGIC_WORD] != _MAGIC:
            return TargetState()
        start = _HEADER_BYTES + self.version % 2 * _SLOT_BYTES
        length, crc = _SLOT_HEAD.unpack_from(self._view, start)
        data = bytes(self._view[start + _SLOT_HEAD.size :][:length])
        if length > _SLOT_BYTES - _SLOT_HEAD.size or zlib.crc32(data) != crc:
            return TargetState()
        return TargetState.decode(data)

    def save(self, state: TargetState) -> None:
        """Make ``state`` the state, for every process at once."""
        state.arbiter.check()
        data = state.encode()
        if len(data) > _SLOT_BYTES - _SLOT_HEAD.size:
            raise BlockError(f"the reservations of this LUN need {len(data)} bytes: too many keys")
        version = self.version + 1
        start = _HEADER_BYTES + version % 2 * _SLOT_BYTES
        _SLOT_HEAD.pack_into(self._view, start, len(data), zlib.crc32(data))
        self._view[start + _SLOT_HEAD.size :][: len(data)] = data
        self._words[_VERSION_WORD] = version
        self._words[_MAGIC_WORD] = _MAGIC

    @contextlib.contextmanager
    def changing(self) -> Iterator[TargetState]:
        """The state, saved at the end of the block if it changed, even when the block raises a
        `BlockError` (a unit attention that was reported is gone). STATE must be held.
        """
        state = self.load()
        before = state.encode()
        try:
            yield state
        finally:
            if state.encode() != before:
                self.save(state)
