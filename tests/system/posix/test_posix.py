"""Both filesystems answer alike, but for the differences listed here with their reasons."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.mounts import Mount

from . import (  # noqa: F401  (importing registers the cases)
    cases_attributes,
    cases_data,
    cases_directories,
    cases_namespace,
    cases_paths,
    cases_permissions,
    cases_rename,
    cases_times,
    cases_transfer,
)
from .case import CASES, OTHER, Observation

pytestmark = pytest.mark.system

DIFFERENCES = {
    "lseek-data-hole": "pyfuse3 has no handler for LSEEK: the kernel takes a file as all data",
    "mmap-shared": "a shared mapping of a DIRECT_IO file needs FUSE_DIRECT_IO_ALLOW_MMAP, which "
    "pyfuse3 does not ask for: ENODEV",
    "o-tmpfile": "pyfuse3 has no handler for TMPFILE: EOPNOTSUPP",
    "open-block": "mounted nodev: EACCES",
    "open-char": "mounted nodev: EACCES",
    f"write-and-setgid-without-execute-{OTHER}": "a write request does not say in which groups its "
    "sender is: without group-execute, where it grants nothing, set-group-ID stays",
    "xattr-create-and-replace": "pyfuse3 keeps the flags of setxattr to itself: it looks first, "
    "and takes both flags at once for XATTR_CREATE",
}
"""Pattern of case names: why csvfs answers otherwise than the machine's own filesystem."""


@pytest.fixture(scope="module")
def reference() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="posix-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def answers_on(name: str, root: Path) -> Observation:
    """Run a case in a fresh directory below ``root``."""
    home = os.getcwd()
    mask = os.umask(0o022)
    directory = root / name.replace("/", "_")[:100]
    directory.mkdir()
    os.chmod(directory, 0o777)
    os.chdir(directory)
    try:
        return CASES[name]()
    finally:
        os.chdir(home)
        os.umask(mask)


@pytest.mark.parametrize("name", sorted(CASES))
def test_answers_agree(name: str, mounted: Mount, reference: Path) -> None:
    theirs = answers_on(name, reference)
    ours = answers_on(name, mounted.path)
    reason = next((why for pattern, why in DIFFERENCES.items() if fnmatch(name, pattern)), None)
    if reason is None:
        assert ours == theirs
    else:
        assert ours != theirs, f"listed as different ({reason}), but the answers agree"
