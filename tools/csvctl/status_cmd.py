"""csvctl status: what this host has mounted, and how it fares."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import require_root

if TYPE_CHECKING:
    from csvfs.host.record import MountRecord

ANSWER_LIMIT_S = 5.0
_HEADLINE = ("directory", "state", "label", "volume_id")


def status(
    directory: Annotated[
        str, typer.Argument(metavar="[DIR]", help="One mount; all of this host if left out.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the volumes that this host has mounted, or what became of them.

    Example: csvctl status /srv/vms --json
    """
    require_root()
    from csvfs.host import mountpoint
    from csvfs.host.problems import Kind, Problem
    from csvfs.host.record import find_record, records

    if directory:
        found = find_record(mountpoint.resolve(directory))
        if found is None:
            raise Problem(Kind.NOT_MOUNTED, f"no csvfs volume is mounted at {directory}")
        shown = look(found)
        console.say(json.dumps(shown, indent=2)) if as_json else _show(shown)
        return
    every = [look(record) for record in records()]
    if as_json:
        console.say(json.dumps(every, indent=2))
        return
    for number, shown in enumerate(every):
        if number:
            console.say("")
        _show(shown)
    if not every:
        console.say("no csvfs volume is mounted on this host")


def look(record: MountRecord) -> dict[str, Any]:
    """Everything known of a mount: what its daemon says, or what was written down of its end."""
    from csvfs.host import admin, places
    from csvfs.host.daemon_lock import daemon_lives
    from csvfs.host.problems import Problem
    from csvfs.host.record import MountState

    volume_id = bytes.fromhex(record.volume_id)
    shown: dict[str, Any] = {
        "directory": record.directory,
        "state": str(record.state),
        "label": record.label,
        "volume_id": record.volume_id,
        "url": record.url,
        "node": record.node,
        "pid": record.pid,
        "log": record.log,
    }
    if not daemon_lives(volume_id):
        shown["state"] = str(MountState.FAILED)
        shown["reason"] = record.reason or "the daemon ended without a word"
        return shown
    try:
        shown |= admin.ask(places.socket_path(volume_id), "status", timeout_s=ANSWER_LIMIT_S)
    except Problem as problem:
        shown["state"] = "no answer"
        shown["reason"] = problem.what
    return shown


def _show(shown: dict[str, Any]) -> None:
    console.say(f"{shown['directory']}: {shown['state'].upper()}")
    pairs = [("volume", f"{shown['label']} ({shown['volume_id']})")]
    first = [name for name in ("url", "node", "reason") if name in shown]
    rest = [name for name in shown if name not in {*first, *_HEADLINE}]
    for name in (*first, *rest):
        title = name.replace("_", " ").removesuffix(" bytes").removesuffix(" ns")
        pairs.append((title, _text(name, shown[name])))
    for name, value in pairs:
        console.say(f"  {name + ':':<18} {value}")


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return console.size_text(value)
    if name.endswith("_ns"):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value / 1e9))
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {each}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(str(each) for each in value) or "none"
    return str(value)
