"""csvctl format without a target: a file LUN, and a target whose arbiter does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csvctl import main
from csvfs import mkfs_claim
from redirector.block.probe_result import Finding, ProbeFlag, ProbeResult


@pytest.fixture
def lun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSVFS_RUN_DIR", str(tmp_path / "run"))
    path = tmp_path / "lun"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


def test_a_file(lun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["format", f"file://{lun}", "--label", "try"]) == 0
    told = capsys.readouterr()
    assert "64 MiB" in told.out and "try (" in told.out
    assert main.run(["dump", f"file://{lun}", "superblock"]) == 0
    assert "try" in capsys.readouterr().out
    assert main.run(["format", f"file://{lun}", "--label", "again"]) == 75
    assert main.run(["format", f"file://{lun}", "--label", "again", "--force"]) == 0


def test_an_arbiter_that_does_not_hold(
    lun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("PREEMPT of an unregistered key", False, True, "it succeeds: use another")

    async def probe(*_arguments: Any, **_options: Any) -> ProbeResult:
        return ProbeResult(ProbeFlag.PROBED, (finding,))

    monkeypatch.setattr(mkfs_claim, "probe", probe)
    before = lun.read_bytes()
    assert main.run(["format", f"file://{lun}", "--label", "x"]) == 69
    told = capsys.readouterr().err
    assert "PREEMPT of an unregistered key: it succeeds" in told
    assert "two hosts could write the same image" in told
    assert lun.read_bytes() == before
