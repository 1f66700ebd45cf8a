"""What a daemon is started with. It travels through a pipe, for it may hold a password."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Self

from redirector.block.device import Credentials


@dataclass(frozen=True, slots=True)
class MountSettings:
    """One mount, as it was asked for."""

    source: str
    """The LUN as the admin wrote it, which is what mount(8) compares with fstab; no password."""
    url: str
    """The LUN's canonical URL; never with a password in it."""
    directory: str
    """Absolute, without symbolic links."""
    node: str
    initiator: str
    options: tuple[str, ...] = ()
    """Options of mount(8) that the kernel is to know (ro, dev, suid, noexec, ...)."""
    foreground: bool = False
    """The log goes to stderr."""
    user: str = ""
    password: str = field(default="", repr=False)
    cluster_address: str = ""
    """Where the node listens for its peers, ``ADDR:PORT``; empty: nobody can join it."""
    evict_after_s: float = 6.0
    """How long this node lets others be silent (`lockmgr.cluster.settings`)."""

    @property
    def credentials(self) -> Credentials | None:
        return Credentials(self.user, self.password) if self.user else None

    def encode(self) -> bytes:
        """For the pipe; holds the password."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What `encode` made. Raises ValueError, TypeError."""
        fields = json.loads(data)
        fields["options"] = tuple(fields["options"])
        return cls(**fields)
