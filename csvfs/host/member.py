"""A member of a volume's cluster, put together from its parts, and the volume that it serves.

    async with open_member(lun, peeked, identity, credentials, ...) as member:
        await member.node.wait_serving()
        async with serving_volume(member, peeked.superblock) as volume:
            ...

Leaving the blocks leaves the cluster cleanly: volume closed, locks given up, journal empty, path
flushed, then the membership. Leaving them with an exception stops as a crash would: sessions
dropped, nothing released.

Concurrency: a nursery of its own runs arbiter, path, lock link and replays; it ends with the block.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import trio

from csvfs.format import Superblock
from csvfs.host.node import ClusterNode
from csvfs.membership.arbiter import LunArbiter
from csvfs.membership.claim import LeaveIncomplete
from csvfs.membership.native_pulse import ControlSession
from csvfs.membership.path_keys import PathKeys
from csvfs.membership.peek import Peeked
from csvfs.volume import Volume, VolumeOptions, open_volume
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.certificates import Credentials
from lockmgr.cluster.effects import StopReason
from lockmgr.cluster.peers import Address
from lockmgr.cluster.pulse import Pulse, PulseWiring, PythonPulse
from lockmgr.cluster.service import Cluster, open_cluster
from lockmgr.cluster.settings import Settings
from redirector.block.device import Lun
from redirector.data_path import DataPath

MakePulse = Callable[[ControlSession, Superblock, PulseWiring], Pulse]
MakeNode = Callable[[trio.Nursery, Superblock, Callable[[str], None]], ClusterNode]


@dataclass(frozen=True, slots=True)
class ClusterMember:
    """The parts of a host that takes part in a volume."""

    node: ClusterNode
    cluster: Cluster
    path: DataPath


@asynccontextmanager
async def open_member(
    lun: Lun,
    peeked: Peeked,
    identity: Identity,
    credentials: Credentials,
    initiator: str,
    *,
    listen: Address,
    told: Callable[[str], None],
    rng: Random,
    obituary: Path | None = None,
    make_node: MakeNode = ClusterNode,
    make_pulse: MakePulse | None = None,
    settings: Settings | None = None,
) -> AsyncIterator[ClusterMember]:
    """Ask to join; leave at the end of the block. Raises `LeaveIncomplete` if that was not clean.

    ``told`` is given words about what may take a while; ``obituary`` as in `open_cluster`;
    ``make_pulse``: what sends the heartbeats, else the event loop does.
    """
    async with trio.open_nursery() as nursery:
        node = make_node(nursery, peeked.superblock, told)
        arbiter = LunArbiter(
            lun,
            peeked.superblock,
            identity,
            initiator,
            on_lost=node.on_lost,
            on_opened=node.on_opened,
            rng=rng,
        )
        path = DataPath(
            peeked.identity,
            on_closed=arbiter.lose,
            on_stranger=arbiter.stranger,
            clock=boottime,
        )
        node.use(arbiter, path)
        try:
            await nursery.start(arbiter.run)
            nursery.start_soon(path.run)
            async with open_cluster(
                identity,
                PathKeys(),
                arbiter,
                listen,
                credentials,
                peeked.superblock.volume_id,
                on_effect=node.on_effect,
                on_network=node.link.take,
                obituary=obituary,
                settings=settings,
                make_pulse=partial(make_pulse, arbiter, peeked.superblock)
                if make_pulse is not None
                else PythonPulse,
                rng=rng,
            ) as cluster:
                node.begin(cluster)
                yield ClusterMember(node, cluster, path)
                await node.end_replays()
                await path.detach()
                arbiter.expect_end()
                stop = await cluster.leave()
                if stop.reason is not StopReason.LEFT:
                    raise LeaveIncomplete(stop.words)
                await arbiter.aclose()
        except BaseException:
            path.evict("the daemon ends")
            arbiter.abort()
            raise
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving_volume(
    member: ClusterMember, superblock: Superblock, options: VolumeOptions | None = None
) -> AsyncIterator[Volume]:
    """The volume, once this node is active and what was left undone in its slot is finished.

    Raises `VolumeFailed` when it cannot go on, also at the end of the block.
    """
    node = member.node
    locks, start = await node.wait_serving()
    own = member.cluster.me
    assert own is not None, "who serves is listed"
    async with (
        open_volume(
            member.path,
            superblock,
            own.slot,
            own.incarnation,
            start,
            locks,
            options=options,
            on_failed=node.fail,
        ) as volume,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(node.recover_for_ever, volume)
        yield volume
        if node.failure is not None:
            raise node.failure
        nursery.cancel_scope.cancel()
    # Also what failed meanwhile: whoever leaves in order says that its journal is empty.
    if node.failure is not None:
        raise node.failure
