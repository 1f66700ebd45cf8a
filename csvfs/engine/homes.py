"""The task that gets back groups of this node's own which others have locked.

See `csvfs.allocation.affinity`. Once in `CLAIM_EVERY_S` at most, and one group at a time: whoever
has the lock may have to write for it, and may be busy there because the volume is full elsewhere.

Concurrency: one task, which holds no other lock.
"""

from __future__ import annotations

from typing import Final

import trio

from csvfs.allocation.affinity import Affinity
from csvfs.engine.locks import Resources
from lockmgr.manager import LockManager
from lockmgr.modes import Mode

CLAIM_EVERY_S: Final = 1.0


async def claim_homes(affinity: Affinity, resources: Resources, locks: LockManager) -> None:
    """Run until cancelled."""
    while True:
        home = await affinity.strayed()
        for group in affinity.homes(home):
            resource = resources.group(group)
            if not locks.node_holds(resource, Mode.EX):
                async with locks.acquire(resource, Mode.EX):
                    break  # from now on it is cached here
        await trio.sleep(CLAIM_EVERY_S)
