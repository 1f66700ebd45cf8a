"""LUN URLs: what is read, what is refused, and that no password is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirector.block.device import AuthenticationFailed, BadUrl, Credentials
from redirector.block.file import FileLun
from redirector.block.url import LunUrl, open_lun, parse_lun_url

IQN = "iqn.2026-11.org.example:disk1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"iscsi://san/{IQN}/1", LunUrl("iscsi", "san", 3260, IQN, 1)),
        (f"iscsi://10.0.0.7:3261/{IQN}/0", LunUrl("iscsi", "10.0.0.7", 3261, IQN, 0)),
        (f"iscsi://[fe80::1]:3261/{IQN}/2", LunUrl("iscsi", "fe80::1", 3261, IQN, 2)),
        (f"iscsi://eve@san/{IQN}/1", LunUrl("iscsi", "san", 3260, IQN, 1, "eve")),
        (f"iscsi://e%40v:p%2Fw@san/{IQN}/1", LunUrl("iscsi", "san", 3260, IQN, 1, "e@v", "p/w")),
        (f"iscsi://san/{IQN}/16383", LunUrl("iscsi", "san", 3260, IQN, 16383)),
        (
            "iscsi://san/eui.0123456789abcdef/1",
            LunUrl("iscsi", "san", 3260, "eui.0123456789abcdef", 1),
        ),
        ("file:///var/lib/lun", LunUrl("file", path="/var/lib/lun")),
        ("file:///a%20b", LunUrl("file", path="/a b")),
    ],
)
def test_good_urls(text: str, expected: LunUrl) -> None:
    assert parse_lun_url(text) == expected
    shown = str(expected)
    again = parse_lun_url(shown)
    assert (again.host, again.target, again.user, again.path) == (
        expected.host,
        expected.target,
        expected.user,
        expected.path,
    )
    assert again.password == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a LUN URL"),
        ("/var/lib/lun", "file:///var/lib/lun"),
        ("san/iqn.x/1", "expected iscsi://"),
        ("nfs://san/x", "nfs://"),
        (f"iscsi:///{IQN}/1", "host is missing"),
        (f"iscsi://san:0/{IQN}/1", "port 0"),
        (f"iscsi://san:99999/{IQN}/1", "port"),
        (f"iscsi://san:x/{IQN}/1", "port"),
        (f"iscsi://[fe80::1/{IQN}/1", "address"),
        ("iscsi://san", "target name"),
        ("iscsi://san/disk1/1", "'disk1' is not a target name"),
        (f"iscsi://san/{IQN}", "LUN must be a number"),
        (f"iscsi://san/{IQN}/", "LUN must be a number"),
        (f"iscsi://san/{IQN}/one", "LUN must be a number"),
        (f"iscsi://san/{IQN}/16384", "LUN must be a number"),
        (f"iscsi://san/{IQN}/-1", "LUN must be a number"),
        (f"iscsi://san/{IQN}/1/2", "LUN must be a number"),
        (f"iscsi://san/{IQN}/1?x=1", "nothing may follow"),
        (f"iscsi://san/{IQN}/1#x", "nothing may follow"),
        (f"iscsi://:secret@san/{IQN}/1", "password without a user"),
        (f"iscsi://san/{IQN}/ 1", "blanks"),
        ("file://relative/path", "absolute path"),
        ("file:///dir/", "names no file"),
        ("file:///a%00b", "names no file"),
    ],
)
def test_bad_urls(text: str, words: str) -> None:
    with pytest.raises(BadUrl, match=r".") as caught:
        parse_lun_url(text)
    assert words in str(caught.value)


@given(st.text(alphabet="abc:/@[]?#%.0123 ", max_size=20), st.booleans())
def test_a_password_is_never_shown(noise: str, good: bool) -> None:
    text = f"iscsi://eve:S3CRET@san{'' if good else noise}/{IQN}/1{'' if good else noise}"
    try:
        url = parse_lun_url(text)
        shown = str(url) + repr(url)
    except BadUrl as error:
        shown = str(error)
    assert "S3CRET" not in shown


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        parse_lun_url(text)
    except BadUrl:
        pass


def test_open_file() -> None:
    lun = open_lun("file:///var/lib/some%20lun")
    assert isinstance(lun, FileLun)
    assert lun.path == Path("/var/lib/some lun")


def test_credentials() -> None:
    with pytest.raises(AuthenticationFailed, match="no password for user 'eve'"):
        open_lun(f"iscsi://eve@san/{IQN}/1")
    lun = open_lun(f"iscsi://eve:S3CRET@san/{IQN}/1")
    assert "S3CRET" not in lun.url
    assert getattr(lun, "credentials", None) == Credentials("eve", "S3CRET")
    lun = open_lun(f"iscsi://eve:S3CRET@san/{IQN}/1", Credentials("bob", "other"))
    assert getattr(lun, "credentials", None) == Credentials("bob", "other")
