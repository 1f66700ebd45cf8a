"""What a probe found: flag bits for the superblock, lines for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag


class ProbeFlag(IntFlag):
    """What was found; kept in the superblock."""

    NONE = 0
    PROBED = 1 << 0
    PREEMPT_UNREGISTERED_CONFLICTS = 1 << 1
    FENCE_STOPS_READ = 1 << 2
    FENCE_STOPS_WRITE = 1 << 3
    FENCE_STOPS_UNMAP = 1 << 4
    FENCE_STOPS_WRITE_SAME = 1 << 5
    REINSTATEMENT_CLOSES = 1 << 6
    PREEMPT_DRAINS = 1 << 7
    """Never set: nothing relies on it, and one run cannot show it."""
    PREEMPT_ABORT_WORKS = 1 << 8
    RESET_DRAINS = 1 << 9
    UNMAP_WORKS = 1 << 10
    WRITE_SAME_WORKS = 1 << 11


@dataclass(frozen=True, slots=True)
class Finding:
    """One property of the target."""

    name: str
    passed: bool
    needed: bool
    """Without it the target is refused."""
    meaning: str
    """What it means for VMs, and what to do; empty if it passed."""

    def __str__(self) -> str:
        mark = "ok" if self.passed else "REFUSED" if self.needed else "note"
        return f"{mark:8}{self.name}" + (f": {self.meaning}" if self.meaning else "")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Everything that was found."""

    flags: ProbeFlag
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Why this target must not be used; empty if it may."""
        return tuple(each for each in self.findings if each.needed and not each.passed)

    def lines(self) -> list[str]:
        """For people: one line a property."""
        return [str(finding) for finding in self.findings]


class Findings:
    """Collects what is found, in order."""

    def __init__(self) -> None:
        self.flags = ProbeFlag.PROBED
        self.list: list[Finding] = []

    def note(self, name: str, passed: bool, *, needed: bool, meaning: str, flag: int = 0) -> bool:
        self.list.append(Finding(name, passed, needed, "" if passed else meaning))
        if passed:
            self.flags |= flag
        return passed

    def result(self) -> ProbeResult:
        return ProbeResult(self.flags, tuple(self.list))
