"""Whether a target keeps hosts apart, and strangers out. Pure.

The arbiter was probed at format, by writing; its results are in the superblock. On a live volume
they are compared with what can be seen without a write: who reads unregistered, what the target
says it can do, whether it is the same product still.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from csvfs.format import ProbeFlag, Superblock
from csvfs.host.validate_facts import (
    Door,
    Facts,
    Property,
    Refused,
    failed,
    not_tested,
    noted,
    passed,
    warned,
)
from redirector.block.device import ReservationType
from redirector.block.probe_result import Finding

_NEEDED: Final = (
    (ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS, "PREEMPT of an unregistered key conflicts"),
    (ProbeFlag.FENCE_STOPS_READ, "the fence stops READ"),
    (ProbeFlag.FENCE_STOPS_WRITE, "the fence stops WRITE"),
    (ProbeFlag.RESET_DRAINS, "a reset drains"),
)
_USE_ANOTHER: Final = "Use another target, or mend this one and try it with a scratch LUN"
_DESTROYED: Final = "two hosts could write the same image at once, and destroy it"
_SCRATCH: Final = "`csvctl validate --destructive` on an empty LUN of the same target"


def judge_target(facts: Facts) -> Iterator[Property]:
    """The arbiter, then who gets in."""
    yield _type_6(facts)
    yield _outsider(facts)
    if facts.probed is not None:
        for finding in facts.probed.findings:
            yield _probed(finding)
    elif facts.superblock is not None:
        yield _arbiter(facts.superblock)
        yield _product(facts, facts.superblock)
        yield _unmap(facts, facts.superblock)
        yield _write_same(facts.superblock)
    else:
        yield not_tested("arbiter", "it takes writes: --destructive, on a LUN that is empty")
    yield _reinstatement(facts)
    yield _password(facts)
    yield _stranger(facts)


# -- the arbiter ---------------------------------------------------------------------------------
def _type_6(facts: Facts) -> Property:
    name = "persistent reservations"
    if not facts.reservable:
        return failed(name, "the target does not know them", _DESTROYED, _USE_ANOTHER)
    says = facts.capabilities
    if says is not None and says.exclusive_access_registrants_only is False:
        return failed(
            name,
            "the target says that it has no type 6 (Exclusive Access, Registrants Only)",
            _DESTROYED,
            _USE_ANOTHER,
        )
    reserved = facts.standing.reservation.type
    if reserved == ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY:
        return passed(name, "type 6 is in force")
    if facts.probed is not None:
        return passed(name, "tried, see below")
    if says is not None and says.exclusive_access_registrants_only:
        return passed(name, "the target says that it has type 6")
    return not_tested(name, "none is in force, and the target does not say which types it has")


def _outsider(facts: Facts) -> Property:
    name = "exclusion"
    if facts.standing.reservation.type != ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY:
        return not_tested(name, "no reservation of type 6 is in force that could keep anybody out")
    if facts.outsider_read is Refused.YES:
        return passed(name, "who is not registered is refused a READ")
    return failed(
        name,
        "the target lets who is not registered READ, although a reservation of type 6 is in force",
        f"an evicted host goes on: {_DESTROYED}",
        f"Stop writing to the volume from more than one host. {_USE_ANOTHER}",
    )


def _probed(finding: Finding) -> Property:
    if finding.passed:
        return passed(finding.name, "tried just now")
    if finding.needed:
        return failed(finding.name, "it does not", finding.meaning, _USE_ANOTHER)
    return noted(finding.name, f"it does not: {finding.meaning}")


def _arbiter(superblock: Superblock) -> Property:
    name = "arbiter"
    if not superblock.probe & ProbeFlag.PROBED:
        return warned(
            name,
            "it was not probed when the volume was formatted",
            "nobody knows whether the target stops a host that was evicted",
            f"Try it: {_SCRATCH}",
        )
    absent = [words for flag, words in _NEEDED if not superblock.probe & flag]
    if absent:
        return failed(
            name,
            f"found to be missing at format: {'; '.join(absent)}",
            _DESTROYED,
            _USE_ANOTHER,
        )
    return passed(name, f"as probed at format: {'; '.join(words for _, words in _NEEDED)}")


def _product(facts: Facts, superblock: Superblock) -> Property:
    name = "target"
    now = f"{facts.identity.vendor} {facts.identity.product}".strip() or "unknown"
    then = f"{superblock.vendor} {superblock.product}".strip() or "unknown"
    if now == then:
        return passed(name, f"{now}, as at format")
    return warned(
        name,
        f"{now}; the volume was formatted on {then}",
        "what was probed at format was another product: this one may fence differently",
        f"Try it: {_SCRATCH}",
    )


def _unmap(facts: Facts, superblock: Superblock) -> Property:
    name = "UNMAP"
    flags = superblock.probe
    supported = bool(facts.identity.unmap_granularity_bytes)
    if not flags & ProbeFlag.UNMAP_WORKS:
        if supported:
            return noted(name, "supported now, not so at format: csvfs does not use it")
        return passed(name, "not supported, not used")
    if not supported:
        return warned(
            name,
            "worked at format, and is not supported any more",
            "space that is freed on the volume stays taken on the array",
            "Look at what was changed on the array (firmware, thin provisioning)",
        )
    if flags & ProbeFlag.FENCE_STOPS_UNMAP:
        return passed(name, "works, and the fence stops it")
    if flags & ProbeFlag.REINSTATEMENT_CLOSES:
        return passed(
            name, "works; it gets through the fence, but not once its sender's session is closed"
        )
    return noted(name, "works, but nothing stops it from an evicted host: csvfs does not use it")


def _write_same(superblock: Superblock) -> Property:
    name = "WRITE SAME"
    if not superblock.probe & ProbeFlag.WRITE_SAME_WORKS:
        return passed(name, "not supported, not used")
    if superblock.probe & ProbeFlag.FENCE_STOPS_WRITE_SAME:
        return passed(name, "works, and the fence stops it; not used")
    return passed(name, "gets through the fence; csvfs never sends it")


def _reinstatement(facts: Facts) -> Property:
    name = "reinstatement"
    superblock = facts.superblock
    closes = facts.closes_old_session
    if closes is None:
        return not_tested(name, "the sessions that it takes could not be opened")
    relied_on = superblock is not None and bool(superblock.probe & ProbeFlag.REINSTATEMENT_CLOSES)
    if closes:
        return passed(name, "a new login closes the old session of the same initiator port")
    if relied_on:
        return warned(
            name,
            "a new login did not close the old session of the same initiator port, as it did at"
            " format",
            "a frozen host can delay the take-over of its virtual machines, and its UNMAPs may"
            " come through",
            "Look at what was changed on the array (firmware, sessions a port)",
        )
    return noted(
        name,
        "a new login does not close the old session: a frozen host can delay the take-over of its"
        " virtual machines until its connection times out",
    )


# -- who gets in -----------------------------------------------------------------------------------
def _password(facts: Facts) -> Property:
    name = "CHAP"
    match facts.no_password:
        case Door.NONE:
            return not_tested(name, "a file has no login: who may open the file may write it")
        case Door.SHUT:
            return passed(name, "the target asks for a password")
        case Door.UNKNOWN:
            return not_tested(name, "a login without a password was not answered clearly")
        case Door.OPEN:
            return warned(
                name,
                "off: the target lets in who has no password",
                "whoever reaches the storage network and knows an initiator name can register,"
                " read every image and destroy the volume",
                "Turn CHAP on at the target, and put user and password into"
                " /etc/csvfs/credentials (mode 0600) of each host",
            )


def _stranger(facts: Facts) -> Property:
    name = "LUN masking"
    match facts.stranger:
        case Door.NONE:
            return not_tested(name, "a file has no login")
        case Door.SHUT:
            return passed(name, "an initiator name that nobody has allowed is refused")
        case Door.UNKNOWN:
            return not_tested(name, "a login under a strange name was not answered clearly")
        case Door.OPEN if facts.no_password is Door.SHUT:
            return noted(name, "any initiator name gets in that has the password")
        case Door.OPEN:
            return warned(
                name,
                "off: the target shows the LUN to any initiator name",
                "any machine on the storage network can destroy the volume, an installer that"
                " takes the LUN for an empty disk included",
                "Map the LUN on the array to the initiator names of the hosts only",
            )
