"""Mistakes made on purpose: what the runs must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from csvfs.host import node
from csvfs.membership import slot_start
from csvfs.membership.arbiter import LunArbiter
from lockmgr.cluster.lease_watch import LeaseWatch
from redirector.data_path import DataPath
from redirector.flow import Flow
from tests.whole.cables import CabledLun


async def _nothing(*_args: Any, **_more: Any) -> None:
    """Says that it is done."""


@contextmanager
def _leases_never_end() -> Iterator[None]:
    def until_for_ever(self: Flow, until_s: float) -> None:
        lease(self, max(until_s, 1e9))

    lease = Flow.lease
    with (
        patch.object(LeaseWatch, "valid", lambda _self: True),
        patch.object(Flow, "lease", until_for_ever),
    ):
        yield


@contextmanager
def _nobody_is_fenced() -> Iterator[None]:
    with patch.object(LunArbiter, "_fence", _nothing):
        yield


@contextmanager
def _nothing_is_drained() -> Iterator[None]:
    with patch.object(CabledLun, "reset", _nothing):
        yield


@contextmanager
def _flush_does_nothing() -> Iterator[None]:
    with patch.object(DataPath, "flush", _nothing):
        yield


@contextmanager
def _journals_are_not_replayed() -> Iterator[None]:
    async def replay_slot(*args: Any) -> Any:
        start = await slot_start.begin_slot(*args)
        return _Replayed(start)

    with patch.object(node, "replay_slot", replay_slot):
        yield


class _Replayed:
    def __init__(self, start: Any) -> None:
        self.start = start


@dataclass(frozen=True, slots=True)
class Mutant:
    """``made`` while it lasts; ``kinds`` of faults after which it shows: of all, if none."""

    made: Callable[[], AbstractContextManager[None]]
    kinds: tuple[str, ...] = ()


MUTANTS: Final = {
    "leases never end": Mutant(_leases_never_end, ("freeze", "isolate")),
    "nobody is fenced": Mutant(_nobody_is_fenced),
    "nothing is drained": Mutant(_nothing_is_drained, ("freeze",)),
    "flush does nothing": Mutant(_flush_does_nothing),
    "journals are not replayed": Mutant(_journals_are_not_replayed),
}
