"""Where a daemon's log goes: stderr in the foreground, else the journal, else a file.

Records are handed to a thread that writes them, because a disk under pressure must not hold up the
trio loop. A password that the daemon was given never gets as far: `Redact` takes it out of every
record, whatever library wrote it.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Final

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
LOG_FILE: Final = "/var/log/csvfs.log"
"""CSVFS_LOG names another one."""
STDERR: Final = "stderr"
IDENTIFIER: Final = "csvfs"

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PRIORITY = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class Redact(logging.Filter):
    """Replaces secrets in what a record says."""

    def __init__(self, *secrets: str) -> None:
        super().__init__()
        self._secrets = [each for each in secrets if each]

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if any(each in message for each in self._secrets):
            for each in self._secrets:
                message = message.replace(each, "***")
            record.msg, record.args = message, ()
        return True


def calm_late_answer(record: logging.LogRecord) -> bool:
    """A filter. pyfuse3 calls it an error if nobody waits for an answer any more: the connection
    was aborted, which the log says, or the caller was killed."""
    nobody = os.strerror(errno.ENOENT)
    if record.levelno > logging.DEBUG and record.getMessage().endswith(f"failed with {nobody}"):
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger().isEnabledFor(logging.DEBUG)
    return True


class JournalHandler(logging.Handler):
    """systemd's journal, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._socket.sendto(self.encode(record), self._path)
        except OSError:
            self.handleError(record)

    def encode(self, record: logging.LogRecord) -> bytes:
        """One datagram: MESSAGE in the form that may hold newlines, the rest as lines."""
        message = self.format(record).encode(errors="replace")
        lines = f"PRIORITY={_PRIORITY.get(record.levelno, 6)}\nSYSLOG_IDENTIFIER={IDENTIFIER}\n"
        size = len(message).to_bytes(8, "little")
        return lines.encode() + b"MESSAGE\n" + size + message + b"\n"

    def close(self) -> None:
        self._socket.close()
        super().close()


def destination(foreground: bool) -> str:
    """Where the log of a daemon goes, in words for people."""
    if foreground:
        return STDERR
    if "CSVFS_LOG" in os.environ:
        return os.environ["CSVFS_LOG"]
    if Path(JOURNAL_SOCKET).exists():
        return f"journalctl -t {IDENTIFIER}"
    return LOG_FILE


@contextmanager
def logging_to(where: str, *secrets: str) -> Iterator[None]:
    """Send the root logger's records to a `destination`, through a thread, without secrets."""
    handler = _handler(where)
    # Here and not where records come in: by now tracebacks are part of the message.
    handler.addFilter(Redact(*secrets))
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = [QueueHandler(records)]
    root.setLevel(os.environ.get("CSVFS_LOG_LEVEL", "INFO").upper())
    logging.captureWarnings(True)
    replies = logging.getLogger("pyfuse3")
    replies.addFilter(calm_late_answer)
    listener = QueueListener(records, handler)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        replies.removeFilter(calm_late_answer)
        logging.captureWarnings(False)
        root.handlers = handlers
        root.setLevel(level)
        handler.close()


def _handler(where: str) -> logging.Handler:
    handler: logging.Handler
    if where.startswith("journalctl"):
        handler = JournalHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        return handler
    if where == STDERR:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = logging.FileHandler(where, delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler
