"""What a daemon and its supervisor do so as not to be late. In processes of their own, which they
change for good."""

from __future__ import annotations

import subprocess
import sys

import pytest


def printed(program: str) -> str:
    """What a Python program prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_many_new_objects_do_not_make_the_collector_look_at_everything() -> None:
    """Fifty thousand, as a change of view makes with ten thousand locks."""
    program = """
import gc
from csvfs.host.hardening import collect_seldom
collect_seldom()
seen = []
gc.callbacks.append(lambda phase, about: seen.append(about["generation"]))
kept = [[number] for number in range(50_000)]
assert gc.get_freeze_count() > 10_000
print(0 in seen, 2 in seen)
"""
    assert printed(program) == "True False\n"


def test_a_death_is_told_with_real_time_priority() -> None:
    program = """
import os
from csvfs.host.last_will import execute_will, make_will_memory
try:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
except PermissionError:
    print("not permitted")
else:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    execute_will(make_will_memory())
    print(os.sched_getscheduler(0) == os.SCHED_RR)
"""
    said = printed(program)
    if said == "not permitted\n":
        pytest.skip("real-time priority is not permitted here")
    assert said == "True\n"
