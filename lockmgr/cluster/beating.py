"""What every node does with each tick: show life, look at the others, keep the lease.

A tick says what the heartbeats are to show, and on which session they may be written; whoever sends
them (`lockmgr.cluster.pulse`) may send more than one of it, and tells of each that is on the LUN
when it was sent. At most one block read is on its way. Confirmed writes renew the lease; they and
the reads show that the own path works, without which nobody is judged.

invariants:
- only writes on the control session of this moment count, and only until `Stop`;
- a coordinator's answers rest on writes that were sent since it has been in office on that session.
"""

from __future__ import annotations

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.effects import Beat, LeaseUntil, ReadBlocks
from lockmgr.cluster.errors import MembershipViolation
from lockmgr.cluster.messages import AskLease
from lockmgr.cluster.outcomes import Blocks, Good, Outcome
from lockmgr.cluster.state import NodeState


class Beating:
    """The heartbeats of one node."""

    def __init__(self, st: NodeState) -> None:
        self._st = st
        self.sequence = 0
        self._office: tuple[int, float] = (0, 0.0)
        """Key of the reserving session, and since when heartbeats on it show the coordinator's."""
        self._read: tuple[int, int] | None = None
        self._wrote_at = self._read_at = float("-inf")

    def tick(self) -> None:
        """Every ``heartbeat_s``."""
        st = self._st
        if st.judge is None or st.me is None:
            return
        self._judge_afresh_unless_looking()
        self.sequence += 1
        key = self.key
        if not st.in_office:
            self._office = (0, 0.0)
        elif self._office[0] != key:
            self._office = (key, st.now)
        st.emit(Beat(st.heartbeat(self.sequence), key))
        if st.path_key and self._read is None:
            self._read = (st.op(), st.session)
            st.emit(ReadBlocks(self._read[0]))
        if not (st.path_key and st.may_write) and st.unregistered is None:
            coordinator = st.coordinator
            if coordinator is not None and coordinator != st.me:
                st.send(coordinator, AskLease(st.now))
        st.best = st.judge.verdict(st.now, direct=bool(st.path_key))

    @property
    def key(self) -> int:
        """Of the session that heartbeats may be written on; 0: there is none."""
        st = self._st
        return st.path_key if st.may_write and st.unregistered is None else 0

    def _judge_afresh_unless_looking(self) -> None:
        st = self._st
        assert st.judge is not None
        since = max(st.opened_at, st.now - st.settings.path_loss_s)
        looked = min(self._read_at, self._wrote_at)
        patience = st.settings.path_loss_s
        if not st.path_key or (looked < since and st.now - st.opened_at > patience):
            st.judge.restart(st.now)
            st.admissions.forget()

    # -- answers -----------------------------------------------------------------------------
    def written(self, key: int, sent_at: float) -> None:
        """A heartbeat sent then, or later, on the session with that key is on the LUN."""
        st = self._st
        if sent_at > st.now:
            raise MembershipViolation(f"a heartbeat that is to be sent at {sent_at} is written")
        if not key or key != st.path_key:
            return
        self._wrote_at = st.now
        self.renew(sent_at)
        office, since = self._office
        if st.in_office and key == office and sent_at >= since:
            st.given.wrote(sent_at)

    def failed(self, key: int) -> None:
        """The session with that key is closed."""
        if key and key == self._st.path_key:
            self._st.lose_path()

    def done(self, op: int, outcome: Outcome) -> bool:
        """Take an answer; False if it is none of these."""
        st = self._st
        if self._read is not None and self._read[0] == op:
            session = self._read[1]
            self._read = None
            if isinstance(outcome, Good) and isinstance(outcome.value, Blocks):
                if session == st.session:
                    self._looked(outcome.value)
            else:
                self._lost(session)
            return True
        return False

    def _looked(self, blocks: Blocks) -> None:
        st = self._st
        assert st.judge is not None
        self._read_at = st.now
        st.judge.take_blocks(blocks.heartbeats, st.now)
        if st.in_office and st.admissions.see(blocks.joins, st.now):
            st.hurry()

    def _lost(self, session: int) -> None:
        if session == self._st.session:
            self._st.lose_path()

    def renew(self, sent_at: float) -> None:
        """A renewal of the lease that was sent then is confirmed."""
        until = self._st.lease.renewed(sent_at)
        if until is not None:
            self._st.emit(LeaseUntil(until))

    def heard(self, beat: Heartbeat) -> None:
        """A datagram came."""
        st = self._st
        if st.judge is None or not st.judge.take_beat(beat, st.now):
            return
        if st.in_office and st.view is not None and beat.epoch < st.view.epoch:
            st.lagging.add(beat.node)
