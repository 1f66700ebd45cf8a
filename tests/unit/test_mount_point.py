"""What is known of a directory before and after a mount."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csvfs.host import mountpoint
from csvfs.host.fuse import mount_options, unblocked_reads

MOUNTINFO = r"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
39 36 0:41 / /srv/my\040vms rw,nosuid shared:7 - fuse.csvfs iscsi://h/iqn.x:y/1 rw,user_id=0
40 39 0:42 / /srv/my\040vms rw - tmpfs none\134x rw
"""


def test_parse_mountinfo() -> None:
    ext3, csvfs, tmpfs = mountpoint.parse_mountinfo(MOUNTINFO)
    assert (ext3.device, ext3.path, ext3.kind) == (98 << 20, "/mnt2", "ext3")
    assert csvfs == mountpoint.Mounted(41, "/srv/my vms", "fuse.csvfs", "iscsi://h/iqn.x:y/1")
    assert tmpfs.source == "none\\x"


def test_a_name_that_is_not_utf8() -> None:
    line = os.fsdecode(b"1 2 0:5 / /srv/\xff rw - tmpfs none rw")
    (found,) = mountpoint.parse_mountinfo(line)
    assert os.fsencode(found.path) == b"/srv/\xff"


def test_find_what_is_mounted() -> None:
    found = mountpoint.find("/proc")
    assert found is not None and found.kind == "proc"
    assert mountpoint.find("/proc/self") is None


def test_find_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    found = mountpoint.find(str(tmp_path / "link"))
    assert found is not None and found.kind == "proc"


def test_a_free_directory(tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    with pytest.raises(mountpoint.Missing):
        mountpoint.check_free(str(directory))
    directory.mkdir()
    assert mountpoint.check_free(str(directory)) == str(directory)
    (directory / "x").touch()
    with pytest.raises(mountpoint.NotEmpty, match="'x'"):
        mountpoint.check_free(str(directory))
    with pytest.raises(mountpoint.NotADirectory):
        mountpoint.check_free(str(directory / "x"))
    with pytest.raises(mountpoint.Occupied, match="proc"):
        mountpoint.check_free("/proc")


def test_users_of_a_mount() -> None:
    reader = subprocess.Popen(["sleep", "100"], cwd="/proc/sys")
    try:
        assert (reader.pid, "sleep") in mountpoint.users("/proc")
    finally:
        reader.kill()
        reader.wait()


def test_unmount_of_nothing(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("umount2(2) is for root")
    with pytest.raises(mountpoint.NotMounted):
        mountpoint.unmount(str(tmp_path))


def test_mount_options() -> None:
    options = mount_options("file:///a,b\\c", {"suid", "ro"})
    assert options == {
        "default_permissions",
        "allow_other",
        "fsname=file:///a\\,b\\\\c",
        "subtype=csvfs",
        "suid",
        "ro",
    }


def test_an_alarm_ends_a_read_that_holds_the_interpreter() -> None:
    """pyfuse3's read(2) of a request that was withdrawn: EINTR instead of a hang."""
    libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the interpreter lock is held
    reader, writer = os.pipe()
    try:
        buffer = ctypes.create_string_buffer(1)
        with unblocked_reads():
            assert libc.read(reader, buffer, 1) == -1
            assert ctypes.get_errno() == errno.EINTR
    finally:
        os.close(reader)
        os.close(writer)


def test_importing_mountpoint_is_cheap() -> None:
    """The supervisor imports it, and stays small."""
    code = (
        "import sys, csvfs.host.mountpoint;"
        "sys.exit(any(m in sys.modules for m in ('trio', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
