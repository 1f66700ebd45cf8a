"""Whom this node talks to, under which name, and with which certificate. Pure.

    a newcomer    the listed nodes of the newest view that it has read. It dials nobody, because
                  only the coordinator knows its certificate, from the join block
    a member      the listed nodes of that view and of the installed one: who is being evicted
                  stays until the view is announced, so that it can be told
    coordinator   also the newcomers whose join blocks change

Certificates come from join and slot blocks; whose is not known yet is in `missing`.

invariants (`check`):
- ``known`` is not older than ``installed``;
- every certificate is one that `check_certificate` takes, under its own fingerprint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lockmgr.cluster.blocks import JoinRequest
from lockmgr.cluster.certificates import BadCertificate, check_certificate, fingerprint_of
from lockmgr.cluster.peers import Peer, addresses_of
from lockmgr.cluster.view import NEWCOMER_SLOT, NodeId, View

log = logging.getLogger("lockmgr.network")

NEWCOMER_QUIET_S = 5.0
"""A join block that does not change for so long is an old one."""


@dataclass(slots=True)
class _Newcomer:
    request: JoinRequest
    changed_at: float = float("-inf")
    """When it was seen to change; finding it proves nothing."""


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """What `Network.install` takes."""

    own: NodeId
    epoch: int
    peers: tuple[Peer, ...]
    secret: bytes


class PeerBook:
    """See the module's docstring."""

    def __init__(self, own_certificate: bytes) -> None:
        self._own_fingerprint = fingerprint_of(own_certificate)
        self.known: View | None = None
        """The newest view that was read or announced."""
        self.installed: View | None = None
        self.me: NodeId | None = None
        self.newcomer_key = 0
        self.missing: tuple[NodeId, ...] = ()
        """Nodes to talk to whose certificates are not known, as of the last `acquaintance`."""
        self._certificates = {self._own_fingerprint: own_certificate}
        self._bad: set[bytes] = set()
        self._newcomers: dict[int, _Newcomer] = {}
        self._changed = True

    # -- learning ------------------------------------------------------------------------------
    def take_changes(self) -> bool:
        """Whether something is different since this was asked last."""
        changed, self._changed = self._changed, False
        return changed

    def asks_as(self, key: int) -> None:
        """This node is a newcomer with that key."""
        self.newcomer_key = key
        self._changed = True

    def is_listed_as(self, me: NodeId) -> None:
        """It is a member."""
        if me != self.me:
            self.me = me
            self._changed = True

    def saw(self, view: View) -> None:
        """A view was read."""
        if self.known is None or view.epoch > self.known.epoch:
            self.known = view
            self._changed = True

    def goes_by(self, view: View) -> None:
        """A view is installed."""
        self.installed = view
        self.saw(view)
        self._changed = True

    def learn(self, certificates: Mapping[bytes, bytes]) -> None:
        """Certificates by fingerprint. Bad ones are logged, once, and left out."""
        for fingerprint, certificate in certificates.items():
            if fingerprint in self._certificates or fingerprint in self._bad or not certificate:
                continue
            if fingerprint_of(certificate) != fingerprint:
                continue
            try:
                check_certificate(certificate)
            except BadCertificate as error:
                self._bad.add(fingerprint)
                log.warning("a certificate on shared storage is not used: it is %s", error)
            else:
                self._certificates[fingerprint] = certificate
                self._changed = True

    def saw_joins(self, joins: Iterable[JoinRequest], now: float) -> None:
        """All join blocks, as just read."""
        present = {request.key: request for request in joins}
        for key, request in present.items():
            found = self._newcomers.get(key)
            if found is None:
                self._newcomers[key] = _Newcomer(request)
            elif found.request.sequence != request.sequence:
                self._changed |= now - found.changed_at > NEWCOMER_QUIET_S
                found.request, found.changed_at = request, now
            self.learn({request.fingerprint: request.certificate})
        for key, found in list(self._newcomers.items()):
            quiet = now - found.changed_at > NEWCOMER_QUIET_S
            if key not in present or (quiet and found.changed_at > 0):
                del self._newcomers[key]
                self._changed |= found.changed_at > 0

    # -- what follows --------------------------------------------------------------------------
    @property
    def own(self) -> NodeId | None:
        """This node's name; None: it has none yet."""
        if self.me is not None:
            return self.me
        return NodeId(NEWCOMER_SLOT, self.newcomer_key) if self.newcomer_key else None

    def acquaintance(self, *, coordinator: bool) -> Acquaintance | None:
        """Whom to talk to; None as long as this node knows no view, or has no name."""
        own, known = self.own, self.known
        if own is None or known is None:
            return None
        peers: dict[NodeId, Peer] = {}
        missing = []
        for view in (known, self.installed):
            for node in view.listed if view is not None else ():
                if node == own or node in peers or view is None:
                    continue
                peer = self.peer(node, view)
                if peer is not None:
                    peers[node] = peer
                elif view.slots[node.slot].fingerprint not in self._bad:
                    missing.append(node)
        self.missing = tuple(dict.fromkeys(missing))
        if coordinator:
            for peer in self._asking(known):
                peers[peer.node] = peer
        return Acquaintance(own, known.epoch, tuple(peers.values()), known.secret)

    def peer(self, node: NodeId, view: View) -> Peer | None:
        """A listed node as a peer; None: its certificate is not known."""
        slot = view.slots[node.slot]
        certificate = self._certificates.get(slot.fingerprint)
        if certificate is None:
            return None
        addresses = addresses_of(node, slot.addresses) if self.me is not None else ()
        return Peer(node, certificate, addresses)

    def to_knock_at(self, nodes: Iterable[NodeId]) -> tuple[Peer, ...]:
        """Those of the nodes that can be asked whether they live."""
        view = self.known
        found = []
        for node in nodes:
            if view is None or not view.lists(*node):
                continue
            slot = view.slots[node.slot]
            certificate = self._certificates.get(slot.fingerprint)
            if certificate is None:
                log.warning("node %s cannot be asked whether it lives: no certificate", node)
            else:
                found.append(Peer(node, certificate, addresses_of(node, slot.addresses)))
        return tuple(found)

    def _asking(self, view: View) -> list[Peer]:
        listed = {view.slots[node.slot].fingerprint for node in view.listed}
        found = []
        for key, newcomer in self._newcomers.items():
            request = newcomer.request
            if newcomer.changed_at <= 0 or request.fingerprint in listed:
                continue
            node = NodeId(NEWCOMER_SLOT, key)
            certificate = self._certificates.get(request.fingerprint)
            if certificate is not None:
                found.append(Peer(node, certificate, addresses_of(node, request.addresses)))
        return found

    def forget_unused(self) -> None:
        """Certificates of whom neither view lists, newcomers and this node aside."""
        views = [view for view in (self.known, self.installed) if view is not None]
        wanted = {view.slots[node.slot].fingerprint for view in views for node in view.listed}
        wanted |= {one.request.fingerprint for one in self._newcomers.values()}
        wanted.add(self._own_fingerprint)
        for fingerprint in self._certificates.keys() - wanted:
            del self._certificates[fingerprint]
        self._bad &= wanted

    def check(self) -> None:
        """Assert the invariants."""
        if self.installed is not None:
            assert self.known is not None and self.known.epoch >= self.installed.epoch
        for fingerprint, certificate in self._certificates.items():
            assert fingerprint_of(certificate) == fingerprint
            check_certificate(certificate)
