"""An arbiter made of a directory that several daemons of one machine share.

For clusters without a LUN, for tests, and as an example of what `lockmgr.cluster.arbiter` asks for:

    lock        flock(2)ed for as long as an operation takes, so each is atomic
    standing    who is registered, by which key, and who holds
    view        the view
    beat-N, join-N, slot-N    the blocks of slot N

Persistent reservations in short: a session registers a key, and does nothing once that is gone; one
key holds; to preempt a key removes it, and takes the reservation if it held. A fence takes the lock
alone, so what it shuts out has ended or will be refused. What the daemons share beyond this
directory is fenced with it if they use it `DirectoryArbiter.using` only.

What it cannot do: fence a process that was stopped (SIGSTOP) while it held the lock. Others get
`Unknown` until it goes on, or is killed. Its calls block for as long as the filesystem does.

invariants:
- ``holder`` is 0 or a registered key, or one that a closed session left registered;
- the view is written only by a session whose key holds;
- a key that was registered once by an incarnation is never registered again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio

from lockmgr.cluster import effects
from lockmgr.cluster.arbiter import ArbiterEffect
from lockmgr.cluster.blocks import Heartbeat, Identity, JoinRequest
from lockmgr.cluster.codec import Registry, WireError
from lockmgr.cluster.errors import MembershipError
from lockmgr.cluster.outcomes import (
    Blocks,
    Good,
    Lost,
    NobodyHolds,
    Opened,
    Outcome,
    Refused,
    Surveyed,
    Unknown,
    Value,
    Why,
    Won,
)
from lockmgr.cluster.view import MAX_SLOTS, NEWCOMER_SLOT, SECRET_BYTES, NodeId, View

POLL_S: Final = 0.002
LOCK_LIMIT_S: Final = 1.0
"""Who cannot have the lock within this time does not know what became of its operation."""
MAX_GENERATION: Final = (1 << 16) - 1


class NotRegistered(Exception):
    """The session's key is gone: it was fenced, or never there."""


class Unavailable(Exception):
    """The directory does not answer."""


class DirectoryKeys:
    """Slot 8 bits, incarnation 24, generation 16. A newcomer's: slot 255 and 40 random bits."""

    def owner(self, key: int) -> NodeId | None:
        """The incarnation that a key belongs to; None for a newcomer's."""
        slot = key >> 40
        return None if slot >= MAX_SLOTS else NodeId(slot, key >> 16 & 0xFFFFFF)

    def is_newcomer(self, key: int) -> bool:
        """Whether a newcomer made it."""
        return key >> 40 == NEWCOMER_SLOT

    def newcomer(self, random_bits: int) -> int:
        """A newcomer's key."""
        return NEWCOMER_SLOT << 40 | random_bits & 0xFFFFFFFFFF

    def path(self, node: NodeId, generation: int) -> int:
        """A member's. Raises `MembershipError` instead of using one twice."""
        if not 0 < generation <= MAX_GENERATION:
            raise MembershipError(f"node {node} has opened too many paths: mount again")
        return node.slot << 40 | node.incarnation << 16 | generation


@dataclass(frozen=True, slots=True)
class Registered:
    """A key, and the one session that may use it."""

    key: int
    session: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """Who may do what."""

    holder: int = 0
    generation: int = 0
    """Grows with each change."""
    registered: tuple[Registered, ...] = ()

    def has(self, who: Registered) -> bool:
        return who in self.registered

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(one.key for one in self.registered)

    def with_registered(self, who: Registered) -> Standing:
        others = tuple(one for one in self.registered if one.key != who.key)
        return replace(self, generation=self.generation + 1, registered=(*others, who))

    def without(self, keys: Iterable[int], holder: int | None = None) -> Standing:
        """These are gone; ``holder`` takes what one of them held."""
        gone = frozenset(keys)
        left = tuple(one for one in self.registered if one.key not in gone)
        holds = self.holder
        if holder is not None and holds in gone and len(left) < len(self.registered):
            holds = holder
        return Standing(holds, self.generation + 1, left)


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """What a node leaves in its slot."""

    slot: int
    incarnation: int
    fingerprint: bytes
    certificate: bytes


def _registry() -> Registry:
    registry = Registry()
    registry.register(View, 1, limit_bytes=1 << 17)
    registry.register(Standing, 2, limit_bytes=1 << 17, max_items=4 * MAX_SLOTS)
    for code, kind in ((3, Heartbeat), (4, JoinRequest), (5, SlotBlock)):
        registry.register(kind, code)
    return registry


_REGISTRY: Final = _registry()
_CODES: Final = {kind: entry.code for kind, entry in _REGISTRY.by_type.items()}


def make_directory(directory: Path, slots: int) -> None:
    """A directory with an empty view. Raises FileExistsError if there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("x"):
        pass
    _write(directory, "standing", Standing())
    _write(directory, "view", View.empty(slots, secret=secrets.token_bytes(SECRET_BYTES)))


@dataclass(eq=False, slots=True)
class _Session:
    who: Registered
    open: bool = True


@dataclass(slots=True)
class _Sessions:
    newcomer: _Session | None = None
    control: _Session | None = None
    data: _Session | None = None


@dataclass(slots=True)
class DirectoryArbiter:
    """An `Arbiter`. ``on_lost``: `Cluster.path_lost`."""

    directory: Path
    identity: Identity
    on_lost: Callable[[tuple[int, ...]], None]
    keys: DirectoryKeys = field(default_factory=DirectoryKeys)
    certificates: dict[bytes, bytes] = field(default_factory=dict)
    lock_limit_s: float = LOCK_LIMIT_S
    _open: _Sessions = field(default_factory=_Sessions)
    _generation: int = 0

    # -- arbiter.Arbiter -----------------------------------------------------------------------
    async def carry_out(self, effect: ArbiterEffect) -> Outcome:
        """Do it, and say how it ended."""
        session = self._session_for(effect)
        try:
            async with self._locked(exclusive=True):
                value = self._do(effect, session)
        except NotRegistered:
            self._drop(session)
            return Refused(Why.PREEMPTED)
        except (Unavailable, OSError, WireError):
            self._drop(session)
            return Unknown()
        return Good(value)

    async def read_certificates(self, nodes: Iterable[NodeId]) -> None:
        """From slot blocks, and from join blocks."""
        try:
            async with self._locked(exclusive=True):
                for node in nodes:
                    self._read_slot(node.slot)
                self._blocks()
        except (Unavailable, OSError, WireError):
            return

    @asynccontextmanager
    async def using(self) -> AsyncIterator[None]:
        """Use what is shared; whoever is fenced is not in here any more when the fence is done.
        Raises `NotRegistered`, `Unavailable`."""
        data = self._open.data
        async with self._locked(exclusive=False):
            if data is None or not data.open or not self._standing().has(data.who):
                raise NotRegistered("this node has no path")
            yield

    def close(self) -> None:
        """Drop every session; what is registered stays so."""
        for session in (self._open.newcomer, self._open.control, self._open.data):
            if session is not None:
                session.open = False
        self._open = _Sessions()

    # -- sessions ------------------------------------------------------------------------------
    def _session_for(self, effect: ArbiterEffect) -> _Session | None:
        match effect:
            case effects.OpenNewcomer() | effects.OpenPaths():
                return None
            case effects.DropNewcomer() | effects.WriteJoin():
                return self._open.newcomer
            case effects.WriteHeartbeat():
                return self._open.control
            case _:
                return self._open.control or self._open.newcomer

    def _drop(self, session: _Session | None) -> None:
        """It is of no use any more; with a path, both are."""
        if session is None or not session.open:
            return
        session.open = False
        if session is self._open.newcomer:
            self._open.newcomer = None
        else:
            self._drop_paths()

    def _drop_paths(self) -> None:
        paths = [one for one in (self._open.control, self._open.data) if one is not None]
        self._open.control = self._open.data = None
        for session in paths:
            session.open = False
        if paths:
            self.on_lost(tuple(session.who.key for session in paths))

    # -- operations, under the lock --------------------------------------------------------------
    def _do(self, effect: ArbiterEffect, session: _Session | None) -> Value:
        match effect:
            case effects.OpenNewcomer(_, key):
                return self._open_newcomer(key)
            case effects.OpenPaths(_, slot, incarnation):
                return self._open_paths(NodeId(slot, incarnation))
            case effects.DropNewcomer() if session is None:
                return None
        if session is None or not session.open:
            raise Unavailable("there is no session")
        standing = self._standing()
        who = session.who
        match effect:  # these are content if somebody has preempted the key
            case effects.DropNewcomer():
                return self._drop_newcomer(standing, session)
            case effects.Unregister(_, keep):
                return self._unregister(standing, keep)
        if not standing.has(who):
            raise NotRegistered(f"the key {who.key:#x} is not registered any more")
        match effect:
            case effects.Survey():
                return self._surveyed(standing)
            case effects.ReadBlocks():
                return self._blocks()
            case effects.WriteHeartbeat(_, beat):
                _write(self.directory, f"beat-{beat.slot}", beat)
            case effects.WriteJoin(_, request):
                _write(self.directory, f"join-{request.slot}", request)
            case effects.WriteView(_, view):
                if standing.holder != who.key:
                    raise NotRegistered("only the holder writes the view")
                _write(self.directory, "view", view)
            case effects.Take(_, old_key):
                return self._contend(who, standing.without((old_key,), who.key))
            case effects.Reserve():
                return self._contend(who, replace(standing, holder=standing.holder or who.key))
            case effects.Fence(_, keys, nodes, _):
                self._fence(standing, who, frozenset(keys), frozenset(nodes))
        return None

    def _open_newcomer(self, key: int) -> Opened:
        standing = self._standing()
        if self._open.newcomer is not None:
            self._drop_newcomer(standing, self._open.newcomer)
        self._open.newcomer = self._register(key)
        return Opened(key, self._surveyed(self._standing()))

    def _open_paths(self, node: NodeId) -> Opened:
        self._drop_paths()
        keys = tuple(self.keys.path(node, self._generation + one) for one in (1, 2))
        self._generation += 2
        try:
            control = self._register(keys[0])
            survey = self._surveyed(self._standing())
            if survey.view.lists(*node):
                me = self.identity
                block = SlotBlock(node.slot, node.incarnation, me.fingerprint, me.certificate)
                _write(self.directory, f"slot-{node.slot}", block)
                self._open.data = self._register(keys[1])
        except (Unavailable, OSError, WireError):
            self._open.data = None
            self.on_lost(keys)  # either may be registered
            raise
        self._open.control = control
        return Opened(keys[0], survey)

    def _register(self, key: int) -> _Session:
        session = _Session(Registered(key, secrets.token_bytes(8)))
        _write(self.directory, "standing", self._standing().with_registered(session.who))
        return session

    def _drop_newcomer(self, standing: Standing, session: _Session) -> Value:
        session.open = False
        if self._open.newcomer is session:
            self._open.newcomer = None
        if standing.has(session.who) and standing.holder != session.who.key:
            _write(self.directory, "standing", standing.without((session.who.key,)))
        return None

    def _contend(self, who: Registered, after: Standing) -> Value:
        _write(self.directory, "standing", after)
        if after.holder == who.key:
            return Won()
        return Lost(after.holder) if after.holder else NobodyHolds()

    def _fence(
        self, standing: Standing, who: Registered, keys: frozenset[int], nodes: frozenset[NodeId]
    ) -> None:
        gone = [
            key
            for key in standing.keys
            if key != who.key and (key in keys or self.keys.owner(key) in nodes)
        ]
        if gone:
            _write(self.directory, "standing", standing.without(gone, who.key))

    def _unregister(self, standing: Standing, keep: int) -> Value:
        control, data = self._open.control, self._open.data
        going = [one for one in (control, data) if one is not None and one.who.key != keep]
        if standing.holder in [one.who.key for one in going]:
            raise Unavailable("the holder's key is not to be unregistered")
        _write(self.directory, "standing", standing.without(one.who.key for one in going))
        for session in going:
            session.open = False
        if control in going:
            self._open.control = None
        self._open.data = None
        return None

    # -- files -----------------------------------------------------------------------------------
    def _standing(self) -> Standing:
        found: Standing | None = _read(self.directory, "standing", Standing)
        if found is None:
            raise Unavailable(f"{self.directory} is no directory of a cluster")
        return found

    def _surveyed(self, standing: Standing) -> Surveyed:
        view = _read(self.directory, "view", View)
        if view is None:
            raise Unavailable(f"{self.directory} has no view")
        return Surveyed(view, standing.holder, standing.keys, standing.generation)

    def _blocks(self) -> Blocks:
        beats, joins = [], []
        for path in sorted(self.directory.iterdir()):
            if path.name.startswith("beat-"):
                beats.append(_read(self.directory, path.name, Heartbeat))
            elif path.name.startswith("join-"):
                joins.append(_read(self.directory, path.name, JoinRequest))
        asked = tuple(join for join in joins if join is not None)
        for join in asked:
            self.certificates[join.fingerprint] = join.certificate
        return Blocks(tuple(beat for beat in beats if beat is not None), asked)

    def _read_slot(self, slot: int) -> None:
        block = _read(self.directory, f"slot-{slot}", SlotBlock)
        if block is not None:
            self.certificates[block.fingerprint] = block.certificate

    @asynccontextmanager
    async def _locked(self, *, exclusive: bool) -> AsyncIterator[None]:
        """Raises `Unavailable` if somebody else has it for too long."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            with trio.move_on_after(self.lock_limit_s) as patience:
                while not _try_lock(fd, exclusive=exclusive):  # noqa: ASYNC110 - no event for it
                    await trio.sleep(POLL_S)
            if patience.cancelled_caught:
                raise Unavailable("another process keeps the directory locked")
            yield
        finally:
            os.close(fd)


def _try_lock(fd: int, *, exclusive: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(directory: Path, name: str, value: object) -> None:
    """In one piece."""
    _code, data, _payload = _REGISTRY.encode(value)
    new = directory / f".{name}.{os.getpid()}"
    new.write_bytes(data)
    new.replace(directory / name)


def _read(directory: Path, name: str, kind: type[Any]) -> Any:
    """None: it was never written."""
    try:
        data = (directory / name).read_bytes()
    except FileNotFoundError:
        return None
    return _REGISTRY.decode(_CODES[kind], data)
