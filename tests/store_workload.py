"""A workload on a `Store` with a model of every promise, and the verifier of its crashes.

The store holds one root block and up to a few dozen others. The root names the number of the last
transaction and every block in use; so it plays the part of inodes and bitmaps: what
it does not name is free, and is then written like a guest's data, with blocks forged to look like
the newest metadata. Now and then the blocks of one owner are handed over to "another node", which
changes them in place or makes data of them.

A recovered volume must be the state after the n-th transaction, for an n that is not less than
what `commit` promised nor more than what was merged when the power was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from struct import Struct

import trio

from csvfs.format import (
    BLOCK_BYTES,
    HEADER_BYTES,
    VERSION_LIMIT,
    BlockType,
    new_block,
    seal,
    verify,
)
from csvfs.journal.replay import ReplayReport, initialise_journal, replay
from csvfs.journal.store import JournalStart, Store, open_store
from csvfs.journal.transaction import MAX_TX_BLOCKS, Transaction
from redirector.block.medium import Blocks
from redirector.block.simulated import SimulatedDevice, SimulatedLun
from tests.crash import PORT, CrashRun, Cut, deterministic_run
from tests.small_store import (
    FIRST,
    KIND,
    LUN_BYTES,
    PLACE,
    VOLUME_ID,
    fill,
    resource_of,
    sealed,
    tag_of,
)

ROOT = 400
POOL = range(FIRST, FIRST + 60)
OWNERS = 5

_HEAD = Struct("<QQ")
_ENTRY = Struct("<Q")


def owner_of(address: int) -> int:
    return address % OWNERS


@dataclass(frozen=True, slots=True)
class Block:
    """A block in use: its tag, and the number of the transaction that set it."""

    tag: int
    changed_by: int


State = dict[int, Block]


@dataclass(slots=True)
class Outside:
    """Something written in place, not through the journal, when ``after`` was the last
    transaction. ``stable_at``: position at which a flush had made it stable."""

    after: int
    begun_at: int
    content: bytes
    data: bool
    """A guest's data in a free block, else another node's version of a block in use."""
    stable_at: int | None = None


@dataclass(eq=False)
class Model:
    """What is known of the store, at any time of the run."""

    first: int = 0
    """Number of the transaction before the first of this run."""
    states: list[State] = field(default_factory=list)
    """After transaction first, first + 1, ..."""
    merged_at: list[int] = field(default_factory=list)
    outside: dict[int, list[Outside]] = field(default_factory=dict)
    creates: dict[int, list[int]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return self.first + len(self.states) - 1

    @property
    def now(self) -> State:
        return self.states[-1]

    def state(self, number: int) -> State:
        return self.states[number - self.first]


def fill_root(root: bytearray, number: int, state: State) -> None:
    payload = root_payload(number, state)
    root[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload


def root_payload(number: int, state: State) -> bytes:
    return _HEAD.pack(number, len(state)) + b"".join(_ENTRY.pack(a) for a in sorted(state))


async def format_store(device: SimulatedDevice) -> JournalStart:
    """An empty store: a root that names nothing."""
    root = new_block(BlockType.ORPHAN_ROOT, ROOT, 0, VOLUME_ID)
    fill_root(root, 0, {})
    seal(root, 1)
    await device.write(ROOT * BLOCK_BYTES, root, fua=True)
    return await initialise_journal(device, PLACE, 1)


class StoreWorkload:
    """Random transactions by several tasks. Call it with a `CrashRun`."""

    def __init__(self, model: Model, incarnation: int, *, tasks: int, steps: int) -> None:
        self.model = model
        self.incarnation = incarnation
        self.tasks = tasks
        self.steps = steps
        self.closing: set[int] = set()
        """Owners whose lock is being handed over: nobody touches their blocks."""
        self.resting: set[int] = set()
        """Freed blocks that may not be used yet."""
        self.records = 0
        self.in_flight: dict[trio.Event, None] = {}
        """In order: a set's order would depend on where its members lie in memory."""

    async def __call__(self, run: CrashRun) -> None:
        self.run = run
        if self.incarnation == 1:
            start = await format_store(run.device)
            self.model.states.append({})
        else:
            start = (await replay(run.device, PLACE, self.incarnation)).start
        self.model.merged_at.append(0)
        run.acknowledge(self.model.first)
        async with open_store(
            run.device,
            PLACE,
            self.incarnation,
            start,
            resource_of=resource_of,
            holds=self._holds,
        ) as store:
            async with trio.open_nursery() as nursery:
                for task in range(self.tasks):
                    nursery.start_soon(self._work, store, Random(f"{run.seed} {task}"))
            if run.seed % 2:
                await store.close()
                assert store.journal.state.idle
            self.records = store.journal.commits

    def _holds(self, kind: BlockType, owner: int, flags: int) -> bool:
        del flags
        return kind == BlockType.ORPHAN_ROOT or owner not in self.closing

    async def _work(self, store: Store, rng: Random) -> None:
        steps = [
            (self._change, 10),
            (self._free, 5),
            (self._fsync, 5),
            (self._checkpoint, 1),
            (self._hand_over, 2),
            (self._pause, 2),
        ]
        for _ in range(self.steps):
            [step] = rng.choices([s for s, _ in steps], [w for _, w in steps])
            await step(store, rng)
            store.check()

    async def _transact(
        self, store: Store, body: Callable[[Transaction], None], *, bound: int = MAX_TX_BLOCKS
    ) -> None:
        ended = trio.Event()
        self.in_flight[ended] = None
        await store.transact(body, bound=bound)
        del self.in_flight[ended]
        ended.set()

    async def _grace(self) -> None:
        """Wait for the transactions in flight: they may be loading blocks that they chose before.

        Takes the place of the locks that a filesystem holds around its transactions.
        """
        for ended in list(self.in_flight):
            await ended.wait()

    # -- transactions --------------------------------------------------------------------------
    def _usable(self) -> list[int]:
        return [a for a in self.model.now if owner_of(a) not in self.closing]

    def _unused(self) -> list[int]:
        taken = self.model.now.keys() | self.resting
        return [a for a in POOL if a not in taken and owner_of(a) not in self.closing]

    async def _change(self, store: Store, rng: Random) -> None:
        seed = rng.random()
        most = rng.choice((1, 2, 3, 3, 30))

        def body(tx: Transaction) -> None:
            dice = Random(seed)
            state = dict(self.model.now)
            usable, unused = self._usable(), self._unused()
            edited = dice.sample(usable, min(len(usable), dice.randint(0, most)))
            created = dice.sample(unused, min(len(unused), dice.randint(0, most // 2 + 1)))
            for address in edited + created:
                tag = dice.getrandbits(64)
                make = tx.edit if address in state else tx.create
                fill(make(address, KIND, owner_of(address)), tag)
                state[address] = Block(tag, self.model.last + 1)
            self._write_root(tx, state, created)
            tx.after_merge(lambda: self.run.count("create" if created else "edit"))

        await self._transact(store, body)

    async def _free(self, store: Store, rng: Random) -> None:
        """Free some blocks, perhaps create one of them again at once; then reuse the others."""
        seed = rng.random()
        gone: list[int] = []

        def body(tx: Transaction) -> None:
            dice = Random(seed)
            state = dict(self.model.now)
            usable = self._usable()
            freed = dice.sample(usable, min(len(usable), dice.randint(1, 6)))
            again = [a for a in freed if dice.random() < 0.2]
            for address in freed:
                tx.free(address)
                del state[address]
            for address in again:
                tag = dice.getrandbits(64)
                fill(tx.create(address, KIND, owner_of(address)), tag)
                state[address] = Block(tag, self.model.last + 1)
            left = [a for a in freed if a not in again]
            self._write_root(tx, state, again)

            def merged() -> None:
                gone.extend(left)
                self.resting.update(left)
                self.run.count("free and create" if again else "free")

            tx.after_merge(merged)

        await self._transact(store, body)
        if rng.random() < 0.5:
            await store.commit()
        else:
            await store.wait_stable()
        await store.settle()
        await self._use_as_data(store, gone, rng)
        self.resting.difference_update(gone)

    def _write_root(self, tx: Transaction, state: State, created: list[int]) -> None:
        model = self.model
        number = model.last + 1
        fill_root(tx.edit(ROOT, BlockType.ORPHAN_ROOT, 0), number, state)

        def merged() -> None:
            assert model.last == number - 1
            model.states.append(state)
            model.merged_at.append(self.run.position)
            for address in created:
                model.creates.setdefault(address, []).append(number)

        tx.after_merge(merged)

    # -- promises --------------------------------------------------------------------------------
    async def _fsync(self, store: Store, rng: Random) -> None:
        del rng
        number = self.model.last
        await store.commit()
        self.run.acknowledge(number)

    async def _checkpoint(self, store: Store, rng: Random) -> None:
        del rng
        number = self.model.last
        await store.checkpoint()
        self.run.acknowledge(number)

    async def _pause(self, store: Store, rng: Random) -> None:
        del store
        await trio.sleep(rng.choice((0.01, 1, 8, 40)))

    # -- writes that the journal does not see ------------------------------------------------------
    async def _use_as_data(self, store: Store, addresses: list[int], rng: Random) -> None:
        await self._grace()
        for address in addresses:
            if rng.random() < 0.7:
                tag = rng.getrandbits(64)
                forged = sealed(address, tag, VERSION_LIMIT - 1, owner_of(address))
                await self._write_outside(store, address, forged, data=True)
                self.run.count("data written where metadata was")

    async def _write_outside(
        self, store: Store, address: int, content: bytes, *, data: bool
    ) -> None:
        entry = Outside(self.model.last, self.run.position, content, data)
        self.model.outside.setdefault(address, []).append(entry)
        await store.device.write(address * BLOCK_BYTES, content)
        store.note_write()
        await store.flush()
        entry.stable_at = self.run.position

    async def _hand_over(self, store: Store, rng: Random) -> None:
        """Give up an owner's lock. Another node edits some blocks, and makes data of others."""
        owner = rng.randrange(OWNERS)
        if owner in self.closing:
            return
        self.closing.add(owner)
        await self._grace()
        changes = [b.changed_by for a, b in self.model.now.items() if owner_of(a) == owner]
        await store.flush_owned(owner)
        self.run.acknowledge(max(changes, default=self.model.first))
        for address, block in self.model.now.items():
            if owner_of(address) == owner:
                home = await store.device.read(address * BLOCK_BYTES, BLOCK_BYTES)
                verify(home, address, KIND, VOLUME_ID, owner)
                assert tag_of(home) == self._tag_now(address, block)
        store.drop_owned(owner)
        mine = [a for a in self.model.now if owner_of(a) == owner]
        touched = rng.sample(mine, min(3, len(mine)))
        for address in touched[:1]:
            version = store.cache.greatest_version + 1000
            content = sealed(address, rng.getrandbits(64), version, owner)
            await self._write_outside(store, address, content, data=False)
            self.run.count("edited by another node")
        await self._freed_by_another_node(store, touched[1:], rng)
        self.closing.discard(owner)

    def _tag_now(self, address: int, block: Block) -> int:
        """What the model says of a block that nobody changes now."""
        tag = block.tag
        for entry in self.model.outside.get(address, ()):
            if entry.after >= block.changed_by:
                tag = tag_of(entry.content)
        return tag

    async def _freed_by_another_node(self, store: Store, addresses: list[int], rng: Random) -> None:
        def body(tx: Transaction) -> None:
            state = {a: b for a, b in self.model.now.items() if a not in addresses}
            self._write_root(tx, state, [])
            tx.after_merge(lambda: self.resting.update(addresses))

        if addresses:
            await self._transact(store, body, bound=1)
            await store.commit()
            await self._use_as_data(store, addresses, rng)
            self.run.count("freed by another node")
            self.resting.difference_update(addresses)


# -- after the crash -------------------------------------------------------------------------------
class StoreVerifier:
    """Recovers a cut and holds it against the model."""

    def __init__(self, model: Model, incarnation: int) -> None:
        self.model = model
        self.incarnation = incarnation
        self.crash_replay_every = 40
        self.cuts = 0

    async def __call__(self, cut: Cut) -> str:
        self.cuts += 1
        lun = cut.lun
        if cut.writes < 4 and self.incarnation == 1:
            return "not formatted yet"
        if self.cuts % self.crash_replay_every == 0:
            lun = await crash_in_replay(cut, self.incarnation + 1)
        device = await lun.login(PORT)
        report = await replay(device, PLACE, self.incarnation + 1)
        self.verify(cut, lun.blocks)
        again = await replay(device, PLACE, self.incarnation + 1)
        assert (again.records, again.start.next_sequence) == (0, report.start.next_sequence)
        return outcome(report)

    def verify(self, cut: Cut, blocks: Blocks) -> int:
        """Assert all promises; return the number of the last transaction that is there."""
        model = self.model
        root = blocks[ROOT]
        verify(root, ROOT, BlockType.ORPHAN_ROOT, VOLUME_ID, 0)
        number, count = _HEAD.unpack_from(root, HEADER_BYTES)
        promised = max(cut.promises(), default=model.first)
        merged = model.first - 1 + sum(1 for at in model.merged_at if at <= cut.position)
        assert promised <= number <= merged, f"{promised} <= {number} <= {merged}"
        state = model.state(number)
        assert root[HEADER_BYTES:].startswith(root_payload(number, state)), "the root's entries"
        assert count == len(state)
        for address, block in state.items():
            tag = self._tag(address, block, cut.position)
            if tag is not None:
                verify(blocks[address], address, KIND, VOLUME_ID, owner_of(address))
                assert tag_of(blocks[address]) == tag, f"block {address} of state {number}"
        for address in model.outside.keys() - state.keys():
            self._verify_data(address, blocks.get(address, b""), number, cut.position)
        return int(number)

    def _tag(self, address: int, block: Block, position: int) -> int | None:
        """The tag that a block must have; None if another node was just writing it in place (its
        own journal would mend that)."""
        tag: int | None = block.tag
        for entry in self.model.outside.get(address, ()):
            if entry.after >= block.changed_by and entry.begun_at <= position:
                settled = entry.stable_at is not None and entry.stable_at <= position
                tag = tag_of(entry.content) if settled else None
        return tag

    def _verify_data(self, address: int, content: bytes, number: int, position: int) -> None:
        begun = [e for e in self.model.outside[address] if e.begun_at <= position]
        if not begun:
            return
        last = begun[-1]
        if not last.data or last.stable_at is None or last.stable_at > position:
            return
        if any(last.after < n <= number for n in self.model.creates.get(address, ())):
            return
        assert content == last.content, f"data in block {address} was overwritten"


def next_life(cut: Cut, verifier: StoreVerifier) -> tuple[Model, SimulatedLun]:
    """A LUN that lost power at ``cut``, to go on with, and the model of what it holds."""
    found = SimulatedLun(LUN_BYTES, blocks=dict(cut.lun.blocks))

    async def recover() -> None:
        await replay(await found.login(PORT), PLACE, verifier.incarnation + 1)

    deterministic_run(recover, cut.run.seed)
    number = verifier.verify(cut, found.blocks)
    state = {a: Block(tag_of(found.blocks[a]), number) for a in verifier.model.state(number)}
    return Model(number, [state]), SimulatedLun(LUN_BYTES, blocks=cut.lun.blocks, record=True)


def outcome(report: ReplayReport) -> str:
    if not report.records:
        return "clean"
    return "replayed, with revokes" if report.revoked else "replayed"


async def crash_in_replay(cut: Cut, incarnation: int) -> SimulatedLun:
    """Lose power again after a random write of the replay."""
    first = SimulatedLun(LUN_BYTES, blocks=cut.lun.blocks, record=True)
    device = await first.login(PORT)
    await replay(device, PLACE, incarnation)
    lun = first.crashed(cut.rng.randint(0, first.journal.writes))
    lun.yields = False
    return lun
