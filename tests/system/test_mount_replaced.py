"""Two mounted hosts: a name that one of them keeps replacing is always there for the other."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mounts import Host
from tests.tgt import Tgt

pytestmark = pytest.mark.system

SECONDS = 5.0


def cluster_address(host: int) -> str:
    address = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.{host}"
    with socket.create_server((address, 0)) as server:
        return f"{address}:{server.getsockname()[1]}"


@pytest.fixture
def directories() -> Iterator[list[Path]]:
    """One directory, as two hosts have it."""
    with Tgt(lun_bytes=256 << 20) as tgt, ExitStack() as stack:
        found = []
        for number in (1, 2):
            host = stack.enter_context(Host(f"host{number}", cluster_address(number)))
            if number == 1:
                host.format(tgt.url)
            found.append(stack.enter_context(host.mounted(tgt.url)).path)
        yield found


def until(end: float, what: Callable[[int], None], failures: list[str]) -> threading.Thread:
    """Do it again and again, in a thread, with 0, 1, 2..."""

    def run() -> None:
        count = 0
        while time.monotonic() < end:
            try:
                what(count)
            except OSError as error:
                failures.append(f"{what.__name__}: {error!r}")
            count += 1
        failures.extend([] if count else [f"{what.__name__} was never done"])

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_what_is_replaced_is_never_missing(directories: list[Path]) -> None:
    one, two = directories
    failures: list[str] = []
    for name in ("file", "link"):
        (one / name).symlink_to("0") if name == "link" else (one / name).write_text("0")

    def replace_file(count: int) -> None:
        (one / "new").write_text(f"{count}")
        (one / "new").rename(one / "file")

    def replace_link(count: int) -> None:
        (one / "newlink").symlink_to(f"{count}")
        (one / "newlink").rename(one / "link")

    def read(_: int) -> None:
        assert (two / "file").read_text() is not None

    def status(_: int) -> None:
        (two / "file").stat()

    def attributes(_: int) -> None:
        os.listxattr(two / "file")

    def follow(_: int) -> None:
        assert os.readlink(two / "link")

    def change(_: int) -> None:
        (two / "file").chmod(0o600)

    # Not link(2): Linux itself says ENOENT of a file that loses its last name meanwhile.
    end = time.monotonic() + SECONDS
    actions = (replace_file, replace_link, read, status, attributes, follow, change)
    for thread in [until(end, action, failures) for action in actions]:
        thread.join()
    assert not failures
