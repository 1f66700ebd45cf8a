"""Tell the service manager how far the daemon is (sd_notify(3)); without one, do nothing."""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger("csvfs.host.notify")


def notify_manager(*assignments: str) -> None:
    """Send ``READY=1``, ``STATUS=...`` and the like to NOTIFY_SOCKET, if there is one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto("\n".join(assignments).encode(), address)
    except OSError as error:
        _log.warning("the service manager cannot be told (%s)", error)
