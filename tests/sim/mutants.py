"""Mistakes made on purpose, each of which a thousand seeds must find.

Each takes out one thing that the design says must be there, by replacing one function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

from lockmgr import rebuild
from lockmgr.cluster import coordinator, newcomer, proof
from lockmgr.cluster.beating import Beating
from lockmgr.cluster.lease import LeasesGiven
from lockmgr.cluster.messages import Fenced
from lockmgr.cluster.state import NodeState
from lockmgr.cluster.view import NodeId, View
from lockmgr.core import LockCore
from lockmgr.debts import Debts
from lockmgr.events import Effect
from lockmgr.messages import AnyMessage, Resource, ValueBlock
from lockmgr.recovery import Recovery
from redirector.block import reservations
from tests.sim import pulse
from tests.sim.application import Application

Mutant = Callable[[], AbstractContextManager[Any]]


def grant_during_recovery() -> AbstractContextManager[Any]:
    """A master answers between its freeze and its thaw."""

    def keep(self: Recovery, message: Any) -> None:
        self._answer(self.master.step(message))

    return mock.patch.object(Recovery, "keep", keep)


def journals_not_awaited() -> AbstractContextManager[Any]:
    """What a departed node had is granted before its journal is replayed, or its lease over."""
    return mock.patch.object(Debts, "let", return_value=True)


def drain_skipped() -> AbstractContextManager[Any]:
    """A fence ends with PREEMPT; nobody waits for what the target had admitted."""

    async def drain(*_: Any, **__: Any) -> None:
        return

    return mock.patch.object(reservations, "drain", drain)


def incarnation_reused() -> AbstractContextManager[Any]:
    """A slot's next node gets the incarnation that it has had already."""

    def same(view: View, slot: int, *_: Any) -> int:
        return max(1, view.slots[slot].incarnation)

    patches = (
        mock.patch.object(coordinator, "next_incarnation", same),
        mock.patch.object(newcomer, "next_incarnation", same),
    )
    return _all(patches)


def epoch_not_checked() -> AbstractContextManager[Any]:
    """A lock message of an earlier view is carried out as if it were of this one."""
    deliver = LockCore._deliver

    def carried_out(self: LockCore, message: AnyMessage, now: float) -> list[Effect]:
        if message.epoch < self.epoch:
            message = replace(message, epoch=self.epoch)
        return deliver(self, message, now)

    return mock.patch.object(LockCore, "_deliver", carried_out)


def lease_from_arrival() -> AbstractContextManager[Any]:
    """A lease runs from when its confirmation is read, not from when its renewal was sent."""
    renew = Beating.renew

    def renewed(self: Beating, _sent_at: float) -> None:
        renew(self, self._st.now)

    return mock.patch.object(Beating, "renew", renewed)


def lease_not_awaited() -> AbstractContextManager[Any]:
    """What a departed node held is granted as soon as it is fenced."""
    return mock.patch.object(LeasesGiven, "over_at", return_value=float("-inf"))


def ready_without_asking() -> AbstractContextManager[Any]:
    """New paths are said to be ready though what was sent over the lost ones may still land."""
    tell = proof.tell

    def told(st: NodeState) -> None:
        st.unproven.clear()
        tell(st)

    return mock.patch.object(proof, "tell", told)


def fenced_before_the_fence() -> AbstractContextManager[Any]:
    """The coordinator says that keys are fenced before they are."""
    asked = proof.asked

    def answered(st: NodeState, peer: NodeId, keys: tuple[int, ...]) -> None:
        st.send(peer, Fenced(keys))
        asked(st, peer, keys)

    return mock.patch.object(proof, "asked", answered)


def retry_reordered() -> AbstractContextManager[Any]:
    """A younger write does not wait for the retry of an older one of the same block."""

    async def wait(*_: Any) -> None:
        return

    return mock.patch.object(Application, "_no_retry_of", wait)


def lease_checked_too_early() -> AbstractContextManager[Any]:
    """A reader asks whether there is a lease, and only then for the data."""

    async def read(self: Application, resource: Resource, _claim: Any) -> None:
        name = resource.name
        floor = self.oracle.floor(name)
        while self.daemon.lease_left_s <= 0:
            await self._lease()
        stamp = self.cache.get(name)
        if stamp is None:
            stamp = await self._from_home(name)
        self.oracle.reads(self.daemon, name, stamp, floor, kept=True)

    return mock.patch.object(Application, "_read", read)


def beats_for_a_hung_loop() -> AbstractContextManager[Any]:
    """The thread that sends heartbeats goes on though nobody stamps."""
    return mock.patch.object(pulse, "ALIVE_S", float("inf"))


def fence_forgotten() -> AbstractContextManager[Any]:
    """An eviction is a matter of the view alone: nobody looks for the keys of who is gone."""

    async def nothing(*_: Any, **__: Any) -> None:
        return

    return mock.patch.object(reservations, "fence", nothing)


def barrier_skipped() -> AbstractContextManager[Any]:
    """The coordinator lets all thaw as soon as it is in order itself."""

    def passed(self: Recovery) -> None:
        if self.coordinator == self.node and not self._passed and self.node in self._barrier:
            self._barrier |= set(self.members)
            pass_barrier(self)

    pass_barrier = Recovery._pass_barrier
    return mock.patch.object(Recovery, "_pass_barrier", passed)


def value_of_the_dead_kept() -> AbstractContextManager[Any]:
    """A value block counts as valid though whoever wrote it last is gone."""

    def latest(about: rebuild.Said, _orphaned: bool) -> ValueBlock:
        known = [state.value for state in about.nodes.values() if state.held is not None]
        known += [state.value for state in about.masters]
        return max(known, key=lambda value: value.sequence, default=ValueBlock())

    return mock.patch.object(rebuild, "true_value", latest)


def _all(patches: tuple[AbstractContextManager[Any], ...]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack


MUTANTS: dict[str, Mutant] = {
    "grant during recovery": grant_during_recovery,
    "journals not awaited": journals_not_awaited,
    "drain skipped": drain_skipped,
    "incarnation reused": incarnation_reused,
    "epoch not checked": epoch_not_checked,
    "lease from arrival": lease_from_arrival,
    "lease not awaited": lease_not_awaited,
    "ready without asking": ready_without_asking,
    "fenced before the fence": fenced_before_the_fence,
    "retry reordered": retry_reordered,
    "lease checked too early": lease_checked_too_early,
    "beats for a hung loop": beats_for_a_hung_loop,
    "fence forgotten": fence_forgotten,
    "barrier skipped": barrier_skipped,
    "value of the dead kept": value_of_the_dead_kept,
}
