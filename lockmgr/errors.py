"""What the lock manager raises.

LockError
+-- LockTimeout (also TimeoutError)   the lock was not granted in time; names who has it
+-- LockDeadlock                      the wait closed a cycle, and was the youngest in it
+-- RangeRefused                      byte ranges were not locked; has the outcome and the errno
+-- ManagerClosed                     the lock manager has been closed
`-- ProtocolViolation                 a message that no correct peer sends; a bug, never handled
"""

from __future__ import annotations

import errno

from lockmgr.ranges_messages import Outcome
from lockmgr.snapshot import LockSnapshot

_ERRNO = {
    Outcome.WOULD_BLOCK: errno.EAGAIN,
    Outcome.DEADLOCK: errno.EDEADLK,
    Outcome.CANCELLED: errno.EINTR,
    Outcome.NO_LOCKS: errno.ENOLCK,
}


class LockError(Exception):
    """Anything that the lock manager raises for its user."""


class LockTimeout(LockError, TimeoutError):
    """Not granted within ``timeout_s`` (0: not at once). The claim is gone; nothing was changed.

    A timeout among the tasks of one node is most often a breach of the lock order: ``snapshot``
    (and the message) name every task that holds or awaits the resource.
    """

    def __init__(self, what: str, snapshot: LockSnapshot) -> None:
        super().__init__(what)
        self.snapshot = snapshot

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.snapshot.sentence()}"


class LockDeadlock(LockError):
    """The wait was one of a cycle, and the youngest: it will never end unless somebody gives way.

    The claim is gone (a conversion: keeps its old mode). Release what else this owner holds, and
    begin again. The message names every wait of the cycle.
    """


class RangeRefused(LockError):
    """A byte-range lock was not granted; ``outcome`` (never DONE) says why.

    Nothing was changed, except that a flock that was to be converted may be lost (flock(2)).
    """

    def __init__(self, what: str, outcome: Outcome) -> None:
        super().__init__(what, outcome)
        self.outcome = outcome

    @property
    def errno(self) -> int:
        """What the application is told (fcntl(2), flock(2))."""
        return _ERRNO[self.outcome]

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.outcome.name}"


class ManagerClosed(LockError):
    """`LockManager.aclose` has been called and has finished."""


class ProtocolViolation(LockError):
    """A message or call that breaks the protocol: a bug on this or on the sending side."""
