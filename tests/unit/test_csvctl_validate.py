"""csvctl validate on a file: what it shows, its exit codes, and --json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from csvctl import main
from csvctl.outcomes import NOT_VALID, OUTCOMES, VALID
from csvfs.host.problems import Kind


@pytest.fixture
def lun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSVFS_RUN_DIR", str(tmp_path / "run"))
    path = tmp_path / "lun"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


def test_an_empty_file_then_a_volume(lun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{lun}"
    assert main.run(["validate", url]) == VALID
    assert "`csvctl format` makes one" in capsys.readouterr().out
    assert main.run(["validate", url, "--destructive"]) == VALID
    assert re.search(r"^passed +the fence stops WRITE", capsys.readouterr().out, re.MULTILINE)
    assert not any(lun.read_bytes())
    assert main.run(["format", url, "--label", "try"]) == 0
    before = lun.read_bytes()
    capsys.readouterr()
    assert main.run(["validate", url]) == VALID
    told = capsys.readouterr().out
    assert re.search(r"^passed +volume: try \([0-9a-f]{32}\)$", told, re.MULTILINE)
    assert re.search(r"^passed +exclusion: ", told, re.MULTILINE)
    assert re.search(r"^not tested +CHAP: a file has no login", told, re.MULTILINE)
    assert "parked, holds the reservation" in told
    assert re.search(r"^\d+ passed, (\d+ notes?, )?2 not tested$", told, re.MULTILINE)
    assert main.run(["validate", url, "--destructive"]) == OUTCOMES[Kind.OCCUPIED_LUN].code
    assert 'csvfs volume "try"' in capsys.readouterr().err
    assert lun.read_bytes() == before


def test_json_and_a_copy(lun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["format", f"file://{lun}", "--label", "try"]) == 0
    copy = lun.with_name("copy")
    copy.write_bytes(lun.read_bytes())
    capsys.readouterr()
    assert main.run(["validate", f"file://{copy}", "--json"]) == NOT_VALID
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "failed"
    assert found["exit_code"] == NOT_VALID
    assert found["url"] == f"file://{copy}"
    assert found["volume"]["label"] == "try"
    assert found["keys"] == []
    assert 0 < found["read_latency_s"]["median"] <= found["read_latency_s"]["worst"]
    failed = [each for each in found["properties"] if each["verdict"] == "failed"]
    assert [each["name"] for each in failed] == ["identity"]
    assert "a copy" in failed[0]["found"] and failed[0]["to_do"]


def test_a_failure_says_what_it_means_and_what_to_do(
    lun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["format", f"file://{lun}", "--label", "try"]) == 0
    with lun.open("r+b") as file:
        file.truncate((64 << 20) - 65536)
    capsys.readouterr()
    assert main.run(["validate", f"file://{lun}"]) == NOT_VALID
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("FAILED      size: "))
    assert lines[at + 1].startswith("            What lay behind its end")
    assert "Restore the LUN's size" in " ".join(lines[at + 2 : at + 4])


def test_no_such_lun(tmp_path: Path) -> None:
    assert main.run(["validate", f"file://{tmp_path}/none"]) == OUTCOMES[Kind.NO_SUCH_LUN].code
