"""The lossless channel as a pure state machine: pairs of them over connections that break."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from lockmgr import channel as channels
from lockmgr.channel import (
    CONFIRM_MESSAGES,
    CONFIRM_S,
    Channel,
    Confirmed,
    Resume,
    Skipped,
    size_bytes,
)
from lockmgr.cluster.codec import WireError
from lockmgr.messages import GlimpseAnswer, Refused, Resource

R = Resource(b"r", b"")
CONTROL = (Resume, Confirmed, Skipped)


def message(serial: int, epoch: int = 1) -> Refused:
    return Refused(R, epoch, 0, serial)


@dataclass
class End:
    """A channel, what was put in, what came out, and what is on its way to the other end."""

    channel: Channel = field(default_factory=Channel)
    sent: list[Refused] = field(default_factory=list)
    got: list[Any] = field(default_factory=list)
    wire: deque[Any] = field(default_factory=deque)
    up: bool = False

    def say(self, messages: list[object]) -> None:
        assert self.up or not messages
        self.wire.extend(messages)

    def send(self, one: Refused) -> None:
        self.sent.append(one)
        if self.channel.send(one):
            self.wire.append(one)

    def take(self, one: Any, now: float) -> None:
        if isinstance(one, CONTROL):
            self.say(self.channel.control(one, now))
        else:
            self.say(self.channel.receive(one, now))
            self.got.append(one)


class Pair:
    """Two ends; either may see a connection later, and lose it earlier, than the other."""

    def __init__(self) -> None:
        self.ends = (End(), End())
        self.now = 0.0

    def connect(self) -> None:
        for end in self.ends:
            end.wire.clear()
        for end in self.ends:
            end.up = True
            end.say(end.channel.connect())

    def lose(self) -> None:
        for end in self.ends:
            end.up = False
            end.channel.lose()
            end.wire.clear()

    def carry(self, sender: End) -> None:
        """One message reaches the other end."""
        receiver = self.ends[1 - self.ends.index(sender)]
        receiver.take(sender.wire.popleft(), self.now)

    def settle(self) -> None:
        """Everything arrives that can; time passes."""
        while any(end.wire for end in self.ends) or any(
            end.channel.next_timer() is not None for end in self.ends
        ):
            for end in self.ends:
                while end.wire:
                    self.carry(end)
            for end in self.ends:
                due = end.channel.next_timer()
                if due is not None:
                    self.now = max(self.now, due)
                    end.say(end.channel.time_passed(self.now))
        self.check()

    def check(self) -> None:
        for end in self.ends:
            end.channel.check()


def connected() -> Pair:
    pair = Pair()
    pair.connect()
    pair.settle()
    return pair


def test_nothing_is_sent_beside_the_messages_until_many_have_come() -> None:
    pair = connected()
    one, two = pair.ends
    for serial in range(CONFIRM_MESSAGES - 1):
        one.send(message(serial))
        assert list(one.wire) == [message(serial)]
        pair.carry(one)
        assert not two.wire
    one.send(message(CONFIRM_MESSAGES))
    pair.carry(one)
    assert list(two.wire) == [Confirmed(CONFIRM_MESSAGES)]
    pair.carry(two)
    assert one.channel.kept == 0 and one.channel.kept_bytes == 0


def test_the_last_of_a_burst_are_confirmed_in_time() -> None:
    pair = connected()
    one, two = pair.ends
    one.send(message(1))
    pair.carry(one)
    assert two.channel.next_timer() == pair.now + CONFIRM_S
    assert two.channel.time_passed(pair.now + CONFIRM_S / 2) == []
    assert two.channel.time_passed(pair.now + CONFIRM_S) == [Confirmed(1)]
    assert two.channel.next_timer() is None


def test_sent_without_a_connection() -> None:
    pair = Pair()
    one, two = pair.ends
    for serial in range(5):
        one.send(message(serial))
    assert not one.wire
    pair.connect()
    assert list(one.wire) == [Resume(0)], "not before the peer has said what it has"
    pair.settle()
    assert two.got == one.sent and one.channel.kept == 0


@pytest.mark.parametrize("seed", range(40))
def test_random_losses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything arrives once and in order, but for what belongs to epochs that are over."""
    rng = random.Random(seed)
    window = rng.choice((1, 300, 2000, 1 << 20))
    monkeypatch.setattr(channels, "WINDOW_BYTES", window)
    monkeypatch.setattr(channels, "CONFIRM_MESSAGES", rng.choice((1, 3, 64)))
    pair = Pair()
    epoch, serial = 1, 0
    for _ in range(800):
        end = rng.choice(pair.ends)
        what = rng.random()
        if what < 0.4:
            serial += 1
            end.send(message(serial, epoch))
        elif what < 0.85:
            for _ in range(rng.randrange(4)):
                if end.wire:
                    pair.carry(end)
        elif what < 0.9:
            pair.now += rng.random()
            end.say(end.channel.time_passed(pair.now))
        elif what < 0.94:
            pair.lose()
        elif what < 0.98:
            pair.connect()
        else:
            epoch += 1
            for each in pair.ends:
                each.say(each.channel.epoch_over(epoch))
        pair.check()
    pair.connect()
    pair.settle()
    for sender, receiver in (pair.ends, pair.ends[::-1]):
        assert sender.channel.kept == 0
        assert sender.channel.sent == receiver.channel.received == len(sender.sent)
        last = [one for one in sender.sent if one.epoch == epoch]
        assert [one for one in receiver.got if one.epoch == epoch] == last
        remaining = iter(sender.sent)
        assert all(one in remaining for one in receiver.got), "in order, and nothing twice"


def test_an_epoch_that_is_over_is_not_sent_again() -> None:
    pair = connected()
    one, two = pair.ends
    for serial in range(1000):
        one.send(message(serial))
    for _ in range(10):
        pair.carry(one)
    pair.lose()
    assert one.channel.epoch_over(2) == []
    assert one.channel.kept_bytes == size_bytes(Skipped(1000))
    one.send(message(1000, 2))
    pair.connect()
    pair.carry(one)
    pair.carry(two)
    assert list(one.wire) == [Skipped(990), message(1000, 2)]
    pair.settle()
    assert two.channel.received == 1001 and two.got[10:] == [message(1000, 2)]


def test_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "WINDOW_BYTES", 100 * size_bytes(message(0)))
    pair = connected()
    one, two = pair.ends
    for serial in range(1000):
        one.send(message(serial))
    assert len(one.wire) == 100
    pair.settle()
    assert two.got == one.sent


def test_big_messages_are_confirmed_by_their_size() -> None:
    pair = connected()
    one, two = pair.ends
    big = GlimpseAnswer(R, 1, 0, 1, bytes(60_000))
    for _ in range(30):
        if one.channel.send(big):
            one.wire.append(big)
    for _ in range(30):
        pair.carry(one)
    assert two.wire[0] == Confirmed(18)


def test_a_peer_that_takes_nothing_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "LIMIT_BYTES", 100 * size_bytes(message(0)))
    pair = Pair()
    one = pair.ends[0]
    for serial in range(101):
        assert one.channel.broken is None
        one.send(message(serial))
    assert one.channel.broken == "it has not taken 101 messages, 0 MiB"
    one.send(message(101))
    pair.check()
    assert one.channel.connect() == [], "with a hole in it, it says nothing more"


def refused(end: Channel, one: Any) -> str:
    take = end.control if isinstance(one, CONTROL) else end.receive
    with pytest.raises(WireError) as caught:
        take(one, 0.0)
    end.check()
    return str(caught.value)


def test_what_no_peer_says() -> None:
    fresh = Channel()
    fresh.connect()
    for early in (message(1), Confirmed(0), Skipped(1)):
        assert refused(fresh, early) == f"{type(early).__name__} before the channel was resumed"
    for number in (-1, 1, 1 << 63):
        words = f"{number} messages received, of 0 sent, 0 before"
        assert refused(fresh, Resume(number)) == words
    pair = connected()
    one = pair.ends[0]
    for serial in range(3):
        one.send(message(serial))
    pair.settle()
    one.send(message(3))
    assert refused(one.channel, Resume(3)) == "the channel was resumed already"
    assert refused(one.channel, Confirmed(5)) == "5 messages confirmed, of 4, 3 before"
    assert refused(one.channel, Confirmed(2)) == "2 messages confirmed, of 4, 3 before"
    assert refused(one.channel, Skipped(0)) == "0 messages skipped"
    assert refused(one.channel, Skipped(-(1 << 63))) == f"{-(1 << 63)} messages skipped"
    pair.lose()
    pair.connect()
    one.wire.clear()
    assert refused(one.channel, Resume(2)) == "2 messages received, of 4 sent, 3 before"
    assert "before the channel was resumed" in refused(one.channel, message(1))


def test_garbage_never_crashes() -> None:
    rng = random.Random(3)
    end = Channel()
    for _ in range(20_000):
        number = rng.choice((-1, 0, 1, 2, end.sent, end.received, 1 << 48, rng.getrandbits(64)))
        one = rng.choice((Resume(number), Confirmed(number), Skipped(number), message(1)))
        try:
            if isinstance(one, CONTROL):
                end.control(one, 0.0)
            else:
                end.receive(one, 0.0)
        except WireError:
            end.connect()
        if rng.random() < 0.2:
            end.send(message(1))
        end.check()
