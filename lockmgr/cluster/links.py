"""With whom this node can talk: connections, as far as who stays a member depends on them.

A heartbeat shows that a node lives, not that it can be talked to: a firewall may let datagrams pass
and nothing else. Locks are recovered by messages, and one pair that cannot exchange any would keep
all locks frozen. So who is not connected is not heard (`judge`). A connection that is lost comes
back in a moment, or else the node is as good as cut off.
"""

from __future__ import annotations

from lockmgr.cluster.settings import Settings
from lockmgr.cluster.view import NodeId


class Links:
    """The connections of this node."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._until: dict[NodeId, float] = {}

    def connected(self, node: NodeId) -> None:
        """Messages reach it."""
        self._until[node] = float("inf")

    def lost(self, node: NodeId, now: float) -> None:
        """They do not any more, but may again soon."""
        if node in self._until:
            self._until[node] = min(self._until[node], now + self._settings.reconnect_s)

    def holds(self, node: NodeId, now: float) -> bool:
        """Whether it is connected, or was a moment ago."""
        return now <= self._until.get(node, float("-inf"))

    def forget(self, now: float) -> None:
        """Who was lost long ago need not be remembered."""
        self._until = {node: until for node, until in self._until.items() if now <= until}
