"""Whom a coordinator lets in: the join blocks, watched.

A join block may be old: who wrote it is believed to be alive after its sequence has grown a few
times while it was watched. A node name is listed once. Who asks under a listed name is either the
same host again, after a crash, or a second host with that name; the difference is whether the
listed one shows life after the request was seen.

invariants:
- nobody is admitted under a name that is listed, or into a slot that is not free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.judge import Judge
from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import MAX_INCARNATION, NodeId, SlotState, View


@dataclass(slots=True)
class _Watched:
    request: JoinRequest
    since: float
    changed_at: float
    changes: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of those who ask."""

    admit: tuple[JoinRequest, ...] = ()
    replaced: frozenset[NodeId] = frozenset()
    """Incarnations that their own host says are dead, and that are silent."""
    refuse: tuple[tuple[JoinRequest, str], ...] = ()


class Admissions:
    """The join blocks, as seen by the coordinator."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._watched: dict[int, _Watched] = {}

    def forget(self) -> None:
        """Out of office, or asleep: what was seen counts no more."""
        self._watched.clear()

    def drop(self, request: JoinRequest) -> None:
        """Its key is not registered: whoever wrote it is gone, or begins anew."""
        watched = self._watched.get(request.slot)
        if watched is not None and watched.request.key == request.key:
            del self._watched[request.slot]

    def see(self, joins: Iterable[JoinRequest], now: float) -> bool:
        """All valid join blocks, as just read. True if somebody asks for the first time."""
        news = False
        for request in joins:
            watched = self._watched.get(request.slot)
            if watched is None or watched.request.key != request.key:
                self._watched[request.slot] = _Watched(request, now, now)
                news = True
            elif watched.request.sequence != request.sequence:
                watched.request, watched.changed_at = request, now
                watched.changes += 1
        return news

    def judge(self, view: View, judge: Judge, now: float) -> Verdict:
        """Whom to let in now."""
        admit: list[JoinRequest] = []
        replaced: set[NodeId] = set()
        refuse: list[tuple[JoinRequest, str]] = []
        names = {view.slots[node.slot].node_name: node for node in view.listed}
        prints = {view.slots[node.slot].fingerprint for node in view.listed}
        for slot, watched in sorted(self._watched.items()):
            request = watched.request
            if not self._is_alive(watched, now) or request.fingerprint in prints:
                continue
            listed = names.get(request.node_name)
            if listed is not None and listed.slot != slot and listed in view.listed:
                if judge.lives_since(listed, watched.since):
                    refuse.append((request, _duplicate(view, listed)))
                elif self._is_replaced(view, watched, listed, judge, now):
                    replaced.add(listed)
                continue
            entry = view.slots[slot] if slot < len(view.slots) else None
            if (
                entry is not None
                and entry.state is SlotState.FREE
                and entry.incarnation < MAX_INCARNATION
                and request.node_name not in names
            ):
                admit.append(request)
                names[request.node_name] = NodeId(slot, 0)
        return Verdict(tuple(admit), frozenset(replaced), tuple(refuse))

    def _is_alive(self, watched: _Watched, now: float) -> bool:
        return (
            watched.changes >= self._settings.join_renewals
            and now - watched.changed_at <= self._settings.path_loss_s
        )

    def _is_replaced(
        self, view: View, watched: _Watched, listed: NodeId, judge: Judge, now: float
    ) -> bool:
        return (
            view.slots[listed.slot].machine_id == watched.request.machine_id
            and now - max(watched.since, judge.last_sign(listed)) >= self._settings.claimed_dead_s
        )


def _duplicate(view: View, listed: NodeId) -> str:
    entry = view.slots[listed.slot]
    return (
        f"a node named {entry.node_name} is a member already (slot {listed.slot}, at "
        f"{', '.join(entry.addresses) or 'an unknown address'}) and it lives. Give this host "
        "another name, or stop that one"
    )
