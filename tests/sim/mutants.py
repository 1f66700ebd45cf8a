"""Mistakes made on purpose, each of which a thousand seeds must find.

Each takes out one thing that the design says must be there, by replacing one function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

from lockmgr.cluster import coordinator, newcomer, proof
from lockmgr.cluster.beating import Beating
from lockmgr.cluster.lease import LeasesGiven
from lockmgr.cluster.messages import Fenced
from lockmgr.cluster.state import NodeState
from lockmgr.cluster.view import NodeId, View
from lockmgr.core import LockCore
from lockmgr.debts import Debts
from lockmgr.events import Effect
from lockmgr.messages import AnyMessage
from lockmgr.recovery import Recovery
from redirector.block import reservations

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
}
