"""Session engine and pulse under gcc's sanitizers: memory errors, leaks, undefined steps, races."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.tgt import Tgt

pytestmark = [pytest.mark.system, pytest.mark.full]

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "redirector/native"
SESSION = [NATIVE / name for name in ("session.c", "login.c", "issue.c", "silence.c", "answer.c")]


def run_stress(sanitizer: str, sources: list[Path], rounds: int, tmp_path: Path, tgt: Tgt) -> str:
    program = tmp_path / "stress"
    command = ["gcc", "-std=gnu11", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    command += ["-fno-sanitize-recover=all"] if "undefined" in sanitizer else []
    command += [f"-I{NATIVE}", *map(str, sources), "-o", str(program)]
    subprocess.run([*command, "-liscsi", "-lcrypto"], check=True)
    done = subprocess.run(
        [program, tgt.portal, tgt.iqn, str(rounds)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


@pytest.mark.parametrize("window", [128, 8])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizer(sanitizer: str, window: int, tmp_path: Path) -> None:
    with Tgt() as tgt:
        update = ("--op", "update", "--mode", "target", "--tid", "1")
        tgt.admin(*update, "--name", "MaxQueueCmd", "--value", str(window))
        sources = [ROOT / "tests/session_stress.c", *SESSION]
        assert "callbacks" in run_stress(sanitizer, sources, 10, tmp_path, tgt)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_pulse_under_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    with Tgt() as tgt:
        sources = [ROOT / "tests/pulse_stress.c", NATIVE / "pulse.c", *SESSION]
        assert "written" in run_stress(sanitizer, sources, 25, tmp_path, tgt)
