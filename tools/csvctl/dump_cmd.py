"""csvctl dump: show on-disk structures."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from csvctl import console
from csvctl.lun_argument import LunArgument, read_lun
from csvfs.host.problems import Kind, Problem

if TYPE_CHECKING:
    from csvfs.host.inspection import Line


class Structure(StrEnum):
    """What can be shown."""

    SUPERBLOCK = "superblock"
    VIEW = "view"
    SLOTS = "slots"
    INODE = "inode"


def dump(
    lun: Annotated[str, typer.Argument(metavar="LUN", help="The LUN's URL.")],
    structure: Annotated[
        Structure, typer.Argument(metavar="superblock|view|slots|inode", help="What to show.")
    ],
    number: Annotated[
        int, typer.Argument(metavar="[N]", help="The inode's number; the root is 1.")
    ] = 0,
) -> None:
    """Show a structure of the volume on LUN, which may be mounted meanwhile.

    Nothing is written; for the time of reading a key is registered at the target.

    Example: csvctl dump iscsi://10.0.0.5/iqn.2026-11.org.example:vms/1 inode 1
    """
    if (structure is Structure.INODE) != (number > 0):
        raise Problem(Kind.USAGE, "`dump LUN inode N` takes a number, the others none")
    import trio

    for line in trio.run(_lines, read_lun(lun), structure, number):
        name = f"{'  ' * line.depth}{line.name}:"
        console.say(f"{name:<24} {line.value}".rstrip())


async def _lines(lun: LunArgument, structure: Structure, number: int) -> list[Line]:
    from random import SystemRandom

    from csvfs.host import inspection, places
    from csvfs.membership.newcomer import open_newcomer
    from csvfs.membership.refusals import RefuseUnfinished

    newcomer = await open_newcomer(lun.open(), places.initiator_name(), SystemRandom())
    async with newcomer:
        if newcomer.superblock_trouble:
            console.warn(f"{newcomer.superblock_trouble}; the backup superblock is used")
        superblock = newcomer.superblock
        if structure is Structure.SUPERBLOCK:
            return await inspection.show_superblock(newcomer)
        if superblock.resignature_under_way:
            unfinished = RefuseUnfinished(superblock.volume_id, superblock.former_volume_id)
            raise Problem(Kind.LUN_COPY, unfinished.words)
        if structure is Structure.VIEW:
            return await inspection.show_view(newcomer)
        if structure is Structure.SLOTS:
            return await inspection.show_slots(newcomer)
        try:
            return await inspection.show_inode(newcomer, number)
        except ValueError as error:
            raise Problem(Kind.USAGE, str(error)) from None
