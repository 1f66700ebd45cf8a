"""Signals that come when a daemon does not serve: it ends, whatever it waits for."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from csvfs import daemon
from csvfs.daemon import Daemon
from csvfs.host.events import Reporter
from csvfs.host.problems import Kind, Problem
from csvfs.host.settings import MountSettings

SETTINGS = MountSettings("lun", "file:///lun", "/mnt", "host1", "iqn.2026-11.test:host1")


class Attached:
    """As far as a volume that is not served is asked."""

    def __init__(self, trouble: str) -> None:
        self.path = self
        self.trouble = trouble
        self.evicted = ""

    def status(self) -> Attached:
        return self

    def evict(self, words: str) -> None:
        self.evicted = words


Attach = Callable[..., AbstractAsyncContextManager[Any]]


def attaching(
    attached: Attached, before: Callable[[], Any] | None, after: Callable[[], Any] | None
) -> Attach:
    """What `csvfs.host.attach.attach` may have to wait for, outside of its stages."""

    @asynccontextmanager
    async def attach(*_: Any) -> AsyncIterator[Any]:
        if before is not None:
            await before()
        yield attached
        if after is not None:
            await after()

    return attach


async def ended(monkeypatch: pytest.MonkeyPatch, attach: Attach) -> Problem:
    """How the daemon ended."""
    monkeypatch.setattr(daemon, "attach", attach)
    with trio.fail_after(5), pytest.raises(Problem) as caught:
        await Daemon(SETTINGS, Reporter(-1), -1).run()
    return caught.value


async def send(times: int) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGTERM)
        for _ in range(10):
            await trio.lowlevel.checkpoint()


async def test_a_signal_while_journals_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume is not served afterwards, but left."""
    left = []

    async def leave() -> None:
        left.append(True)

    attach = attaching(Attached(""), lambda: send(1), leave)
    problem = await ended(monkeypatch, attach)
    assert problem.kind is Kind.INTERRUPTED and left


async def test_a_second_one_when_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def replay() -> None:
        await send(2)
        await trio.sleep_forever()

    problem = await ended(monkeypatch, attaching(Attached(""), replay, None))
    assert problem.kind is Kind.INTERRUPTED


@pytest.mark.parametrize(("trouble", "signals"), [("no path", 1), ("", 2)])
async def test_signals_that_insist_while_it_is_left(
    monkeypatch: pytest.MonkeyPatch, trouble: str, signals: int
) -> None:
    """A wait for the LUN is ended by the second one in all, any other wait by the third."""
    attached = Attached(trouble)

    async def leave() -> None:
        # The first one was sent before; what `Attached` is being left is known after the block.
        await trio.lowlevel.checkpoint()
        await send(signals)
        await trio.sleep_forever()

    problem = await ended(monkeypatch, attaching(attached, lambda: send(1), leave))
    assert problem.kind is Kind.INTERRUPTED
    assert "before the volume was left" in attached.evicted


async def test_no_signal_less(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = Attached("")

    async def leave() -> None:
        await send(1)

    problem = await ended(monkeypatch, attaching(attached, lambda: send(1), leave))
    assert problem.kind is Kind.INTERRUPTED
    assert not attached.evicted, "it was left in order"
