"""Another node that wants locks: it takes what this node has, and gives it back at once."""

from __future__ import annotations

import itertools
from random import Random

import trio

from lockmgr.events import Deliver, Effect, Event, Send
from lockmgr.manager import LockManager
from lockmgr.messages import Granted, Lower, Request, Resource
from lockmgr.modes import Mode

RIVAL = 9


class LockRival:
    """Stands behind the messages that ``locks``, master of everything, sends to node 9."""

    def __init__(self, locks: LockManager) -> None:
        self._locks = locks
        self._serials = itertools.count(1)
        self._granted: dict[bytes, trio.Event] = {}
        self._step = locks.core.step
        locks.core.step = self._filter  # type: ignore[method-assign]  # there is no network yet
        # Messages for who is in no view are dropped. What it masters was settled before: nothing.
        locks.core.recovery.members += (RIVAL,)
        self.taken = 0

    def _filter(self, event: Event, now: float) -> list[Effect]:
        effects = []
        for effect in self._step(event, now):
            if isinstance(effect, Send) and effect.to == RIVAL:
                if isinstance(effect.message, Granted):
                    self._granted[effect.message.resource.name].set()
            else:
                effects.append(effect)
        return effects

    async def take(self, resource: Resource, mode: Mode) -> None:
        """Have ``resource`` in ``mode`` for a moment."""
        epoch = self._locks.core.epoch
        granted = self._granted[resource.name] = trio.Event()
        serial = next(self._serials)
        request = Request(resource, epoch, RIVAL, serial, mode, True)
        self._locks._step(Deliver(request))
        await granted.wait()
        self.taken += 1
        self._locks._step(Deliver(Lower(resource, epoch, RIVAL, serial, None)))

    async def take_some(self, rng: Random) -> None:
        """Take some of what the node has cached, unless a task of it is using that."""
        cached = [lock.resource for lock in self._locks.core.locks.idle]
        for resource in rng.sample(cached, min(len(cached), rng.choice((0, 0, 1, 3)))):
            await self.take(resource, rng.choice((Mode.PR, Mode.EX)))
