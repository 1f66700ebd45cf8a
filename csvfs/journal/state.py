"""Which images are where between a transaction and their home. No I/O.

Theory. A changed block passes three stages, and may be in all of them at once, each with an image
of its own (images are copied on write, so none of them changes under the others):

    running      merged, in memory only; the next commit takes it
    committing   frozen: version and checksum are stamped, the record is being written
    unhomed      its record is stable, its home block on the LUN may be older

A block in none of them is clean, and the cache may drop it. A *freed* block leaves the cache and
the running set at once, but its unhomed image stays until the revoke is **stable**: if the free is
lost in a crash, the block is still in use, and the tail must not have passed its last image.

The tail may move up to the oldest record that holds an image which home does not have for
certain: written, and flushed after that.

invariants:
  1. what the cache holds for an address is its image in the latest stage that has one
  2. a block is pinned in the cache iff some stage has an image of it
  3. the ring's live records include every sequence from the oldest unhomed one on
  4. while the running set is not empty, its record with `hook_images` more fits in the ring
  5. no image of an address is written home once a revoke of it is stable, unless it is younger
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from csvfs.journal.cache import BlockCache
from csvfs.journal.record import (
    JournalPlace,
    LiveRecord,
    RecordImage,
    Ring,
    encode_record,
    record_blocks,
)
from csvfs.journal.transaction import MAX_TX_BLOCKS, MAX_TX_FREES, BlockKey, Image, Transaction
from csvfs.ondisk.block import seal

MAX_RECORD_BLOCKS: Final = 1024
RING_SHARE: Final = 3
"""A record takes at most one part in this many of the ring, so that after a checkpoint one fits
on either side of the head."""
MAX_HOOK_IMAGES: Final = 256


class Room(Enum):
    """May a transaction run now, or what must happen first?"""

    YES = "there is room"
    COMMIT = "the running set is full"
    CHECKPOINT = "the ring is full"


class Batch:
    """The transactions that are committed together."""

    __slots__ = ("callbacks", "fresh", "images", "number", "revokes")

    def __init__(self, number: int) -> None:
        self.number = number
        self.images: dict[int, Image] = {}
        self.fresh: set[int] = set()
        self.revokes: set[int] = set()
        self.callbacks: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self.images or self.revokes or self.callbacks)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A batch on its way to the LUN. ``record`` None: it has nothing to write."""

    batch: Batch
    record: LiveRecord | None
    data: bytearray


class Unhomed:
    """A committed image. ``oldest``: the first record whose image of it home may lack."""

    __slots__ = ("data", "key", "oldest", "sequence")

    def __init__(self, key: BlockKey, data: bytearray, sequence: int) -> None:
        self.key = key
        self.data = data
        self.sequence = sequence
        self.oldest = sequence


class HomeImage(NamedTuple):
    """An image to write to its home, as it was when it was picked."""

    address: int
    data: bytearray
    sequence: int


class JournalState:
    """The stages, the ring, and what fits."""

    def __init__(
        self, place: JournalPlace, incarnation: int, ring: Ring, cache: BlockCache
    ) -> None:
        self.place = place
        self.incarnation = incarnation
        self.ring = ring
        self.cache = cache
        self.running = Batch(1)
        self.committing: Frozen | None = None
        self.unhomed: dict[int, Unhomed] = {}
        self.stable_number = 0
        """Number of the last batch that is stable."""
        self.tail_sequence = ring.next_sequence
        """As the header on the LUN says."""
        self.record_limit = min(ring.blocks // RING_SHARE, MAX_RECORD_BLOCKS)
        spare = self.record_limit - record_blocks(MAX_TX_BLOCKS, MAX_TX_FREES)
        self.hook_images = min(spare // 2, MAX_HOOK_IMAGES)
        """Images held back in each record for what is added just before it is frozen."""
        if self.hook_images < 1:
            raise ValueError(f"a journal of {place.blocks} blocks is too small")

    # -- running ---------------------------------------------------------------------------
    def room(self, images: int = MAX_TX_BLOCKS, revokes: int = MAX_TX_FREES) -> Room:
        """Can the running set grow by so much, whatever the ring does until it is frozen?"""
        running = self.running
        need = record_blocks(
            len(running.images) + images + self.hook_images, len(running.revokes) + revokes
        )
        if need > self.record_limit and running:
            return Room.COMMIT
        return Room.YES if self.ring.fits(need) else Room.CHECKPOINT

    def merge(self, transaction: Transaction) -> None:
        """Add a transaction's changes to the running set; the cache shows them from now on."""
        running, cache = self.running, self.cache
        for address in transaction.freed:
            running.images.pop(address, None)
            running.fresh.discard(address)
            running.revokes.add(address)
            cache.forget(address)
        for address, image in transaction.images.items():
            if image.fresh:
                # A fresh image supersedes all older ones, so it needs no revoke beside it.
                running.fresh.add(address)
                running.revokes.discard(address)
            running.images[address] = image
            cache.put(address, image)
        running.callbacks += transaction.stable_callbacks

    def revoke_homed(self, addresses: Iterable[int]) -> None:
        """Let replay forget images of blocks that stay in use: their homes are stable, and
        another node is about to change them."""
        self.running.revokes.update(addresses)

    # -- committing ------------------------------------------------------------------------
    def freeze(self) -> Frozen:
        """Seal the running set and give its record a place. A new running set begins."""
        assert self.committing is None
        batch, place, cache = self.running, self.place, self.cache
        record, data = None, bytearray()
        if batch.images or batch.revokes:
            cache.greatest_version += 1
            images, keys = [], []
            owned: dict[Hashable, list[int]] = {}
            for address in sorted(batch.images):
                image = batch.images[address]
                seal(image.data, cache.greatest_version)
                images.append(RecordImage(address, address in batch.fresh, image.data))
                keys.append(BlockKey(address, image.kind, image.owner, image.flags))
                owned.setdefault(cache.resource_at(address), []).append(address)
            revokes = sorted(batch.revokes)
            record = self.ring.append(tuple(keys), tuple(revokes), owned)
            data = encode_record(
                place, record.position, self.incarnation, record.sequence, images, revokes
            )
        self.committing = Frozen(batch, record, data)
        self.running = Batch(batch.number + 1)
        return self.committing

    def committed(self) -> Batch:
        """The record of the committing set is stable."""
        frozen, self.committing = self.committing, None
        assert frozen is not None
        batch, record = frozen.batch, frozen.record
        self.stable_number = batch.number
        if record is None:
            return batch
        for address in record.revokes:
            # From here on no home write of an older image may begin (one that is in flight is
            # waited for before the block becomes anything else).
            self.unhomed.pop(address, None)
        for key in record.keys:
            address, sequence = key.address, record.sequence
            data = batch.images[address].data
            entry = self.unhomed.get(address)
            if entry is None or address in batch.fresh:
                self.unhomed[address] = Unhomed(key, data, sequence)
            else:
                entry.data, entry.sequence = data, sequence
        return batch

    # -- home ------------------------------------------------------------------------------
    def to_home(self, addresses: Iterable[int]) -> list[HomeImage]:
        """The committed images of those of ``addresses`` that need to go home *now*."""
        picked = []
        for address in addresses:
            entry = self.unhomed.get(address)
            if entry is not None:
                picked.append(HomeImage(address, entry.data, entry.sequence))
        return picked

    def home(self, images: Iterable[HomeImage]) -> None:
        """These images are stable at home: written, and flushed since."""
        for address, data, sequence in images:
            entry = self.unhomed.get(address)
            if entry is None:
                continue
            if entry.data is data:
                del self.unhomed[address]
                self._unpin(address)
            else:
                entry.oldest = max(entry.oldest, sequence + 1)

    def _unpin(self, address: int) -> None:
        committing = self.committing
        if address not in self.running.images and (
            committing is None or address not in committing.batch.images
        ):
            self.cache.unpin(address)

    def tail_candidate(self) -> int:
        """Sequence of the first record that replay still needs."""
        end = self.ring.next_sequence
        committing = self.committing
        if committing is not None and committing.record is not None:
            end = committing.record.sequence
        return min((entry.oldest for entry in self.unhomed.values()), default=end)

    def tail_moved(self, sequence: int) -> None:
        """A header with this tail is stable."""
        self.tail_sequence = sequence
        self.ring.release_before(sequence)

    # -- what belongs to a lock ----------------------------------------------------------------
    def journaled(self, resource: Hashable) -> set[int]:
        """Blocks under a lock of which replay would find a live image in the records on the LUN."""
        found: set[int] = set()
        for record in self.ring.live:
            found.difference_update(record.revokes)
            found.update(record.owned.get(resource, ()))
        return found

    def live(self, addresses: Collection[int]) -> set[int]:
        """Those of which replay would find a live image in the records on the LUN."""
        found: set[int] = set()
        for record in self.ring.live:
            found.difference_update(record.revokes)
            found.update(key.address for key in record.keys if key.address in addresses)
        return found

    def in_memory(self, resource: Hashable) -> bool:
        """Has the running or committing set a change of a block that a lock covers?

        Whose a freed block was is not remembered: any free counts.
        """
        batches = [self.running]
        if self.committing is not None:
            batches.append(self.committing.batch)
        return any(
            batch.revokes or not batch.images.keys().isdisjoint(self.cache.owned(resource))
            for batch in batches
        )

    @property
    def idle(self) -> bool:
        """Nothing is on its way, and the journal on the LUN is empty."""
        return not (
            self.running
            or self.committing
            or self.unhomed
            or self.tail_sequence != self.ring.next_sequence
        )

    def check(self) -> None:
        """Assert the invariants at the top of this module."""
        self.ring.check()
        stages: dict[int, bytearray] = {a: e.data for a, e in self.unhomed.items()}
        batches = [self.committing.batch] if self.committing else []
        for batch in [*batches, self.running]:
            for address in batch.revokes - batch.images.keys():
                stages.pop(address, None)
            stages |= {address: image.data for address, image in batch.images.items()}
        for address, data in stages.items():
            key = self.cache.key_of(address)
            assert key is not None, f"block {address} left the cache before it was home"
            assert self.cache.read(*key) is data
        assert self.cache.pinned() == stages.keys()
        first = self.ring.live[0].sequence if self.ring.live else self.ring.next_sequence
        assert self.tail_sequence == first <= self.tail_candidate()
        assert not self.running or self.ring.fits(
            record_blocks(len(self.running.images), len(self.running.revokes))
        )
        assert self.running.fresh <= self.running.images.keys()
