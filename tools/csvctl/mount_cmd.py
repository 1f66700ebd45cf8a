"""csvctl mount: take the volume and mount it."""

from __future__ import annotations

from typing import Annotated

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun, require_root
from csvfs.host import places
from csvfs.host.problems import Kind, Problem

LEAST_EVICT_AFTER_S = 5.0
"""Less, and a host is evicted before its own sessions are given up as silent."""
MOST_EVICT_AFTER_S = 600.0


def mount(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An empty directory.")],
    node: Annotated[
        str, typer.Option(metavar="NAME", help="This host's name. Default: the host name.")
    ] = "",
    initiator: Annotated[
        str,
        typer.Option(
            metavar="IQN",
            help="InitiatorName. Default: that of /etc/iscsi/initiatorname.iscsi, or one made "
            "from the machine id.",
        ),
    ] = "",
    cluster_address: Annotated[
        str,
        typer.Option(
            metavar="ADDR[:PORT]",
            help="This host's numeric address for its peers, TCP and UDP; port 21065 unless given. "
            "Without it this host can use the volume only alone.",
        ),
    ] = "",
    evict_after_s: Annotated[
        float,
        typer.Option(
            "--evict-after",
            metavar="SECONDS",
            min=LEAST_EVICT_AFTER_S,
            max=MOST_EVICT_AFTER_S,
            help="How long another host may be silent before it is evicted; the same on all hosts.",
        ),
    ] = 6.0,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and log to stderr, until it is unmounted.")
    ] = False,
) -> None:
    """Mount the volume on LUN at DIR, and detach once the mount answers.

    Example: csvctl mount iscsi://san1/iqn.2026-11.org.x:vms/1 /srv/vms --cluster-address 10.1.0.1

    fcntl and flock locks, QEMU's image locks among them, do not cross hosts yet.

    CHAP users and passwords are read from /etc/csvfs/credentials (mode 0600), one a line:
    TARGET-IQN USER PASSWORD.
    """
    require_root()
    mount_lun(
        read_lun(lun),
        directory,
        node=node,
        initiator=initiator,
        cluster_address=cluster_address,
        evict_after_s=evict_after_s,
        foreground=foreground,
    )


def mount_lun(
    lun: LunArgument,
    directory: str,
    *,
    node: str = "",
    initiator: str = "",
    cluster_address: str = "",
    evict_after_s: float = 6.0,
    options: tuple[str, ...] = (),
    foreground: bool = False,
    quiet: bool = False,
) -> None:
    """Mount; returns when the mount answers, or in the foreground when it has ended.

    Raises `Problem`, `csvfs.host.mountpoint.MountPointError`, OSError.
    """
    from csvctl.launch import launch, run_in_foreground
    from csvfs.host import mountpoint
    from csvfs.host.dead_mount import detach_dead_mount
    from csvfs.host.events import EventKind
    from csvfs.host.settings import MountSettings

    if detach_dead_mount(directory):
        console.note(f"{directory}: the daemon of an earlier mount was gone; its mount is detached")
    settings = MountSettings(
        source=lun.text,
        url=str(lun.url),
        directory=mountpoint.check_free(directory),
        node=_node_name(node or places.node_name()),
        initiator=_initiator_name(initiator or places.initiator_name()),
        cluster_address=_cluster_address(cluster_address),
        evict_after_s=evict_after_s,
        options=options,
        foreground=foreground,
        user=lun.credentials.user if lun.credentials else "",
        password=lun.credentials.password if lun.credentials else "",
    )
    if foreground:
        for event in run_in_foreground(settings):
            console.note(event.text)
        return
    with console.spinner(f"mounting at {directory}") as show:
        for event in launch(settings):
            if event.kind is EventKind.WARNING:
                console.warn(event.text)
            elif event.kind is EventKind.READY and not quiet:
                console.say(event.text)
            else:
                show(event.text)


def _node_name(name: str) -> str:
    if not name.isprintable() or not 0 < len(name.encode()) <= 64 or "/" in name:
        raise Problem(Kind.USAGE, f"the node name {name!r} is not 1 to 64 printable bytes")
    return name


def _cluster_address(text: str) -> str:
    from lockmgr.cluster.peers import parse_address

    try:
        return str(parse_address(text)) if text else ""
    except ValueError as error:
        raise Problem(Kind.USAGE, f"--cluster-address: {error}") from error


def _initiator_name(name: str) -> str:
    if not name.startswith(("iqn.", "eui.", "naa.")) or len(name) > 223 or name.split() != [name]:
        raise Problem(Kind.USAGE, f"{name!r} is not an initiator name such as iqn.2026-11.org.x:h")
    return name
