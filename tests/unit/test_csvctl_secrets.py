"""Passwords: where they are read, who may read them, and where they never appear."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csvctl import password
from csvctl.credentials import find_credentials
from csvctl.lun_argument import read_lun
from csvfs.host.logs import JournalHandler, Redact, logging_to
from csvfs.host.problems import Kind, Problem
from csvfs.host.settings import MountSettings
from redirector.block.url import parse_lun_url

IQN = "iqn.2026-11.org.example:vms"


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSVFS_CONFIG_DIR", str(tmp_path))
    path = tmp_path / "credentials"
    path.write_text(
        f"# comment\n\n{IQN} host1 correct horse battery\n10.0.0.9 admin hunter2\n* other last\n"
    )
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("url", "user", "secret"),
    [
        (f"iscsi://10.0.0.5/{IQN}/1", "host1", "correct horse battery"),
        (f"iscsi://host1@10.0.0.5/{IQN}/1", "host1", "correct horse battery"),
        (f"iscsi://other@10.0.0.5/{IQN}/1", "other", "last"),
        ("iscsi://10.0.0.9:3261/iqn.2026-11.org.example:x/1", "admin", "hunter2"),
        ("iscsi://10.0.0.5/iqn.2026-11.org.example:x/1", "other", "last"),
    ],
)
def test_the_first_line_that_fits(credentials: Path, url: str, user: str, secret: str) -> None:
    found = find_credentials(parse_lun_url(url))
    assert found is not None
    assert (found.user, found.password) == (user, secret)
    assert credentials.exists()


def test_files_have_no_credentials(credentials: Path) -> None:
    credentials.chmod(0o644)
    assert find_credentials(parse_lun_url("file:///x")) is None


def test_no_file_is_no_credentials(credentials: Path) -> None:
    credentials.unlink()
    assert find_credentials(parse_lun_url(f"iscsi://10.0.0.5/{IQN}/1")) is None
    with pytest.raises(Problem, match="no password for user 'me'") as raised:
        find_credentials(parse_lun_url(f"iscsi://me@10.0.0.5/{IQN}/1"))
    assert raised.value.kind is Kind.CREDENTIALS


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(credentials: Path, mode: int) -> None:
    credentials.chmod(mode)
    with pytest.raises(Problem, match=f"mode {mode:04o}") as raised:
        find_credentials(parse_lun_url(f"iscsi://10.0.0.5/{IQN}/1"))
    assert raised.value.kind is Kind.CREDENTIALS
    assert "horse" not in raised.value.what


def test_a_line_that_cannot_be_read_is_named_without_its_content(credentials: Path) -> None:
    credentials.write_text("secretonly\n")
    with pytest.raises(Problem, match="line 1") as raised:
        find_credentials(parse_lun_url(f"iscsi://10.0.0.5/{IQN}/1"))
    assert "secretonly" not in raised.value.what


@pytest.mark.parametrize(
    ("argument", "plain", "secret"),
    [
        (f"iscsi://u:p%40ss@h/{IQN}/1", f"iscsi://u@h/{IQN}/1", "p@ss"),
        (f"iscsi://u:a:b@h:3260/{IQN}/1", f"iscsi://u@h:3260/{IQN}/1", "a:b"),
        (f"iscsi://u@h:3260/{IQN}/1", f"iscsi://u@h:3260/{IQN}/1", ""),
        (f"iscsi://h:3260/{IQN}/1", f"iscsi://h:3260/{IQN}/1", ""),
        ("file:///a:b@c/d", "file:///a:b@c/d", ""),
        ("/srv/vms", "/srv/vms", ""),
    ],
)
def test_a_password_is_cut_out_of_an_argument(argument: str, plain: str, secret: str) -> None:
    assert password.split(argument) == (plain, secret)


def test_a_password_on_the_command_line_is_hidden_and_handed_on() -> None:
    code = (
        "import os, sys\n"
        "from csvctl import password\n"
        "password.hide()\n"
        "line = open('/proc/self/cmdline').read().split(chr(0))\n"
        "environment = open('/proc/self/environ').read()\n"
        "assert not any('s3cret' in each for each in line[3:]), line\n"
        "assert 's3cret' not in environment\n"
        "print(line[3], password.taken(), repr(password.taken()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"iscsi://u:s3cret@h/{IQN}/1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"iscsi://u@h/{IQN}/1", "s3cret", "''"]


def test_a_password_in_a_url_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    found = read_lun(f"iscsi://u:s3cret@h/{IQN}/1")
    assert found.credentials is not None
    assert found.credentials.password == "s3cret"
    assert "s3cret" not in repr(found)
    told = capsys.readouterr().err
    assert "warning" in told and "/etc/csvfs/credentials" in told and "s3cret" not in told


def test_settings_travel_whole_and_show_no_password() -> None:
    settings = MountSettings("s", "u", "/d", "n", "i", ("ro",), True, "user", "s3cret")
    assert MountSettings.decode(settings.encode()) == settings
    assert "s3cret" not in repr(settings)
    assert settings.credentials is not None
    assert settings.credentials.password == "s3cret"


def test_the_log_never_holds_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with logging_to(str(log), "s3cret", ""):
        logging.getLogger("x").info("login as %s with %s", "user", "s3cret")
        try:
            raise ValueError("bad password: s3cret")
        except ValueError:
            logging.getLogger("x").exception("oops")
    text = log.read_text()
    assert "login as user with ***" in text
    assert "bad password: ***" in text
    assert "s3cret" not in text


def test_a_journal_datagram() -> None:
    handler = JournalHandler("/nowhere")
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "two\nlines", (), None)
    assert Redact("lines").filter(record)
    data = handler.encode(record)
    assert data.startswith(b"PRIORITY=4\nSYSLOG_IDENTIFIER=csvfs\nMESSAGE\n")
    assert data.endswith((7).to_bytes(8, "little") + b"two\n***\n")
    handler.close()


def test_root_owns_it(credentials: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(credentials, 12345, -1)
    with pytest.raises(Problem, match="uid 12345"):
        find_credentials(parse_lun_url(f"iscsi://10.0.0.5/{IQN}/1"))
