"""Options of the test run: a random order with a printed seed, and a bound on its time."""

from __future__ import annotations

import random
import time
from collections.abc import Generator

import pytest

_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, default=None, help="run in a random order of this seed")
    parser.addoption(
        "--minutes", type=float, default=None, help="start no further test after so many minutes"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"seed {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
