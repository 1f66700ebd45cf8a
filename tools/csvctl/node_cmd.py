"""csvctl node: who uses a volume, and making one go."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import require_root
from csvctl.mounted import ask_daemon, the_mount

node = typer.Typer(help="Show the hosts that use a volume, or evict one.", no_args_is_help=True)

_EVICTION_LIMIT_S = 35.0
"""A little longer than the daemon waits (`csvfs.host.attach.EVICTION_LIMIT_S`): it says why."""
_DIRECTORY = typer.Argument(metavar="[DIR]", help="The mount; needed if there are several.")


@node.command("list")
def list_nodes(
    directory: Annotated[str, _DIRECTORY] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show every host of the volume, as this host sees them.

    Example: csvctl node list /srv/vms
    """
    require_root()
    answer = ask_daemon(the_mount(directory), "nodes")
    if as_json:
        console.say(json.dumps(answer, indent=2))
        return
    console.say(f"view {answer['epoch']}, coordinator: {answer['coordinator'] or 'nobody'}")
    console.table(
        ("SLOT", "NODE", "LIFE", "STATE", "PATH", "LAST SEEN", "ROUND TRIP", "ADDRESS"),
        [_row(each) for each in answer["nodes"]],
    )


def _row(shown: dict[str, Any]) -> tuple[str, ...]:
    seen, trip = shown["last_seen_s"], shown["round_trip_ms"]
    return (
        str(shown["slot"]),
        shown["node"] + " *" * shown["is_this_host"],
        str(shown["incarnation"]),
        shown["state"],
        shown["path"],
        "-" if seen is None else f"{seen:.1f} s ago",
        "-" if trip is None else f"{trip:.2f} ms",
        ", ".join(shown["addresses"]) or "-",
    )


@node.command("evict")
def evict(
    name: Annotated[str, typer.Argument(metavar="NODE", help="Its name, as `node list` shows it.")],
    directory: Annotated[str, _DIRECTORY] = "",
    why: Annotated[
        str, typer.Option("--why", metavar="TEXT", help="For this host's log.")
    ] = "an administrator asked for it",
) -> None:
    """Make a host go: it is fenced at the target, its journal replayed, its locks given to others.

    Its virtual machines on this volume see I/O errors. It may mount again at once.

    Example: csvctl node evict host3 --why "its NIC is to be replaced"
    """
    require_root()
    record = the_mount(directory)
    answer = ask_daemon(record, "evict", timeout_s=_EVICTION_LIMIT_S, node=name, why=why)
    view = "" if answer["epoch"] is None else f": view {answer['epoch']}"
    console.say(f"{name} (slot {answer['slot']}) is evicted{view}")
