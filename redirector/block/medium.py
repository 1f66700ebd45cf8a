"""A medium in memory with a volatile write cache, and the record from which any crash is built.

Theory. What a disk holds after power was lost is *some* mixture of the writes that it had taken:
those that were stable for certain, and, of the others, any subset, each torn at any 512-byte
sector (no disk promises more). `Journal` keeps every event in the order in which the medium saw it:

    Written     a write (or unmap) is in the cache: from here on reads see it
    Answered    its initiator was told; only now does FUA bind
    FlushBegun  a SYNCHRONIZE CACHE arrived
    FlushEnded  and was answered: every write *answered* before it had begun is stable
    Reserved    the arbiter's state after a PERSISTENT RESERVE OUT

An image "at position p" is what the first p events leave behind, given a choice (`Keep`) of what
becomes of each write that is not stable there. Later writes lie over earlier ones in every image,
because a cache holds one version of a sector: FUA or a flush never brings an older one back.

A cursor walks the events once, so building the images after every write of a long run, in
ascending order, costs each time one shallow copy of a dict plus the writes that are unstable there.

invariants:
  1. events are only appended; position p always means the same moment
  2. the cursor's ``stable`` blocks plus its pending writes, all kept, are what reads saw there
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from random import Random

from redirector.block.arbiter import ArbiterState

BLOCK_BYTES = 4096
SECTOR_BYTES = 512

Blocks = dict[int, bytes]
"""Sparse content: block number to `BLOCK_BYTES` bytes; an absent block reads as zeros."""

_ZEROS = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Written:
    """One write: ``data`` at ``offset_bytes``; ``data`` None: these bytes were unmapped."""

    index: int
    offset_bytes: int
    length_bytes: int
    data: bytes | None
    fua: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """The initiator knows that write ``index`` is done."""

    index: int


@dataclass(frozen=True, slots=True)
class FlushBegun:
    """A SYNCHRONIZE CACHE arrived."""

    flush: int


@dataclass(frozen=True, slots=True)
class FlushEnded:
    """SYNCHRONIZE CACHE ``flush`` was answered."""

    flush: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Registrations or holder changed."""

    state: ArbiterState


Event = Written | Answered | FlushBegun | FlushEnded | Reserved
Keep = Callable[[Written], "bool | list[bool]"]
"""What becomes of an unstable write: all kept, all lost, or per sector of 512 bytes."""


# -- content -------------------------------------------------------------------------------------
def store(blocks: Blocks, offset_bytes: int, data: bytes) -> None:
    """Put ``data`` in place; offset and length are multiples of a sector."""
    block, within = divmod(offset_bytes, BLOCK_BYTES)
    length = len(data)
    if not within and length == BLOCK_BYTES:
        blocks[block] = data
        return
    position = 0
    while position < length:
        piece = data[position : position + BLOCK_BYTES - within]
        if len(piece) < BLOCK_BYTES:
            old = blocks.get(block, _ZEROS)
            whole = old[:within] + piece + old[within + len(piece) :]
        else:
            whole = piece
        blocks[block] = whole
        position += len(piece)
        block += 1
        within = 0


def load_into(blocks: Blocks, offset_bytes: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset_bytes`` on."""
    block, within = divmod(offset_bytes, BLOCK_BYTES)
    position, length = 0, len(buffer)
    while position < length:
        size = min(BLOCK_BYTES - within, length - position)
        piece = blocks.get(block, _ZEROS)
        buffer[position : position + size] = piece[within : within + size]
        position += size
        block += 1
        within = 0


def discard(blocks: Blocks, offset_bytes: int, length_bytes: int) -> None:
    """Make the range read as zeros, whatever its size, in time proportional to what is there."""
    end = offset_bytes + length_bytes
    first, last = -(-offset_bytes // BLOCK_BYTES), end // BLOCK_BYTES
    if last < first:
        store(blocks, offset_bytes, bytes(length_bytes))
        return
    if first * BLOCK_BYTES > offset_bytes:
        store(blocks, offset_bytes, bytes(first * BLOCK_BYTES - offset_bytes))
    if end > last * BLOCK_BYTES:
        store(blocks, last * BLOCK_BYTES, bytes(end - last * BLOCK_BYTES))
    doomed = range(first, last)
    if len(doomed) > len(blocks):
        for block in [block for block in blocks if block in doomed]:
            del blocks[block]
    else:
        for block in doomed:
            blocks.pop(block, None)


def is_allocated(blocks: Blocks, offset_bytes: int, length_bytes: int) -> bool:
    """Whether a thin medium has space behind every byte of the range already."""
    first = offset_bytes // BLOCK_BYTES
    return all(
        block in blocks for block in range(first, -(-(offset_bytes + length_bytes) // BLOCK_BYTES))
    )


def apply(blocks: Blocks, written: Written, kept: bool | list[bool]) -> None:
    """Carry out what is kept of a write."""
    if kept is False:
        return
    if kept is True:
        if written.data is None:
            discard(blocks, written.offset_bytes, written.length_bytes)
        else:
            store(blocks, written.offset_bytes, written.data)
        return
    for sector, keep in enumerate(kept):
        if keep:
            at = sector * SECTOR_BYTES
            piece = bytes(SECTOR_BYTES) if written.data is None else written.data[at : at + 512]
            store(blocks, written.offset_bytes + at, piece)


# -- what a crash keeps ----------------------------------------------------------------------------
def keep_all(_written: Written) -> bool:
    """The host died, the target did not: its cache survives."""
    return True


def keep_none(_written: Written) -> bool:
    """Power was lost and the cache had written nothing back."""
    return False


def keep_only(indexes: Collection[int]) -> Keep:
    """Keep the unstable writes with these indexes, whole, and lose the others."""
    return lambda written: written.index in indexes


def keep_by(rng: Random) -> Keep:
    """Keep, lose or tear each unstable write at random.

    How much is kept in general is drawn once for each image, so that "all but one" and "one
    alone" come up as often as "about half".
    """
    kept_share = rng.choice((0.03, 0.25, 0.5, 0.75, 0.97))
    torn_share = rng.choice((0.0, 0.1, 0.5))

    def keep(written: Written) -> bool | list[bool]:
        sectors = written.length_bytes // SECTOR_BYTES
        if 1 < sectors <= 4096 and rng.random() < torn_share:
            cut = rng.randrange(1, sectors)
            shape = rng.randrange(3)
            if shape == 0:
                return [sector < cut for sector in range(sectors)]
            if shape == 1:
                return [sector >= cut for sector in range(sectors)]
            return [rng.random() < kept_share for _ in range(sectors)]
        return rng.random() < kept_share

    return keep


# -- the record ------------------------------------------------------------------------------------
class _Pending:
    """A write on the cursor's way that is not folded into the stable blocks yet."""

    __slots__ = ("answered_at", "stable", "written")

    def __init__(self, written: Written) -> None:
        self.written = written
        self.answered_at: int | None = None
        self.stable = False


class _Cursor:
    """The state of the medium at one position."""

    def __init__(self, base: Blocks, reservations: ArbiterState | None) -> None:
        self.position = 0
        self.stable: Blocks = base.copy()
        self.pending: deque[_Pending] = deque()
        self.reservations = reservations
        self._by_index: dict[int, _Pending] = {}
        self._flush_began: dict[int, int] = {}

    def step(self, event: Event) -> None:
        match event:
            case Written():
                pending = _Pending(event)
                self.pending.append(pending)
                self._by_index[event.index] = pending
            case Answered():
                done = self._by_index.get(event.index)
                if done is not None:
                    done.answered_at = self.position
                    if done.written.fua:
                        done.stable = True
            case FlushBegun():
                self._flush_began[event.flush] = self.position
            case FlushEnded():
                began = self._flush_began.pop(event.flush)
                for write in self.pending:
                    if write.answered_at is not None and write.answered_at < began:
                        write.stable = True
            case Reserved():
                self.reservations = event.state
        self.position += 1
        self._fold()

    def _fold(self) -> None:
        # Only from the front: a stable write must stay above the unstable ones that it covers.
        while self.pending and self.pending[0].stable:
            write = self.pending.popleft()
            del self._by_index[write.written.index]
            apply(self.stable, write.written, True)

    def image(self, keep: Keep) -> Blocks:
        blocks = self.stable.copy()
        for write in self.pending:
            apply(blocks, write.written, True if write.stable else keep(write.written))
        return blocks


class Journal:
    """Everything that happened to a medium since ``base``."""

    def __init__(
        self, base: Blocks, *, record: bool, reservations: ArbiterState | None = None
    ) -> None:
        self._base = base.copy() if record else base
        self._base_reservations = reservations
        self._record = record
        self._events: list[Event] = []
        self._forgotten = 0
        self._cursor = _Cursor(base, reservations)
        self._write_positions: list[int] = []
        self._flushes = 0
        self.writes = 0
        """How many writes and unmaps the medium has taken; the n-th has index n - 1."""

    @property
    def position(self) -> int:
        """How many events there were: a stamp for "was answered before the cut"."""
        return self._forgotten + len(self._events)

    @property
    def events(self) -> list[Event]:
        """All events. Raises `RuntimeError` if they were not recorded."""
        self._need_record()
        return self._events

    def position_after(self, writes: int) -> int:
        """The position just after the ``writes``-th write landed and before it was answered."""
        self._need_record()
        return self._write_positions[writes - 1] if writes else 0

    def writes_before(self, position: int) -> int:
        """How many writes had landed at ``position``."""
        self._need_record()
        return bisect_left(self._write_positions, position + 1)

    # -- recording -------------------------------------------------------------------------------
    def written(self, offset_bytes: int, length_bytes: int, data: bytes | None, fua: bool) -> int:
        """A write or unmap landed; returns its index."""
        index = self.writes
        self.writes += 1
        self._append(Written(index, offset_bytes, length_bytes, data, fua))
        if self._record:
            self._write_positions.append(self.position)
        return index

    def answered(self, index: int) -> None:
        """Write ``index`` was answered."""
        self._append(Answered(index))

    def flush_begun(self) -> int:
        """A flush arrived; returns its number."""
        self._flushes += 1
        self._append(FlushBegun(self._flushes))
        return self._flushes

    def flush_ended(self, flush: int) -> None:
        """Flush number ``flush`` was answered."""
        self._append(FlushEnded(flush))

    def reserved(self, state: ArbiterState) -> None:
        """Registrations or holder changed."""
        self._append(Reserved(state))

    def _append(self, event: Event) -> None:
        if self._record:
            self._events.append(event)
        else:
            self._cursor.step(event)
            self._forgotten += 1

    def _need_record(self) -> None:
        if not self._record:
            raise RuntimeError("this LUN was made without record=True")

    # -- crashes -----------------------------------------------------------------------------------
    def image_at(self, position: int, keep: Keep) -> tuple[Blocks, ArbiterState | None]:
        """Content and reservations at ``position``; ``keep`` decides on each unstable write."""
        cursor = self._seek(position)
        return cursor.image(keep), cursor.reservations

    def unstable_at(self, position: int) -> Iterator[Written]:
        """The writes whose fate ``keep`` decides at ``position``."""
        return (write.written for write in self._seek(position).pending if not write.stable)

    def _seek(self, position: int) -> _Cursor:
        if not self._record:
            if position != self.position:
                self._need_record()
            return self._cursor
        if not 0 <= position <= self.position:
            raise ValueError(f"position {position} is not within 0..{self.position}")
        if position < self._cursor.position:
            self._cursor = _Cursor(self._base, self._base_reservations)
        cursor = self._cursor
        for event in self._events[cursor.position : position]:
            cursor.step(event)
        return cursor
