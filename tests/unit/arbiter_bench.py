"""A simulated LUN with a volume whose view a test writes by hand, and arbiters on it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import trio

from csvfs.format import SlotBlock, SlotState, Superblock, View, ViewSlot, byte_offset
from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.fixed_area import read_superblock, read_view, write_view
from csvfs.membership.path_keys import PathKeys
from lockmgr.cluster import effects, outcomes
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.outcomes import Good, Outcome
from lockmgr.cluster.view import NodeId
from redirector.block.arbiter import Op
from redirector.block.device import InitiatorPort, Lun
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration
from redirector.block.simulated import Command, Faults, SimulatedLun
from tests.member_nodes import format_lun

SIZE = 64 << 20
OFFICER = PathKey(0, 1, 9).pack()
"""Holds the reservation: of the node in slot 0, whose life is not simulated."""
NODE = NodeId(1, 7)


def listed(incarnation: int) -> ViewSlot:
    return ViewSlot(incarnation, SlotState.ACTIVE, node_name=f"node {incarnation}")


@dataclass
class Bench:
    lun: SimulatedLun
    superblock: Superblock
    officer: Registration
    commands: list[Command] = field(default_factory=list)
    """All that the target admitted since the bench was set up, or this was cleared."""

    async def admit(self, *nodes: NodeId) -> View:
        """The officer writes the next view: it and these are members."""
        return await self._admit(self.officer, nodes)

    async def admit_by(self, holder: Node, *nodes: NodeId) -> View:
        """Who holds now writes it."""
        return await self._admit(holder.control, nodes)

    async def _admit(self, holder: Registration, nodes: tuple[NodeId, ...]) -> View:
        device = holder.device
        view = await read_view(device, self.superblock.volume_id)
        slots = {number: ViewSlot(entry.incarnation) for number, entry in enumerate(view.slots)}
        slots |= {node.slot: listed(node.incarnation) for node in (NodeId(0, 1), *nodes)}
        view = view.next(holder.key, slots, 0)
        await write_view(holder, view, self.superblock.volume_id)
        return view

    async def slot_block(self, slot: int) -> SlotBlock:
        address = self.superblock.geometry.slot_block(slot)
        block = await self.officer.device.read(byte_offset(address), 4096)
        return SlotBlock.decode(block, address, self.superblock.volume_id, slot)[0]

    @property
    def registered(self) -> list[int]:
        return sorted(self.lun.arbiter.registrations.values())

    @property
    def holder(self) -> int:
        return self.lun.arbiter.read_reservation().key

    def ops(self) -> list[Op]:
        return [command.op for command in self.commands]

    @asynccontextmanager
    async def arbiter(self, name: str = "alpha", lun: Lun | None = None) -> AsyncIterator[Node]:
        """``lun``: by which way it goes to the bench's LUN."""
        certificate = f"certificate of {name}".encode()
        identity = Identity(
            name,
            bytes(16),
            bytes(16),
            hashlib.sha256(certificate).digest(),
            (f"{name}:1",),
            certificate,
        )
        told: list[tuple[str, tuple[int, ...]]] = []

        def opened(control: Registration, data: Registration) -> None:
            told.append(("opened", (control.key, data.key)))

        arbiter = LunArbiter(
            lun or self.lun,
            self.superblock,
            identity,
            f"iqn.2026-11.test:{name}",
            on_lost=lambda keys: told.append(("lost", keys)),
            on_opened=opened,
            rng=Random(name),
            now_ns=lambda: 7,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: arbiter.run(task_status=task_status))
            yield Node(self, arbiter, told, identity)
            arbiter.check()
            nursery.cancel_scope.cancel()


@dataclass
class Node:
    bench: Bench
    arbiter: LunArbiter
    told: list[tuple[str, tuple[int, ...]]]
    identity: Identity

    async def do(self, effect: effects.AnyIo) -> Outcome:
        self.arbiter.check()
        outcome = await self.arbiter.carry_out(effect)
        self.arbiter.check()
        return outcome

    async def open_paths(self, node: NodeId = NODE) -> outcomes.Opened:
        return opened(await self.do(effects.OpenPaths(1, *node)))

    async def open_newcomer(self, bits: int = 5) -> outcomes.Opened:
        return opened(await self.do(effects.OpenNewcomer(1, PathKeys().newcomer(bits))))

    @property
    def control(self) -> Registration:
        assert self.arbiter.control is not None
        return self.arbiter.control

    @property
    def data(self) -> Registration:
        assert self.arbiter.data is not None
        return self.arbiter.data

    async def take_office(self) -> None:
        """Be the holder."""
        outcome = await self.do(effects.Take(1, self.bench.holder))
        assert outcome == Good(outcomes.Won())
        self.bench.commands.clear()


def opened(outcome: Outcome) -> outcomes.Opened:
    assert isinstance(outcome, Good) and isinstance(outcome.value, outcomes.Opened), outcome
    return outcome.value


@asynccontextmanager
async def open_bench(faults: Faults | None = None) -> AsyncIterator[Bench]:
    lun = SimulatedLun(SIZE, faults=faults)
    await format_lun(lun)
    device = await lun.login(InitiatorPort("iqn.2026-11.test:officer", 0x80 << 40 | 99))
    officer = await Registration.register(device, OFFICER)
    await officer.reserve()
    superblock, _ = await read_superblock(device)
    bench = Bench(lun, superblock, officer)
    await bench.admit(NODE)
    lun.hold(lambda command: bool(bench.commands.append(command)))  # type: ignore[func-returns-value]
    yield bench
    lun.check()
