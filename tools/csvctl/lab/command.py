"""csvctl lab: a cluster on one machine, to try csvfs and to break it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import require_root
from csvctl.sizes import parse_size
from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvctl.lab.host import Host
    from csvctl.lab.state import LabState

_HELP = """A cluster on one machine: hosts in network namespaces, a target, faults and scenarios.

Each host has a link to a SAN and one to its peers; its volume is mounted at DIR/host1, DIR/host2
and so on, where everybody sees it. Nothing of it touches the machine's own network."""

Directory = Annotated[
    Path,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="The lab's directory.",
        envvar="CSVFS_LAB_DIR",
        show_default=True,
    ),
]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="host1, host2 and so on.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]

_DEFAULT = Path("/var/lib/csvfs-lab")


def make_lab_app() -> typer.Typer:
    """The commands below `csvctl lab`."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)
    app.command("up")(up)
    app.command("status")(status)
    app.command("exec", no_args_is_help=True)(execute)
    app.command("fault", no_args_is_help=True)(fault)
    app.command("heal", no_args_is_help=True)(heal)
    app.command("run")(run)
    app.command("down")(down)
    return app


def up(
    hosts: Annotated[int, typer.Option("--hosts", metavar="N", help="How many, 1 to 64.")] = 3,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Of the LUN.")] = "4G",
    directory: Directory = _DEFAULT,
) -> None:
    """Make a lab: network, target, a formatted LUN, mounted on every host.

    Example: csvctl lab up --hosts 3 --dir /tmp/lab
    """
    require_root()
    from csvctl.lab import lab

    with console.spinner("lab up") as tell:
        made = lab.up(_absolute(directory), hosts, parse_size(size), tell)
    for host in made.hosts:
        console.say(f"{host.name} is mounted at {made.path / host.name}")
    console.say(f"lab {made.id}: {made.lun}; logs in {made.path / 'log'}")


def status(directory: Directory = _DEFAULT, as_json: Json = False) -> None:
    """Show the lab's hosts: where they are mounted, and which faults they have."""
    require_root()
    from csvctl.lab import lab, state

    shown = lab.describe(state.read(_absolute(directory)))
    if as_json:
        console.say(json.dumps(shown, indent=2))
        return
    served = f"served by pid {shown['target']['pids'][0]}" if shown["target"]["pids"] else "down"
    console.say(f"lab {shown['id']} in {shown['directory']}: {shown['lun']}, {served}")
    for host in shown["hosts"]:
        console.say(f"  {host['name']:<7} {host['mount']:<8} {_faults_text(host['faults'])}")


def execute(
    host: HostName,
    command: Annotated[list[str], typer.Argument(metavar="CMD...", help="What to run there.")],
    directory: Directory = _DEFAULT,
) -> None:
    """Run a command on a host: in its network, with csvctl's files of that host.

    Ends with the command's own exit code. Example: csvctl lab exec host2 -- csvctl status
    """
    require_root()
    from csvctl.lab.host import enter

    found = _host(_absolute(directory), host)
    words = [*enter(found.lab, found.name), *command]
    if not found.namespace:
        raise AssertionError("a host without a namespace is a Problem")
    os.execvpe(words[0], words, found.environment())


def fault(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="One of those listed below.")],
    host: Annotated[str, typer.Argument(metavar="[HOST]", help="Not for target-restart.")] = "",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0, help="slow-san: how much later.")
    ] = 0.2,
    directory: Directory = _DEFAULT,
) -> None:
    """Break something.

    san-cut: the SAN link drops everything, silently. san-reset: connections to the target are
    closed, and new ones refused. net-cut: as san-cut, to the peers. slow-san: the target answers
    later. kill, freeze: SIGKILL or SIGSTOP for the daemon. power-off: both links cut, then
    everything on the host killed. target-restart: the target forgets its sessions and reservations.

    Example: csvctl lab fault san-cut host2
    """
    require_root()
    from csvctl.lab import faults, state

    if kind not in list(faults.Fault):
        raise Problem(Kind.USAGE, f"{kind!r} is no fault; there are {', '.join(faults.Fault)}")
    if not host and kind != faults.Fault.TARGET_RESTART:
        raise Problem(Kind.USAGE, f"{kind} wants a host, such as host1")
    with state.changing(_absolute(directory)) as found:
        faults.strike(_member(found, host or "host1"), faults.Fault(kind), seconds)


def heal(host: HostName, directory: Directory = _DEFAULT) -> None:
    """Undo every fault of a host; where its daemon has ended, mount again as a new incarnation."""
    require_root()
    from csvctl.lab import faults, state

    with state.changing(_absolute(directory)) as found:
        member = _member(found, host)
        faults.mend(member)
        state.write(found)
        if member.daemon() is None:
            member.mount()
            console.say(f"{member.name} is mounted again at {member.mountpoint}")


def run(
    scenario: Annotated[
        str, typer.Argument(metavar="[SCENARIO]", help="Left out: list what there is.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of what is done at random.")
    ] = None,
    directory: Directory = _DEFAULT,
    as_json: Json = False,
) -> None:
    """Play a scenario: programs write and read on the hosts, something breaks, all is compared.

    Ends with 0 if nothing was lost, stale or late and `csvctl check` found the volume clean, else
    with 1. Example: csvctl lab run san-cut --json
    """
    from csvctl.lab.scenarios import SCENARIOS, play

    if not scenario:
        for name, each in SCENARIOS.items():
            console.say(f"{name:<30} {each.summary}")
        return
    require_root()
    with console.spinner(f"lab run {scenario}") as tell:
        result = play(_absolute(directory), scenario, tell, seed)
    if as_json:
        console.say(json.dumps(result))
    else:
        details: dict[str, Any] = result.pop("details")
        console.facts([(name, str(value)) for name, value in result.items()])
        for name, value in details.items():
            console.say(f"  {name}: {value}")
    raise typer.Exit(0 if result["ok"] else 1)


def down(
    directory: Directory = _DEFAULT,
    every: Annotated[
        bool, typer.Option("--all", help="Every lab of this machine, and what is left of any.")
    ] = False,
) -> None:
    """Take the lab away: processes, mounts, links, namespaces, files. The LUN's content is gone."""
    require_root()
    from csvctl.lab import lab, state

    found = state.known().items() if every else [lab.find(_absolute(directory))]
    for lab_id, place in found:
        lab.down(lab_id, place)
        console.say(f"lab {lab_id} is gone")


def _host(directory: Path, name: str) -> Host:
    from csvctl.lab import state

    return _member(state.read(directory), name)


def _member(lab: LabState, name: str) -> Host:
    from csvctl.lab.host import Host

    return Host(lab, lab.host(name))


def _absolute(directory: Path) -> Path:
    return Path(os.path.realpath(directory))


def _faults_text(faults: dict[str, float]) -> str:
    return ", ".join(f"{kind} {each:g} s" if each else kind for kind, each in faults.items())
