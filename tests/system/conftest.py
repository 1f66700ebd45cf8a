"""Fixtures of the system tests: a LUN with a volume, a host, and the mount between them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import Host, Mount
from tests.tgt import Tgt

VOLUME_BYTES = 4 << 30


@pytest.fixture(scope="module")
def mounted() -> Iterator[Mount]:
    """One mount for all tests of a module: each of them works in a directory of its own."""
    with Tgt(lun_bytes=VOLUME_BYTES) as tgt, Host() as host:
        host.format(tgt.url)
        with host.mounted(tgt.url) as found:
            yield found
        assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


@pytest.fixture
def area(mounted: Mount, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on the mount of the module that is this test's alone."""
    directory = mounted.path / re.sub(r"\W+", "-", request.node.name)
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def lun() -> Iterator[Tgt]:
    """A target with a volume on it, for one test; writes that begin with ``b"SLOW"`` can be held
    back. In the end the volume must be clean, and is not mounted any more."""
    with Tgt(lun_bytes=VOLUME_BYTES, late_gate=True) as tgt, Host("formatter") as host:
        host.format(tgt.url)
        yield tgt
        assert "the volume is clean" in host.csvctl("check", tgt.url).stdout


@pytest.fixture
def mnt(lun: Tgt) -> Iterator[Mount]:
    """That volume, mounted by a host of its own."""
    with Host() as host, host.mounted(lun.url) as found:
        yield found
