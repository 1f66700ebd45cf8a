"""What of other libraries' words reaches the log, and how loud."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from csvfs.host.logs import logging_to


@pytest.mark.parametrize(("why", "kept"), [("No such file or directory", 0), ("Bad address", 1)])
def test_an_answer_that_nobody_waits_for_is_no_error(tmp_path: Path, why: str, kept: int) -> None:
    log = tmp_path / "log"
    with logging_to(str(log)):
        logging.getLogger("pyfuse3").error("fuse_read(): fuse_reply_* failed with %s", why)
        logging.getLogger("csvfs").error("failed with No such file or directory")
    assert log.read_text().count("fuse_reply") == kept
    assert log.read_text().count("ERROR csvfs: failed") == 1
