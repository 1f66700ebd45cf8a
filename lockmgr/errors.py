"""What the lock manager raises.

LockError
+-- LockTimeout (also TimeoutError)   the lock was not granted in time; names who has it
+-- LockDeadlock                      the wait closed a cycle, and was the youngest in it
+-- ManagerClosed                     the lock manager has been closed
`-- ProtocolViolation                 a message that no correct peer sends; a bug, never handled
"""

from __future__ import annotations

from lockmgr.snapshot import LockSnapshot


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


class ManagerClosed(LockError):
    """`LockManager.aclose` has been called and has finished."""


class ProtocolViolation(LockError):
    """A message or call that breaks the protocol: a bug on this or on the sending side."""
