"""csvctl format: make a volume of a LUN."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun
from csvctl.sizes import parse_key, parse_size


def format_lun(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    label: Annotated[str, typer.Option(metavar="NAME", help="The volume's name.")],
    slots: Annotated[int, typer.Option(min=1, max=64, help="Hosts that may mount it.")] = 16,
    journal_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Of each host's journal. Default: min(64M, LUN/256)."),
    ] = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Destroy what is on the LUN; never while somebody is registered."
        ),
    ] = False,
    preempt_key: Annotated[
        str,
        typer.Option(metavar="KEY", help="Remove this key, whose owner is gone for good."),
    ] = "",
) -> None:
    """Make an empty csvfs volume of LUN. What was on it is lost.

    Refuses a LUN that carries anything (a partition table, a filesystem, LVM, VMFS, csvfs), or at
    which somebody is registered. Probes the target first.

    Example: csvctl format iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1 --label vms
    """
    journal_bytes = parse_size(journal_size) if journal_size else None
    key = parse_key(preempt_key) if preempt_key else None
    argument = read_lun(lun)
    import trio

    trio.run(_format, argument, label, slots, journal_bytes, force, key)


async def _format(
    lun: LunArgument,
    label: str,
    slots: int,
    journal_bytes: int | None,
    force: bool,
    preempt_key: int | None,
) -> None:
    from random import SystemRandom

    from csvfs import places
    from csvfs.mkfs import FormatOptions, make_filesystem
    from redirector.block.keys import choose_port

    device = await lun.open().login(choose_port(places.initiator_name(), SystemRandom()))
    with console.progress_bar("formatting") as progress:
        await make_filesystem(
            device,
            FormatOptions(label=label, slots=slots, journal_bytes=journal_bytes),
            now_ns=time.time_ns(),
            progress=progress,
        )
    await device.aclose()
