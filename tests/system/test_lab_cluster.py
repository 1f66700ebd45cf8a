"""Three hosts on one LUN, and what breaks them: the scenarios of `csvctl lab run` that must hold.

Each is judged by the lab itself (nothing lost, stale or late, no error that a program should not
see, `csvctl check` clean). Here also: how long a program on a host that lives may have had to wait,
and that nobody is warned of what is as it should be.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csvctl.lab import state
from csvctl.lab.faults import Fault
from csvctl.lab.host import Host, enter
from csvfs.host.problems import Problem
from tests.system.test_lab import Lab

pytestmark = [pytest.mark.system, pytest.mark.full]

NOTICED_S = 3.0
"""A machine that is busy with other things, and the fence, the replay, the recovery of locks."""
SILENCE_S = 6.0
"""--evict-after."""
SPREAD_S = 2.5
LEASE_S = 5.0
HOLD_S = 4.0
"""How long the lab leaves a SAN link cut."""
PAUSES_S = {
    "quiet": NOTICED_S,
    "kill+coordinator": NOTICED_S,
    Fault.FREEZE: SILENCE_S + NOTICED_S,
    "power-off+coordinator": SILENCE_S + NOTICED_S,
    # Who is cut off from its peers alone shows life on the LUN until it is fenced.
    "net-cut+coordinator": SILENCE_S + SPREAD_S + LEASE_S + NOTICED_S,
    Fault.SAN_CUT: HOLD_S + NOTICED_S,
    Fault.TARGET_RESTART: NOTICED_S + 2,
    "kill+freeze": SILENCE_S + LEASE_S + NOTICED_S,
    "rejoin": NOTICED_S,
    "ping-pong": NOTICED_S,
    # Each of two may have to be waited for, and then the one that was to replay for it.
    "random": 2 * (SILENCE_S + SPREAD_S + LEASE_S) + NOTICED_S,
}
FAIL_OVER_S = {"kill+coordinator": 2.0, "power-off+coordinator": 8.0}
"""From the fault to the first write of another host to the same file, without START_S."""
START_S = 4.0
"""The other host's program has to start, on a busy machine, and looks at every block first."""
EXPECTED = ("the OOM killer may take", "the daemon is not fully protected")
"""Of a container, whose root may not do everything."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    parent = Path(tempfile.mkdtemp(prefix="csvlab-"))
    made = Lab(parent / "lab")
    try:
        made("up", "--hosts", "3", "--size", "1G")
        yield made
    finally:
        for place in state.known().values():
            if place == made.directory:
                made("down")
        shutil.rmtree(parent)


@pytest.fixture
def whole(lab: Lab) -> Lab:
    """What the test before broke and left is no trouble of this one."""
    for each in lab.status()["hosts"]:
        if each["mount"] != "mounted" or each["faults"]:
            lab("heal", each["name"])
    return lab


def hosts(lab: Lab) -> list[Host]:
    found = state.read(lab.directory)
    return [Host(found, each) for each in found.hosts]


@pytest.mark.parametrize("scenario", list(PAUSES_S))
def test_scenario(whole: Lab, scenario: str) -> None:
    logs = {host.name: host.log.stat().st_size for host in hosts(whole)}
    result = json.loads(whole("run", scenario, "--json"))
    assert result["ok"] and result["check"] == "clean", result
    for count in ("io_errors", "lost_writes", "stale_reads", "zombie_writes"):
        assert result[count] == 0, result
    assert result["details"]["acknowledged"] > 0
    assert result["max_pause_s"] <= PAUSES_S[scenario], result
    if scenario in FAIL_OVER_S:
        (took_s,) = (
            value for name, value in result["details"].items() if name.endswith("_fail_over_s")
        )
        assert took_s <= FAIL_OVER_S[scenario] + START_S, result
    if scenario == "quiet":  # everybody also leaves, and comes back
        for host in hosts(whole):
            said = host.log.read_bytes()[logs[host.name] :].decode()
            assert not troubles(said), f"{host.name} warns of what is as it should be"


@contextmanager
def only_datagrams(one: Host, other: Host) -> Iterator[None]:
    """A firewall between two hosts."""

    def rules(change: str) -> None:
        address = other.state.cluster_address.partition(":")[0]
        for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
            rule = ["iptables", change, chain, side, address, "-p", "tcp", "-j", "DROP"]
            subprocess.run([*enter(one.lab, one.name), *rule], check=True)

    rules("-A")
    try:
        yield
    finally:
        rules("-D")


def test_a_host_that_one_member_cannot_be_connected_with_is_put_out(whole: Lab) -> None:
    first, second, last = hosts(whole)
    last.umount()
    try:
        with only_datagrams(second, last), pytest.raises(Problem, match="did not hear each other"):
            last.mount()
        for host in (first, second):
            begun = time.monotonic()
            (host.mountpoint / f"beside-{host.name}").write_text("as before")
            assert time.monotonic() - begun < NOTICED_S
    finally:
        whole("heal", last.name)
    assert last.is_mounted


def troubles(said: str) -> list[str]:
    """What a human should look at."""
    return [
        line
        for line in said.splitlines()
        if not any(words in line for words in EXPECTED)
        and any(f" {level} " in line for level in ("WARNING", "ERROR", "CRITICAL"))
    ]
