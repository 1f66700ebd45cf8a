"""Take the reservation from whoever had it, and fence everybody whose place the claim takes."""

from __future__ import annotations

from collections.abc import Iterable

from csvfs.format import NoView, SlotBlock
from csvfs.membership.decision import live_slots, path_keys
from csvfs.membership.fixed_area import read_slot_blocks, read_view
from csvfs.membership.newcomer import Newcomer
from csvfs.membership.path_keys import victims_of_sessions
from redirector.block.device import Lun
from redirector.block.keys import PathKey
from redirector.block.reservations import Registration, Victim, fence


async def succeed(registration: Registration, victim_key: int) -> None:
    """An atomic compare-and-swap: of two that try, one goes on. Key 0: nobody holds."""
    if victim_key == 0:
        await registration.reserve()
    elif victim_key != registration.key:
        await registration.take(victim_key)


async def fence_predecessors(lun: Lun, newcomer: Newcomer, *, without_view: bool) -> None:
    """The newcomer holds the reservation; nobody else's I/O may land after this.

    ``without_view``: the claim is a repair, which goes on where no view can be read. Raises
    `FenceFailed`, `NoView`, `BlockError` and what the reservation raises.
    """
    holder = newcomer.registration
    blocks = await holder.ask(lambda: read_slot_blocks(newcomer.device, newcomer.superblock))
    keys = (await holder.ask(newcomer.device.read_keys)).keys
    listed: Iterable[int]
    try:
        view = await holder.ask(lambda: read_view(newcomer.device, newcomer.superblock.volume_id))
        listed = live_slots(view)
    except NoView:
        if not without_view:
            raise
        listed = {path.slot for key in path_keys(keys) if (path := PathKey.parse(key)) is not None}
    await fence(
        lun,
        holder,
        [
            *(Victim(key=key) for key in keys if key != newcomer.key),
            *_recorded({n: block for n, block in blocks.items() if n in listed}.values()),
        ],
        # A dead or frozen reader of an incarnation that is not listed any more.
        stragglers=lambda: _recorded(blocks.values()),
    )


def _recorded(blocks: Iterable[SlotBlock]) -> list[Victim]:
    return victims_of_sessions(session for block in blocks for session in block.sessions)
