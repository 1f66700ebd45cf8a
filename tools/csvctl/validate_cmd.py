"""csvctl validate: judge a LUN and its target, property by property."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun
from csvctl.outcomes import NOT_VALID, VALID, VALID_WITH_WARNINGS

if TYPE_CHECKING:
    from csvfs.host.validate_facts import Facts, KeyUse, Property, Report
    from redirector.block.device import Lun

_INDENT = " " * 12
_WIDTH = 94


def validate(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    destructive: Annotated[
        bool,
        typer.Option(
            "--destructive",
            help="Try the target by writing first, as format does. Only on a LUN that carries"
            " nothing and at which nobody is registered.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say of each property of LUN and its target whether it is as it must be.

    What is on it, whether it is the LUN that was formatted or a copy, its size, limits, cache and
    latency; whether the target keeps out who is not registered; who is registered, who holds the
    reservation, which keys are stale; whether CHAP and LUN masking are on. A failure says what it
    means for virtual machines, and what to do.

    Without --destructive nothing is written, and a volume may be mounted meanwhile: a key of a
    newcomer is registered where reading needs one, and removed. One login without password and
    one under a strange initiator name are tried: the target's log may name them.

    Exit codes: 0 nothing failed, 1 warnings only, 2 something failed; 64 to 99 it could not be
    done.

    Example: csvctl validate iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1

    Example: csvctl validate --destructive --json iscsi://10.0.0.5/iqn.2026-11.org.example:new/1
    """
    argument = read_lun(lun)
    import trio

    with console.spinner("validating"):
        report = trio.run(_validate, argument, destructive)
    code = exit_code(report)
    if as_json:
        console.say(json.dumps({"url": str(argument.url), **as_object(report)}, indent=2))
    else:
        _show(report)
    raise typer.Exit(code)


def exit_code(report: Report) -> int:
    """See `csvctl.outcomes`."""
    return {"failed": NOT_VALID, "warning": VALID_WITH_WARNINGS}.get(report.verdict, VALID)


def as_object(report: Report) -> dict[str, Any]:
    """A report for programs."""
    identity = report.facts.identity
    return {
        "verdict": report.verdict.value,
        "exit_code": exit_code(report),
        "properties": [
            {
                "name": each.name,
                "verdict": each.verdict.value,
                "found": each.found,
                "means": each.means,
                "to_do": each.to_do,
            }
            for each in report.properties
        ],
        "keys": [
            {
                "key": f"{use.key:#018x}",
                "state": use.state.value,
                "holds": use.holds,
                "owner": use.owner,
                "path": use.path,
            }
            for use in report.keys
        ],
        "lun": {
            "vendor": identity.vendor,
            "product": identity.product,
            "revision": identity.revision,
            "serial": identity.serial,
            "device_id": identity.device_id.hex(),
            "size_bytes": identity.size_bytes,
        },
        "volume": _volume_object(report.facts),
        "read_latency_s": _latency_object(report.facts.reads_s),
    }


def _volume_object(facts: Facts) -> dict[str, Any] | None:
    superblock, view = facts.superblock, facts.view
    if superblock is None:
        return None
    return {
        "label": superblock.label,
        "volume_id": superblock.volume_id.hex(),
        "epoch": view.epoch if view is not None else None,
    }


def _latency_object(reads_s: Sequence[float]) -> dict[str, float] | None:
    return {"median": median(reads_s), "worst": max(reads_s)} if reads_s else None


# -- for people ------------------------------------------------------------------------------------
def _show(report: Report) -> None:
    identity = report.facts.identity
    words = f"{identity.vendor} {identity.product} {identity.revision}".split()
    console.facts(
        [
            ("LUN", " ".join(words) or "unknown"),
            ("serial", identity.serial or "none"),
            ("size", console.size_text(identity.size_bytes)),
        ]
    )
    console.say("")
    for each in report.properties:
        for line in _lines(each):
            console.say(line)
    console.say("")
    console.say("registered:" if report.keys else "registered: nobody")
    for use in report.keys:
        console.say(f"  {_key_text(use)}")
    console.say("")
    console.say(_summary(report))


def _lines(each: Property) -> Iterator[str]:
    """The property in one line; below it what it means and what to do, if something is wrong."""
    bad = bool(each.to_do)
    verdict = each.verdict.value.upper() if bad else each.verdict.value
    yield f"{verdict:<{len(_INDENT)}}{each.name}: {each.found}"
    if bad:
        means = each.means[0].upper() + each.means[1:]
        for sentence in (means, each.to_do):
            yield textwrap.indent(
                textwrap.fill(f"{sentence}.", _WIDTH - len(_INDENT), break_on_hyphens=False),
                _INDENT,
            )


def _key_text(use: KeyUse) -> str:
    from redirector.block.keys import key_words

    words = [key_words(use.key), use.state.value]
    if use.owner:
        words.append(use.owner)
    if use.path:
        words.append(f"{use.path} path")
    if use.holds:
        words.append("holds the reservation")
    return ", ".join(words)


def _summary(report: Report) -> str:
    from csvfs.host.validate_facts import Verdict

    words = []
    for verdict in Verdict:
        number = len(report.having(verdict))
        plural = "s" if number > 1 and verdict in (Verdict.NOTE, Verdict.WARNING) else ""
        if number:
            words.append(f"{number} {verdict.value}{plural}")
    return ", ".join(words)


# -- doing it --------------------------------------------------------------------------------------
async def _validate(argument: LunArgument, destructive: bool) -> Report:
    from csvfs.host import places
    from csvfs.host.validate import Validator

    lun = argument.open()
    validator = Validator(lun, places.initiator_name(), anonymous=_anonymous(argument, lun))
    return await validator.run(destructive=destructive)


def _anonymous(argument: LunArgument, lun: Lun) -> Lun | None:
    """The same LUN for who has no password; None where there is no login."""
    from redirector.block.url import open_lun

    if argument.url.scheme == "file":
        return None
    if argument.credentials is None:
        return lun
    return open_lun(replace(argument.url, user="", password=""))
