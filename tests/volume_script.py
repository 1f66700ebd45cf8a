"""A list of calls, carried out on a volume and held against what the model said of each.

A `Step` names a method of `Volume`, its arguments with model objects in place of numbers and
handles, and the expected outcome. `Replay` carries a script out: on one volume, or on several
lives of it, with locks that are taken away at random, and looks at everything at the end.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest

from csvfs.check import Damage, check_volume
from csvfs.format import NOBODY, SlotState, Superblock, View, ViewSlot, ViewSlotFlag
from csvfs.namespace.handle import Handle
from csvfs.namespace.inode import Attributes
from csvfs.ondisk.geometry import ROOT_INODE
from csvfs.volume import Volume
from lockmgr.settings import Settings
from redirector.block.device import BlockDevice
from redirector.block.simulated import SimulatedLun
from tests.lock_rival import LockRival
from tests.simulated_volume import LUN_BYTES, PORT, SLOT, formatted, mounted
from tests.volume_model import Model, Node, OpenFile


def look(node: Node) -> tuple[int, ...]:
    """What the model and a volume's attributes are compared by."""
    return node.mode, node.nlink, node.uid, node.gid, 0 if node.is_directory else node.size


def look_at(attributes: Attributes) -> tuple[int, ...]:
    """The same of a volume's attributes."""
    size = 0 if attributes.is_directory else attributes.size
    return attributes.mode, attributes.nlink, attributes.uid, attributes.gid, size


@dataclass(frozen=True)
class Step:
    """One call. ``result`` is what the model returned, an error class if it raised one."""

    method: str
    args: tuple[Any, ...]
    result: Any
    seen: tuple[int, ...] = ()
    """`look` of the node that the call told of, as the model had it then."""


@dataclass(frozen=True)
class Forget(Step):
    """The kernel forgets the inode of ``args[0]``, if it was told of it."""


@dataclass(frozen=True)
class Remount(Step):
    """Leave and mount again; ``clean`` False: sync, then vanish as if the host had died."""

    clean: bool = True


class _Vanish(Exception):
    """The host dies."""


@dataclass
class Replay:
    """One script on one LUN. ``greedy``: another node wants locks at random all the time."""

    model: Model
    settings: Settings | None = None
    greedy: Random | None = None
    inos: dict[Node, int] = field(default_factory=dict)
    handles: dict[OpenFile, Handle] = field(default_factory=dict)
    lookups: dict[Node, int] = field(default_factory=dict)

    async def run(self, script: Sequence[Step]) -> None:
        """Raises AssertionError where the volume and the model differ."""
        lun = SimulatedLun(LUN_BYTES, yields=False)
        superblock = await formatted(lun)
        self.inos[self.model.root] = ROOT_INODE
        lives: list[list[Step]] = [[]]
        ends: list[bool] = []
        for step in script:
            if isinstance(step, Remount):
                lives.append([])
                ends.append(step.clean)
            else:
                lives[-1].append(step)
        ends.append(True)
        for incarnation, (steps, clean) in enumerate(zip(lives, ends, strict=True), 1):
            device = await lun.login(PORT)
            last = incarnation == len(lives)
            try:
                await self._live(device, superblock, incarnation, steps, clean=clean, last=last)
            except* _Vanish:
                lun.close_session(device)
            self.handles.clear()
            self.lookups.clear()
        device = await lun.login(PORT)
        await assert_clean(device, superblock, len(lives))

    async def _live(
        self,
        device: BlockDevice,
        superblock: Superblock,
        incarnation: int,
        steps: list[Step],
        *,
        clean: bool,
        last: bool,
    ) -> None:
        async with mounted(device, superblock, incarnation=incarnation, settings=self.settings) as (
            volume,
            locks,
        ):
            rival = LockRival(locks)
            for step in steps:
                if self.greedy is not None:
                    await rival.take_some(self.greedy)
                await self._step(volume, step)
            volume.check()
            if last:
                await self._compare_all(volume)
            if not clean:
                await volume.sync()
                raise _Vanish

    async def _step(self, volume: Volume, step: Step) -> None:
        if isinstance(step, Forget):
            count = self.lookups.pop(step.args[0], 0)
            if count:
                await volume.forget(self.inos[step.args[0]], count)
            return
        method: Callable[..., Awaitable[Any]] = getattr(volume, step.method)
        args = [self._real(argument) for argument in step.args]
        if isinstance(step.result, type):
            with pytest.raises(step.result):
                await method(*args)
            return
        result = await method(*args)
        node = self._compare(step, result)
        if node is not None:
            volume.remember(self.inos[node], 1)
            self.lookups[node] = self.lookups.get(node, 0) + 1

    def _real(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.inos[argument]
        if isinstance(argument, OpenFile):
            return self.handles[argument]
        return argument

    def _compare(self, step: Step, result: Any) -> Node | None:
        """Raise if they differ; the node that the kernel was told of, if one was."""
        expected = step.result
        if isinstance(result, tuple):
            handle, attributes = result
            self.handles[expected] = handle
            return self._learn(expected.node, attributes, step)
        if isinstance(result, Handle):
            self.handles[expected] = result
        elif isinstance(result, Attributes):
            learnt = self._learn(expected, result, step)
            return None if step.method == "setattr" else learnt
        elif isinstance(expected, bytes):
            assert bytes(result) == expected, (step.method, step.args)
        else:
            assert result == expected, (step, result)
        return None

    def _learn(self, node: Node, attributes: Attributes, step: Step) -> Node:
        known = self.inos.setdefault(node, attributes.ino)
        assert known == attributes.ino
        assert look_at(attributes) == step.seen, step
        return node

    # -- at the end --------------------------------------------------------------------------
    async def _compare_all(self, volume: Volume) -> None:
        todo = [self.model.root]
        while todo:
            directory = todo.pop()
            ino = self.inos[directory]
            found: dict[bytes, Attributes] = {}
            cookie = 0
            while entries := await volume.readdir(ino, cookie, 5):
                cookie = entries[-1].cookie
                assert not found.keys() & {entry.name for entry in entries}
                found |= {entry.name: entry.attributes for entry in entries}
            above = directory.parent
            assert above is not None
            assert found.pop(b".").ino == ino and found.pop(b"..").ino == self.inos[above]
            assert found.keys() == directory.names.keys()
            for name, attributes in found.items():
                node = directory.names[name]
                await self._compare_node(volume, node, attributes)
                if node.is_directory:
                    todo.append(node)

    async def _compare_node(self, volume: Volume, node: Node, attributes: Attributes) -> None:
        assert attributes.ino == self.inos[node]
        again = await volume.getattr(attributes.ino)
        assert replace(again, atime_ns=attributes.atime_ns) == attributes
        assert look_at(attributes) == look(node)
        names = await volume.listxattr(attributes.ino)
        assert names == list(node.xattrs)
        for name in names:
            assert await volume.getxattr(attributes.ino, name) == node.xattrs[name]
        if node.is_file:
            handle = await volume.open(attributes.ino, os.O_RDONLY, 0)
            assert bytes(await volume.read(handle, 0, node.size + 10)) == bytes(node.data)
            await volume.release(handle)


def slot_view(superblock: Superblock, incarnation: int) -> View:
    """A view that says that the tests' slot was used."""
    slots = [ViewSlot()] * superblock.geometry.slots
    slots[SLOT] = ViewSlot(incarnation, SlotState.ACTIVE, NOBODY, flags=ViewSlotFlag.JOURNAL_USED)
    return View(9, 0, tuple(slots))


async def assert_clean(device: BlockDevice, superblock: Superblock, incarnation: int) -> None:
    """`csvfs.check` finds nothing wrong, and nothing left to reclaim."""
    view = slot_view(superblock, incarnation)
    report = await check_volume(device, superblock, now_ns=9, own_view=view)
    wrong = [f for f in report.findings if f.damage is not Damage.SLOT_BLOCK]
    assert not wrong, "\n".join(map(str, wrong))
    assert not report.totals.orphans and not report.totals.reclaim_entries, report.totals
