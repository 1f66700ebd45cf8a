"""What `csvctl validate` makes of what it found: facts in, verdicts out, no LUN."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from csvfs.format import (
    Geometry,
    Identity,
    ProbeFlag,
    Session,
    SessionKind,
    SlotBlock,
    SlotState,
    Superblock,
    View,
    ViewSlot,
    WriteCache,
)
from csvfs.host.validate import judge
from csvfs.host.validate_facts import (
    Copy,
    Door,
    Facts,
    KeyState,
    KeyUse,
    Property,
    Refused,
    Report,
    Verdict,
)
from csvfs.signatures import Signature
from redirector.block.device import LunIdentity, RegisteredKeys, Reservation, ReservationType
from redirector.block.keys import PathKey, newcomer_key
from redirector.block.probe_result import Finding, ProbeResult
from redirector.block.probe_result import ProbeFlag as Found
from redirector.block.reservations import Standing
from redirector.block.scsi import ReserveCapabilities

SIZE = 64 << 20
TYPE_6 = ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
DATA, CONTROL = PathKey(1, 7, 1).pack(), PathKey(1, 7, 2).pack()
OLD_PATH, OLD_LIFE = PathKey(1, 7, 3).pack(), PathKey(1, 6, 1).pack()
NEWCOMER = newcomer_key(Random(1))
STRANGER = 0x1234_5678_9ABC_DEF0
GOOD_PROBE = (
    ProbeFlag.PROBED
    | ProbeFlag.PREEMPT_UNREGISTERED_CONFLICTS
    | ProbeFlag.FENCE_STOPS_READ
    | ProbeFlag.FENCE_STOPS_WRITE
    | ProbeFlag.RESET_DRAINS
    | ProbeFlag.REINSTATEMENT_CLOSES
    | ProbeFlag.UNMAP_WORKS
    | ProbeFlag.WRITE_SAME_WORKS
)
"""As tgt's: UNMAP and WRITE SAME leak."""
IDENTITY = LunIdentity(
    SIZE, 512, "IET", "DISK", serial="s", device_id=b"id", thin=True, unmap_granularity_bytes=512
)
SUPERBLOCK = Superblock(
    b"V" * 16,
    Geometry.for_lun(SIZE, 4),
    0,
    "vms",
    b"id",
    "IET",
    "DISK",
    "s",
    GOOD_PROBE,
)
MEMBER = ViewSlot(7, SlotState.ACTIVE, node_name="alpha")
EMPTY = View.empty(4, 8, holder_key=CONTROL).with_slot(
    1, ViewSlot(7, SlotState.FREE, node_name="alpha")
)
MOUNTED = replace(EMPTY.with_slot(1, MEMBER), epoch=9)
BLOCK = SlotBlock(
    1,
    Identity(7, 2, 0, 0, bytes(16), bytes(16), "alpha"),
    (
        Session(SessionKind.DATA, 1, DATA, "iqn.x", 1),
        Session(SessionKind.CONTROL, 2, CONTROL, "iqn.x", 2),
    ),
)


def standing(*keys: int, holder: int = 0, kind: int = TYPE_6) -> Standing:
    reservation = Reservation(3, holder, kind if holder else ReservationType.NONE)
    return Standing(RegisteredKeys(3, keys), reservation)


HEALTHY = Facts(
    identity=IDENTITY,
    standing=standing(DATA, CONTROL, NEWCOMER, holder=CONTROL),
    outsider_read=Refused.YES,
    own_key=NEWCOMER,
    superblocks=(Copy(SUPERBLOCK), Copy(SUPERBLOCK)),
    views=(Copy(EMPTY), Copy(MOUNTED)),
    slot_blocks={1: BLOCK},
    reads_s=(0.001, 0.002, 0.003),
    closes_old_session=True,
    no_password=Door.SHUT,
    stranger=Door.SHUT,
)
PARKED = replace(
    HEALTHY, views=(Copy(EMPTY), Copy(None, "torn")), standing=standing(CONTROL, holder=CONTROL)
)
BLANK = Facts(identity=IDENTITY, standing=standing(), outsider_read=Refused.NO, reads_s=(0.001,))


def with_superblock(**changes: Any) -> Facts:
    changed = replace(SUPERBLOCK, **changes)
    return replace(HEALTHY, superblocks=(Copy(changed), Copy(changed)))


def with_identity(**changes: Any) -> Facts:
    return replace(HEALTHY, identity=replace(IDENTITY, **changes))


def keys(facts: Facts, *registered: int, holder: int = 0, kind: int = TYPE_6) -> Facts:
    return replace(facts, standing=standing(*registered, holder=holder, kind=kind))


def the(report: Report, name: str) -> Property:
    found = [each for each in report.properties if each.name == name]
    assert len(found) == 1, f"{name}: {len(found)} lines"
    return found[0]


def test_a_healthy_volume_passes() -> None:
    report = judge(HEALTHY)
    assert report.verdict is Verdict.PASSED
    left = {each.name for each in report.properties if each.verdict is not Verdict.PASSED}
    assert left == {"provisioning"}, "thin is a note"
    assert report.keys == (
        KeyUse(DATA, KeyState.MEMBER, False, "alpha", "data"),
        KeyUse(CONTROL, KeyState.MEMBER, True, "alpha", "control"),
    )


def test_a_parked_volume_passes() -> None:
    report = judge(PARKED)
    assert report.verdict is Verdict.PASSED
    assert report.keys == (KeyUse(CONTROL, KeyState.PARKED, True),)


def test_an_empty_lun_passes() -> None:
    report = judge(BLANK)
    assert report.verdict is Verdict.PASSED
    assert the(report, "volume").verdict is Verdict.NOT_TESTED
    assert the(report, "arbiter").verdict is Verdict.NOT_TESTED
    assert "--destructive" in the(report, "arbiter").found


CASES: list[tuple[str, Facts, str, Verdict, str]] = [
    # what is on the LUN
    (
        "one superblock",
        replace(HEALTHY, superblocks=(Copy(None, "bad checksum"), Copy(SUPERBLOCK))),
        "superblock copies",
        Verdict.WARNING,
        "bad checksum",
    ),
    (
        "two volumes",
        replace(
            HEALTHY,
            superblocks=(Copy(SUPERBLOCK), Copy(replace(SUPERBLOCK, volume_id=b"W" * 16))),
        ),
        "superblock copies",
        Verdict.FAILED,
        "two volumes",
    ),
    (
        "no superblock, but a view",
        replace(BLANK, destroyed="block 0: zeroes"),
        "volume",
        Verdict.FAILED,
        "block 0: zeroes",
    ),
    (
        "another filesystem",
        replace(BLANK, signatures=(Signature(1080, "ext4"),)),
        "volume",
        Verdict.WARNING,
        "ext4 at byte 1080",
    ),
    (
        "one view",
        replace(HEALTHY, views=(Copy(None, "torn"), Copy(MOUNTED))),
        "view copies",
        Verdict.NOTE,
        "torn",
    ),
    (
        "no view",
        replace(HEALTHY, views=(Copy(None, "torn"), Copy(None, "gone"))),
        "view copies",
        Verdict.FAILED,
        "torn; gone",
    ),
    ("a newer format", with_superblock(incompat=4), "features", Verdict.FAILED, "0x4"),
    # the device
    ("a copy", with_identity(device_id=b"other"), "identity", Verdict.FAILED, b"other".hex()),
    (
        "an id that went away",
        with_identity(device_id=b""),
        "identity",
        Verdict.FAILED,
        "without an id",
    ),
    (
        "no id at all",
        replace(with_superblock(device_id=b""), identity=replace(IDENTITY, device_id=b"")),
        "identity",
        Verdict.NOT_TESTED,
        "83h",
    ),
    ("shrunk", with_identity(size_bytes=SIZE - 512), "size", Verdict.FAILED, "shrunk"),
    ("grown", with_identity(size_bytes=SIZE + 65536), "size", Verdict.WARNING, "grown"),
    ("odd size", with_identity(size_bytes=SIZE + 512), "size", Verdict.PASSED, "as formatted"),
    (
        "blocks too large",
        with_identity(logical_block_bytes=8192),
        "block limits",
        Verdict.FAILED,
        "8192",
    ),
    (
        "short commands",
        with_identity(max_transfer_bytes=65536),
        "block limits",
        Verdict.WARNING,
        "64 KiB",
    ),
    ("thick", with_identity(thin=False), "provisioning", Verdict.PASSED, "thick"),
    (
        "thin without UNMAP",
        with_superblock(probe=GOOD_PROBE & ~ProbeFlag.UNMAP_WORKS),
        "provisioning",
        Verdict.WARNING,
        "cannot give freed space back",
    ),
    (
        "stable cache",
        with_identity(volatile_cache=False),
        "write cache",
        Verdict.PASSED,
        "no write",
    ),
    (
        "battery lost",
        with_superblock(write_cache=WriteCache.TARGET_SAYS_STABLE),
        "write cache",
        Verdict.WARNING,
        "now",
    ),
    # reading
    (
        "slow in the median",
        replace(HEALTHY, reads_s=(0.03, 0.03, 0.001)),
        "latency",
        Verdict.WARNING,
        "median 30.00 ms, worst 30.00 ms",
    ),
    (
        "one slow read",
        replace(HEALTHY, reads_s=(0.001, 0.001, 0.6)),
        "latency",
        Verdict.WARNING,
        "median 1.00 ms, worst 600.00 ms",
    ),
    (
        "silent",
        replace(HEALTHY, reads_s=(0.001, 0.001, 2.5)),
        "latency",
        Verdict.FAILED,
        "worst 2500.00 ms",
    ),
    (
        "lost bytes",
        replace(HEALTHY, unreadable=("byte 4096",)),
        "medium",
        Verdict.FAILED,
        "byte 4096",
    ),
    # the target
    (
        "no reservations",
        replace(BLANK, reservable=False),
        "persistent reservations",
        Verdict.FAILED,
        "does not know them",
    ),
    (
        "no type 6",
        replace(BLANK, capabilities=ReserveCapabilities(False, False)),
        "persistent reservations",
        Verdict.FAILED,
        "no type 6",
    ),
    (
        "says type 6",
        replace(BLANK, capabilities=ReserveCapabilities(False, True)),
        "persistent reservations",
        Verdict.PASSED,
        "says that it has type 6",
    ),
    (
        "the fence leaks",
        replace(HEALTHY, outsider_read=Refused.NO),
        "exclusion",
        Verdict.FAILED,
        "READ",
    ),
    ("not probed", with_superblock(probe=ProbeFlag.NONE), "arbiter", Verdict.WARNING, "not probed"),
    (
        "unfit, and used nevertheless",
        with_superblock(probe=GOOD_PROBE & ~ProbeFlag.RESET_DRAINS),
        "arbiter",
        Verdict.FAILED,
        "missing at format: a reset drains",
    ),
    ("another product", with_identity(product="NEW"), "target", Verdict.WARNING, "IET NEW"),
    (
        "UNMAP leaks for good",
        with_superblock(probe=GOOD_PROBE & ~ProbeFlag.REINSTATEMENT_CLOSES),
        "UNMAP",
        Verdict.NOTE,
        "does not use it",
    ),
    (
        "UNMAP is gone",
        with_identity(unmap_granularity_bytes=0),
        "UNMAP",
        Verdict.WARNING,
        "not supported any more",
    ),
    (
        "UNMAP is new",
        with_superblock(probe=GOOD_PROBE & ~ProbeFlag.UNMAP_WORKS),
        "UNMAP",
        Verdict.NOTE,
        "not so at format",
    ),
    (
        "sessions stay open",
        replace(HEALTHY, closes_old_session=False),
        "reinstatement",
        Verdict.WARNING,
        "as it did at format",
    ),
    (
        "sessions always stayed open",
        replace(
            with_superblock(probe=GOOD_PROBE & ~ProbeFlag.REINSTATEMENT_CLOSES),
            closes_old_session=False,
        ),
        "reinstatement",
        Verdict.NOTE,
        "times out",
    ),
    # who gets in
    ("no CHAP", replace(HEALTHY, no_password=Door.OPEN), "CHAP", Verdict.WARNING, "off"),
    ("a file", replace(HEALTHY, no_password=Door.NONE), "CHAP", Verdict.NOT_TESTED, "file"),
    (
        "unclear",
        replace(HEALTHY, no_password=Door.UNKNOWN),
        "CHAP",
        Verdict.NOT_TESTED,
        "not answered",
    ),
    (
        "unmasked behind CHAP",
        replace(HEALTHY, stranger=Door.OPEN),
        "LUN masking",
        Verdict.NOTE,
        "password",
    ),
    (
        "unmasked without CHAP",
        replace(HEALTHY, stranger=Door.OPEN, no_password=Door.OPEN),
        "LUN masking",
        Verdict.WARNING,
        "any initiator name",
    ),
    # who is registered
    (
        "mounted, nobody holds",
        keys(HEALTHY, DATA, CONTROL),
        "reservation",
        Verdict.FAILED,
        "nobody holds it",
    ),
    ("parked, nobody holds", keys(PARKED), "reservation", Verdict.NOTE, "waits 5 s"),
    (
        "a newcomer holds",
        keys(HEALTHY, DATA, CONTROL, NEWCOMER + 1, holder=NEWCOMER + 1),
        "reservation",
        Verdict.WARNING,
        "not yet a member",
    ),
    (
        "a dead life holds",
        keys(HEALTHY, DATA, CONTROL, OLD_LIFE, holder=OLD_LIFE),
        "reservation",
        Verdict.WARNING,
        "no member",
    ),
    (
        "another kind of reservation",
        keys(HEALTHY, STRANGER, holder=STRANGER, kind=5),
        "reservation",
        Verdict.FAILED,
        "type 5",
    ),
    (
        "a stranger holds",
        replace(keys(BLANK, STRANGER, holder=STRANGER), readable=False),
        "reservation",
        Verdict.FAILED,
        "not a key of csvfs",
    ),
    ("RESERVE(6)", replace(BLANK, readable=False), "reservation", Verdict.FAILED, "RESERVE(6)"),
    (
        "held without a volume",
        keys(BLANK, NEWCOMER, holder=NEWCOMER),
        "reservation",
        Verdict.WARNING,
        "no volume",
    ),
    (
        "a stranger is registered",
        keys(HEALTHY, DATA, CONTROL, STRANGER, holder=CONTROL),
        "foreign keys",
        Verdict.FAILED,
        "0x123456789abcdef0",
    ),
    (
        "somebody looks",
        keys(HEALTHY, DATA, CONTROL, NEWCOMER + 1, holder=CONTROL),
        "newcomers",
        Verdict.NOTE,
        "a tool such as this",
    ),
    (
        "a path that was given up",
        keys(HEALTHY, DATA, CONTROL, OLD_PATH, holder=CONTROL),
        "stale keys",
        Verdict.WARNING,
        "generation 3) of alpha",
    ),
    (
        "a life that ended",
        keys(HEALTHY, DATA, CONTROL, OLD_LIFE, holder=CONTROL),
        "stale keys",
        Verdict.WARNING,
        "a host that is no member",
    ),
    (
        "left beside the parked key",
        keys(PARKED, DATA, CONTROL, holder=CONTROL),
        "stale keys",
        Verdict.WARNING,
        "of alpha",
    ),
    (
        "a member without a path",
        replace(
            keys(HEALTHY, DATA, CONTROL, holder=CONTROL),
            views=(
                Copy(EMPTY),
                Copy(
                    MOUNTED.with_slot(2, ViewSlot(1, SlotState.ACTIVE, node_name="beta")),
                ),
            ),
        ),
        "members",
        Verdict.WARNING,
        "without a registered path: beta",
    ),
    (
        "an unreplayed journal",
        replace(
            HEALTHY,
            views=(
                Copy(EMPTY),
                Copy(
                    MOUNTED.with_slot(2, ViewSlot(1, SlotState.NEEDS_REPLAY, node_name="beta")),
                ),
            ),
        ),
        "journals",
        Verdict.WARNING,
        "beta (slot 2)",
    ),
]


@pytest.mark.parametrize(
    ("facts", "name", "verdict", "words"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_each_property(facts: Facts, name: str, verdict: Verdict, words: str) -> None:
    report = judge(facts)
    found = the(report, name)
    assert found.verdict is verdict, found
    assert words in found.found
    if verdict in (Verdict.FAILED, Verdict.WARNING):
        assert found.means and found.to_do
    if verdict is Verdict.FAILED:
        assert report.verdict is Verdict.FAILED


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_no_property_stands_there_twice(case: tuple[str, Facts, str, Verdict, str]) -> None:
    names = [each.name for each in judge(case[1]).properties]
    assert len(names) == len(set(names))


def test_without_a_view_nobody_calls_a_key_stale() -> None:
    report = judge(replace(HEALTHY, views=(Copy(None, "torn"), Copy(None, "torn"))))
    assert {use.state for use in report.keys} == {KeyState.UNKNOWN}
    assert the(report, "members").verdict is Verdict.NOT_TESTED
    assert "stale keys" not in {each.name for each in report.properties}


def test_a_member_whose_slot_block_is_of_another_life_has_no_stale_key() -> None:
    other = replace(BLOCK, identity=replace(BLOCK.identity, incarnation=6))
    report = judge(replace(HEALTHY, slot_blocks={1: other}))
    assert {use.state for use in report.keys} == {KeyState.MEMBER}


def test_what_a_writing_probe_found_takes_the_place_of_what_format_found() -> None:
    findings = (
        Finding("it drains", True, True, ""),
        Finding("it leaks", False, False, "nothing to do"),
        Finding("it conflicts", False, True, "use another"),
    )
    report = judge(replace(BLANK, probed=ProbeResult(Found.PROBED, findings)))
    assert the(report, "it drains").verdict is Verdict.PASSED
    assert the(report, "it leaks").verdict is Verdict.NOTE
    assert the(report, "it conflicts").verdict is Verdict.FAILED
    assert the(report, "it conflicts").means == "use another"
    assert "arbiter" not in {each.name for each in report.properties}
