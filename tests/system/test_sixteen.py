"""Many hosts on a machine that has more to do than it can: nobody is evicted, no lease is lost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.system, pytest.mark.full]


def test_eight_hosts_on_busy_processors_for_a_minute() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.sixteen"),
            *("--hosts", "8", "--minutes", "1", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["mistakes"] == []
    assert report["check"] == "clean"
    assert report["leases_lost"] == 0
    assert report["heartbeats"] >= 8 * 110
    assert report["late_p999_ms"] < 500
