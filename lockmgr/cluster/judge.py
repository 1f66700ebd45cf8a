"""Who shows life, who hears whom, and so who stays: what one awake observer knows.

Theory. A node shows life by a datagram or by a change of its heartbeat block; both say whom it
hears. The judge keeps, for each node, when it last showed life, and for each ordered pair, when the
one last said that it hears the other (for itself: when it last heard). All these clocks count only
while the judge observes: `restart` after every gap makes everybody fresh. A pair is mutual, and a
node alive, for ``evict_after_s`` after its last sign or after it became fresh. The *verdict* is the
largest set of living nodes that are pairwise mutual and have a direct path.

One cut does not show in all pairs at the same time: what the judge hears itself ends at once, what
others say that they hear ends ``hears_s`` later. A verdict in between would find sets that were
never there. So when the first pair is broken the judge waits, ``spread_s`` at most, as long as
other pairs are as good as broken. Who shows no life at all needs no such wait.

Who is heard and not connected (`links`) is not heard: it could not be told anything.

Who is still joining costs no active member its place: the active ones are judged first, and of the
joining those stay who are mutual with all of them.

That a heartbeat block has *changed*, and the latest time at which it can have done so, is kept
across gaps: a value that was read twice has not changed in between, whoever slept.

invariants:
- the judge itself is always alive to itself;
- no sign is later than the last step; `changed_at` of a block is never too early.
"""

from __future__ import annotations

from collections.abc import Iterable

from lockmgr.cluster.blocks import Heartbeat, HeartbeatFlag
from lockmgr.cluster.cliques import largest_mutual_set
from lockmgr.cluster.links import Links
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId


class BlockWatch:
    """When each heartbeat block changed, as far as looking at it now and then can tell."""

    def __init__(self) -> None:
        self._sequences: dict[NodeId, int] = {}
        self._changed_at: dict[NodeId, float] = {}

    def take(self, blocks: Iterable[Heartbeat], now: float) -> list[Heartbeat]:
        """All heartbeat blocks, as just read. Returns those seen to change: not those that are
        seen for the first time, which shows that they were written once, not that a node lives.
        """
        changed = []
        for block in blocks:
            node = block.node
            before = self._sequences.get(node)
            if before == block.sequence:
                continue
            self._sequences[node] = block.sequence
            self._changed_at[node] = now
            if before is not None:
                changed.append(block)
        return changed

    def changed_at(self, node: NodeId, now: float) -> float:
        """No later change of that node's block was there at the last look."""
        return self._changed_at.get(node, now)


class Judge:
    """The observations of node ``me``."""

    def __init__(
        self, me: NodeId, settings: Settings, links: Links, watch: BlockWatch | None = None
    ) -> None:
        self.me = me
        self._watch = watch or BlockWatch()
        self._settings = settings
        self._links = links
        self._fresh: dict[NodeId, float] = {me: 0.0}
        self._life: dict[NodeId, float] = {}
        self._sign_before: dict[NodeId, float] = {}
        """The sign of life before the last one."""
        self._heard: dict[tuple[int, int], float] = {}
        """(a, b): when slot a last said that it hears slot b."""
        self._direct: dict[NodeId, bool] = {}
        self._rows: dict[int, tuple[int, float]] = {}
        """By slot: the last bit map it said, and when."""
        self._by_slot: dict[int, NodeId] = {me.slot: me}
        self._joining: frozenset[NodeId] = frozenset()
        self._sequences: dict[NodeId, int] = {}
        self._verdicts: dict[tuple[tuple[int, ...], int, int], tuple[int, ...]] = {}
        self._broken_since: float | None = None
        self._latest = 0.0

    # -- whom it is about --------------------------------------------------------------------
    def set_nodes(
        self, nodes: Iterable[NodeId], now: float, joining: Iterable[NodeId] = ()
    ) -> None:
        """These are listed now, some of them still joining; who was not before is fresh."""
        wanted = {*nodes, self.me}
        self._joining = frozenset(joining)
        for node in wanted - self._fresh.keys():
            self._fresh[node] = now
            self._rows.pop(node.slot, None)
            self._heard = {pair: t for pair, t in self._heard.items() if node.slot not in pair}
        for node in self._fresh.keys() - wanted:
            del self._fresh[node]
            self._life.pop(node, None)
            self._sign_before.pop(node, None)
            self._direct.pop(node, None)
            self._sequences.pop(node, None)
        self._by_slot = {node.slot: node for node in wanted}

    def restart(self, now: float) -> None:
        """The judge slept, or could not read: whatever it did not see is nobody's silence."""
        self._fresh = dict.fromkeys(self._fresh, now)
        self._broken_since = None

    # -- signs -------------------------------------------------------------------------------
    def take_beat(self, beat: Heartbeat, now: float) -> bool:
        """A datagram. False if it is none of a listed node, or not a new one."""
        node = beat.node
        if node not in self._fresh or node == self.me:
            return False
        if beat.sequence <= self._sequences.get(node, -1):
            return False
        self._sign(beat, now)
        if self._links.holds(node, now):
            self._heard[self.me.slot, node.slot] = now
        return True

    def take_blocks(self, blocks: Iterable[Heartbeat], now: float) -> None:
        """All heartbeat blocks, as just read."""
        for block in self._watch.take(blocks, now):
            node = block.node
            if node == self.me or node not in self._fresh:
                continue
            if block.sequence > self._sequences.get(node, -1):
                self._sign(block, now)
            else:
                self._life[node] = now

    def _sign(self, beat: Heartbeat, now: float) -> None:
        node = beat.node
        self._latest = now
        self._sequences[node] = beat.sequence
        if node in self._life:
            self._sign_before[node] = self._life[node]
        self._life[node] = now
        self._rows[node.slot] = (beat.hears | 1 << node.slot, now)
        self._direct[node] = bool(beat.flags & HeartbeatFlag.HAS_DIRECT_PATH)
        for slot in self._by_slot:
            if beat.hears >> slot & 1:
                self._heard[node.slot, slot] = now

    # -- what follows ------------------------------------------------------------------------
    def hears(self, now: float) -> int:
        """The bit map of slots whose datagrams came lately, to be told to the others."""
        bits = 1 << self.me.slot
        for slot in self._by_slot:
            heard = self._heard.get((self.me.slot, slot))
            if heard is not None and now - heard <= self._settings.hears_s:
                bits |= 1 << slot
        return bits

    def changed_at(self, node: NodeId, now: float) -> float:
        """See `BlockWatch.changed_at`."""
        return self._watch.changed_at(node, now)

    def last_sign(self, node: NodeId) -> float:
        """When it last showed life, or became fresh."""
        return max(self._life.get(node, 0.0), self._fresh.get(node, 0.0))

    def lives_since(self, node: NodeId, since: float) -> bool:
        """Whether it really showed life after that time; the judge itself always does.

        Twice: one heartbeat may have been on its way when its node died.
        """
        return node == self.me or self._sign_before.get(node, float("-inf")) > since

    def is_alive(self, node: NodeId, now: float) -> bool:
        return node == self.me or now - self.last_sign(node) <= self._settings.evict_after_s

    def knows(self, node: NodeId) -> bool:
        """Whether it is one of those that are judged."""
        return node in self._fresh

    def is_direct(self, node: NodeId) -> bool:
        """What it last said of its own path."""
        return self._direct.get(node, False)

    def _apart_for(self, a: NodeId, b: NodeId, now: float) -> float:
        """How long ago the two last heard each other, or became fresh."""
        fresh = max(self._fresh.get(a, 0.0), self._fresh.get(b, 0.0))
        heard = min(
            self._heard.get((a.slot, b.slot), float("-inf")),
            self._heard.get((b.slot, a.slot), float("-inf")),
        )
        return now - max(fresh, heard)

    def has_met(self, node: NodeId, others: Iterable[NodeId], now: float) -> bool:
        """Whether it and each of the others have really heard each other of late."""
        within = 2 * self._settings.hears_s
        return all(
            now - self._heard.get(pair, float("-inf")) <= within
            for other in others
            if other != node
            for pair in ((node.slot, other.slot), (other.slot, node.slot))
        )

    def verdict(self, now: float, direct: bool) -> frozenset[NodeId]:
        """Those who stay. ``direct``: whether the judge has a path itself, as it must.

        While it does not show yet which pairs an event has cut, everybody who lives stays.
        """
        if self._all_is_well(now):
            self._broken_since = None
            return frozenset(self._by_slot.values())
        slots = sorted(self._by_slot)
        nodes = [self._by_slot[slot] for slot in slots]
        words = [0] * len(nodes)
        paths = 0
        limit, spread = self._settings.evict_after_s, self._settings.spread_s
        broken = doubtful = False
        for i, a in enumerate(nodes):
            if not self.is_alive(a, now):
                continue
            words[i] |= 1 << i
            # Who has not yet said anything since it is fresh is believed to have a path.
            if direct if a == self.me else self._direct.get(a, True):
                paths |= 1 << i
            for j, b in enumerate(nodes[:i]):
                if not words[j]:
                    continue
                apart_for = self._apart_for(a, b, now)
                if apart_for > limit:
                    broken = True
                    continue
                doubtful |= apart_for > limit - spread
                words[i] |= 1 << j
                words[j] |= 1 << i
        if not broken:
            self._broken_since = None
        elif self._broken_since is None:
            self._broken_since = now
        if broken and doubtful and now - (self._broken_since or now) < spread:
            return frozenset(node for i, node in enumerate(nodes) if words[i])
        joining = sum(1 << i for i, node in enumerate(nodes) if node in self._joining)
        question = (tuple(words), paths, joining)
        answer = self._verdicts.get(question)
        if answer is None:
            answer = _who_stays(words, paths, joining)
            self._verdicts = {question: answer}
        return frozenset(nodes[i] for i in answer)

    def _all_is_well(self, now: float) -> bool:
        """The usual case, quickly: all say that they hear all, and somebody else has a path."""
        everybody = sum(1 << slot for slot in self._by_slot)
        recent = now - self._settings.hears_s
        for slot, node in self._by_slot.items():
            if node == self.me:
                continue
            bits, when = self._rows.get(slot, (0, recent))
            if when < recent or everybody & ~bits:
                return False
            if self._heard.get((self.me.slot, slot), float("-inf")) < recent:
                return False
        return any(self._direct.get(node, False) for node in self._by_slot.values())

    def check(self, now: float) -> None:
        """Assert the invariants."""
        assert self.is_alive(self.me, now)
        assert self._latest <= now
        assert set(self._by_slot.values()) == self._fresh.keys()
        assert len(self._by_slot) == len(self._fresh), "two incarnations of one slot"


def _who_stays(words: list[int], paths: int, joining: int) -> tuple[int, ...]:
    active = [0 if joining >> i & 1 else word for i, word in enumerate(words)]
    stay = largest_mutual_set(active, paths)
    if not stay:
        return largest_mutual_set(words, paths)
    inside = sum(1 << i for i in stay)
    fit = [
        word if joining >> i & 1 and word & inside == inside else 0 for i, word in enumerate(words)
    ]
    return tuple(sorted((*stay, *largest_mutual_set(fit, joining))))
