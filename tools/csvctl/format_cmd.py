"""csvctl format: make a volume of a LUN."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun
from csvctl.sizes import parse_key, parse_size
from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvfs.format import Superblock
    from csvfs.mkfs import FormatOptions
    from redirector.block.device import LunIdentity
    from redirector.block.probe_result import ProbeResult


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
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Remove this key, whose owner is gone for good. May be repeated."
        ),
    ] = None,
) -> None:
    """Make an empty csvfs volume of LUN. What was on it is lost.

    Refuses a LUN that carries anything (a partition table, a filesystem, LVM, VMFS, csvfs), or at
    which somebody is registered. Probes the target first, and refuses one that cannot keep hosts
    apart.

    Example: csvctl format iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1 --label vms
    """
    journal_bytes = parse_size(journal_size) if journal_size else None
    keys = frozenset(parse_key(each) for each in preempt_key or ())
    argument = read_lun(lun)
    from csvfs.mkfs import FormatOptions

    options = FormatOptions(label=label, slots=slots, journal_bytes=journal_bytes)
    import trio

    superblock = trio.run(_format, argument, options, force, keys)
    geometry = superblock.geometry
    console.facts(
        [
            ("volume", f"{superblock.label} ({superblock.volume_id.hex()})"),
            ("hosts", f"{geometry.slots}, each with a journal of {_journal_text(superblock)}"),
        ]
    )


async def _format(
    lun: LunArgument, options: FormatOptions, force: bool, preempt_keys: frozenset[int]
) -> Superblock:
    from csvfs.host import places
    from csvfs.mkfs_claim import Formatter

    with console.progress_bar("formatting") as progress:
        formatter = Formatter(
            lun.open(),
            places.initiator_name(),
            options,
            force=force,
            preempt_keys=preempt_keys,
            now_ns=time.time_ns(),
            show=_show_lun,
            report=_show_probe,
            progress=progress,
        )
        try:
            return await formatter.run()
        except ValueError as error:
            from csvfs.format import BadGeometry

            if isinstance(error, BadGeometry):
                raise
            raise Problem(Kind.USAGE, str(error)) from None


def _show_lun(identity: LunIdentity) -> None:
    """Whose LUN it is, before anything is changed."""
    console.facts(
        [
            ("LUN", f"{identity.vendor} {identity.product}".strip() or "unknown"),
            ("serial", identity.serial or "none"),
            ("size", console.size_text(identity.size_bytes)),
        ]
    )


def _show_probe(result: ProbeResult) -> None:
    """What the target does not do, though csvfs could use it."""
    for finding in result.findings:
        if not finding.passed and not finding.needed:
            console.note(f"note: {finding.name}: {finding.meaning}")


def _journal_text(superblock: Superblock) -> str:
    return console.size_text(superblock.geometry.journal_units << 16)
