"""Options of the test run: a random order with a printed seed, a bound on its time, and whether
property tests try the same examples as everywhere (the gate) or new ones (`--explore`)."""

from __future__ import annotations

import random
import signal
import time
import unittest
from collections.abc import Generator

import hypothesis
import pytest

_started = time.monotonic()

# A gate that everybody has to pass gives everybody the same answer; `make explore` looks further.
hypothesis.settings.register_profile("gate", derandomize=True, print_blob=True, database=None)
hypothesis.settings.register_profile("explore", derandomize=False, print_blob=True)
hypothesis.settings.load_profile("gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, default=None, help="run in a random order of this seed")
    parser.addoption(
        "--minutes", type=float, default=None, help="start no further test after so many minutes"
    )

    parser.addoption(
        "--explore", action="store_true", help="property tests only, with examples never tried"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--explore"):
        hypothesis.settings.load_profile("explore")
    if not hasattr(config, "workerinput"):
        # Who stops a run by SIGTERM (timeout(1), say) wants its mounts and targets to go as well.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _is_property(item: pytest.Item) -> bool:
    """Does hypothesis choose what it tries?"""
    machine = isinstance(item, pytest.Function) and issubclass(
        item.cls or object, unittest.TestCase
    )
    return machine or getattr(getattr(item, "obj", None), "is_hypothesis_test", False)


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"seed {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--explore"):
        items[:] = [item for item in items if _is_property(item)]
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - _started > minutes * 60:
        pytest.skip(f"the {minutes:g} minutes of this run are over")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    yield
    seed = terminalreporter.config.getoption("--shuffle")
    if seed is not None:
        terminalreporter.write_line(f"seed {seed}")
