"""What is on a LUN, whether it is the LUN that was formatted, and how it is served. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Final

from csvfs.format import BLOCK_BYTES, UNIT_BYTES, Superblock, WriteCache
from csvfs.host.validate_facts import (
    Copy,
    Facts,
    Property,
    failed,
    not_tested,
    noted,
    passed,
    warned,
)
from csvfs.mkfs import stored_device_id

SLOW_MEDIAN_S: Final = 0.02
"""A guest that reads one block after the other then gets less than from one disk drive."""
SLOW_WORST_S: Final = 0.5
"""A member shows that it is alive so often."""
SILENT_S: Final = 2.0
"""After so long a silence a session counts as lost."""
_SMALL_TRANSFER_BYTES: Final = 256 << 10

_LOOK_AT_THE_ARRAY: Final = "Look at the array's log and its health"


def judge_lun(facts: Facts) -> Iterator[Property]:
    """The volume and its copies first, then the LUN."""
    yield _volume(facts)
    superblock = facts.superblock
    if superblock is not None:
        yield _superblocks(facts.superblocks)
        if not superblock.resignature_under_way:
            yield _views(facts)
        yield _features(superblock)
        yield _identity(facts, superblock)
        yield _size(facts, superblock)
    yield _blocks(facts)
    yield _thin(facts)
    yield _cache(facts, superblock)
    yield from _reading(facts)


def _volume(facts: Facts) -> Property:
    name = "volume"
    superblock = facts.superblock
    if superblock is not None:
        return passed(name, f"{superblock.label} ({superblock.volume_id.hex()})")
    if not facts.readable:
        return not_tested(name, "the LUN cannot be read beside another system's reservation")
    if facts.destroyed:
        return failed(
            name,
            f"both superblocks are destroyed: {facts.destroyed}",
            "the volume cannot be mounted. The images may be intact behind them",
            "Find out what wrote to the LUN before anything else does; then `csvctl check` says"
            " whether they can be derived from the rest",
        )
    if facts.signatures:
        found = "; ".join(str(each) for each in facts.signatures)
        return warned(
            name,
            f"none; on the LUN is {found}",
            "it may be another system's data, or the wrong LUN",
            "Make sure that it is the right LUN; nothing but `csvctl format --force` overwrites it",
        )
    return not_tested(name, "none, and nothing else: `csvctl format` makes one")


# -- copies ------------------------------------------------------------------------------------
def _superblocks(copies: tuple[Copy[Superblock], ...]) -> Property:
    name = "superblock copies"
    bad = [copy.trouble for copy in copies if copy.content is None]
    valid = [copy.content for copy in copies if copy.content is not None]
    if bad:
        return warned(
            name,
            f"one is damaged: {'; '.join(bad)}",
            "the volume works with the other one; with both gone it cannot be mounted",
            "Find out what wrote there (a partitioning tool, an installer?); at the next"
            " occasion unmount the volume and run `csvctl check --repair`",
        )
    if len({superblock.volume_id for superblock in valid}) > 1:
        return failed(
            name,
            "they are of two volumes",
            "parts of two volumes lie on this LUN: an incomplete copy or restore",
            "Do not mount it. Restore the LUN from a snapshot or backup of the array",
        )
    return passed(name, "both valid")


def _views(facts: Facts) -> Property:
    name = "view copies"
    bad = [copy.trouble for copy in facts.views if copy.content is None]
    if not bad:
        epoch = facts.view.epoch if facts.view is not None else 0
        return passed(name, f"both valid, epoch {epoch}")
    if facts.view is None:
        return failed(
            name,
            f"both are damaged: {'; '.join(bad)}",
            "nobody can tell who is a member: no host can mount the volume, one that has it"
            " mounted writes a new view when it unmounts",
            "Unmount the volume where it is mounted; if it is nowhere, `csvctl check --repair`"
            " makes a new view",
        )
    return noted(
        name,
        f"one is damaged: {'; '.join(bad)}. A crash in the middle of writing it leaves it so; the"
        " next two changes of membership write both anew",
    )


def _features(superblock: Superblock) -> Property:
    name = "features"
    unknown = superblock.unknown_incompat, superblock.unknown_ro_compat
    if not any(unknown):
        return passed(name, "all known")
    return failed(
        name,
        f"unknown: incompat {unknown[0]:#x}, ro_compat {unknown[1]:#x}",
        "this host cannot mount the volume",
        "Install the csvfs that the other hosts run",
    )


# -- the device --------------------------------------------------------------------------------
def _identity(facts: Facts, superblock: Superblock) -> Property:
    name = "identity"
    formatted, found = superblock.device_id, stored_device_id(facts.identity)
    if superblock.resignature_under_way:
        return failed(
            name,
            f"a copy of volume {superblock.former_volume_id.hex()} that `csvctl resignature` was"
            " making a volume of its own, and was cut off",
            "no host can mount it; the original is not concerned",
            "Run `csvctl resignature` again: it goes on where it was cut off",
        )
    if formatted != found:
        return failed(
            name,
            f"a copy: formatted was {_id_words(formatted)}, this is {_id_words(found)}",
            "the original may be in use; csvfs does not mount a snapshot or clone of an array",
            "Mount the original, or make the copy a volume of its own (`csvctl resignature`); if"
            " this is the original and the array has given it a new id, restore the old one there",
        )
    if not found:
        return not_tested(name, "the LUN has no designator (VPD page 83h): a copy would not show")
    return passed(name, f"the LUN that was formatted, {_id_words(found)}")


def _id_words(device_id: bytes) -> str:
    return f"device {device_id.hex()}" if device_id else "a device without an id"


def _size(facts: Facts, superblock: Superblock) -> Property:
    name = "size"
    size, needed = facts.identity.size_bytes, superblock.geometry.size_bytes
    if size < needed:
        return failed(
            name,
            f"{size} bytes, the volume has {needed}: the LUN has shrunk",
            "what lay behind its end is lost or out of reach; the volume is not mounted",
            "Restore the LUN's size on the array before anything else",
        )
    if size - needed >= UNIT_BYTES:
        return warned(
            name,
            f"{size} bytes, the volume uses {needed}: the LUN has grown",
            "the new room is not used; and if the first superblock is destroyed, its backup is not"
            " found, because it lies at the old end",
            "Give the LUN its old size back, or make a new volume; this version does not grow one",
        )
    return passed(name, f"{size} bytes, as formatted")


def _blocks(facts: Facts) -> Property:
    name = "block limits"
    identity = facts.identity
    found = (
        f"logical block {identity.logical_block_bytes} bytes, at most"
        f" {identity.max_transfer_bytes >> 10} KiB a command"
    )
    if identity.logical_block_bytes > BLOCK_BYTES:
        return failed(
            name,
            found,
            "csvfs writes blocks of 4 KiB: it cannot use this LUN",
            "Export the LUN with logical blocks of 512 or 4096 bytes",
        )
    if identity.max_transfer_bytes < _SMALL_TRANSFER_BYTES:
        return warned(
            name,
            found,
            "large reads and writes of virtual machines are cut to pieces, and slow",
            "Raise the target's maximum transfer length (VPD page B0h) to 1 MiB",
        )
    return passed(name, found)


def _thin(facts: Facts) -> Property:
    name = "provisioning"
    identity = facts.identity
    if not identity.thin:
        return passed(name, "thick: the array has set the room aside")
    superblock = facts.superblock
    if superblock is None or superblock.unmap_allowed:
        unmap = bool(identity.unmap_granularity_bytes)
        how = "can be given back by UNMAP" if unmap else "cannot be given back (no UNMAP)"
        return noted(
            name,
            f"thin: watch the room on the array, a full one stops every write. Freed space {how}",
        )
    return warned(
        name,
        "thin, and csvfs cannot give freed space back here (see UNMAP)",
        "the array fills up although the volume does not; a full array stops every write",
        "Watch the room on the array, and keep as much as the LUN has; or use a thick LUN",
    )


def _cache(facts: Facts, superblock: Superblock | None) -> Property:
    name = "write cache"
    volatile = facts.identity.volatile_cache
    believed = superblock.write_cache if superblock is not None else WriteCache.VOLATILE
    if not volatile:
        return passed(name, "the target says that it loses no write when its power fails")
    if believed is WriteCache.VOLATILE:
        return passed(
            name,
            "volatile (WCE): csvfs flushes, and keeps what is not flushed, so nothing that fsync"
            " acknowledged is lost",
        )
    who = "the target" if believed is WriteCache.TARGET_SAYS_STABLE else "the administrator"
    return warned(
        name,
        f"volatile (WCE) now; at format {who} said that it is not",
        "fsync stays safe, because csvfs goes by what the target says at each login; but the"
        " target is set up differently, or has lost its battery",
        "Look at the array's cache and its battery or flash",
    )


# -- reading -------------------------------------------------------------------------------------
def _reading(facts: Facts) -> Iterator[Property]:
    if facts.unreadable:
        yield failed(
            "medium",
            f"cannot be read: {', '.join(facts.unreadable)}",
            "the array has lost data: files that lie there give an error, others are not concerned",
            f"{_LOOK_AT_THE_ARRAY}; then `csvctl check`, and restore the files that it names",
        )
    if facts.reads_s:
        yield _latency(facts.reads_s)
    elif not facts.unreadable:
        yield not_tested("latency", "nothing could be read")


def _latency(reads_s: tuple[float, ...]) -> Property:
    name = "latency"
    middle, worst = median(reads_s), max(reads_s)
    found = (
        f"{len(reads_s)} reads of 4 KiB: median {middle * 1e3:.2f} ms, worst {worst * 1e3:.2f} ms"
    )
    if worst >= SILENT_S:
        return failed(
            name,
            found,
            "a path without an answer for 2 s is given up: virtual machines pause again and again",
            f"{_LOOK_AT_THE_ARRAY}, the storage network (drops, pause frames, duplex), and what"
            " else loads it",
        )
    if worst >= SLOW_WORST_S or middle >= SLOW_MEDIAN_S:
        return warned(
            name,
            found,
            "virtual machines are slow, and a take-over takes longer",
            "Run it again when the LUN is idle; if it stays, look at the array's load and at the"
            " storage network (drops, MTU, pause frames)",
        )
    return passed(name, found)
