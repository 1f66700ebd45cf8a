"""The end of a FUSE mount whose requests wait for what may never come."""

from __future__ import annotations

import os
from pathlib import Path

import pyfuse3
import pytest
import trio

from csvfs.host import mountpoint, serving
from csvfs.host.serving import Serving
from csvfs.operations import Operations


class Connection:
    """Of a kernel that does what it is told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Session:
    """pyfuse3's, with one request that waits until the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.connection = Connection(os.stat(directory).st_dev)
        self.answered = trio.Event()
        self.closed = False
        monkeypatch.setattr(serving, "serve", self._serve)
        monkeypatch.setattr(serving, "prepare", lambda _directory: self.connection)
        monkeypatch.setattr(serving, "mount_options", lambda *_: set())
        monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
        monkeypatch.setattr(pyfuse3, "close", self._close)

    async def _serve(self) -> None:
        await self.answered.wait()

    def _close(self, unmount: bool) -> None:
        assert unmount
        self.closed = True


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    return Session(monkeypatch, tmp_path)


def served(directory: Path) -> Serving:
    return Serving(Operations.__new__(Operations), str(directory), "test", set())


async def test_after_a_failure_nobody_waits_for_requests(session: Session, tmp_path: Path) -> None:
    mount, ready = served(tmp_path), trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.run, ready.set)
            await ready.wait()
            mount.fail("evicted")
    assert mount.failure == "evicted"
    assert session.connection.aborted and session.closed
    assert not session.answered.is_set()


async def test_who_insists_on_the_end_waits_for_requests(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The volume is sound and is left in order: what is under way comes to its end before."""

    def in_use(_directory: str) -> None:
        raise mountpoint.InUse("a file is open")

    monkeypatch.setattr(mountpoint, "unmount", in_use)
    monkeypatch.setattr(mountpoint, "detach", lambda _directory: None)
    mount, ready = served(tmp_path), trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.run, ready.set)
            await ready.wait()
            await mount.stop()
            assert not session.connection.aborted
            await mount.stop()
            assert session.connection.aborted
            await trio.testing.wait_all_tasks_blocked()
            assert not session.closed
            session.answered.set()
    assert session.closed
