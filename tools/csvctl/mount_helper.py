"""mount.csvfs: what mount(8) runs for ``mount -t csvfs LUN DIR`` and for fstab lines.

    iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1  /srv/vms  csvfs  _netdev  0 0

pip installs it beside csvctl, but mount(8) looks for its helpers in /sbin only:
``ln -s "$(command -v mount.csvfs)" /sbin/``.

Called as ``mount.csvfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`` (mount(8),
"external helpers"). Options of csvfs are ``node=NAME``, ``initiator=IQN``,
``cluster=ADDR[:PORT]``, ``evict_after=SECONDS``, ``allow_dev`` and ``allow_suid``; those of
mount(8) are handed on or, where they are for mount(8) alone, passed over. Any other is refused.
(mount(8) does not tell its helpers of ``dev`` and ``suid``, which it takes for granted: so a mount
is nodev and nosuid unless asked for in words of our own.)
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Final

from csvctl import console, password
from csvctl.outcomes import mount_code
from csvfs.host.problems import Kind, Problem, problem_of

NAME: Final = "mount.csvfs"
_FOR_THE_KERNEL: Final = frozenset(
    {
        "ro",
        "rw",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "sync",
        "async",
        "dirsync",
        "noatime",
        "nodiratime",
    }
)
_ALLOWED: Final = {"allow_dev": "dev", "allow_suid": "suid"}
_PASSED_OVER: Final = frozenset(
    {
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "nofail",
        "_netdev",
        "atime",
        "diratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
    }
)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What ``-o`` asked for."""

    node: str = ""
    initiator: str = ""
    kernel: tuple[str, ...] = ()
    cluster: str = ""
    evict_after_s: float = 6.0


def parse_options(text: str) -> MountOptions:
    """Read the value of ``-o``. Raises `Problem` (kind USAGE) for what nobody knows."""
    named = {"node": "", "initiator": "", "cluster": ""}
    evict_after_s = 6.0
    kernel = []
    for option in filter(None, text.split(",")):
        name, _, value = option.partition("=")
        if option in _FOR_THE_KERNEL:
            kernel.append(option)
        elif option in _ALLOWED:
            kernel.append(_ALLOWED[option])
        elif name in named and value:
            named[name] = value
        elif name == "evict_after" and value:
            evict_after_s = _evict_after(value)
        elif option == "remount":
            raise Problem(Kind.USAGE, "options cannot be changed by remount: unmount and mount")
        elif option not in _PASSED_OVER and not name.startswith(("x-", "comment")):
            raise Problem(Kind.USAGE, f"the mount option {option!r} is not known")
    return MountOptions(**named, kernel=tuple(kernel), evict_after_s=evict_after_s)


def _evict_after(text: str) -> float:
    from csvctl.mount_cmd import LEAST_EVICT_AFTER_S, MOST_EVICT_AFTER_S

    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_EVICT_AFTER_S <= seconds <= MOST_EVICT_AFTER_S:
        raise Problem(
            Kind.USAGE,
            f"evict_after={text}: seconds, {LEAST_EVICT_AFTER_S:g} to {MOST_EVICT_AFTER_S:g}",
        )
    return seconds


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # it does not return either
        raise Problem(Kind.USAGE, message)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog=NAME, description="Mount a csvfs volume (run by mount(8)).")
    parser.add_argument("source", help="the LUN's URL")
    parser.add_argument("directory")
    parser.add_argument("-o", dest="options", default="", help="comma-separated mount options")
    parser.add_argument("-f", dest="fake", action="store_true", help="do everything but mount")
    parser.add_argument("-v", dest="verbose", action="store_true")
    for ignored in ("-s", "-n"):
        parser.add_argument(ignored, action="store_true")
    for ignored in ("-N", "-t"):
        parser.add_argument(ignored)
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> int:
    """Mount; the exit code that mount(8) wants."""
    try:
        parsed = _parse(arguments)
        options = parse_options(parsed.options)
        from csvctl.lun_argument import read_lun, require_root
        from csvctl.mount_cmd import mount_lun

        require_root()
        lun = read_lun(parsed.source)
        if not parsed.fake:
            mount_lun(
                lun,
                parsed.directory,
                node=options.node,
                initiator=options.initiator,
                cluster_address=options.cluster,
                evict_after_s=options.evict_after_s,
                options=options.kernel,
                quiet=not parsed.verbose,
            )
        return 0
    except KeyboardInterrupt:
        problem = Problem(Kind.INTERRUPTED, "interrupted")
    except Exception as error:
        problem = problem_of(error)
        if problem.kind is Kind.BUG:
            traceback.print_exc()
    console.complain(NAME, problem)
    return mount_code(problem.kind)


def main() -> None:
    """Entry point of the console script."""
    # mount(8) clears the environment of a privileged mount, PATH included.
    os.environ.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    password.hide()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
