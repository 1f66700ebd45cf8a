"""Mounting a volume that another host has, or had: who is refused, and who takes over."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from csvfs.host import mountpoint
from tests.mounts import Host, Mount
from tests.tgt import Tgt, wait_until

pytestmark = [pytest.mark.system, pytest.mark.full]


@pytest.fixture
def tgt() -> Iterator[Tgt]:
    with Tgt(lun_bytes=256 << 20) as made:
        with Host("formatter") as host:
            host.format(made.url)
        yield made


def mount(host: Host, tgt: Tgt, *options: str, code: int = 0, node: str = "") -> tuple[Mount, str]:
    path = host.directory / "mnt"
    if not path.exists():
        host.mountpoint()
    words = ("--node", node or host.name, "--initiator", host.initiator, *options)
    done = host.csvctl("mount", tgt.url, str(path), *words, code=code)
    return Mount(host, tgt.url, path), done.stderr


def test_a_name_is_taken_once(tgt: Tgt) -> None:
    with Host("alpha") as alpha, Host("beta") as beta:
        beta.expect("a node named alpha is a member already")
        first, _ = mount(alpha, tgt, "--cluster-address", "127.0.0.1:21981")
        (first.path / "file").write_text("x")
        _, words = mount(beta, tgt, "--cluster-address", "127.0.0.1:21982", node="alpha", code=81)
        assert "a node named alpha is a member already" in words
        assert "Nothing was changed" in words
        assert (first.path / "file").read_text() == "x"
        assert first.status()["path_losses"] == 0
        first.umount()


def test_hosts_are_evicted_by_name_also_the_own(tgt: Tgt) -> None:
    """Exit codes and words of `csvctl node evict`, and of what is locked beside it."""
    with Host("alpha") as alpha, Host("beta") as beta:
        alpha.expect("eviction of ")
        alpha.expect("beta .* is gone without having left")
        for words in ("the mount ends: ", "is detached", "this node stops", "eviction of ", ""):
            beta.expect(words)
        first, _ = mount(alpha, tgt, "--cluster-address", "127.0.0.1:21984")
        assert "no node 'gamma'" in alpha.csvctl("node", "evict", "gamma", code=64).stderr
        assert "nobody is there to" in alpha.csvctl("node", "evict", "alpha", code=64).stderr
        for evictor in (alpha, beta):
            options = ("--cluster-address", "127.0.0.1:21985", "--evict-after", "20")
            second, _ = mount(beta, tgt, *options)
            rows = json.loads(alpha.csvctl("lock", "list", "--json").stdout)["locks"]
            assert {row["master"] for row in rows} <= {"alpha", "beta"}
            assert "is evicted" in evictor.csvctl("node", "evict", "beta").stdout
            wait_until(lambda: not beta.daemons(), "the evicted daemon to end")
            assert second.status()["state"] == "failed"
        (first.path / "file").write_text("x")
        first.umount()


def test_a_host_that_nobody_could_reach_is_succeeded_when_it_is_dead(tgt: Tgt) -> None:
    """It was mounted without --cluster-address; a power cut takes it away for good."""
    with Host("alpha") as alpha, Host("beta") as beta:
        beta.expect("alpha has the volume, and was mounted without --cluster-address")
        beta.expect("alpha .* is gone without having left")
        beta.expect("cannot listen at")
        first, _ = mount(alpha, tgt)
        with (first.path / "file").open("w") as file:
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
        # Of a documentation network: nobody has it, and the look at the LUN comes first.
        mount(beta, tgt, "--cluster-address", "192.0.2.77", code=81)
        for pid in (first.supervisor, first.pid):
            os.kill(pid, signal.SIGKILL)
        _, words = mount(beta, tgt, "--cluster-address", "192.0.2.77", code=71)
        assert "cannot listen at 192.0.2.77" in words
        second, _ = mount(beta, tgt, "--cluster-address", "127.0.0.1:21983")
        assert (second.path / "file").read_text() == "x"
        second.umount()
        mountpoint.detach(str(first.path))
