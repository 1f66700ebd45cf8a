"""Why a host cannot have a volume, in a form that a program can act on and a person can read."""

from __future__ import annotations

from dataclasses import dataclass

from redirector.block.keys import key_words


@dataclass(frozen=True, slots=True)
class Refusal:
    """The volume cannot be taken; `words` says why and what to do."""

    @property
    def words(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RefuseOther(Refusal):
    """Another host has the volume mounted, or died with it mounted."""

    slot: int
    node_name: str
    addresses: tuple[str, ...]
    since_ns: int

    @property
    def words(self) -> str:
        where = f" ({', '.join(self.addresses)})" if self.addresses else ""
        return (
            f"{self.node_name}{where} has the volume in slot {self.slot}; unmount it there first,"
            " or if that host died, mount and unmount it there once, so that its journal is"
            " replayed"
        )


@dataclass(frozen=True, slots=True)
class RefuseMountedHere(Refusal):
    """A daemon of this very host has it."""

    @property
    def words(self) -> str:
        return "the volume is mounted on this host already; `csvctl status` shows where"


@dataclass(frozen=True, slots=True)
class RefuseCopy(Refusal):
    """The LUN is not the device that was formatted: the array has copied it."""

    formatted: bytes
    found: bytes

    @property
    def words(self) -> str:
        return (
            f"this LUN is a copy: the volume was formatted on device {self.formatted.hex()}, this"
            f" is device {self.found.hex() or 'without an id'}. Mount the original; csvfs does not"
            " mount a snapshot or clone that an array made, because nobody can tell the two apart."
            " `csvctl resignature` makes the copy a volume of its own"
        )


@dataclass(frozen=True, slots=True)
class RefuseUnfinished(Refusal):
    """A resignature was cut off: some blocks are of the new volume, some of the copied one."""

    volume_id: bytes
    former_volume_id: bytes

    @property
    def words(self) -> str:
        return (
            f"this LUN is a copy of volume {self.former_volume_id.hex()} that `csvctl resignature`"
            f" was making a volume of its own ({self.volume_id.hex()}), and was cut off: run"
            " `csvctl resignature` again to finish it"
        )


@dataclass(frozen=True, slots=True)
class RefuseFeature(Refusal):
    """Written by a newer csvfs."""

    incompat: int
    ro_compat: int

    @property
    def words(self) -> str:
        return (
            f"the volume uses features that this csvfs does not know (incompat"
            f" {self.incompat:#x}, ro_compat {self.ro_compat:#x}): use a newer csvfs"
        )


@dataclass(frozen=True, slots=True)
class RefuseTooSmall(Refusal):
    """The LUN has shrunk since it was formatted."""

    size_bytes: int
    needed_bytes: int

    @property
    def words(self) -> str:
        return (
            f"the LUN has {self.size_bytes} bytes, the volume {self.needed_bytes}: it was made"
            " smaller. Restore its size before anything else"
        )


@dataclass(frozen=True, slots=True)
class RefuseForeign(Refusal):
    """A registration that csvfs never made."""

    key: int
    holds: bool
    type: int

    @property
    def words(self) -> str:
        what = f"holds a reservation of type {self.type}" if self.holds else "is registered"
        return (
            f"key {key_words(self.key)} {what} on this LUN: some other"
            " system uses it. Find it and stop it there"
        )


@dataclass(frozen=True, slots=True)
class RefuseUnexplained(Refusal):
    """Both views are destroyed, and keys are registered whose owners may be alive."""

    keys: tuple[tuple[int, str], ...]
    """Each with the node that it is of, as far as a slot block says; empty: unknown."""

    @property
    def words(self) -> str:
        who = "; ".join(
            f"{key_words(key)} of {name or 'a node that no slot block names'}"
            for key, name in self.keys
        )
        return (
            "both copies of the view are destroyed, so nobody can tell who is a member, and"
            f" registered on the LUN is {who}. If that node has the volume mounted, unmount it"
            " there, which writes a new view; if not, run `csvctl check --repair` there. Only if it"
            " is gone for good: `csvctl check --repair --preempt-key KEY`"
        )


@dataclass(frozen=True, slots=True)
class RefuseExhausted(Refusal):
    """No slot has an incarnation number left."""

    @property
    def words(self) -> str:
        return "every free slot has used up its 16,777,215 incarnations; format a new volume"
