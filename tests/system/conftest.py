"""Fixtures of the system tests: a LUN with a volume, a host, and the mount between them."""

from __future__ import annotations

from collections.abc import Iterator

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
