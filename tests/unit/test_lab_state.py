"""What a lab writes down of itself, and what it says to wishes that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csvctl.lab import state
from csvctl.lab.command import make_lab_app
from csvctl.lab.faults import FAULTS, Fault
from csvctl.lab.relay import Orders
from csvctl.lab.scenarios import SCENARIOS
from csvctl.lab.state import LabState, new_state
from csvctl.main import run
from csvfs.host.problems import Kind, Problem


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "INDEX", tmp_path / "index")
    monkeypatch.setattr(state, "NAMESPACES", tmp_path / "netns")
    return tmp_path / "index"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LabState:
    monkeypatch.setattr(state, "MAX_DIRECTORY_BYTES", 4096)
    made = new_state(tmp_path / "lab", 3, 1 << 30)
    state.begin(made)
    return made


def test_what_was_written_is_read(lab: LabState) -> None:
    lab.hosts[1].faults["slow-san"] = 0.5
    state.write(lab)
    assert state.read(lab.path) == lab


def test_hosts_share_nothing_that_must_be_their_own(lab: LabState) -> None:
    for name in ("initiator", "machine_id", "boot_id", "san_address", "cluster_address", "name"):
        assert len({getattr(host, name) for host in lab.hosts}) == 3, name


def test_two_labs_share_no_name(lab: LabState) -> None:
    other = new_state(Path("/b"), 3, 1 << 30)
    assert not {lab.namespace(r) for r in lab.roles} & {other.namespace(r) for r in other.roles}
    assert lab.lun != other.lun


def test_a_lab_is_known_before_anything_of_it_is_made(lab: LabState) -> None:
    assert state.known() == {lab.id: lab.path}
    state.forget(lab)
    assert state.known() == {}


def test_namespaces_without_an_entry_are_known(tmp_path: Path) -> None:
    (tmp_path / "netns").mkdir()
    for name in ("csvlab-0123abcd-host1", "csvlab-0123abcd-switch", "blue"):
        (tmp_path / "netns" / name).touch()
    assert state.known() == {"0123abcd": Path()}


def test_one_directory_holds_one_lab(lab: LabState) -> None:
    with pytest.raises(Problem, match="there is a lab in"):
        state.begin(new_state(lab.path, 1, 1 << 30))


def test_a_directory_with_other_things_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MAX_DIRECTORY_BYTES", 4096)
    (tmp_path / "mine").touch()
    with pytest.raises(Problem, match="not empty"):
        state.begin(new_state(tmp_path, 1, 1 << 30))


@pytest.mark.parametrize("hosts", [0, -1, 65])
def test_numbers_of_hosts_that_cannot_be(hosts: int) -> None:
    with pytest.raises(Problem, match="1 to 64"):
        new_state(Path("/l"), hosts, 1 << 30)


def test_sockets_of_the_last_host_fit_below_the_longest_directory() -> None:
    directory = Path("/" + "d" * (state.MAX_DIRECTORY_BYTES - 1))
    new_state(directory, 64, 1 << 30)
    assert len(os.fsencode(directory / "run" / "host64" / ("0" * 32 + ".sock"))) <= 107
    with pytest.raises(Problem, match="longer than"):
        new_state(Path(f"{directory}d"), 64, 1 << 30)


def test_an_unknown_host_is_named_with_those_that_are(lab: LabState) -> None:
    with pytest.raises(Problem, match="'host9', but host1, host2, host3"):
        lab.host("host9")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "hosts": [{}]}'])
def test_a_damaged_description_is_a_problem(lab: LabState, text: str) -> None:
    (lab.path / "lab.json").write_text(text)
    with pytest.raises(Problem) as caught:
        state.read(lab.path)
    assert caught.value.kind is Kind.USAGE


def test_a_change_that_fails_is_not_written(lab: LabState) -> None:
    def change_and_fail() -> None:
        with state.changing(lab.path) as found:
            found.hosts[0].faults["kill"] = 0.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        change_and_fail()
    assert state.read(lab.path) == lab


def test_a_lab_that_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="lab up"), state.changing(tmp_path / "no"):
        pass
    assert not (tmp_path / "no").exists()


def test_every_fault_is_a_row_and_a_scenario_alone_and_in_pairs() -> None:
    assert set(FAULTS) == set(Fault)
    assert set(Fault) <= set(SCENARIOS)
    for one in Fault:
        for other in Fault:
            assert f"{one}+{other}" in SCENARIOS or f"{other}+{one}" in SCENARIOS


def test_orders_of_the_relay_are_read_as_they_were_written() -> None:
    for orders in (Orders(0.0, reset=True), Orders(0.25, reset=False)):
        assert Orders.decode(orders.encode()) == orders


def test_it_wants_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (
        ["up"],
        ["status"],
        ["exec", "host1", "true"],
        ["fault", "kill", "host1"],
        ["heal", "host1"],
        ["run", "quiet"],
        ["down"],
    ):
        assert run(["lab", *words]) == 77
        assert "only root may do this" in capsys.readouterr().err


def test_bad_wishes_say_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lab: LabState
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    where = ["--dir", str(lab.path)]
    assert run(["lab", "fault", "fire", "host1", *where]) == 64
    assert "san-cut" in capsys.readouterr().err
    assert run(["lab", "fault", "kill", *where]) == 64
    assert "wants a host" in capsys.readouterr().err
    assert run(["lab", "run", "nothing", *where]) == 64
    assert "no scenario" in capsys.readouterr().err


def test_the_list_of_scenarios_wants_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab", "run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SCENARIOS)


def test_the_commands_are_those_of_the_manual() -> None:
    names = {command.name for command in make_lab_app().registered_commands}
    assert names == {"up", "status", "exec", "fault", "heal", "run", "down"}
