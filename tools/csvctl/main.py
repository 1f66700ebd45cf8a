"""csvctl: the command line.

Each command is a file of its own; this one puts them together and ends the process. A command ends
well by returning, badly by raising: a `Problem`, or anything that `problem_of` makes one. The
message and the exit code come from `csvctl.outcomes`. Nothing slow is imported before it is needed:
``csvctl --help`` loads neither trio nor the filesystem.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from csvctl import console, password
from csvctl.check_cmd import check
from csvctl.dump_cmd import dump
from csvctl.format_cmd import format_lun
from csvctl.lab.command import make_lab_app
from csvctl.lock_cmd import lock
from csvctl.mount_cmd import mount
from csvctl.node_cmd import node
from csvctl.outcomes import OUTCOMES, fsck_code
from csvctl.resignature_cmd import resignature
from csvctl.status_cmd import status
from csvctl.umount_cmd import umount
from csvctl.validate_cmd import validate
from csvfs.host.problems import Kind, Problem, problem_of

HELP = """csvfs: Cluster Shared Volumes for Linux. VM images on an iSCSI LUN.

LUN is a URL: iscsi://[user@]host[:port]/target-iqn/lun, or file:///absolute/path.

Exit codes: 0 done; 64 to 99 bad input, each case its own; 70 a bug; `check` ends as fsck(8),
`validate` with 1 for warnings and 2 for a failed property."""


def make_app() -> typer.Typer:
    """The commands; plain help where it is piped."""
    app = typer.Typer(
        name="csvctl",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("format", no_args_is_help=True)(format_lun)
    app.command("mount", no_args_is_help=True)(mount)
    app.command("umount", no_args_is_help=True)(umount)
    app.command("status")(status)
    app.command("check", no_args_is_help=True)(check)
    app.command("resignature", no_args_is_help=True)(resignature)
    app.command("dump", no_args_is_help=True)(dump)
    app.command("validate", no_args_is_help=True)(validate)
    app.add_typer(node, name="node")
    app.add_typer(lock, name="lock")
    app.add_typer(make_lab_app(), name="lab")
    return app


def run(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    command = next((each for each in arguments if not each.startswith("-")), "")
    name = f"csvctl {command}".rstrip()
    try:
        code = make_app()(arguments, prog_name="csvctl", standalone_mode=False)
    except typer.TyperException as error:
        problem = Problem(Kind.USAGE, error.format_message())
    except BrokenPipeError:  # `csvctl status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        problem = Problem(Kind.INTERRUPTED, "interrupted")
    except Exception as error:
        problem = problem_of(error)
        if problem.kind is Kind.BUG:
            traceback.print_exc()
    else:
        if code != _INTERRUPTED_BY_TYPER:
            return int(code or 0)
        problem = Problem(Kind.INTERRUPTED, "interrupted")
    console.complain(name, problem)
    return fsck_code(problem.kind) if command == "check" else OUTCOMES[problem.kind].code


_INTERRUPTED_BY_TYPER = 130


def main() -> None:
    """Entry point of the console script."""
    password.hide()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
