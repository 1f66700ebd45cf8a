"""What else may be on a LUN: partition tables, filesystems, volume managers, csvfs itself.

Pure: `windows` says which bytes to read, `find_signatures` names what is in them and where. The
offsets are those of libblkid and of the systems' own documents. Formatting destroys what is
found, so a doubtful signature counts: it costs a ``--force``, a missed one somebody's data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from csvfs.ondisk.block import BLOCK_BYTES, MAGIC, UNIT_BYTES, BadBlock
from csvfs.ondisk.superblock import Superblock

_KIB: Final = 1024
_MIB: Final = 1024 * 1024
_HEAD_BYTES: Final = 512 * _KIB
_TAIL_BYTES: Final = _MIB
_EXTRA_WINDOWS: Final = tuple(
    (at, 8 * _KIB) for at in (_MIB, _MIB + 64 * _KIB, 2 * _MIB, 3 * _MIB, 64 * _MIB)
)

_BCACHE: Final = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
_BCACHEFS: Final = bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")
_VMFS_MEMBER: Final = bytes.fromhex("0dd001c0")
_VMFS: Final = bytes.fromhex("5ef1ab2f")
_SWAP_PAGES: Final = (4096, 8192, 16384, 65536)

_MAGICS: Final = (
    # offset, bytes, name
    (0, b"XFSB", "XFS"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    *((at, b"SKUL\xba\xbe", "LUKS (second header)") for at in (0x4000, 0x8000, 0x10000)),
    (3, b"NTFS    ", "NTFS"),
    (3, b"ReFS\0\0\0\0", "ReFS"),
    (3, b"EXFAT   ", "exFAT"),
    (3, b"-FVE-FS-", "BitLocker"),
    *((at, b"LABELONE", "LVM physical volume") for at in (0, 512, 1024, 1536)),
    *((size - 10, b"SWAPSPACE2", "swap") for size in _SWAP_PAGES),
    *((size - 10, b"SWAP-SPACE", "swap") for size in _SWAP_PAGES),
    *((size - 10, b"S1SUSPEND\0", "swap (a suspended machine)") for size in _SWAP_PAGES),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (64 * _MIB + 0x40, b"_BHRfS_M", "btrfs (superblock copy)"),
    *((at, _VMFS_MEMBER, "VMFS volume member") for at in (_MIB, _MIB + 0x10000, 2 * _MIB)),
    *((at, _VMFS, "VMFS") for at in (2 * _MIB, 3 * _MIB)),
    *((at, b"OCFSV2", "OCFS2") for at in (1024, 2048, 4096, 8192)),
    (4096 + 24, _BCACHE, "bcache"),
    (4096 + 24, _BCACHEFS, "bcachefs"),
    (0, bytes.fromhex("fc4e2ba9"), "Linux RAID (mdraid 1.1)"),
    (4096, bytes.fromhex("fc4e2ba9"), "Linux RAID (mdraid 1.2)"),
    (0x8001, b"CD001", "ISO 9660"),
    (32, b"NXSB", "APFS"),
    (1024, b"H+\x00\x04", "HFS+"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
    (0x8000, b"JFS1", "JFS"),
    *((0x10034, name, "ReiserFS") for name in (b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs")),
    (0, b"bluestore block device", "Ceph BlueStore"),
    (0, b"dmvdo001", "VDO"),
    (512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
    (32, b"ORCLDISK", "Oracle ASM"),
    (0, b"QFI\xfb", "qcow2 image"),
)


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """Something that is on the LUN already."""

    offset_bytes: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} at byte {self.offset_bytes}"


def windows(size_bytes: int) -> tuple[tuple[int, int], ...]:
    """(offset, length) of what must be read to find every signature, ascending, no overlaps."""
    tail = max(0, size_bytes // BLOCK_BYTES * BLOCK_BYTES - _TAIL_BYTES)
    wanted = [(0, _HEAD_BYTES), *_EXTRA_WINDOWS, (tail, size_bytes - tail)]
    merged: list[tuple[int, int]] = []
    for start, length in sorted(wanted):
        end = min(start + length, size_bytes)
        if merged and start <= merged[-1][0] + merged[-1][1]:
            first = merged[-1][0]
            merged[-1] = (first, max(end, first + merged[-1][1]) - first)
        elif start < end:
            merged.append((start, end - start))
    return tuple(merged)


class _Bytes:
    """The windows, addressed as on the LUN; what was not read is empty."""

    def __init__(self, pieces: Mapping[int, bytes | bytearray]) -> None:
        self._starts = sorted(pieces)
        self._pieces = pieces

    def at(self, offset: int, length: int) -> bytes:
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset < 0:
            return b""
        start = self._starts[index]
        return bytes(self._pieces[start][offset - start : offset - start + length])


def find_signatures(
    size_bytes: int, pieces: Mapping[int, bytes | bytearray]
) -> tuple[Signature, ...]:
    """Everything known that is on the LUN, by offset. ``pieces``: bytes read at `windows`."""
    disk = _Bytes(pieces)
    found = {Signature(at, name) for at, magic, name in _MAGICS if _has(disk, at, magic)}
    for finder in (_partitions, _ext, _gfs2, _zfs, _raid_at_end, _csvfs):
        found.update(finder(disk, size_bytes))
    return tuple(sorted(found))


def _has(disk: _Bytes, at: int, magic: bytes) -> bool:
    return disk.at(at, len(magic)) == magic


def _partitions(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    for sector in (512, 4096):
        if _has(disk, sector, b"EFI PART"):
            yield Signature(sector, "GPT partition table")
        if _has(disk, size_bytes - sector, b"EFI PART"):
            yield Signature(size_bytes - sector, "GPT partition table (backup)")
    boot = disk.at(0, 512)
    if boot[510:] != b"\x55\xaa":
        return
    if boot[54:59] in (b"FAT12", b"FAT16", b"FAT  ") or boot[82:87] == b"FAT32":
        yield Signature(0, "FAT")
    elif boot[3:11] not in (b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"):
        entries = [boot[446 + 16 * n : 462 + 16 * n] for n in range(4)]
        used = any(entry[4] and entry[0] in (0x00, 0x80) for entry in entries)
        yield Signature(510, "MBR partition table" if used else "boot sector")


def _ext(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    del size_bytes
    superblock = disk.at(1024, 1024)
    if superblock[56:58] != b"\x53\xef":
        return
    compat, incompat, ro_compat = (
        int.from_bytes(superblock[at : at + 4], "little") for at in (92, 96, 100)
    )
    # ext4 is what ext3 does not know: extents, 64bit, flex_bg, huge_file, checksums, ...
    is_ext4 = incompat & ~0x0016 or ro_compat & ~0x0007
    yield Signature(1024 + 56, "ext4" if is_ext4 else "ext3" if compat & 0x0004 else "ext2")


def _gfs2(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    del size_bytes
    if disk.at(0x10000, 8) == bytes.fromhex("0116197000000001"):
        version = int.from_bytes(disk.at(0x10000 + 24, 4), "big")
        yield Signature(0x10000, "GFS" if 1200 <= version < 1400 else "GFS2")


def _zfs(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    """Any uberblock in any of the four labels; they come every 1 KiB at the least."""
    label = 256 * _KIB
    end = size_bytes // label * label
    for number, start in enumerate((0, label, end - 2 * label, end - label)):
        array = disk.at(start + label // 2, label // 2)
        for at in range(0, len(array), _KIB):
            if array[at : at + 8] in (
                bytes.fromhex("0cb1ba0000000000"),
                bytes.fromhex("0000000000bab10c"),
            ):
                yield Signature(start + label // 2 + at, f"ZFS (label {number})")
                break


def _raid_at_end(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    old = size_bytes // UNIT_BYTES * UNIT_BYTES - UNIT_BYTES
    if disk.at(old, 4) in (bytes.fromhex("fc4e2ba9"), bytes.fromhex("a92b4efc")):
        yield Signature(old, "Linux RAID (mdraid 0.90)")
    new = ((size_bytes // 512 - 16) & ~7) * 512
    if disk.at(new, 4) == bytes.fromhex("fc4e2ba9"):
        yield Signature(new, "Linux RAID (mdraid 1.0)")


def _csvfs(disk: _Bytes, size_bytes: int) -> Iterator[Signature]:
    """A valid superblock by its label; a damaged one is somebody's volume all the same."""
    backup = (size_bytes // UNIT_BYTES - 1) * UNIT_BYTES
    for at, which in ((0, ""), (backup, " (backup superblock)")):
        block = disk.at(at, BLOCK_BYTES)
        if not block.startswith(MAGIC):
            continue
        try:
            label = Superblock.decode(block, at // BLOCK_BYTES).label
        except BadBlock:
            yield Signature(at, f"csvfs, damaged{which}")
        else:
            yield Signature(at, f'csvfs volume "{label}"{which}')
