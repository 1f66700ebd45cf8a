"""csvctl lock: what is locked on a volume, by whom, and who waits for whom."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import require_root
from csvctl.mounted import ask_daemon, the_mount

lock = typer.Typer(help="Show the locks of a volume.", no_args_is_help=True)


@lock.command("list")
def list_locks(
    directory: Annotated[
        str, typer.Argument(metavar="[DIR]", help="The mount; needed if there are several.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    cached: Annotated[
        bool, typer.Option("--all", help="Also what is only cached, and nobody waits for.")
    ] = False,
) -> None:
    """Show resources with their holders and waiters, the longest wait first.

    Numbers of inodes are those of `ls -i`.

    Example: csvctl lock list /srv/vms --all
    """
    require_root()
    answer = ask_daemon(the_mount(directory), "locks", all=cached)
    if as_json:
        console.say(json.dumps(answer, indent=2))
        return
    for each in answer["locks"]:
        _show(each)
    for words in answer["deadlocks"]:
        console.warn(f"a deadlock: {words}")
    if answer["recovering"]:
        console.warn("the view has just changed: locks are being recovered, nothing is granted")
    if answer["silent"]:
        console.warn(f"no answer, or not a whole one, from {', '.join(answer['silent'])}")
    if answer["truncated"]:
        console.warn("there are more locks than are shown")
    if not answer["locks"]:
        console.say("nothing is in use" if not cached else "nothing is locked")


def _show(shown: dict[str, Any]) -> None:
    console.say(f"{shown['resource']}  (master: {shown['master']})")
    for kind in ("holders", "waiters"):
        for each in shown[kind]:
            tasks = f"  {', '.join(each['tasks'])}" if each["tasks"] else ""
            age = "" if each["age_s"] is None else f" for {each['age_s']:.1f} s"
            verb = "holds" if kind == "holders" else "waits for"
            console.say(f"  {each['node']:<12} {verb} {each['mode']}{age}{tasks}")
    for words in shown["waits_for"]:
        console.say(f"  {words}")
