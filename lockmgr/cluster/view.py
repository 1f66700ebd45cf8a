"""The view: who is a member, by slot, in one epoch. Pure values and what can be computed of them.

Where it is stored, and how, is not said here.

invariants (`View.check`):
- an incarnation number of a slot only grows from one view to the next (`follows`);
- no two listed slots have the same node name or the same fingerprint;
- ``lock_epoch`` is the epoch in which the set of ACTIVE incarnations changed last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, Protocol

from lockmgr.cluster.errors import EpochsExhausted

FINGERPRINT_BYTES: Final = 32
SECRET_BYTES: Final = 32
MAX_SLOTS: Final = 64
NOBODY: Final = 255
"""``replay_by`` while no node has been told to replay."""
NEWCOMER_SLOT: Final = 255
"""The slot of who has none; its "incarnation" is its temporary key."""
MAX_EPOCH: Final = (1 << 63) - 1
MAX_INCARNATION: Final = (1 << 24) - 1
"""A key has 24 bits for it."""


class SlotState(IntEnum):
    FREE = 0
    """Nobody; its journal holds nothing live."""
    JOINING = 1
    """Its node may do I/O, and serves nothing yet: the slot's journal may still hold what the
    incarnation before it left."""
    ACTIVE = 2
    NEEDS_REPLAY = 3
    """Its node is gone; once it is fenced its journal is to be replayed."""


class ViewSlotFlag(IntFlag):
    NONE = 0
    JOURNAL_USED = 1
    """Journal, orphan and reclaim root of the slot were written: from the first ACTIVE on."""


class NodeId(NamedTuple):
    """One life of a node in a slot. Never comes again."""

    slot: int
    incarnation: int

    def __str__(self) -> str:
        if self.slot == NEWCOMER_SLOT:
            return f"newcomer {self.incarnation:#x}"
        return f"{self.slot}.{self.incarnation}"


class Keys(Protocol):
    """What membership must know of reservation keys; what else is in them is not its business."""

    def owner(self, key: int) -> NodeId | None:
        """The incarnation that a key belongs to; None for a newcomer's and for a stranger's."""

    def is_newcomer(self, key: int) -> bool:
        """Whether a newcomer, or an offline tool, made it."""

    def newcomer(self, random_bits: int) -> int:
        """A newcomer's key; as many of the random bits are used as fit."""


@dataclass(frozen=True, slots=True)
class ViewSlot:
    """One slot as the view has it."""

    incarnation: int = 0
    """Of the node that is, or was last, in the slot; never reused."""
    state: SlotState = SlotState.FREE
    replay_by: int = NOBODY
    """NEEDS_REPLAY: the slot whose node replays."""
    fingerprint: bytes = bytes(FINGERPRINT_BYTES)
    """SHA-256 of the node's certificate; each incarnation makes its own."""
    node_name: str = ""
    since_ns: int = 0
    """CLOCK_REALTIME of the last change of this entry; for people only."""
    flags: ViewSlotFlag = ViewSlotFlag.NONE
    machine_id: bytes = bytes(16)
    boot_id: bytes = bytes(16)
    """With the node's name, what proves that an incarnation was this host's and is dead."""
    addresses: tuple[str, ...] = ()
    """``host:port`` where the node listens for its peers."""

    @property
    def is_listed(self) -> bool:
        """True if the slot's incarnation may do I/O."""
        return self.state in (SlotState.JOINING, SlotState.ACTIVE)


@dataclass(frozen=True, slots=True)
class View:
    """The member list of one epoch."""

    epoch: int
    holder_key: int
    """Key of the node that holds the reservation; under an empty view the parked key; 0: none."""
    slots: tuple[ViewSlot, ...]
    secret: bytes = field(default=bytes(SECRET_BYTES), repr=False)
    written_ns: int = 0
    lock_epoch: int = 0
    """The epoch in which the set of ACTIVE incarnations changed last. Lock messages carry it: who
    joins, and a journal that is replayed, does not make the locks be recovered."""

    @classmethod
    def empty(cls, slots: int, epoch: int = 1, *, holder_key: int = 0, secret: bytes = b"") -> View:
        """A view with nobody in it and no slot ever used, as format writes it."""
        return cls(epoch, holder_key, (ViewSlot(),) * slots, secret or bytes(SECRET_BYTES))

    # -- who is in it ------------------------------------------------------------------------
    @property
    def members(self) -> tuple[int, ...]:
        """Slots that are not free: a view with none is *empty*."""
        return tuple(n for n, slot in enumerate(self.slots) if slot.state != SlotState.FREE)

    @property
    def listed(self) -> tuple[NodeId, ...]:
        """The incarnations that may do I/O: joining or active."""
        return tuple(node for node, slot in self._nodes() if slot.is_listed)

    @property
    def active(self) -> tuple[NodeId, ...]:
        """The incarnations that take part in locking."""
        return tuple(node for node, slot in self._nodes() if slot.state is SlotState.ACTIVE)

    @property
    def joining(self) -> tuple[NodeId, ...]:
        return tuple(node for node, slot in self._nodes() if slot.state is SlotState.JOINING)

    @property
    def to_replay(self) -> tuple[NodeId, ...]:
        """The departed whose journals are still to be replayed."""
        return tuple(node for node, slot in self._nodes() if slot.state is SlotState.NEEDS_REPLAY)

    def lists(self, slot: int, incarnation: int) -> bool:
        """True if that incarnation may do I/O: joining or active."""
        if not 0 <= slot < len(self.slots):
            return False
        entry = self.slots[slot]
        return entry.is_listed and entry.incarnation == incarnation

    def state_of(self, node: NodeId) -> SlotState:
        """FREE also if another incarnation is in the slot."""
        if not 0 <= node.slot < len(self.slots):
            return SlotState.FREE
        entry = self.slots[node.slot]
        return entry.state if entry.incarnation == node.incarnation else SlotState.FREE

    def replayer_of(self, node: NodeId) -> int:
        """The slot of who is to replay its journal; `NOBODY` also if nothing is to be replayed."""
        waits = self.state_of(node) is SlotState.NEEDS_REPLAY
        return self.slots[node.slot].replay_by if waits else NOBODY

    def find(self, fingerprint: bytes) -> NodeId | None:
        """The listed incarnation with that certificate."""
        for node, slot in self._nodes():
            if slot.is_listed and slot.fingerprint == fingerprint:
                return node
        return None

    def _nodes(self) -> Iterator[tuple[NodeId, ViewSlot]]:
        for number, slot in enumerate(self.slots):
            yield NodeId(number, slot.incarnation), slot

    # -- the next one ------------------------------------------------------------------------
    def with_slot(self, number: int, slot: ViewSlot) -> View:
        """The same view with one entry replaced; the epoch is the caller's to raise."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    def next(self, holder_key: int, slots: dict[int, ViewSlot], wall_ns: int) -> View:
        """The view that follows, with these entries replaced.

        Raises `EpochsExhausted` instead of wrapping.
        """
        if self.epoch >= MAX_EPOCH:
            raise EpochsExhausted("the epoch of the view would wrap")
        entries = list(self.slots)
        for number, slot in slots.items():
            entries[number] = replace(slot, since_ns=wall_ns)
        view = replace(
            self,
            epoch=self.epoch + 1,
            holder_key=holder_key,
            slots=tuple(entries),
            written_ns=wall_ns,
        )
        if view.active != self.active:
            view = replace(view, lock_epoch=view.epoch)
        return view

    def with_replayers(self, assigned: dict[int, int]) -> View:
        """The same view, with these slots to be replayed by those."""
        slots = list(self.slots)
        for number, by in assigned.items():
            slots[number] = replace(slots[number], replay_by=by)
        return replace(self, slots=tuple(slots))

    # -- invariants --------------------------------------------------------------------------
    def check(self) -> None:
        """Assert what holds within one view."""
        listed = [slot for slot in self.slots if slot.is_listed]
        names = [slot.node_name for slot in listed]
        prints = [slot.fingerprint for slot in listed if slot.fingerprint != bytes(32)]
        assert len(set(names)) == len(names), f"a node name twice: {names}"
        assert len(set(prints)) == len(prints), "a fingerprint twice"
        assert 0 <= self.lock_epoch <= self.epoch
        for number, slot in enumerate(self.slots):
            assert slot.incarnation or slot.state is SlotState.FREE, f"slot {number}: nobody"
            if slot.state is not SlotState.NEEDS_REPLAY:
                assert slot.replay_by == NOBODY, f"slot {number}: nothing to replay"

    def follows(self, before: View) -> None:
        """Assert what holds between two views of one volume, other views between them or not."""
        assert self.epoch > before.epoch, f"epoch {self.epoch} after {before.epoch}"
        assert self.lock_epoch >= before.lock_epoch
        # The other way round it does not hold: who joins and leaves again leaves the same set.
        assert self.active == before.active or self.lock_epoch > before.lock_epoch
        for number, (old, new) in enumerate(zip(before.slots, self.slots, strict=True)):
            assert new.incarnation >= old.incarnation, f"slot {number}: incarnation went back"
            if new.incarnation == old.incarnation and not old.is_listed:
                assert not new.is_listed, f"slot {number}: incarnation {new.incarnation} came again"
