"""A volume of a LUN, from its URL to a `Volume` that answers, and back to a LUN that is left.

    look at the LUN, lock file; then a member: newcomer, joining (the own journal in order), active
    lock manager, volume, and what was left undone in this slot finished
    ... the caller serves ...
    volume closed, locks given up, journal empty, path flushed; then the member leaves

Leaving the block leaves the volume cleanly. Leaving it with an exception, or after the volume has
failed, stops as a crash would: sessions dropped, nothing released. Another host replays then, or
the next mount.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from random import SystemRandom
from typing import Any

import trio

from csvfs.engine.locks import in_words
from csvfs.errors import VolumeFailed
from csvfs.format import View
from csvfs.host import mountpoint, places
from csvfs.host.daemon_lock import DaemonLock, daemon_lives
from csvfs.host.events import Reporter
from csvfs.host.last_will import leave_will
from csvfs.host.member import ClusterMember, open_member, serving_volume
from csvfs.host.node import ClusterNode, number_of
from csvfs.host.problems import Kind, Problem
from csvfs.host.record import MountState, records
from csvfs.host.settings import MountSettings
from csvfs.membership.native_pulse import NativePulse
from csvfs.membership.peek import Peeked, peek, shows_life
from csvfs.volume import Volume
from lockmgr.cluster.blocks import Identity
from lockmgr.cluster.boottime import wall_offset_ns
from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.effects import StopReason
from lockmgr.cluster.peers import Address, parse_address
from lockmgr.cluster.service import Cluster
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.status import NodeStatus
from lockmgr.cluster_snapshot import cluster_locks
from redirector.block.device import Lun
from redirector.block.url import open_lun

_log = logging.getLogger("csvfs.host.attach")

_LEAVING_POLL_S = 0.1
EVICTION_LIMIT_S = 30.0
"""How long `csvctl node evict` waits for the view that says so."""
_GATHER_LIMIT_S = 3.0
_NOBODY_LISTENS = Address("127.0.0.1", 0)


class Starting:
    """What a signal ends as long as the volume is not served: waits for the LUN and for hosts."""

    def __init__(self) -> None:
        self._scope: trio.CancelScope | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Whatever is waited for, now or later, is not waited for."""
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Raises `Problem` (INTERRUPTED) at the end of the block if it was cancelled."""
        with trio.CancelScope() as self._scope:
            if self._cancelled:
                self._scope.cancel()
            yield
        if self._scope.cancelled_caught:
            raise Problem(Kind.INTERRUPTED, "stopped by a signal before it was mounted")


class Attached:
    """A volume that this host takes part in and may serve."""

    def __init__(
        self,
        peeked: Peeked,
        member: ClusterMember,
        volume: Volume,
        initiator: str,
    ) -> None:
        self.cluster = member.cluster
        self.node = member.node
        self.path = member.path
        self.volume = volume
        self.volume_id = peeked.superblock.volume_id
        self.label = peeked.superblock.label
        self._initiator = initiator

    async def wait_failed(self) -> VolumeFailed:
        """Wait until the volume cannot go on."""
        return await self.node.wait_failed()

    def status(self) -> dict[str, Any]:
        """What `csvctl status` tells of the volume."""
        identity, path, cluster = self.path.identity, self.path.status(), self.cluster
        own, view, locks = cluster.me, self.node.view, self.node.locks
        assert own is not None
        assert view is not None
        assert locks is not None
        return {
            "path": "direct" if path.flows else f"waiting: {path.trouble}",
            "path_losses": path.losses,
            "unflushed_bytes": path.retained_bytes,
            "slot": own.slot,
            "incarnation": own.incarnation,
            "epoch": view.epoch,
            "lock_epoch": view.lock_epoch,
            "coordinator": _coordinator_of(cluster) or "none",
            "members": [view.slots[node.slot].node_name for node in view.active],
            "lease_left_s": round(max(cluster.lease.left_s, 0.0), 1),
            "lease_least_left_s": round(
                max(min(cluster.lease.least_left_s, cluster.lease.left_s), 0.0), 1
            ),
            "leases_lost": cluster.lease.lost,
            "locks_cached": locks.statistics().idle,
            "lock_messages_sent": self.node.link.sent,
            "key": f"{path.key:#018x}",
            "initiator": self._initiator,
            "cluster_address": ", ".join(view.slots[own.slot].addresses) or "none",
            "lun_vendor": f"{identity.vendor} {identity.product}".strip(),
            "lun_serial": identity.serial,
            "lun_bytes": identity.size_bytes,
        }

    def nodes(self) -> dict[str, Any]:
        """What `csvctl node list` tells."""
        found = self.cluster.status()
        return {
            "epoch": found.epoch,
            "coordinator": _coordinator_of(self.cluster),
            "nodes": [_node_words(each) for each in found.nodes],
        }

    async def locks(self, *, cached: bool) -> dict[str, Any]:
        """What `csvctl lock list` tells: of the whole cluster, as far as its nodes answer."""
        locks, view = self.node.locks, self.node.view
        assert locks is not None
        assert view is not None
        names = {number_of(node): view.slots[node.slot].node_name for node in view.listed}
        told = await locks.gather(_GATHER_LIMIT_S, cached)
        found = cluster_locks(told, in_words, lambda number: names.get(number, f"{number:#x}"))
        return found.as_json()

    async def evict(self, name: str, why: str) -> dict[str, Any]:
        """Have the node of that name evicted; returns when the view says so. Raises `Problem`."""
        node = self.cluster.status().node_named(name)
        if node is None:
            raise Problem(Kind.USAGE, f"the volume has no node {name!r}: see `csvctl node list`")
        own, view = self.cluster.me, self.node.view
        if node == own and (view is None or set(view.active) <= {own}):
            raise Problem(
                Kind.USAGE,
                f"{name} is the only host that has the volume: nobody is there to evict it. "
                "`csvctl umount DIR` takes it away",
            )
        _log.warning("eviction of %s (%s) was asked for: %s", name, node, why)
        self.cluster.evict(node, why)
        with trio.move_on_after(EVICTION_LIMIT_S):
            while (view := self.node.view) is None or view.lists(*node):
                if self.node.failure is not None:
                    stop = self.cluster.stopped
                    if node == own and stop is not None and stop.reason is StopReason.EVICTED:
                        # Who is evicted does not learn in which view.
                        return {"slot": node.slot, "epoch": None}
                    raise self.node.failure
                await self.node.wait_view()
            return {"slot": node.slot, "epoch": view.epoch}
        raise Problem(
            Kind.NO_ANSWER,
            f"{name} is not evicted after {EVICTION_LIMIT_S:.0f} s: the coordinator, or a majority"
            " that could replace it, cannot be reached. `csvctl node list` shows who is seen",
        )


def _coordinator_of(cluster: Cluster) -> str:
    return next((each.name for each in cluster.status().nodes if each.is_coordinator), "")


def _node_words(each: NodeStatus) -> dict[str, Any]:
    connection = each.connection
    trip_s = connection.rtt_s if connection is not None else None
    ages = [age for age in (each.heard_s, each.block_changed_s) if age is not None]
    direct = {True: "direct", False: "none", None: "unknown"}[each.has_path]
    return {
        "slot": each.node.slot,
        "incarnation": each.node.incarnation,
        "node": each.name,
        "state": each.state,
        "is_this_host": each.is_this_node,
        "is_coordinator": each.is_coordinator,
        "path": direct,
        "last_seen_s": round(min(ages), 2) if ages else None,
        "connected": each.is_this_node or bool(connection and connection.number),
        "round_trip_ms": None if trip_s is None else round(trip_s * 1000, 3),
        "hears": list(each.hears),
        "addresses": list(each.addresses),
    }


@asynccontextmanager
async def attach(
    settings: MountSettings,
    reporter: Reporter,
    starting: Starting,
    will_fd: int,
) -> AsyncIterator[Attached]:
    """Become a member, have the volume ready, and leave at the end; see the module's text.

    Cancelling ``starting`` ends the wait for the LUN or for other hosts. Raises what stands in
    the way: errors of LUN, membership and replay, or `Problem`.
    """
    lun = open_lun(settings.url, settings.credentials)
    with DaemonLock() as lock:
        with starting.stage():
            peeked = await _look(lun, settings, reporter, lock)
            await _refuse_unreachable(lun, peeked.view, settings, reporter)
        if peeked.superblock_trouble:
            reporter.warning(
                f"the superblock is damaged ({peeked.superblock_trouble}); its backup was used. "
                "Run `csvctl check --repair` when the volume is not mounted"
            )
            _log.warning("superblock: %s; the backup is used", peeked.superblock_trouble)
        async with _member(lun, peeked, settings, reporter, will_fd) as member:
            reporter.step("waiting for the other hosts of the volume")
            with starting.stage():
                await _wait_serving(member, settings)
            async with serving_volume(member, peeked.superblock) as volume:
                yield Attached(peeked, member, volume, settings.initiator)


async def _wait_serving(member: ClusterMember, settings: MountSettings) -> None:
    """Raises `Problem` if this host is not let in, `VolumeFailed` if it cannot go on."""
    try:
        await member.node.wait_serving()
    except VolumeFailed as failure:
        stop = member.cluster.stopped
        if stop is None:
            raise
        if stop.reason is StopReason.REFUSED:
            raise Problem(Kind.OTHER_HOST, stop.words) from failure
        if stop.reason is StopReason.EVICTED and settings.cluster_address:
            raise Problem(
                Kind.NOT_HEARD,
                "the other hosts let this one in, and put it out again because they and it did not "
                f"hear each other; it was to be reached at {settings.cluster_address}",
            ) from failure
        raise


async def _refuse_unreachable(
    lun: Lun, view: View, settings: MountSettings, reporter: Reporter
) -> None:
    """Who could not be heard by those who have the volume would be let in and evicted again."""
    own = (places.machine_id(), settings.node)
    unreachable = {}
    for node in view.listed:
        entry = view.slots[node.slot]
        if (entry.machine_id, entry.node_name) == own:
            continue
        if not settings.cluster_address:
            raise Problem(
                Kind.OTHER_HOST,
                f"{entry.node_name} ({', '.join(entry.addresses)}) has the volume. To share it, "
                "mount with --cluster-address ADDR: this host's address for its peers. (If "
                f"{entry.node_name} is dead, that lets this host take over from it as well)",
            )
        here = _is_loopback(settings.cluster_address)
        if here and not any(map(_is_loopback, entry.addresses)):
            raise Problem(
                Kind.USAGE,
                f"--cluster-address: nobody but this host itself reaches {settings.cluster_address}"
                f"; {entry.node_name} is at {', '.join(entry.addresses)}",
            )
        if not here and all(map(_is_loopback, entry.addresses)):
            unreachable[node.slot] = entry.node_name
    if not unreachable:
        return
    names = ", ".join(unreachable.values())
    reporter.step(f"looking whether {names} is alive")
    # Whom nobody can reach may be dead: then nothing is in the way of taking over from it.
    if await shows_life(lun, settings.initiator, frozenset(unreachable)):
        raise Problem(
            Kind.OTHER_HOST,
            f"{names} has the volume, and was mounted without --cluster-address: "
            "nobody can share it with that host. Unmount it there, and mount it again with it",
        )


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(parse_address(text).host).is_loopback


def _member(
    lun: Lun, peeked: Peeked, settings: MountSettings, reporter: Reporter, will_fd: int
) -> AbstractAsyncContextManager[ClusterMember]:
    """A member of the cluster, which leaves at the end of the block."""
    credentials = make_credentials()
    obituary = places.obituary_path(peeked.superblock.volume_id)
    leave_will(will_fd, obituary, credentials.certificate, credentials.key_pem)
    address = settings.cluster_address
    identity = Identity(
        settings.node,
        places.machine_id(),
        places.boot_id(),
        credentials.fingerprint,
        (address,) if address else (),
        credentials.certificate,
        wall_offset_ns(),
    )
    return open_member(
        lun,
        peeked,
        identity,
        credentials,
        settings.initiator,
        listen=parse_address(address) if address else _NOBODY_LISTENS,
        told=reporter.step,
        rng=SystemRandom(),
        obituary=obituary,
        make_node=partial(ClusterNode, evict_after_s=settings.evict_after_s),
        make_pulse=NativePulse,
        settings=Settings(evict_after_s=settings.evict_after_s),
    )


async def _look(lun: Lun, settings: MountSettings, reporter: Reporter, lock: DaemonLock) -> Peeked:
    """What is on the LUN, once no other daemon of this host has it."""
    while True:
        reporter.step(f"connecting to {settings.url}")
        peeked = await peek(lun, settings.initiator)
        volume_id = peeked.superblock.volume_id
        if lock.take(volume_id):
            return peeked
        await _wait_while_leaving(volume_id, reporter)


async def _wait_while_leaving(volume_id: bytes, reporter: Reporter) -> None:
    """Return when the daemon that holds the lock has left. Raises `Problem` if it stays."""
    while daemon_lives(volume_id):
        record = next((r for r in records() if r.volume_id == volume_id.hex()), None)
        if record is None:
            raise Problem(Kind.MOUNTED_TWICE, "another daemon of this host has the volume")
        # umount(8) returns before the daemon has noticed: then the directory tells.
        gone = record.state is MountState.LEAVING or mountpoint.find(record.directory) is None
        if not gone:
            raise Problem(
                Kind.MOUNTED_TWICE,
                f"{record.label} is mounted on this host already, at {record.directory} "
                f"(pid {record.pid})",
            )
        reporter.step(f"waiting: the daemon of {record.directory} is leaving the volume")
        await trio.sleep(_LEAVING_POLL_S)
