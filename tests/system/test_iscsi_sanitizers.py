"""The session engine under gcc's sanitizers: memory errors, leaks, undefined behaviour, races."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.tgt import Tgt

pytestmark = [pytest.mark.system, pytest.mark.full]

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests/session_stress.c",
    *(
        ROOT / "redirector/native" / name
        for name in ("session.c", "login.c", "issue.c", "silence.c", "answer.c")
    ),
]


@pytest.mark.parametrize("window", [128, 8])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizer(sanitizer: str, window: int, tmp_path: Path) -> None:
    program = tmp_path / "session_stress"
    command = ["gcc", "-std=gnu11", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    command += ["-fno-sanitize-recover=all"] if "undefined" in sanitizer else []
    command += [f"-I{ROOT / 'redirector/native'}", *map(str, SOURCES), "-o", str(program)]
    subprocess.run([*command, "-liscsi"], check=True)
    with Tgt() as tgt:
        update = ("--op", "update", "--mode", "target", "--tid", "1")
        tgt.admin(*update, "--name", "MaxQueueCmd", "--value", str(window))
        done = subprocess.run(
            [program, tgt.portal, tgt.iqn, "10"],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
            check=False,
        )
    assert done.returncode == 0, done.stderr[-8000:]
    assert "callbacks" in done.stdout
