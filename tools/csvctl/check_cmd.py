"""csvctl check: find damage, and mend it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun, require_root
from csvctl.sizes import parse_key
from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvfs.check import Report, Totals


def check(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is wrong.")] = False,
    preempt_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="With --repair, where both copies of the view are destroyed: remove this key,"
            " whose owner is gone for good. May be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check the volume on LUN, which must not be mounted anywhere.

    The volume is taken as by a mount: journals of this host's unclean ends are replayed first.
    With --repair it is taken even if both copies of the view, which says who is a member, or of the
    superblock are destroyed, as long as no other host is registered on the LUN.

    Exit codes as fsck(8): 0 clean, 1 errors corrected, 4 errors left, 8 it could not be done,
    16 usage, 32 interrupted.

    Example: csvctl check --repair iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1
    """
    require_root()
    keys = frozenset(parse_key(each) for each in preempt_key or ())
    if keys and not repair:
        raise Problem(Kind.USAGE, "--preempt-key goes with --repair only")
    argument = read_lun(lun)
    import trio

    with console.spinner("checking") as show:
        report = trio.run(_check, argument, repair, keys, show)
    if as_json:
        console.say(json.dumps(as_object(report), indent=2))
    else:
        _show(report, repair=repair)
    raise typer.Exit(report.exit_code)


def as_object(report: Report) -> dict[str, Any]:
    """A report for programs."""
    left = {id(finding) for finding in report.left}
    return {
        "clean": report.clean,
        "exit_code": report.exit_code,
        "findings": [
            {
                "damage": finding.damage.name.lower(),
                "where": finding.where,
                "what": finding.damage.words,
                "detail": finding.detail,
                "repairable": finding.repairable,
            }
            for finding in report.findings
        ],
        "left": [str(finding) for finding in report.left],
        "complete": report.complete,
        "repaired_blocks": report.repaired_blocks,
        "totals": asdict(report.totals),
        "left_count": len(left),
    }


def _show(report: Report, *, repair: bool) -> None:
    for finding in report.findings:
        remedy = f" ({finding.damage.remedy})" if repair and finding.repairable else ""
        console.say(f"{finding}{remedy}")
    if repair:
        for finding in report.left:
            console.say(f"NOT repaired: {finding}")
    if report.complete:
        _show_totals(report.totals)
    if report.clean:
        console.say("the volume is clean")
    elif not report.left:
        console.say(f"{len(report.findings)} errors corrected: the volume is clean now")
    elif repair:
        console.say(f"{len(report.left)} errors are left")
    elif not all(finding.repairable for finding in report.left):
        console.say(f"{len(report.left)} errors: `csvctl check --repair` cannot mend all of them")
    else:
        console.say(f"{len(report.left)} errors: `csvctl check --repair` mends them")
    if not report.complete:
        console.say("nothing behind that could be checked")


def _show_totals(totals: Totals) -> None:
    console.say(
        f"{totals.files} files, {totals.directories} directories, {totals.others} others, "
        f"{totals.extents} extents, {console.size_text(totals.data_units << 16)} of data, "
        f"{totals.metadata_blocks} metadata blocks"
    )


async def _check(lun: LunArgument, repair: bool, keys: frozenset[int], show: Any) -> Report:
    from csvfs.host.offline import check_offline

    return await check_offline(
        lun.open(),
        str(lun.url),
        repair=repair,
        preempt_keys=keys,
        progress=show,
        warn=console.warn,
    )
