"""Names and data against a model, by a hypothesis rule machine.

The rules drive the model and write down each call with the outcome that the model gave; at the
end the whole script is carried out on a volume, in virtual time, and everything is compared. So
one example is one deterministic run, and shrinks like any other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from random import Random
from typing import Any, Final, TypeVar

import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from csvfs.errors import FilesystemError
from csvfs.namespace.inode import SetAttributes
from csvfs.namespace.rename import EXCHANGE, NOREPLACE
from lockmgr.settings import Settings
from tests.volume_model import Model, Node, OpenFile
from tests.volume_script import Forget, Remount, Replay, Step, look

T = TypeVar("T")

UNIT = 65536
NAMES = st.sampled_from([b"a", b"b", b"c", b"d"] * 5 + [b"long" * 60, b".", b"..", b"x" * 256])
MODES = st.sampled_from([0o755, 0o2755, 0o4711, 0o600])
FLAGS = st.sampled_from(
    [os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC, os.O_WRONLY]
)
OFFSETS = st.one_of(
    st.sampled_from([0, 1, 511, 512, 4096, UNIT - 1, UNIT, UNIT + 4096, 3 * UNIT - 512]),
    st.integers(0, 6 * UNIT),
)
LENGTHS = st.sampled_from([0, 1, 512, 700, 4096, UNIT - 512, UNIT, UNIT + 1, 3 * UNIT + 5])


def content(seed: int, length: int) -> bytes:
    """Bytes that tell where they are from."""
    return (Random(seed).randbytes(min(length, 4096)) * (length // 4096 + 1))[:length]


class VolumeMachine(RuleBasedStateMachine):
    """Collects a script."""

    directories: Bundle[Node] = Bundle("directories")
    others: Bundle[Node] = Bundle("others")
    handles: Bundle[OpenFile] = Bundle("handles")

    lock_settings: Settings | None = None
    greedy = False

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.script: list[Step] = []
        self.dead: set[Node] = set()
        self.known: set[Node] = set()
        self.nodes: list[Node] = [self.model.root]
        self.open: list[OpenFile] = []

    def call(self, method: str, args: tuple[Any, ...], model: Callable[[], T]) -> list[T]:
        """One step of the script; what the model returned, nothing if it raised."""
        nodes = [arg.node if isinstance(arg, OpenFile) else arg for arg in args]
        if any(node in self.dead for node in nodes if isinstance(node, Node)):
            return []
        if any(arg not in self.open for arg in args if isinstance(arg, OpenFile)):
            return []
        try:
            result = model()
        except FilesystemError as error:
            self.script.append(Step(method, args, type(error)))
            return []
        node = result.node if isinstance(result, OpenFile) else result
        seen = look(node) if isinstance(node, Node) else ()
        self.script.append(Step(method, args, result, seen))
        if isinstance(result, Node) and result not in self.nodes:
            self.nodes.append(result)
        if isinstance(result, OpenFile):
            self.open.append(result)
            if result.node not in self.nodes:
                self.nodes.append(result.node)
        if isinstance(node, Node) and method not in ("setattr", "open"):
            self.known.add(node)
        self.bury()
        return [result]

    def bury(self) -> None:
        """What has no name, and is neither known nor open, must not be asked for again."""
        used = self.known | {handle.node for handle in self.open}
        self.dead |= {node for node in self.nodes if node.nlink == 0 and node not in used}

    # -- names -------------------------------------------------------------------------------
    @initialize(target=directories)
    def begin(self) -> Node:
        return self.model.root

    @rule(target=directories, parent=directories, name=NAMES, mode=MODES)
    def mkdir(self, parent: Node, name: bytes, mode: int) -> Any:
        return multiple(
            *self.call(
                "mkdir",
                (parent, name, mode, 0, 0),
                lambda: self.model.make(parent, name, stat.S_IFDIR | mode),
            )
        )

    @rule(target=others, parent=directories, name=NAMES, length=st.sampled_from([1, 3840, 4000]))
    def symlink(self, parent: Node, name: bytes, length: int) -> Any:
        target = b"t" * length
        return multiple(
            *self.call(
                "symlink",
                (parent, name, target, 0, 0),
                lambda: self.model.make(parent, name, stat.S_IFLNK | 0o777, target=target),
            )
        )

    @rule(target=others, parent=directories, name=NAMES)
    def mkfifo(self, parent: Node, name: bytes) -> Any:
        mode = stat.S_IFIFO | 0o600
        return multiple(
            *self.call(
                "mknod",
                (parent, name, mode, 0, 0, 0),
                lambda: self.model.make(parent, name, mode),
            )
        )

    @rule(target=handles, parent=directories, name=NAMES, mode=MODES, flags=FLAGS)
    def create(self, parent: Node, name: bytes, mode: int, flags: int) -> Any:
        return multiple(
            *self.call(
                "create",
                (parent, name, mode, flags, 0, 0),
                lambda: self.model.create(parent, name, mode, flags),
            )
        )

    @rule(node=others | directories, parent=directories, name=NAMES)
    def link(self, node: Node, parent: Node, name: bytes) -> None:
        self.call("link", (node, parent, name), lambda: self.model.link(node, parent, name))

    @rule(handle=handles, parent=directories, name=NAMES)
    def link_file(self, handle: OpenFile, parent: Node, name: bytes) -> None:
        self.link(handle.node, parent, name)

    @rule(parent=directories, name=NAMES)
    def lookup(self, parent: Node, name: bytes) -> None:
        self.call("lookup", (parent, name), lambda: self.model.lookup(parent, name))

    @rule(parent=directories, name=NAMES)
    def unlink(self, parent: Node, name: bytes) -> None:
        self.call("unlink", (parent, name), lambda: self.model.unlink(parent, name))

    @rule(parent=directories, name=NAMES)
    def rmdir(self, parent: Node, name: bytes) -> None:
        self.call("rmdir", (parent, name), lambda: self.model.rmdir(parent, name))

    @rule(
        parent=directories,
        name=NAMES,
        new=directories,
        new_name=NAMES,
        flags=st.sampled_from([0, 0, NOREPLACE, EXCHANGE, 3]),
    )
    def rename(self, parent: Node, name: bytes, new: Node, new_name: bytes, flags: int) -> None:
        self.call(
            "rename",
            (parent, name, new, new_name, flags),
            lambda: self.model.rename(parent, name, new, new_name, flags),
        )

    @rule(node=others)
    def readlink(self, node: Node) -> None:
        self.call("readlink", (node,), lambda: self.model.readlink(node))

    # -- attributes --------------------------------------------------------------------------
    @rule(handle=handles, size=OFFSETS)
    def truncate(self, handle: OpenFile, size: int) -> None:
        changes = SetAttributes(size=size)
        node = handle.node
        self.call("setattr", (node, changes), lambda: self.model.setattr(node, changes))

    @rule(node=others | directories, mode=MODES, uid=st.sampled_from([None, 3]))
    def set_mode_or_owner(self, node: Node, mode: int, uid: int | None) -> None:
        changes = SetAttributes(mode=mode, uid=uid)
        self.call("setattr", (node, changes), lambda: self.model.setattr(node, changes))

    @rule(
        node=others | directories,
        name=st.sampled_from([b"user.a", b"trusted.b"]),
        length=st.sampled_from([0, 9, 3000]),
    )
    def setxattr(self, node: Node, name: bytes, length: int) -> None:
        value = bytes(length)
        self.call("setxattr", (node, name, value), lambda: self.model.setxattr(node, name, value))

    @rule(node=others | directories, name=st.sampled_from([b"user.a", b"trusted.b"]))
    def removexattr(self, node: Node, name: bytes) -> None:
        self.call("removexattr", (node, name), lambda: self.model.removexattr(node, name))

    # -- files -------------------------------------------------------------------------------
    @rule(target=handles, handle=handles, flags=FLAGS)
    def open_again(self, handle: OpenFile, flags: int) -> Any:
        node = handle.node
        return multiple(*self.call("open", (node, flags, 0), lambda: self.model.open(node, flags)))

    @rule(handle=handles, offset=OFFSETS, length=LENGTHS, seed=st.integers(0, 99))
    def write(self, handle: OpenFile, offset: int, length: int, seed: int) -> None:
        data = content(seed, length)
        self.call("write", (handle, offset, data), lambda: self.model.write(handle, offset, data))

    @rule(handle=handles, offset=OFFSETS, length=LENGTHS)
    def read(self, handle: OpenFile, offset: int, length: int) -> None:
        self.call("read", (handle, offset, length), lambda: self.model.read(handle, offset, length))

    @rule(handle=handles, datasync=st.booleans())
    def fsync(self, handle: OpenFile, datasync: bool) -> None:
        self.call("fsync", (handle.node, datasync), lambda: None)

    @rule(handle=consumes(handles))
    def release(self, handle: OpenFile) -> None:
        self.call("release", (handle,), lambda: None)
        self.open = [each for each in self.open if each is not handle]
        self.bury()

    @rule(node=others | directories)
    def forget(self, node: Node) -> None:
        self._forget(node)

    @rule(handle=handles)
    def forget_file(self, handle: OpenFile) -> None:
        self._forget(handle.node)

    def _forget(self, node: Node) -> None:
        self.script.append(Forget("forget", (node,), None))
        self.known.discard(node)
        self.bury()

    @rule(clean=st.booleans())
    def remount(self, clean: bool) -> None:
        self.script.append(Remount("remount", (), None, clean=clean))
        self.open.clear()
        self.known.clear()
        self.bury()

    def teardown(self) -> None:
        replay = Replay(self.model, self.lock_settings, Random(7) if self.greedy else None)
        trio.run(replay.run, self.script, clock=trio.testing.MockClock(autojump_threshold=0))


class SheddingMachine(VolumeMachine):
    """Every lock is given up as soon as no task uses it."""

    lock_settings = Settings(cache_limit=0, min_hold_s=0)


class RivalMachine(VolumeMachine):
    """Another node takes locks at random."""

    greedy = True


_SETTINGS: Final = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for _machine in (VolumeMachine, SheddingMachine, RivalMachine):
    _machine.TestCase.settings = _SETTINGS

TestVolume = VolumeMachine.TestCase
TestVolumeThatShedsLocks = SheddingMachine.TestCase
TestVolumeWithRival = RivalMachine.TestCase
