"""A lab with one host, from nothing to nothing; what breaks it, and what is left when it crashes.

Everything that needs several hosts is a scenario of `csvctl lab run`. Without the long tests
(``full``) this is one lab: it comes up, does what it is told, plays a scenario, and is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csvctl.lab import processes, state
from csvctl.lab.host import Host
from csvctl.lab.workload import Job
from csvfs.host import mountpoint
from tests.tgt import wait_until

pytestmark = pytest.mark.system

CSVCTL = str(Path(sys.executable).with_name("csvctl"))


class Lab:
    """`csvctl lab` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_bytes = 0
        self.environment = {**os.environ, "CSVFS_LAB_DIR": str(directory)}

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run it; its words."""
        done = subprocess.run(
            [CSVCTL, "lab", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"lab {words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([CSVCTL, "lab", *words], env=self.environment)

    @property
    def host(self) -> Host:
        found = state.read(self.directory)
        return Host(found, found.hosts[0])

    def logged(self) -> str:
        """What the daemon has logged during this test."""
        return self.host.log.read_bytes()[self.log_bytes :].decode()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("status", "--json"))
        return found

    def namespaces(self, lab_id: str) -> list[processes.Namespace]:
        names = [f"csvlab-{lab_id}-{role}" for role in ("switch", "target", "host1")]
        return [each for name in names if (each := processes.namespace_of(name)) is not None]

    def is_gone(self, lab_id: str, spaces: list[processes.Namespace]) -> None:
        """Fail if anything is left."""
        assert not processes.members(spaces)
        names = os.listdir(state.NAMESPACES) if state.NAMESPACES.is_dir() else []
        assert not [name for name in names if lab_id in name]
        assert not [m for m in mountpoint.mounts() if m.path.startswith(str(self.directory))]
        assert not (state.INDEX / lab_id).exists()
        assert not self.directory.exists()


@pytest.fixture
def lab() -> Iterator[Lab]:
    parent = Path(tempfile.mkdtemp(prefix="csvlab-"))
    made = Lab(parent / "lab")
    yield made
    for lab_id, place in state.known().items():
        if place == made.directory:
            made("down")
            pytest.fail(f"the test left lab {lab_id} behind")
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    """One lab for the tests that leave it as they found it."""
    parent = Path(tempfile.mkdtemp(prefix="csvlab-"))
    made = Lab(parent / "lab")
    made("up", "--hosts", "1", "--size", "1G")
    lab_id = state.read(made.directory).id
    spaces = made.namespaces(lab_id)
    assert len(spaces) == 3
    yield made
    made("down")
    made.is_gone(lab_id, spaces)
    parent.rmdir()


@pytest.fixture
def up(shared: Lab) -> Iterator[Lab]:
    shared.log_bytes = shared.host.log.stat().st_size
    yield shared
    shared("heal", "host1")
    found = shared.status()["hosts"][0]
    assert (found["mount"], found["faults"]) == ("mounted", {})


def write(place: Path) -> float:
    """Write and fsync a block; how long it took, seconds."""
    begun = time.monotonic()
    with (place / "block").open("wb", buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
    return time.monotonic() - begun


class Writing:
    """`write` in a thread."""

    def __init__(self, place: Path) -> None:
        self.took_s = 0.0
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(place,), daemon=True)
        self._thread.start()

    def _run(self, place: Path) -> None:
        try:
            self.took_s = write(place)
        except OSError as error:
            self.error = error

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(60)
        assert not self.waits and self.error is None, self.error


def test_up_exec_and_down_leave_nothing(up: Lab) -> None:
    write(up.host.mountpoint)
    addresses = up("exec", "host1", "--", "cat", "/proc/net/fib_trie")
    assert "10.1.0.1" in addresses and "10.2.0.1" in addresses
    assert "state" in up("exec", "host1", "--", "csvctl", "status", "--json")
    up("exec", "host1", "--", "sh", "-c", "exit 7", code=7)
    assert "no host 'host2'" in up("exec", "host2", "--", "true", code=64)
    host = up.status()["hosts"][0]
    assert (host["mount"], host["faults"]) == ("mounted", {})


@pytest.mark.full
@pytest.mark.parametrize("kind", ["san-cut", "san-reset"])
def test_without_its_san_a_host_waits_and_goes_on(up: Lab, kind: str) -> None:
    place = up.host.mountpoint
    write(place)
    up("fault", kind, "host1")
    assert f"{kind} already" in up("fault", kind, "host1", code=64)
    writing = Writing(place)
    # Longer than the path takes to be given up.
    wait_until(lambda: "data session is lost" in up.logged(), "the loss")
    assert writing.waits
    assert up.status()["hosts"][0]["faults"] == {kind: 0.0}
    up("heal", "host1")
    writing.join()
    assert up.status()["hosts"][0]["faults"] == {}


@pytest.mark.full
def test_a_slow_san_is_slow_and_breaks_nothing(up: Lab) -> None:
    place = up.host.mountpoint
    quick = write(place)
    up("fault", "slow-san", "host1", "--seconds", "0.2")
    assert write(place) > quick + 0.2
    up("fault", "slow-san", "host1", "--seconds", "0.4")
    assert write(place) > quick + 0.4
    up("heal", "host1")
    assert write(place) < 0.4
    assert "lost" not in up.logged()


@pytest.mark.full
def test_a_slow_san_can_be_cut_and_reset_meanwhile(up: Lab) -> None:
    place = up.host.mountpoint
    for kind in ("slow-san", "san-cut", "san-reset"):
        up("fault", kind, "host1")
    writing = Writing(place)
    wait_until(lambda: "data session is lost" in up.logged(), "the loss")
    assert writing.waits
    up("heal", "host1")
    writing.join()


@pytest.mark.full
def test_a_target_that_restarts_is_another_process_with_the_same_bytes(up: Lab) -> None:
    write(up.host.mountpoint)
    before = up.status()["target"]["pids"]
    up("fault", "target-restart")
    assert up.status()["target"]["pids"] not in (before, [])
    write(up.host.mountpoint)
    assert (up.host.mountpoint / "block").read_bytes() == b"x" * 4096


@pytest.mark.full
def test_a_frozen_daemon_goes_on_when_it_is_healed(up: Lab) -> None:
    up("fault", "freeze", "host1")
    assert up.status()["hosts"][0]["mount"] == "frozen"
    writing = Writing(up.host.mountpoint)
    time.sleep(0.3)
    assert writing.waits
    up("heal", "host1")
    writing.join()
    assert up.status()["hosts"][0]["mount"] == "mounted"


@pytest.mark.full
@pytest.mark.parametrize("kind", ["kill", "power-off"])
def test_a_dead_daemon_is_another_incarnation_when_it_is_healed(up: Lab, kind: str) -> None:
    write(up.host.mountpoint)
    pid = up.status()["hosts"][0]["pid"]
    up("fault", kind, "host1")
    assert up.status()["hosts"][0]["mount"] == ("none" if kind == "kill" else "dead")
    up("heal", "host1")
    assert up.status()["hosts"][0]["pid"] not in (pid, None)
    assert (up.host.mountpoint / "block").read_bytes() == b"x" * 4096


@pytest.mark.full
def test_where_no_volume_is_mounted_nothing_can_be_written(up: Lab) -> None:
    up("fault", "kill", "host1")
    with pytest.raises(PermissionError):
        write(up.host.mountpoint)


@pytest.mark.full
def test_power_off_leaves_no_process_on_the_host(up: Lab) -> None:
    sleeper = up.start("exec", "host1", "--", "sleep", "600")
    wait_until(lambda: any("sleep" in m.command for m in up.host.processes()), "the sleeper")
    up("fault", "power-off", "host1")
    assert up.host.processes() == []
    assert sleeper.wait(10) != 0


@pytest.mark.full
def test_two_labs_do_not_meet(up: Lab) -> None:
    other = Lab(up.directory.with_name("other"))
    other("up", "--hosts", "1", "--size", "1G")
    lab_id = state.read(other.directory).id
    spaces = other.namespaces(lab_id)
    write(other.host.mountpoint)
    up("fault", "san-cut", "host1")
    write(other.host.mountpoint)
    assert up.status()["id"] != lab_id
    other("down")
    other.is_gone(lab_id, spaces)
    up("heal", "host1")
    write(up.host.mountpoint)


@pytest.mark.full
def test_a_frozen_daemon_and_a_program_that_waits_for_it_do_not_hold_down_up(lab: Lab) -> None:
    lab("up", "--hosts", "1", "--size", "1G")
    lab_id, spaces = state.read(lab.directory).id, lab.namespaces(state.read(lab.directory).id)
    lab("fault", "freeze", "host1")
    writing = Writing(lab.host.mountpoint)
    time.sleep(0.2)
    lab("down")
    lab.is_gone(lab_id, spaces)
    wait_until(lambda: not writing.waits, "the writer to be let go")


@pytest.mark.full
@pytest.mark.parametrize("after_s", [0.25, 0.6, 0.9, 1.3, 1.8, 2.5, 4.0])
def test_what_a_killed_lab_command_leaves_is_found_and_taken_down(lab: Lab, after_s: float) -> None:
    maker = lab.start("up", "--hosts", "1", "--size", "1G")
    time.sleep(after_s)  # any moment is a good one
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    entry = {place: lab_id for lab_id, place in state.known().items()}.get(lab.directory)
    if entry is None:
        assert not lab.directory.exists()
        return
    spaces = lab.namespaces(entry)
    lab("down")
    lab.is_gone(entry, spaces)


@pytest.mark.full
def test_a_lab_of_which_only_the_names_are_left_is_taken_down(lab: Lab) -> None:
    lab("up", "--hosts", "1", "--size", "1G")
    lab_id, spaces = state.read(lab.directory).id, lab.namespaces(state.read(lab.directory).id)
    (lab.directory / "lab.json").unlink()
    lab("down")
    assert not processes.members(spaces)
    assert lab.namespaces(lab_id) == []
    assert list(lab.directory.iterdir()) == []
    lab.directory.rmdir()
    assert "no lab" in lab("down", code=64)


def test_a_scenario_is_played_and_says_how_it_went(up: Lab) -> None:
    result = json.loads(up("run", "kill", "--json", "--seed", "7"))
    assert list(result) == [
        "scenario",
        "ok",
        "max_pause_s",
        "io_errors",
        "lost_writes",
        "stale_reads",
        "zombie_writes",
        "check",
        "details",
    ]
    assert result["ok"] and result["check"] == "clean"
    assert result["details"]["seed"] == 7
    assert result["details"]["acknowledged"] > 0 and result["details"]["reads"] > 0


@pytest.mark.full
def test_the_writer_is_not_held_up_by_a_mount_that_is_not_there(up: Lab) -> None:
    host = up.host
    up("fault", "kill", "host1")
    log = up.directory / "work" / "log"
    job = Job(str(host.mountpoint), str(host.mountpoint / "f"), 1, 4, str(log), term=1)
    command = [sys.executable, "-m", "csvctl.lab.workload", "write", job.encode()]
    assert host.start(command).wait(30) == 3
    assert log.read_text().startswith("ERROR writer 107 ")


def test_what_cannot_be_is_refused_in_one_sentence(up: Lab) -> None:
    assert "'melt' is no fault" in up("fault", "melt", "host1", code=64)
    assert "freeze wants a host" in up("fault", "freeze", code=64)
    assert "no host 'host9'" in up("fault", "kill", "host9", code=64)
    assert "no host 'host9'" in up("heal", "host9", code=64)
    assert "no scenario 'picnic'" in up("run", "picnic", code=64)
    assert "there is a lab in" in up("up", "--hosts", "1", code=64)


@pytest.mark.full
def test_a_lun_that_is_too_small_is_refused(lab: Lab) -> None:
    assert "a LUN has 64 MiB" in lab("up", "--size", "3", code=64)
    assert not lab.directory.exists()


@pytest.mark.full
def test_a_dead_host_is_not_killed_or_frozen_and_healing_twice_is_no_error(up: Lab) -> None:
    up("fault", "power-off", "host1")
    for kind in ("kill", "freeze"):
        assert "no daemon lives on host1" in up("fault", kind, "host1", code=64)
    assert up.status()["hosts"][0]["faults"] == {"power-off": 0.0}
    assert "mounted again" in up("heal", "host1")
    assert up("heal", "host1") == ""


@pytest.mark.full
def test_what_a_killed_scenario_leaves_does_not_disturb_the_next(up: Lab) -> None:
    first = up.start("run", "quiet")
    wait_until(lambda: any(up.host.mountpoint.glob("*.img")), "the scenario")
    assert "a scenario is being played" in up("run", "quiet", code=64)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert list(up.host.mountpoint.glob("*.img"))
    assert json.loads(up("run", "quiet", "--json"))["ok"]
    assert not list(up.host.mountpoint.glob("*.img"))


@pytest.mark.full
def test_without_its_relay_a_host_waits_and_is_healed(up: Lab) -> None:
    place = up.host.mountpoint
    up("fault", "slow-san", "host1")
    spaces = up.namespaces(up.status()["id"])
    relays = [each for each in processes.members(spaces) if each.module == "csvctl.lab.relay"]
    processes.end(relays, spaces)
    writing = Writing(place)
    wait_until(lambda: "data session is lost" in up.logged(), "the loss")
    up("heal", "host1")
    writing.join()
