"""csvctl resignature: make a copy of a LUN a volume of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun
from csvctl.sizes import parse_key
from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvfs.resignature import Resigned
    from redirector.block.probe_result import ProbeResult


def resignature(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The URL of the copy.")],
    label: Annotated[
        str | None,
        typer.Option(metavar="NEW", help="The new volume's name. Default: as the original's."),
    ] = None,
    preempt_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Remove this key, whose owner is gone for good. May be repeated."
        ),
    ] = None,
) -> None:
    """Make LUN, a snapshot or clone that the array made of a volume's LUN, a volume of its own.

    Mounting a copy is refused, because it could not be told from the original. This gives the copy
    a volume id of its own, so that both can be mounted side by side, on one host too. The original
    may be mounted meanwhile: what its hosts' journals held when the copy was made is replayed, as
    after a power failure. Refuses a LUN that is no copy, and one that others use. Cut off, it is
    run again.

    Example: csvctl resignature iscsi://10.0.0.5/iqn.2026-11.org.example:vms/2 --label vms-test
    """
    keys = frozenset(parse_key(each) for each in preempt_key or ())
    argument = read_lun(lun)
    import trio

    done = trio.run(_resign, argument, label, keys)
    superblock = done.superblock
    former = done.former_volume_id.hex()
    again = ", begun by an earlier run" if done.resumed else ""
    console.say(
        f"volume {superblock.label} ({superblock.volume_id.hex()}), made of a copy of {former}"
        f"{again}: {done.renamed_blocks} metadata blocks renamed,"
        f" {done.replayed_records} journal records replayed"
    )


async def _resign(lun: LunArgument, label: str | None, preempt_keys: frozenset[int]) -> Resigned:
    from csvfs.host import places
    from csvfs.resignature_claim import Resigner

    with console.progress_bar("resignature") as progress:
        resigner = Resigner(
            lun.open(),
            places.initiator_name(),
            label=label,
            preempt_keys=preempt_keys,
            now_ns=time.time_ns(),
            report=_show_probe,
            progress=progress,
        )
        try:
            return await resigner.run()
        except ValueError as error:
            raise Problem(Kind.USAGE, str(error)) from None


def _show_probe(result: ProbeResult) -> None:
    """What the target does not do, though csvfs could use it."""
    for finding in result.findings:
        if not finding.passed and not finding.needed:
            console.note(f"note: {finding.name}: {finding.meaning}")
