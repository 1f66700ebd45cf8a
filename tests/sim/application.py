"""A toy filesystem and its guests, on the locks and the data path of one daemon.

A guest's read is answered from the cache while the lease lasts, else after a read of the block's
home; a write goes into the slot's journal and is acknowledged when it stands there. Before a lock
is lowered the block's home is written, then the journal forgets the record. The value block carries
the version of what was acknowledged last. Reads and writes of which no answer came are issued
again on the next path, once it is proven that nothing of the old one is on its way. A guest may
have a second, younger write to the same block on its way meanwhile, which waits for that retry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lockmgr import events as lock_events
from lockmgr.claim import Claim, ClaimState
from lockmgr.cluster.view import NodeId
from lockmgr.events import Patience
from lockmgr.messages import VALUE_BYTES, Resource
from lockmgr.modes import COVERS, Mode
from redirector.block.device import BlockError
from redirector.block.reservations import Registration
from tests.sim.content import NOTHING_WRITTEN, Stamp
from tests.sim.world import Resume, Wish

if TYPE_CHECKING:
    from tests.sim.locking import Locking

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Younger:
    """A write that may be begun while an older one to the same block is retried."""

    claim: Claim
    stamp: Stamp
    begun: bool = False
    ended: bool = False
    waiter: list[Resume] = field(default_factory=list)


class Application:
    """See the module's docstring."""

    def __init__(self, locking: Locking) -> None:
        self.locking = locking
        daemon = locking.daemon
        self.daemon = daemon
        self.world = daemon.world
        self.oracle = daemon.cluster.oracle
        self.resources = daemon.cluster.resources
        self.names = [resource.name for resource in self.resources]
        self.cache: dict[bytes, Stamp] = {}
        self.dirty: set[bytes] = set()
        """Acknowledged in the journal, not yet at home."""
        self.started = False
        self.stopping = False
        self.dead = False
        self.waiting: dict[Claim, tuple[Resume, float]] = {}
        self.done = 0
        self._path_waiters: list[Resume] = []
        self._lease_waiters: list[Resume] = []
        self._retried: dict[bytes, list[Resume]] = {}
        """Blocks of which a write is issued again, and who waits for its end."""
        self._drains: dict[bytes, Resume] = {}
        self._glimpses: dict[int, tuple[bytes, Stamp]] = {}
        self._ticket = 0

    # -- guests ----------------------------------------------------------------------------
    def start(self) -> None:
        """Let the guests run."""
        self.started = True
        for number in range(self.daemon.cluster.guests):
            self.daemon.process.start(self._guest(number))

    def stop(self) -> None:
        """Let no guest begin anything more."""
        self.stopping = True

    async def _guest(self, number: int) -> None:
        cluster = self.daemon.cluster
        rng = self.world.rng
        while not self.stopping:
            await self.daemon.process.sleep(rng.expovariate(1.0 / cluster.think_s))
            if self.stopping or not self.daemon.serves:
                return
            if cluster.quiet:
                continue
            dice = rng.random()
            resource = self.resources[int(len(self.resources) * rng.random() ** 2)]
            if dice < 0.03:
                self._glimpse(resource)
            elif dice < 0.11 and len(self.resources) > 1:
                other = self.resources[int(len(self.resources) * rng.random() ** 2)]
                await self._both(number, resource, other)
            elif dice < 0.5:
                await self._with(number, resource, Mode.EX, self._write)
            else:
                await self._with(number, resource, Mode.PR, self._read)

    async def _both(self, number: int, one: Resource, other: Resource) -> None:
        """Two locks in an order that somebody else may turn round: a deadlock now and then."""

        async def write_both(resource: Resource, claim: Claim) -> None:
            await self._write(resource, claim)
            if other is not one:
                await self._with(number, other, Mode.EX, self._write)

        await self._with(number, one, Mode.EX, write_both)

    async def _with(
        self,
        number: int,
        resource: Resource,
        mode: Mode,
        use: Callable[[Resource, Claim], Awaitable[None]],
    ) -> None:
        guest = f"guest {number} of {self.daemon.name}"
        claim = Claim(resource, mode, False, guest, owner=guest)
        if not await self.acquire(claim):
            return
        await use(resource, claim)
        self.done += 1
        self.locking.step(lock_events.Release(claim))

    async def read_everything(self) -> str:
        """Every block once, under its lock; returns whose daemon this is."""
        for resource in self.resources:
            claim = Claim(resource, Mode.PR, False, f"last reader of {self.daemon.name}")
            if await self._asked(claim):
                await self._read(resource, claim)
                self.locking.step(lock_events.Release(claim))
        return self.daemon.name

    def _asked(self, claim: Claim) -> Wish[bool]:
        def begin(resume: Resume) -> None:
            self.waiting[claim] = (resume, self.world.now)
            self.locking.step(lock_events.Acquire(claim))

        return Wish(begin)

    async def acquire(self, claim: Claim) -> bool:
        """Have it granted, now or later; False: denied."""
        rng = self.world.rng
        dice = rng.random()
        patience = Patience.NO_QUEUE if dice < 0.02 else Patience.QUEUE
        timeout_s = rng.random() * 2 if 0.02 <= dice < 0.05 else None

        def begin(resume: Resume) -> None:
            self.waiting[claim] = (resume, self.world.now)
            self.locking.step(lock_events.Acquire(claim, patience, timeout_s))
            if 0.05 <= dice < 0.06:
                self.world.after(rng.random(), self.daemon.process.deliver, self._withdraw, claim)

        wish: Wish[bool] = Wish(begin)
        return await wish

    def _withdraw(self, claim: Claim) -> None:
        if claim.state is ClaimState.WAITING and claim in self.waiting and self.daemon.serves:
            resume, _ = self.waiting.pop(claim)
            self.locking.step(lock_events.Withdraw(claim))
            resume(False)

    def granted(self, claim: Claim) -> None:
        """The core has granted a claim."""
        resume, _ = self.waiting.pop(claim)
        value = claim.lock.value.data if claim.lock is not None else None
        self.oracle.granted(self.daemon, claim.resource.name, value)
        resume(True)

    def denied(self, effect: lock_events.Deny) -> None:
        """The core has denied one: a timeout, no wish to queue, a deadlock."""
        waiting = self.waiting.pop(effect.claim, None)
        if waiting is not None:
            waiting[0](False)

    # -- reading and writing -----------------------------------------------------------------
    async def _read(self, resource: Resource, _claim: Claim) -> None:
        name = resource.name
        floor = self.oracle.floor(name)
        while True:
            stamp = self.cache.get(name)
            if stamp is None:
                stamp = await self._from_home(name)
            # Checked after data has arrived and before the reply is given.
            if self.daemon.lease_left_s > 0:
                break
            await self._lease()
        self.oracle.reads(self.daemon, name, stamp, floor, kept=True)

    async def _from_home(self, name: bytes) -> Stamp:
        stamp = await self._data_read(lambda: self.daemon.cluster.content.home_of(name))
        if name not in self.cache:
            self.cache[name] = stamp
        return self.cache[name]

    async def _write(self, resource: Resource, claim: Claim) -> None:
        name = resource.name
        before = self.cache.get(name)
        if before is None:
            before = await self._from_home(name)
        stamp = Stamp(before.version + 1, self.oracle.next_value())
        younger = _Younger(claim, Stamp(stamp.version + 1, self.oracle.next_value()))
        if self.world.chance(0.3):
            delay_s = 5.0 * self.world.rng.random()
            self.world.after(delay_s, self.daemon.process.deliver, self._begin_younger, younger)
        await self._write_one(claim, stamp)
        if younger.begun and not younger.ended:
            await Wish[None](younger.waiter.append)
        younger.ended = True

    def _begin_younger(self, younger: _Younger) -> None:
        name = younger.claim.resource.name
        if name in self._retried and not younger.ended and self.daemon.serves:
            younger.begun = True
            write = self._write_one(younger.claim, younger.stamp)
            self.daemon.process.start(write, lambda _: self._end_younger(younger))

    @staticmethod
    def _end_younger(younger: _Younger) -> None:
        younger.ended = True
        for resume in younger.waiter:
            resume(None)

    async def _write_one(self, claim: Claim, stamp: Stamp) -> None:
        name = claim.resource.name
        daemon = self.daemon
        content = daemon.cluster.content
        assert daemon.node is not None
        slot = daemon.node.slot
        self.oracle.writes(name, stamp)
        log = partial(content.log, slot, name, stamp)
        await self._data_write(f"journal {name!r} {stamp}", log, block=name)
        while daemon.lease_left_s <= 0:
            await self._lease()
        self.cache[name] = stamp
        self.dirty.add(name)
        core = self.locking.core
        assert core is not None
        if COVERS[claim.mode][Mode.EX] and claim.lock is not None:
            core.locks.set_value(claim, stamp.version.to_bytes(8, "little").ljust(VALUE_BYTES))
        self.oracle.acknowledges(daemon, name, stamp)

    # -- giving up -------------------------------------------------------------------------
    async def demote(self, resource: Resource, to_mode: Mode) -> None:
        """Write back, forget, tell the core."""
        name = resource.name
        empty = False
        if self.world.chance(0.5):
            wish: Wish[bool] = Wish(lambda resume: self._begin_drain(resource, resume))
            empty = await wish
        await self._flush(name)
        lock = self.locking.core.locks.locks.get(name) if self.locking.core is not None else None
        unused = empty or (lock is not None and not lock.above_target())
        if not COVERS[to_mode][Mode.PR] and unused and name not in self.dirty:
            self.cache.pop(name, None)
        self.locking.step(lock_events.Demoted(resource))

    def _begin_drain(self, resource: Resource, resume: Resume) -> None:
        self._drains[resource.name] = resume
        self.locking.step(lock_events.AwaitDrain(resource))

    def drained(self, resource: Resource, empty: bool) -> None:
        """The core has closed the gate, and nobody is inside (``empty``)."""
        self._drains.pop(resource.name)(empty)

    async def _flush(self, name: bytes) -> None:
        content = self.daemon.cluster.content
        assert self.daemon.node is not None
        slot = self.daemon.node.slot
        while name in self.dirty:
            stamp = self.cache[name]
            await self._bring_home(name, stamp)
            if self.cache[name] == stamp:
                self.dirty.discard(name)
                forget = partial(content.forget_if, slot, name, stamp)
                await self._data_write(f"tail beyond {name!r} {stamp}", forget)

    async def _bring_home(self, name: bytes, stamp: Stamp) -> None:
        write = partial(self.daemon.cluster.content.write_home, name, stamp)
        await self._data_write(f"home {name!r} {stamp}", write)

    async def replay(self, node: NodeId) -> None:
        """Bring home what the journal of a slot has and the home has not."""
        content = self.daemon.cluster.content
        records = await self._data_read(lambda: dict(content.journals.get(node.slot, {})))
        for name, stamp in records.items():
            home = await self._data_read(partial(content.home_of, name))
            if stamp.version > home.version:
                await self._bring_home(name, stamp)
        empty = partial(content.empty, node.slot)
        await self._data_write(f"empty journal {node.slot}", empty)

    # -- glimpses --------------------------------------------------------------------------
    def _glimpse(self, resource: Resource) -> None:
        self._ticket += 1
        self._glimpses[self._ticket] = (resource.name, self.oracle.floor(resource.name))
        self.locking.step(lock_events.Glimpse(resource, self._ticket))

    def asked(self, effect: lock_events.Answer) -> None:
        """Another node wants to know."""
        stamp = self.cache.get(effect.resource.name, NOTHING_WRITTEN)
        answer = stamp.version.to_bytes(8, "little")
        self.locking.step(
            lock_events.Answered(effect.resource, effect.asker, effect.serial, answer)
        )

    def glimpsed(self, ticket: int, _answer: bytes | None) -> None:
        """The answer."""
        self._glimpses.pop(ticket, None)

    # -- the data path ---------------------------------------------------------------------
    async def _data_read(self, what: Callable[[], T]) -> T:
        paths = self.daemon.paths
        return await self._insist(lambda data: paths.read_data(data, what))

    async def _data_write(
        self, words: str, apply: Callable[[], None], block: bytes | None = None
    ) -> None:
        paths = self.daemon.paths
        if block is not None:
            await self._no_retry_of(block)
        await self._insist(lambda data: paths.write_data(data, words, apply), block)

    async def _no_retry_of(self, block: bytes) -> None:
        """A younger write waits for the retry of an older one that it overlaps."""
        while block in self._retried:
            await Wish[None](self._retried[block].append)

    async def _insist(
        self, command: Callable[[Registration], Awaitable[T]], block: bytes | None = None
    ) -> T:
        """Until it has an answer, on one path after the other."""
        paths = self.daemon.paths
        retried = False
        while True:
            data = paths.data
            if data is None or not paths.ready:
                await self._path()
                continue
            try:
                answer = await command(data)
            except BlockError:
                paths.path_lost(data)
                if block is not None and not retried:
                    retried = True
                    self._retried.setdefault(block, [])
                continue
            if retried and block is not None:
                for resume in self._retried.pop(block, []):
                    resume(None)
            return answer

    def paths_ready(self) -> None:
        """There is one, and nothing of those before it is on its way."""
        waiters, self._path_waiters = self._path_waiters, []
        for resume in waiters:
            resume(None)

    def lease_renewed(self) -> None:
        """There is a lease."""
        waiters, self._lease_waiters = self._lease_waiters, []
        for resume in waiters:
            resume(None)

    def _path(self) -> Wish[None]:
        return Wish(self._path_waiters.append)

    def _lease(self) -> Wish[None]:
        return Wish(self._lease_waiters.append)
