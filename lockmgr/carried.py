"""Whatever nodes say to each other about locks, in one type."""

from __future__ import annotations

from lockmgr.messages import AnyMessage
from lockmgr.ranges_messages import RangeMessage
from lockmgr.snapshot_messages import Snapshots

Carried = AnyMessage | RangeMessage | Snapshots
"""What a channel takes from node to node, in order and without loss within an epoch."""
