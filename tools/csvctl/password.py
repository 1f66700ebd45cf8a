"""A password in a LUN's URL: accepted, warned of, and taken out of what ps shows.

The first thing csvctl does is look for one in its command line. If there is, it writes it into a
pipe and executes itself again with the URL as it should have been: from then on neither
/proc/PID/cmdline nor the environment holds it. (For the moment until then, and in the shell's
history, it stands. So the warning.)
"""

from __future__ import annotations

import os
import re
import sys
from typing import Final
from urllib.parse import unquote

_FD_VARIABLE: Final = "CSVFS_PASSWORD_FD"
_WITH_PASSWORD: Final = re.compile(r"^(iscsi://[^/:@]*):([^/]*)(@[^/@]*/.*)$", re.DOTALL)

WARNING: Final = (
    "a password on the command line is seen by every user of this host and kept in the shell's "
    "history: put it into /etc/csvfs/credentials instead, and change it"
)


def split(argument: str) -> tuple[str, str]:
    """(the argument without a password, the password or "")."""
    found = _WITH_PASSWORD.match(argument)
    if found is None:
        return argument, ""
    return found[1] + found[3], unquote(found[2])


def hide() -> None:
    """Execute this program again without the password, if its command line has one."""
    pairs = [split(each) for each in sys.orig_argv]
    password = next((secret for _, secret in pairs if secret), "")
    if not password:
        return
    reader, writer = os.pipe()
    os.write(writer, password.encode())
    os.close(writer)
    os.set_inheritable(reader, True)
    os.environ[_FD_VARIABLE] = str(reader)
    os.execv(sys.executable, [sys.executable, *(plain for plain, _ in pairs[1:])])


def taken() -> str:
    """The password that `hide` took out, once; "" if there was none."""
    fd = os.environ.pop(_FD_VARIABLE, None)
    if fd is None:
        return ""
    with open(int(fd), encoding="utf-8") as pipe:
        return pipe.read()
