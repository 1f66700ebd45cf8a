"""Several nodes on one volume: what one does the others see, and nothing is lost between them."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from random import Random

import pytest
import trio

from csvfs.errors import NotFound, StaleInode
from csvfs.namespace.inode import SetAttributes
from lockmgr.modes import Mode
from tests.cluster_volumes import Node, NodeDied, cluster_volumes, in_virtual_time
from tests.simulated_volume import RDWR, ROOT, UNIT, create, mkdir, names


@in_virtual_time
async def test_what_one_node_makes_all_others_see() -> None:
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.write(handle, 0, b"x" * 5000)
        for node in (two, three):
            found = await node.volume.lookup(ROOT, b"f")
            node.volume.remember(found.ino, 1)
            assert found.size == 5000 * node.slot
            theirs = await node.volume.open(found.ino, RDWR, 0)
            assert bytes(await node.volume.read(theirs, 0, 5000)) == b"x" * 5000
            await node.volume.write(theirs, 5000 * node.slot, b"y" * 5000)
            await node.volume.release(theirs)
        content = bytes(await one.volume.read(handle, 0, 99999))
        assert content == b"x" * 5000 + b"y" * 10000
        await one.volume.release(handle)


@in_virtual_time
async def test_a_node_that_dies_leaves_what_it_had_synced() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.write(handle, 0, b"x" * UNIT)
        await one.volume.fsync(handle.ino, False)
        await cluster.kill(one)
        found = await two.volume.lookup(ROOT, b"f")
        theirs = await two.volume.open(found.ino, os.O_RDONLY, 0)
        assert bytes(await two.volume.read(theirs, 0, UNIT)) == b"x" * UNIT
        await two.volume.release(theirs)
        again = await cluster.join(one.slot)
        assert again.incarnation == 2
        assert b"f" in await names(again.volume)


@in_virtual_time
async def test_calls_of_a_node_that_dies_end() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        async with trio.open_nursery() as nursery:

            async def make_directories() -> None:
                for number in itertools.count():
                    await one.call(one.volume.mkdir, ROOT, b"%d" % number, 0o755, 0, 0)

            async def work() -> None:
                with pytest.raises(NodeDied):
                    await make_directories()

            nursery.start_soon(work)
            await trio.sleep(0.05)
            await cluster.kill(one)
        await mkdir(two.volume, b"after")
        assert b"after" in await names(two.volume)


@in_virtual_time
async def test_directories_of_one_are_listed_by_another_while_names_come_and_go() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        directory = await mkdir(one.volume, b"d")
        stay = [b"stay%d" % i for i in range(40)]
        for name in stay:
            await mkdir(one.volume, name, parent=directory.ino)
        rng = Random(1)
        done = False

        async def churn() -> None:
            there: list[bytes] = []
            number = 0
            while not done:
                if there and rng.random() < 0.5:
                    name = there.pop(rng.randrange(len(there)))
                    await one.volume.rmdir(directory.ino, name)
                else:
                    number += 1
                    there.append(b"come%d" % number)
                    await one.volume.mkdir(directory.ino, there[-1], 0o755, 0, 0)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(churn)
            for _ in range(5):
                found = await names(two.volume, directory.ino)
                assert [name for name in found if name.startswith(b"stay")].count(b"stay1") == 1
                assert set(stay) <= set(found) and len(found) == len(set(found))
            done = True


@in_virtual_time
async def test_what_another_node_removed_is_gone_here() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.release(handle)
        found = await two.volume.lookup(ROOT, b"f")
        two.volume.remember(found.ino, 1)
        await one.volume.unlink(ROOT, b"f")
        await one.volume.forget(handle.ino, 1)
        with pytest.raises(NotFound):
            await two.volume.lookup(ROOT, b"f")
        with pytest.raises(StaleInode):
            await two.volume.getattr(found.ino)


@pytest.mark.parametrize("end", ["close", "crash of the holder", "leave", "crash", "crash first"])
@in_virtual_time
async def test_a_file_that_is_open_on_another_node_outlives_its_name(end: str) -> None:
    """Whichever way the two nodes go, the file can be read until then, and nothing is left."""
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.write(handle, 0, b"x" * UNIT)
        await two.volume.unlink(ROOT, b"f")
        if end == "crash first":
            await two.volume.sync()
            await cluster.kill(two)
        elif end == "leave":
            await cluster.leave(two)
        await trio.sleep(1)
        await one.volume.write(handle, UNIT, b"y" * UNIT)
        assert bytes(await one.volume.read(handle, 0, 3 * UNIT)) == b"x" * UNIT + b"y" * UNIT
        assert (await one.volume.getattr(handle.ino)).nlink == 0
        if end == "crash of the holder":
            await one.volume.sync()
            await cluster.kill(one)
        elif end == "crash":
            await one.volume.sync()
            await two.volume.sync()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cluster.kill, one)
                nursery.start_soon(cluster.kill, two)
        else:
            await one.volume.release(handle)
            await one.volume.forget(handle.ino, 1)
        await trio.sleep(10)  # the commit that the reclaimer waits for
        freed = [node.volume.reclaimer.units_freed for node in cluster.nodes]
        assert sum(freed) == 2, freed
        assert three.volume.failure is None


@in_virtual_time
async def test_appends_of_all_nodes_follow_each_other() -> None:
    async with cluster_volumes(3) as cluster:
        handle = await create(cluster.nodes[0].volume, b"f", flags=RDWR | os.O_APPEND)
        flags = RDWR | os.O_APPEND
        theirs = [await node.volume.open(handle.ino, flags, 0) for node in cluster.nodes[1:]]
        handles = [handle, *theirs]

        async def append(at: int) -> None:
            for number in range(30):
                record = b"%d:%06d" % (at, number) * 100
                await cluster.nodes[at].volume.write(handles[at], 0, record)
                await trio.sleep(0.002)

        async with trio.open_nursery() as nursery:
            for at in range(3):
                nursery.start_soon(append, at)
        content = bytes(await cluster.nodes[1].volume.read(handles[1], 0, 10**7))
        assert len(content) == 3 * 30 * 800
        found = [content[start : start + 800] for start in range(0, len(content), 800)]
        for at in range(3):
            ours = [record for record in found if record.startswith(b"%d:" % at)]
            assert ours == [b"%d:%06d" % (at, number) * 100 for number in range(30)]
        for node, each in zip(cluster.nodes, handles, strict=True):
            await node.volume.release(each)


@in_virtual_time
async def test_renames_across_directories_from_two_hosts_end() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        a, b = await mkdir(one.volume, b"a"), await mkdir(one.volume, b"b")
        c = await mkdir(one.volume, b"c", parent=a.ino)
        await mkdir(one.volume, b"x", parent=c.ino)
        await mkdir(one.volume, b"y", parent=b.ino)
        moved = 0

        async def move(node: Node, source: int, target: int, name: bytes) -> None:
            nonlocal moved
            for _ in range(40):
                with suppress(NotFound):
                    await node.volume.rename(source, name, target, name)
                    moved += 1
                source, target = target, source
                await trio.sleep(0.001)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(move, one, c.ino, b.ino, b"x")
                nursery.start_soon(move, two, b.ino, c.ino, b"y")
                nursery.start_soon(move, two, c.ino, a.ino, b"x")
                nursery.start_soon(move, one, a.ino, b.ino, b"y")
        assert moved >= 40
        found = [await names(two.volume, each.ino) for each in (a, b, c)]
        assert sorted(name for each in found for name in each).count(b"x") == 1


@in_virtual_time
async def test_a_truncation_here_and_writes_there() -> None:
    """Each write is there as a whole or was cut off as a whole, and nothing old comes back."""
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        handle = await create(one.volume, b"f")
        theirs = await two.volume.open(handle.ino, RDWR, 0)

        async def cut() -> None:
            for number in range(20):
                await two.volume.setattr(handle.ino, SetAttributes(size=number % 3 * 700))
                await trio.sleep(0.004)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            for number in range(1, 60):
                at = number % 5 * UNIT // 2
                await one.volume.write(handle, at, bytes([number]) * 5000)
                content = bytes(await two.volume.read(theirs, 0, 10**7))
                assert content.count(bytes([number])) in (0, 700, 5000)
                assert (await two.volume.getattr(handle.ino)).size in range(5 * UNIT)
                await trio.sleep(0.001)
        await two.volume.setattr(handle.ino, SetAttributes(size=0))
        await one.volume.setattr(handle.ino, SetAttributes(size=5 * UNIT))
        assert not any(bytes(await two.volume.read(theirs, 0, 10**7)))
        await one.volume.release(handle)
        await two.volume.release(theirs)


@in_virtual_time
async def test_fsync_covers_what_was_written_under_a_lock_that_is_lost() -> None:
    async with cluster_volumes(3) as cluster:
        one, two, three = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.write(handle, 0, b"1" * UNIT)
        theirs = await two.volume.open(handle.ino, RDWR, 0)
        await two.volume.write(theirs, 2 * UNIT, b"2" * 512)
        assert not one.locks.node_holds(handle.state.resource, Mode.PR)
        await one.volume.fsync(handle.ino, False)
        await two.volume.fsync(handle.ino, True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.kill, one)
            nursery.start_soon(cluster.kill, two)
        again = await three.volume.open((await three.volume.lookup(ROOT, b"f")).ino, RDWR, 0)
        content = bytes(await three.volume.read(again, 0, 10**7))
        assert content == b"1" * UNIT + bytes(UNIT) + b"2" * 512
        await three.volume.release(again)


@in_virtual_time
async def test_one_of_two_names_goes_without_asking_who_has_the_file_open() -> None:
    async with cluster_volumes(2) as cluster:
        one, two = cluster.nodes
        handle = await create(one.volume, b"f")
        await one.volume.link(handle.ino, ROOT, b"g")
        started = trio.current_time()
        await two.volume.unlink(ROOT, b"f")
        assert trio.current_time() - started < 0.1
        assert (await one.volume.getattr(handle.ino)).nlink == 1
        await one.volume.release(handle)
        await one.volume.forget(handle.ino, 1)
