"""Many glimpses in one message, and nothing lost, doubled or overtaken."""

from __future__ import annotations

import pytest

from lockmgr.events import Effect, Emptied, Send
from lockmgr.glimpses import BYTES_PER_MESSAGE, PER_MESSAGE, bundle, unbundle
from lockmgr.messages import AskGlimpse, GlimpseAnswer, Glimpses, Probe, Refused, Resource
from lockmgr.modes import Mode
from tests.unit.lockmgr_changing import ChangingCluster
from tests.unit.lockmgr_cluster import Cluster

ME, PEER, OTHER = 1, 2, 3


def resource(number: int) -> Resource:
    return Resource(b"r%d" % number, b"p")


def ask(number: int, to: int = PEER) -> Send:
    return Send(to, AskGlimpse(resource(number), 7, ME, number))


def probe(number: int, to: int = PEER) -> Send:
    return Send(to, Probe(resource(number), 7, to, OTHER, number))


def answer(number: int, said: bytes | None, to: int = PEER) -> Send:
    return Send(to, GlimpseAnswer(resource(number), 7, to, number, said))


def opened(effects: list[Effect]) -> list[Effect]:
    """As the addressees understand it."""
    out: list[Effect] = []
    for effect in effects:
        if isinstance(effect, Send) and isinstance(effect.message, Glimpses):
            out += [Send(effect.to, each) for each in unbundle(effect.message, effect.to)]
        else:
            out.append(effect)
    return out


def test_what_is_alone_leaves_alone() -> None:
    effects: list[Effect] = [ask(1), Emptied(), ask(2, OTHER)]
    assert bundle(effects, ME) == effects


def test_what_is_for_one_node_leaves_together() -> None:
    effects: list[Effect] = [ask(1), ask(2, OTHER), probe(3), answer(4, b"x"), answer(5, None)]
    sent = bundle(effects, ME)
    assert [effect.to for effect in sent if isinstance(effect, Send)] == [PEER, OTHER]
    assert opened(sent) == [ask(1), probe(3), answer(4, b"x"), answer(5, None), ask(2, OTHER)]


def test_nothing_overtakes_what_is_said_in_between() -> None:
    between = Send(PEER, Refused(resource(9), 7, PEER, 1))
    effects: list[Effect] = [ask(1), ask(2), between, ask(3), ask(4)]
    sent = bundle(effects, ME)
    assert len(sent) == 3 and opened(sent) == effects


@pytest.mark.parametrize("said_bytes", [0, 100, BYTES_PER_MESSAGE])
def test_limits(said_bytes: int) -> None:
    effects: list[Effect] = [answer(n, bytes(said_bytes)) for n in range(3 * PER_MESSAGE)]
    sent = bundle(effects, ME)
    assert opened(sent) == effects
    if said_bytes < 200:
        assert len(sent) == 3
    else:
        assert sent == effects


def test_one_message_to_each_master_and_holder() -> None:
    cluster = Cluster(3)
    asked = [Resource(b"%d%d" % (master, n), bytes([master])) for master in (1, 2) for n in (1, 2)]
    for each in asked[1:]:
        cluster.cache(1, each, Mode.EX)
    tickets = cluster.glimpse_all(0, asked)
    assert {pair: len(sent) for pair, sent in cluster.channels.items() if sent} == {
        (0, 1): 1,
        (0, 2): 1,
    }
    cluster.deliver(0, 2)
    (probes,) = cluster.channels[2, 1]
    assert isinstance(probes, Glimpses) and [each for each, _, _ in probes.probes] == asked[2:]
    cluster.settle()
    said = [cluster.glimpsed[ticket] for ticket in tickets]
    assert said == [None, b"answer", b"answer", b"answer"]


def test_glimpses_are_asked_again_after_a_change_of_the_view() -> None:
    cluster = ChangingCluster(3)
    asked = [Resource(b"%d" % n, b"\2") for n in range(4)]
    for each in asked:
        cluster.cache(1, each, Mode.EX)
    tickets = cluster.glimpse_all(0, asked)
    cluster.kill(2)  # the master
    cluster.change_view()
    cluster.recover()
    assert [cluster.glimpsed[ticket] for ticket in tickets] == [b"answer"] * 4
