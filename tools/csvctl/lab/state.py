"""What a lab consists of, and where that is written down.

    DIR/lab.json              the lab; replaced atomically, under the lock DIR/lab.lock
    /run/csvfs-lab/<id>       the lab's directory, in one line: for `lab down --all`
    /run/netns/csvlab-<id>-*  its namespaces

Invariants
- The entry in /run/csvfs-lab and lab.json are written before anything is made, and go after
  everything has gone: whatever exists of a lab can be found, at any moment its maker may be killed.
- Every name follows from the id. A fault is written down before it is caused and struck out after
  it is mended: what is not in the list is not the case.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

from csvfs.host.problems import Kind, Problem
from csvfs.ondisk.geometry import MAX_LUN_BYTES, MIN_LUN_BYTES

INDEX: Final = Path("/run/csvfs-lab")
NAMESPACES: Final = Path("/run/netns")
PREFIX: Final = "csvlab-"
DEFAULT_DIRECTORY: Final = Path("/var/lib/csvfs-lab")
MAX_HOSTS: Final = 64
MAX_DIRECTORY_BYTES: Final = 56
"""A unix socket's name has 107 bytes; DIR/run/host64/<32 digits>.sock takes 51 of them."""

_FORMAT: Final = 1


@dataclass
class HostState:
    """One host."""

    number: int
    initiator: str
    machine_id: str
    """32 hexadecimal digits."""
    boot_id: str
    """32 hexadecimal digits; another one after a power-off."""
    faults: dict[str, float] = field(default_factory=dict)
    """Kind of each fault that it has now -> its seconds, where the kind has any, else 0."""

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def san_address(self) -> str:
        return f"10.1.0.{self.number}"

    @property
    def cluster_address(self) -> str:
        return f"10.2.0.{self.number}"


@dataclass
class LabState:
    """One lab."""

    id: str
    """8 hexadecimal digits."""
    directory: str
    size_bytes: int
    """Of the LUN."""
    made_directory: bool
    """The lab has made its directory, and takes it away in the end."""
    hosts: list[HostState] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def target_iqn(self) -> str:
        return f"iqn.2026-11.lab.csvfs:{self.id}"

    @property
    def target_address(self) -> str:
        return "10.1.0.254"

    @property
    def lun(self) -> str:
        return f"iscsi://{self.target_address}/{self.target_iqn}/1"

    def namespace(self, role: str) -> str:
        """The name of a network namespace: ``switch``, ``target``, or a host's."""
        return f"{PREFIX}{self.id}-{role}"

    @property
    def roles(self) -> list[str]:
        """Everybody with a namespace, the network first."""
        return ["switch", "target", *(host.name for host in self.hosts)]

    def host(self, name: str) -> HostState:
        """Raises `Problem` (kind USAGE) for a host that the lab does not have."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise Problem(Kind.USAGE, f"the lab has no host {name!r}, but {known}")

    def encode(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def decode(cls, text: str) -> Self:
        """What `encode` made. Raises ValueError."""
        try:
            fields = json.loads(text)
            if fields.pop("format") != _FORMAT:
                raise ValueError("a lab of another version")
            fields["hosts"] = [HostState(**each) for each in fields["hosts"]]
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no description of a lab: {error!r}") from error


def new_state(directory: Path, hosts: int, size_bytes: int) -> LabState:
    """A lab that nothing exists of yet. Raises `Problem` (kind USAGE)."""
    if not 1 <= hosts <= MAX_HOSTS:
        raise Problem(Kind.USAGE, f"a lab has 1 to {MAX_HOSTS} hosts, not {hosts}")
    if not MIN_LUN_BYTES <= size_bytes <= MAX_LUN_BYTES:
        raise Problem(
            Kind.USAGE, f"a LUN has {MIN_LUN_BYTES >> 20} MiB to {MAX_LUN_BYTES >> 50} PiB"
        )
    if len(os.fsencode(directory)) > MAX_DIRECTORY_BYTES:
        raise Problem(
            Kind.USAGE,
            f"{directory} is longer than {MAX_DIRECTORY_BYTES} bytes: names of sockets below it "
            "would be too long",
        )
    lab_id = secrets.token_hex(4)
    members = [
        HostState(
            number,
            f"iqn.2026-11.lab.csvfs:{lab_id}-host{number}",
            secrets.token_hex(16),
            secrets.token_hex(16),
        )
        for number in range(1, hosts + 1)
    ]
    return LabState(lab_id, str(directory), size_bytes, not directory.exists(), members)


def begin(state: LabState) -> None:
    """Write down that the lab is going to exist. Raises `Problem`, OSError."""
    path = state.path
    path.mkdir(parents=True, exist_ok=True)
    if (path / "lab.json").exists():
        raise Problem(Kind.USAGE, f"there is a lab in {path} already: `csvctl lab down` ends it")
    if any(path.iterdir()):
        raise Problem(Kind.USAGE, f"{path} is not empty: a lab wants a directory of its own")
    INDEX.mkdir(mode=0o700, parents=True, exist_ok=True)
    (INDEX / state.id).write_text(state.directory + "\n")
    write(state)


def write(state: LabState) -> None:
    """Put the state in its place. Raises OSError."""
    fresh = state.path / f"lab.json.{os.getpid()}"
    fresh.write_text(state.encode())
    fresh.replace(state.path / "lab.json")


def read(directory: Path) -> LabState:
    """The lab in a directory. Raises `Problem` (kind USAGE), OSError."""
    path = directory / "lab.json"
    try:
        return LabState.decode(path.read_text())
    except FileNotFoundError:
        raise Problem(
            Kind.USAGE, f"there is no lab in {directory}: `csvctl lab up` makes one"
        ) from None
    except ValueError as error:
        raise Problem(Kind.USAGE, f"{path}: {error}") from error


@contextmanager
def changing(directory: Path) -> Iterator[LabState]:
    """The state, to be changed by nobody else meanwhile; written when the block ends well.

    The block may `write` what must be known before it acts. Raises as `read`.
    """
    read(directory)
    with open(directory / "lab.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read(directory)
        yield state
        write(state)


def forget(state: LabState) -> None:
    """The lab has gone. Raises OSError."""
    for name in ("lab.json", "lab.lock"):
        (state.path / name).unlink(missing_ok=True)
    (INDEX / state.id).unlink(missing_ok=True)


def known() -> dict[str, Path]:
    """The id of every lab of this machine that anything is known of -> its directory.

    A namespace whose entry is missing counts, with the default directory's place left empty.
    """
    found: dict[str, Path] = {}
    for name in os.listdir(NAMESPACES) if NAMESPACES.is_dir() else ():
        if name.startswith(PREFIX):
            found[name.removeprefix(PREFIX).partition("-")[0]] = Path()
    for entry in INDEX.iterdir() if INDEX.is_dir() else ():
        found[entry.name] = Path(entry.read_text().strip())
    return found
