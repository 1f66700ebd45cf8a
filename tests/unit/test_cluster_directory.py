"""The arbiter over a directory: registrations, one holder, fences that wait for who is inside."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from lockmgr.cluster import effects
from lockmgr.cluster.arbiter import ArbiterEffect, Split
from lockmgr.cluster.blocks import Heartbeat, Identity, JoinRequest
from lockmgr.cluster.directory_arbiter import (
    MAX_GENERATION,
    DirectoryArbiter,
    DirectoryKeys,
    NotRegistered,
    Unavailable,
    make_directory,
)
from lockmgr.cluster.errors import MembershipError
from lockmgr.cluster.outcomes import Blocks, Good, Lost, NobodyHolds, Opened, Refused, Unknown, Won
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlot

A, B = NodeId(0, 1), NodeId(1, 1)
KEYS = DirectoryKeys()


class Node:
    """An arbiter, and what it said."""

    def __init__(self, directory: Path, name: str) -> None:
        self.lost: list[tuple[int, ...]] = []
        self.identity = Identity(
            name, bytes(16), bytes(16), name.encode() * 32, (), b"of " + name.encode()
        )
        self.arbiter = DirectoryArbiter(directory, self.identity, self.lost.append)
        self.arbiter.lock_limit_s = 0.05

    async def get(self, effect: ArbiterEffect) -> object:
        outcome = await self.arbiter.carry_out(effect)
        assert isinstance(outcome, Good), outcome
        return outcome.value

    async def open(self, node: NodeId) -> int:
        opened = await self.get(effects.OpenPaths(1, *node))
        assert isinstance(opened, Opened)
        return opened.key


def view_of(*nodes: NodeId) -> View:
    view = View.empty(4)
    for node in nodes:
        view = view.with_slot(node.slot, ViewSlot(node.incarnation, SlotState.ACTIVE))
    return view


async def two(tmp_path: Path) -> tuple[Node, Node, int, int]:
    """Both members with open paths; the first holds."""
    make_directory(tmp_path / "shared", 4)
    one, other = Node(tmp_path / "shared", "a"), Node(tmp_path / "shared", "b")
    newcomer = KEYS.newcomer(5)
    await one.get(effects.OpenNewcomer(1, newcomer))
    assert await one.get(effects.Reserve(1)) == Won()
    await one.get(effects.WriteView(1, replace(view_of(A, B), epoch=2)))
    key, other_key = await one.open(A), await other.open(B)
    assert await one.get(effects.Take(1, newcomer)) == Won()
    await one.get(effects.DropNewcomer(1))
    return one, other, key, other_key


async def test_who_holds_is_one(tmp_path: Path) -> None:
    one, other, key, other_key = await two(tmp_path)
    assert await other.get(effects.Reserve(1)) == Lost(key)
    assert await other.get(effects.Take(1, key)) == Won()
    assert other.arbiter.keys.owner(other_key) == B
    outcome = await one.arbiter.carry_out(effects.Take(1, other_key))
    assert isinstance(outcome, Refused), "whose key was preempted does nothing any more"
    assert one.lost == [(key, key + 1)]
    key = await one.open(A)
    assert await one.get(effects.Take(1, 12345)) == Lost(other_key)


async def test_take_takes_nothing_when_nobody_holds(tmp_path: Path) -> None:
    make_directory(tmp_path / "shared", 4)
    node = Node(tmp_path / "shared", "a")
    await node.get(effects.OpenNewcomer(1, KEYS.newcomer(1)))
    assert await node.get(effects.Take(1, 99)) == NobodyHolds()


async def test_only_the_holder_writes_the_view(tmp_path: Path) -> None:
    _one, other, _key, _other_key = await two(tmp_path)
    outcome = await other.arbiter.carry_out(effects.WriteView(1, view_of(B)))
    assert isinstance(outcome, Refused)


async def test_who_is_not_listed_gets_a_control_session_only(tmp_path: Path) -> None:
    one, _other, _key, _other_key = await two(tmp_path)
    stranger = Node(one.arbiter.directory, "c")
    await stranger.open(NodeId(2, 1))
    with pytest.raises(NotRegistered):
        async with stranger.arbiter.using():
            raise AssertionError


async def test_a_fence_waits_for_who_is_inside_and_lets_nobody_in(tmp_path: Path) -> None:
    one, other, _key, other_key = await two(tmp_path)
    one.arbiter.lock_limit_s = 10
    fenced = trio.Event()

    async def fence() -> None:
        await one.get(effects.Fence(1, (), (B,)))
        fenced.set()

    async with trio.open_nursery() as nursery:
        async with other.arbiter.using():
            nursery.start_soon(fence)
            with trio.move_on_after(0.05):
                await fenced.wait()
            assert not fenced.is_set()
        await fenced.wait()
    with pytest.raises(NotRegistered):
        async with other.arbiter.using():
            raise AssertionError
    assert isinstance(await other.arbiter.carry_out(effects.Survey(1)), Refused)
    assert other.lost == [(other_key, other_key + 1)]
    assert isinstance(await other.arbiter.carry_out(effects.Survey(1)), Unknown)
    assert len(other.lost) == 1, "once"
    async with one.arbiter.using():
        pass


async def test_a_process_that_keeps_the_lock(tmp_path: Path) -> None:
    one, _other, key, _other_key = await two(tmp_path)
    with (one.arbiter.directory / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert isinstance(await one.arbiter.carry_out(effects.Survey(1)), Unknown)
        assert one.lost == [(key, key + 1)]
        await one.arbiter.read_certificates([B])
        with pytest.raises(Unavailable):
            async with one.arbiter.using():
                raise AssertionError


async def test_paths_that_come_to_nothing_are_named(tmp_path: Path) -> None:
    one, _other, key, _other_key = await two(tmp_path)
    (one.arbiter.directory / "view").write_bytes(b"?")
    assert isinstance(await one.arbiter.carry_out(effects.OpenPaths(1, *A)), Unknown)
    assert one.lost == [(key, key + 1), (key + 2, key + 3)]


async def test_unregister_is_content_with_what_others_have_preempted(tmp_path: Path) -> None:
    one, other, key, other_key = await two(tmp_path)
    assert isinstance(await one.arbiter.carry_out(effects.Unregister(1, 0)), Unknown)
    one.arbiter.close()
    key = await one.open(A)
    assert await other.get(effects.Take(1, key)) == Lost(key - 2)
    assert await other.get(effects.Take(1, key - 2)) == Won()
    await one.get(effects.Unregister(1, 0))
    surveyed = await other.get(effects.Survey(1))
    assert [KEYS.owner(k) for k in surveyed.keys].count(A) == 1  # type: ignore[attr-defined]
    await other.get(effects.Unregister(1, other_key))
    await other.get(effects.Survey(1))


async def test_blocks_and_certificates(tmp_path: Path) -> None:
    one, other, _key, _other_key = await two(tmp_path)
    beat = Heartbeat(1, 1, 5, 2, 3)
    request = JoinRequest(3, KEYS.newcomer(9), 1, "c", bytes(16), bytes(16), b"c" * 32, (), b"of c")
    newcomer = Node(one.arbiter.directory, "c")
    await newcomer.get(effects.OpenNewcomer(1, request.key))
    await newcomer.get(effects.WriteJoin(1, request))
    await other.get(effects.WriteHeartbeat(1, beat))
    assert await one.get(effects.ReadBlocks(1)) == Blocks((beat,), (request,))
    await one.arbiter.read_certificates([A, B, NodeId(3, 1)])
    assert set(one.arbiter.certificates.values()) == {b"of a", b"of b", b"of c"}
    assert isinstance(await newcomer.arbiter.carry_out(effects.WriteHeartbeat(1, beat)), Unknown)


async def test_a_witness_and_a_fencer_may_be_two(tmp_path: Path) -> None:
    one, _other, _key, _other_key = await two(tmp_path)
    split = Split(one.arbiter, one.arbiter)
    for effect in (effects.Survey(1), effects.ReadBlocks(1)):
        assert isinstance(await split.carry_out(effect), Good)
    await split.read_certificates([B])
    assert b"of b" in split.certificates.values()


def test_a_directory_is_made_once(tmp_path: Path) -> None:
    make_directory(tmp_path, 4)
    with pytest.raises(FileExistsError):
        make_directory(tmp_path, 4)


def test_keys() -> None:
    key = KEYS.path(NodeId(3, 9), MAX_GENERATION)
    assert KEYS.owner(key) == NodeId(3, 9) and not KEYS.is_newcomer(key)
    newcomer = KEYS.newcomer((1 << 64) - 1)
    assert KEYS.owner(newcomer) is None and KEYS.is_newcomer(newcomer)
    with pytest.raises(MembershipError, match="mount again"):
        KEYS.path(NodeId(3, 9), MAX_GENERATION + 1)
