"""What rides on a cluster's connections; the lease; the file for the supervisor; certificates."""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio

from lockmgr.cluster import effects, events
from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.boottime import boottime
from lockmgr.cluster.certificates import make_credentials
from lockmgr.cluster.codec import WireError
from lockmgr.cluster.effects import Stop, StopReason
from lockmgr.cluster.errors import ClusterStopped
from lockmgr.cluster.lease_watch import LeaseWatch
from lockmgr.cluster.lock_link import LockLink
from lockmgr.cluster.messages import Announce, Ready
from lockmgr.cluster.network_events import Arrived, Connected, Lost, NetworkEvent
from lockmgr.cluster.obituary import (
    BadObituary,
    read_obituary,
    remove_obituary,
    report_death_from,
    write_obituary,
)
from lockmgr.cluster.peer_book import NEWCOMER_QUIET_S, Acquaintance, PeerBook
from lockmgr.cluster.peers import Address, Peer
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, SlotState, View, ViewSlot
from lockmgr.errors import ProtocolViolation
from lockmgr.events import ViewChanged
from lockmgr.manager import LockManager
from lockmgr.mastering import node_number
from lockmgr.messages import Request, Resource
from lockmgr.modes import Mode
from tests.unit.cluster_services import ID, QUICK, Host, open_world, until

QUESTION = Request(Resource(b"x", b"x"), 1, 0, 1, Mode.EX, True)


# -- messages of the layers above ----------------------------------------------------------------
class Rider:
    """Takes everything, and remembers it."""

    def __init__(self, host: Host) -> None:
        self.events: list[NetworkEvent] = []
        self.says: Exception | None = None
        host.on_network = self.take

    def take(self, event: NetworkEvent) -> bool:
        self.events.append(event)
        if isinstance(event, Arrived) and self.says is not None:
            error, self.says = self.says, None
            raise error
        return True

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.mark.parametrize("error", [ProtocolViolation("nonsense"), WireError("nonsense")])
async def test_messages_that_are_not_of_the_membership(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(tmp_path) as world:
        one = await world.begin("a")
        await one.cluster.wait_active()
        rider = Rider(one)
        two = await world.begin("b")
        await two.cluster.wait_active()
        await until(lambda: rider.of(Connected))
        await until(lambda: two.cluster.send(one.node, QUESTION))
        await until(lambda: rider.of(Arrived))
        assert rider.of(Arrived)[0].message == QUESTION
        rider.says, lost = error, len(rider.of(Lost))
        await until(lambda: two.cluster.send(one.node, QUESTION) and rider.says is None)
        await until(lambda: len(rider.of(Lost)) > lost)
        await until(lambda: len(rider.of(Connected)) > len(rider.of(Lost)))
        assert "nonsense" in caplog.text
        await until(lambda: one.sees_active(one, two) and two.sees_active(one, two))


async def test_who_sends_what_nobody_takes_loses_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.start("a", "b")

        def is_answered(message: object, words: str) -> bool:
            one.cluster.send(two.node, message)  # again: it may be lost with a connection
            return words in caplog.text

        await until(lambda: is_answered(QUESTION, "Request is not wanted here"))
        view = replace(two.view, epoch=two.view.epoch + 1, lock_epoch=99)
        await until(lambda: is_answered(Announce(view), "announces a view that cannot be"))
        await until(lambda: one.cluster.send(two.node, Ready()))
        assert one.stopped is None and two.stopped is None


async def test_an_exception_from_above_ends_the_cluster(tmp_path: Path) -> None:
    def burst(_effect: object) -> None:
        raise RuntimeError("no")

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no"), flatten_subgroups=True):
        async with open_world(tmp_path) as world:
            host = Host(world, "a", "a")
            host.on_effect = burst
            await world.nursery.start(host.run)
            await trio.sleep_forever()


# -- locks ---------------------------------------------------------------------------------------
class Locking:
    """A host with a lock manager, put together as a daemon does it."""

    def __init__(self, host: Host, nursery: trio.Nursery) -> None:
        self.host = host
        self.nursery = nursery
        self.link = LockLink(lambda node, words: host.cluster.evict(node, words))
        self.manager: LockManager | None = None
        host.on_effect = self.told
        host.on_network = self.link.take

    def begin(self) -> None:
        self.link.use(self.host.cluster)
        self.nursery.start_soon(self.link.run)

    def told(self, effect: effects.UpwardEffect) -> None:
        match effect:
            case effects.ViewInstalled():
                self.follow(effect)
            case effects.DepartedMayBeGranted(node) if self.manager is not None:
                self.manager.cleared([node_number(*node)])

    def follow(self, effect: effects.ViewInstalled) -> None:
        view, me = effect.view, self.host.node
        if self.manager is None:
            self.manager = LockManager(
                self.nursery,
                node=node_number(*me),
                epoch=0,
                members=(),
                send=self.link.send,
                on_thawed=self.host.cluster.locks_thawed,
            )
            self.link.attach(self.manager)
        self.link.view_changed((node for node in view.listed if node != me), view.lock_epoch)
        if me not in view.active:
            return
        self.manager.replayed(node_number(*node) for node in effect.replayed)
        active = tuple(sorted(node_number(*node) for node in view.active))
        coordinator = node_number(*effect.coordinator)
        self.manager.view_changed(
            ViewChanged(
                view.lock_epoch,
                active,
                coordinator if coordinator in active else active[0],
                frozenset(node_number(*node) for node in view.to_replay),
            )
        )


async def test_a_lock_of_a_dead_node_is_granted_after_its_lease(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world, trio.open_nursery() as nursery:
        hosts = [Host(world, name, name) for name in ("a", "b", "c")]
        lockings = [Locking(host, nursery) for host in hosts]
        for host, locking in zip(hosts, lockings, strict=True):
            await nursery.start(host.run)
            locking.begin()
        await until(lambda: all(host.sees_active(*hosts) for host in hosts))
        resource = Resource(b"disk", b"place")
        managers = [locking.manager for locking in lockings]
        assert all(managers)
        await until(lambda: all(host.of(effects.PathsReady) for host in hosts))
        held = await managers[1].acquire(resource, Mode.EX)  # type: ignore[union-attr]
        died = boottime()
        hosts[1].kill()
        async with managers[2].acquire(resource, Mode.EX):  # type: ignore[union-attr]
            assert boottime() - died > QUICK.evict_after_s / 2
        assert held.mode is Mode.EX
        nursery.cancel_scope.cancel()


# -- the lease -----------------------------------------------------------------------------------
async def test_a_lease_wakes_up_with_its_renewal(autojump_clock: object) -> None:
    del autojump_clock
    lease = LeaseWatch()
    woken = []

    async def wait() -> None:
        await lease.wait_valid()
        woken.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        lease.renewed(boottime() - 1)
        await trio.testing.wait_all_tasks_blocked()
        assert not woken and not lease.valid()
        lease.renewed(boottime() + 10)
        await trio.testing.wait_all_tasks_blocked()
        assert woken and lease.valid() and 9 < lease.left_s <= 10
        lease.renewed(boottime() + 5)
        assert lease.left_s > 9, "it never goes back"


async def test_a_lease_that_will_never_run_again() -> None:
    lease = LeaseWatch()
    lease.renewed(boottime() + 10)
    lease.stopped(Stop(StopReason.EVICTED, "the others have evicted this one"))
    assert not lease.valid()
    with pytest.raises(ClusterStopped, match="have evicted") as caught:
        await lease.wait_valid()
    assert caught.value.stop.reason is StopReason.EVICTED


async def test_who_waits_is_told_when_a_daemon_ends_without_leaving(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        (host,) = await world.start("a")
        host.kill()
        await until(lambda: host.stopped)
        with pytest.raises(ClusterStopped, match="without having left"):
            await host.cluster.wait_active()
        with pytest.raises(ClusterStopped, match="without having left"):
            await host.cluster.lease.wait_valid()
        assert host.obituary.exists(), "its supervisor still has something to tell"


async def test_who_slept_takes_in_what_has_come_before_it_ticks(tmp_path: Path) -> None:
    """All hosts of this test are of one process: they sleep together, and judge nobody."""
    async with open_world(tmp_path) as world:
        hosts = await world.start("a", "b", "c")
        epoch = hosts[0].view.epoch
        stepped: list[type] = []
        step = hosts[0].cluster._member.step

        def remember(event: events.Event, now: float) -> list[effects.Effect]:
            stepped.append(type(event))
            return step(event, now)

        hosts[0].cluster._member.step = remember  # type: ignore[method-assign]
        await until(lambda: stepped and stepped[-1] is events.Tick)
        stepped.clear()
        time.sleep(QUICK.evict_after_s + QUICK.judge_gap_s)  # noqa: ASYNC251 - the loop is held up
        await until(lambda: events.Tick in stepped)
        late = hosts[0].cluster.status().pulse.late_most_s
        assert late > QUICK.evict_after_s / 2, "and it shows how late its heartbeats were"
        await until(lambda: all(host.cluster.lease.valid() for host in hosts))
        assert {host.view.epoch for host in hosts} == {epoch}


# -- the obituary --------------------------------------------------------------------------------
def known_to(*peers: Peer) -> Acquaintance:
    return Acquaintance(NodeId(1, 4), 7, peers, bytes(32))


def test_an_obituary_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "obituary"
    ours, theirs = make_credentials(), make_credentials()
    peer = Peer(NodeId(0, 3), theirs.certificate, (Address("192.0.2.1", 5), Address("::1", 6)))
    newcomer = Peer(NodeId(NEWCOMER_SLOT, 99), make_credentials().certificate)
    write_obituary(path, ID, ours, known_to())
    write_obituary(path, ID, ours, known_to(peer, newcomer))
    found = read_obituary(path)
    assert (found.cluster_id, found.node, found.fingerprint) == (ID, (1, 4), ours.fingerprint)
    assert found.peers == (peer,)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["obituary"]
    assert b"PRIVATE" not in path.read_bytes()
    remove_obituary(path)
    remove_obituary(path)
    assert not path.exists()


async def test_an_obituary_of_another_life_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "obituary"
    write_obituary(path, ID, make_credentials(), known_to())
    with pytest.raises(BadObituary, match="another incarnation"):
        await report_death_from(path, make_credentials())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 2}', "format 2, not 1"),
        ('{"format": 1, "cluster_id": "00", "node": [1, 2], "fingerprint": "", "peers": []}', "id"),
    ],
)
def test_a_damaged_obituary(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "obituary"
    path.write_text(text)
    with pytest.raises(BadObituary, match=words):
        read_obituary(path)


def test_obituaries_that_cannot_be_written_or_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nowhere" / "obituary"
    write_obituary(path, ID, make_credentials(), known_to())
    assert "cannot be written" in caplog.text
    with pytest.raises(BadObituary, match="cannot be read"):
        read_obituary(path)


async def test_the_file_follows_the_peers(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.start("a", "b")
        await until(lambda: [p.node for p in read_obituary(one.obituary).peers] == [two.node])
        said = json.loads(one.obituary.read_text())
        assert said["node"] == list(one.node)
        await two.cluster.leave()
        await until(lambda: read_obituary(one.obituary).peers == ())


# -- whom a node talks to ------------------------------------------------------------------------
CREDENTIALS = [make_credentials() for _ in range(3)]


def view_of(epoch: int, *slots: int) -> View:
    view = View.empty(4, epoch)
    for number in slots:
        entry = ViewSlot(
            epoch,
            SlotState.ACTIVE,
            fingerprint=CREDENTIALS[number].fingerprint,
            node_name=f"n{number}",
            addresses=(f"192.0.2.{number + 1}",),
        )
        view = view.with_slot(number, entry)
    return view


def certificates(*slots: int) -> dict[bytes, bytes]:
    return {CREDENTIALS[n].fingerprint: CREDENTIALS[n].certificate for n in slots}


def names(known: Acquaintance | None) -> set[NodeId]:
    assert known is not None
    return {peer.node for peer in known.peers}


def test_a_newcomer_knows_the_listed_and_dials_nobody() -> None:
    book = PeerBook(CREDENTIALS[2].certificate)
    assert book.acquaintance(coordinator=False) is None
    book.asks_as(77)
    book.saw(view_of(1, 0, 1))
    book.learn(certificates(0))
    known = book.acquaintance(coordinator=False)
    assert known is not None and known.own == NodeId(NEWCOMER_SLOT, 77)
    assert names(known) == {NodeId(0, 1)}
    assert all(not peer.addresses for peer in known.peers)
    assert book.missing == (NodeId(1, 1),)
    book.learn(certificates(1))
    assert book.take_changes()
    assert names(book.acquaintance(coordinator=False)) == {NodeId(0, 1), NodeId(1, 1)}
    assert not book.missing
    assert [p.addresses for p in book.to_knock_at([NodeId(1, 1), NodeId(3, 9)])] == [
        (Address("192.0.2.2", 21065),)
    ]
    book.check()


def test_who_is_being_evicted_stays_until_that_is_announced() -> None:
    book = PeerBook(CREDENTIALS[2].certificate)
    book.learn(certificates(0, 1))
    book.is_listed_as(NodeId(2, 1))
    book.goes_by(view_of(1, 0, 1, 2))
    after = view_of(1, 0, 2)
    after = replace(after, epoch=2)
    book.saw(after)
    assert names(book.acquaintance(coordinator=True)) == {NodeId(0, 1), NodeId(1, 1)}
    book.goes_by(after)
    assert names(book.acquaintance(coordinator=True)) == {NodeId(0, 1)}
    book.forget_unused()
    book.saw(replace(view_of(1, 0, 1, 2), epoch=3))
    assert names(book.acquaintance(coordinator=True)) == {NodeId(0, 1)}
    assert book.missing == (NodeId(1, 1),), "its certificate was forgotten"
    book.check()


def test_a_bad_certificate_is_logged_once_and_not_looked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = PeerBook(CREDENTIALS[2].certificate)
    junk = random.Random(1).randbytes(300)
    fingerprint = sha256(junk).digest()
    view = view_of(1, 0, 2)
    book.is_listed_as(NodeId(2, 1))
    book.goes_by(view.with_slot(0, replace(view.slots[0], fingerprint=fingerprint)))
    book.acquaintance(coordinator=False)
    assert book.missing == (NodeId(0, 1),)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            book.learn({fingerprint: junk, bytes(32): CREDENTIALS[0].certificate})
    assert caplog.text.count("is not used") == 1
    assert names(book.acquaintance(coordinator=False)) == set()
    assert not book.missing
    book.check()


def test_a_coordinator_knows_newcomers_whose_requests_change() -> None:
    book = PeerBook(CREDENTIALS[2].certificate)
    book.is_listed_as(NodeId(2, 1))
    book.goes_by(view_of(1, 2))
    asks = JoinRequest(
        *(0, 77, 1, "n0", bytes(16), bytes(16)),
        CREDENTIALS[0].fingerprint,
        ("192.0.2.1",),
        CREDENTIALS[0].certificate,
    )
    book.take_changes()
    book.saw_joins([asks], 100.0)
    assert names(book.acquaintance(coordinator=True)) == set(), "it may be old"
    book.saw_joins([replace(asks, sequence=2)], 100.5)
    assert book.take_changes()
    assert names(book.acquaintance(coordinator=True)) == {NodeId(NEWCOMER_SLOT, 77)}
    assert names(book.acquaintance(coordinator=False)) == set()
    book.saw_joins([replace(asks, sequence=3)], 101.0)
    assert not book.take_changes(), "still the same"
    book.saw_joins([replace(asks, sequence=3)], 101.1 + NEWCOMER_QUIET_S)
    assert book.take_changes()
    assert names(book.acquaintance(coordinator=True)) == set()
    book.check()
