"""What every node does with each tick: show life, look at the others, keep the lease.

At most one heartbeat write and one block read are on their way. Their answers renew the lease and
show that the own path completes writes and reads, without which nobody is judged.
"""

from __future__ import annotations

from lockmgr.cluster.blocks import Heartbeat
from lockmgr.cluster.effects import Beat, LeaseUntil, ReadBlocks, WriteHeartbeat
from lockmgr.cluster.messages import AskLease
from lockmgr.cluster.outcomes import Blocks, Good, Outcome
from lockmgr.cluster.state import NodeState


class Beating:
    """The heartbeats of one node."""

    def __init__(self, st: NodeState) -> None:
        self._st = st
        self.sequence = 0
        self._write: tuple[int, float, int, bool] | None = None
        """op, when it was sent, session, whether on the reserving session."""
        self._read: tuple[int, int] | None = None
        self._wrote_at = self._read_at = float("-inf")

    def tick(self) -> None:
        """Every ``heartbeat_s``."""
        st = self._st
        if st.judge is None or st.me is None:
            return
        self._judge_afresh_unless_looking()
        self.sequence += 1
        beat = st.heartbeat(self.sequence)
        st.emit(Beat(beat))
        if st.path_key and st.may_write and self._write is None and st.unregistered is None:
            self._write = (st.op(), st.now, st.session, st.in_office)
            st.emit(WriteHeartbeat(self._write[0], beat))
        if st.path_key and self._read is None:
            self._read = (st.op(), st.session)
            st.emit(ReadBlocks(self._read[0]))
        if not (st.path_key and st.may_write) and st.unregistered is None:
            coordinator = st.coordinator
            if coordinator is not None and coordinator != st.me:
                st.send(coordinator, AskLease(st.now))
        st.best = st.judge.verdict(st.now, direct=bool(st.path_key))

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
    def done(self, op: int, outcome: Outcome) -> bool:
        """Take an answer; False if it is none of these."""
        st = self._st
        if self._write is not None and self._write[0] == op:
            _, sent_at, session, in_office = self._write
            self._write = None
            if isinstance(outcome, Good):
                self._wrote_at = st.now
                self.renew(sent_at)
                if in_office and st.in_office and session == st.session:
                    st.given.wrote(sent_at)
            else:
                self._lost(session)
            return True
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
