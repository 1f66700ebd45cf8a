"""The part of a SCSI target that decides who may do what: persistent reservations (SPC-4 5.12).

Theory. A pure state machine: nexuses come and go, commands ask to be admitted, PERSISTENT RESERVE
OUT changes registrations and holder. It behaves as tgt 1.0.85 does, whose habits were measured:

- a registration belongs to the nexus (the *session*), not to the initiator port behind it, and
  outlives it: the key of a closed session stays registered, to a nexus that nobody can use;
- a unit attention is reported before a conflict, on any command but INQUIRY, one at a time;
- PREEMPT tests "is this key registered", not "does it hold": of a registered non-holder it
  returns GOOD and takes nothing; RESERVE, RELEASE, PREEMPT do not compare the issuer's key;
- PRGENERATION grows with REGISTER and PREEMPT only (SPC-4 5.12.5.4).

The switches in `ArbiterHabits` make it behave as other, worse targets do.

invariants:
  1. the holder is a registered nexus; there is none when ``type`` is NONE
  2. no registration has key 0
  3. only open nexuses have unit attentions pending
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

from redirector.block.device import (
    IllegalRequest,
    RegisteredKeys,
    Reservation,
    ReservationConflict,
    ReservationType,
    UnitAttention,
)

UA_RESET = 0x2900
UA_RESERVATIONS_PREEMPTED = 0x2A03
UA_RESERVATIONS_RELEASED = 0x2A04
UA_REGISTRATIONS_PREEMPTED = 0x2A05

UA_WORDS = {
    UA_RESET: "power on, reset, or bus device reset occurred",
    UA_RESERVATIONS_PREEMPTED: "reservations preempted",
    UA_RESERVATIONS_RELEASED: "reservations released",
    UA_REGISTRATIONS_PREEMPTED: "registrations preempted",
}


class Op(StrEnum):
    """The commands that an arbiter tells apart."""

    READ = "READ"
    WRITE = "WRITE"
    SYNCHRONIZE_CACHE = "SYNCHRONIZE CACHE"
    UNMAP = "UNMAP"
    WRITE_SAME = "WRITE SAME"
    TEST_UNIT_READY = "TEST UNIT READY"
    READ_KEYS = "READ KEYS"
    READ_RESERVATION = "READ RESERVATION"
    REGISTER = "REGISTER"
    RESERVE = "RESERVE"
    RELEASE = "RELEASE"
    PREEMPT = "PREEMPT"


DATA_OPS = frozenset({Op.READ, Op.WRITE, Op.SYNCHRONIZE_CACHE, Op.UNMAP, Op.WRITE_SAME})
PR_OUT_OPS = frozenset({Op.REGISTER, Op.RESERVE, Op.RELEASE, Op.PREEMPT})


@dataclass(frozen=True, slots=True)
class ArbiterHabits:
    """How a target departs from a good one; the default is a good one that answers as tgt does."""

    leaks: frozenset[Op] = frozenset()
    """Commands that a type 6 reservation lets through for everyone (tgt: UNMAP, WRITE SAME)."""
    preempts_unregistered: bool = False
    """PREEMPT of a key that nobody registered answers GOOD (SPDK, istgt)."""
    knows_abort: bool = False
    """PREEMPT AND ABORT is supported."""
    forgets_closed: bool = False
    """A registration ends with its session, and with the holder's the reservation."""
    checks_keys: bool = False
    """RESERVE, RELEASE and PREEMPT with a key that is not the nexus's own conflict, as SPC-4
    demands; tgt ignores the key."""


class ArbiterState(TypedDict):
    """What `Arbiter.state` returns: plain values, fit for JSON."""

    generation: int
    registrations: list[tuple[int, int]]
    holder: int | None
    legacy_holder: int | None
    attentions: list[tuple[int, list[int]]]


def _conflict(op: Op) -> ReservationConflict:
    return ReservationConflict(op.value, status=0x18, words="reservation conflict")


@dataclass(slots=True)
class Arbiter:
    """Registrations, holder and unit attentions of one LUN. A nexus is a number, used once."""

    habits: ArbiterHabits = ArbiterHabits()
    generation: int = 0
    registrations: dict[int, int] = field(default_factory=dict)
    holder: int | None = None
    legacy_holder: int | None = None
    """The nexus of a RESERVE(6), which excludes every other; a reset or its end releases it."""
    attentions: dict[int, list[int]] = field(default_factory=dict)

    # -- nexuses -----------------------------------------------------------------------------
    def open(self, nexus: int) -> None:
        """A session was established; the unit attention of a fresh nexus counts as fetched."""
        self.attentions[nexus] = []

    def close(self, nexus: int) -> None:
        """The session ended. A registration stays ("parked")."""
        self.attentions.pop(nexus, None)
        if self.legacy_holder == nexus:
            self.legacy_holder = None
        if self.habits.forgets_closed and self.registrations.pop(nexus, 0):
            self.holder = None if self.holder == nexus else self.holder

    def reset(self) -> None:
        """LOGICAL UNIT RESET: reservations survive, everyone hears of it (SPC-4 5.12.3)."""
        self.legacy_holder = None
        self._tell(self.attentions, UA_RESET)

    def forget(self) -> None:
        """The target restarted: no sessions, no registrations, PRGENERATION starts again."""
        self.generation = 0
        self.registrations.clear()
        self.attentions.clear()
        self.holder = None
        self.legacy_holder = None

    # -- admission ---------------------------------------------------------------------------
    def admit(self, nexus: int, op: Op) -> None:
        """Let a command of ``nexus`` in, or raise `UnitAttention` or `ReservationConflict`."""
        pending = self.attentions.get(nexus)
        if pending:
            code = pending.pop(0)
            raise UnitAttention(op.value, sense_key=6, asc_ascq=code, words=UA_WORDS[code])
        if op not in DATA_OPS:
            return
        if self.legacy_holder not in (None, nexus):
            raise _conflict(op)
        if self.holder is None or nexus in self.registrations or op in self.habits.leaks:
            return
        raise _conflict(op)

    # -- PERSISTENT RESERVE OUT and IN ---------------------------------------------------------
    def register(self, nexus: int, key: int, old_key: int) -> None:
        """REGISTER (SPC-4 5.12.7); ``old_key`` must be the nexus's own, 0 if it has none."""
        if self.registrations.get(nexus, 0) != old_key:
            raise _conflict(Op.REGISTER)
        if key:
            self.registrations[nexus] = key
        elif old_key:
            if self.holder == nexus:
                self.holder = None
                self._tell((n for n in self.registrations if n != nexus), UA_RESERVATIONS_RELEASED)
            del self.registrations[nexus]
        self.generation += 1

    def reserve(self, nexus: int, key: int) -> None:
        """RESERVE, type 6."""
        self._need_registration(nexus, key, Op.RESERVE)
        if self.holder not in (None, nexus):
            raise _conflict(Op.RESERVE)
        self.holder = nexus

    def release(self, nexus: int, key: int) -> None:
        """RELEASE: of the holder it ends the reservation, of another registrant it does nothing."""
        self._need_registration(nexus, key, Op.RELEASE)
        if self.holder == nexus:
            self.holder = None
            self._tell((n for n in self.registrations if n != nexus), UA_RESERVATIONS_RELEASED)

    def preempt(
        self, nexus: int, key: int, victim_key: int, *, abort: bool = False
    ) -> tuple[int, ...]:
        """PREEMPT; returns the nexuses that lost their registration."""
        if abort and not self.habits.knows_abort:
            raise IllegalRequest(
                "PREEMPT AND ABORT", sense_key=5, asc_ascq=0x2400, words="invalid field in CDB"
            )
        self._need_registration(nexus, key, Op.PREEMPT)
        victims = tuple(
            n for n, key in self.registrations.items() if key == victim_key and n != nexus
        )
        if not victims:
            if self.habits.preempts_unregistered or self.registrations[nexus] == victim_key:
                self.generation += 1
                return ()
            raise _conflict(Op.PREEMPT)
        for victim in victims:
            del self.registrations[victim]
        if self.holder in victims:
            self.holder = nexus
        self._tell(victims, UA_RESERVATIONS_PREEMPTED)
        self.generation += 1
        return victims

    def reserve_legacy(self, nexus: int) -> None:
        """RESERVE(6) (SPC-2 5.5.1), as a stranger may still send it."""
        if self.legacy_holder not in (None, nexus):
            raise ReservationConflict("RESERVE(6)", status=0x18, words="reservation conflict")
        self.legacy_holder = nexus

    def read_keys(self) -> RegisteredKeys:
        """READ KEYS."""
        return RegisteredKeys(self.generation, tuple(self.registrations.values()))

    def read_reservation(self) -> Reservation:
        """READ RESERVATION."""
        if self.holder is None:
            return Reservation(self.generation, 0, ReservationType.NONE)
        return Reservation(
            self.generation,
            self.registrations[self.holder],
            ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
        )

    # -- state ---------------------------------------------------------------------------------
    def state(self) -> ArbiterState:
        """A copy of everything, as plain values."""
        return {
            "generation": self.generation,
            "registrations": list(self.registrations.items()),
            "holder": self.holder,
            "legacy_holder": self.legacy_holder,
            "attentions": [(nexus, list(codes)) for nexus, codes in self.attentions.items()],
        }

    def restore(self, state: ArbiterState) -> None:
        """Take the place of what `state` described."""
        self.generation = state["generation"]
        self.registrations = {nexus: key for nexus, key in state["registrations"]}  # noqa: C416
        self.holder = state["holder"]
        self.legacy_holder = state["legacy_holder"]
        self.attentions = {nexus: list(codes) for nexus, codes in state["attentions"]}

    def check(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert self.holder is None or self.holder in self.registrations, "holder not registered"
        assert 0 not in self.registrations.values(), "key 0 is registered"
        assert self.legacy_holder is None or self.legacy_holder in self.attentions

    def _need_registration(self, nexus: int, key: int, op: Op) -> None:
        own = self.registrations.get(nexus)
        if own is None or (self.habits.checks_keys and own != key):
            raise _conflict(op)

    def _tell(self, nexuses: Iterable[int], code: int) -> None:
        for nexus in nexuses:
            pending = self.attentions.get(nexus)
            if pending is not None and code not in pending:
                pending.append(code)
