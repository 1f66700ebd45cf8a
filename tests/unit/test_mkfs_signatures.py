"""Everything that may be on a LUN is found and named, as bytes and as real tools write it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from csvfs import format as fmt
from csvfs.signatures import Signature, find_signatures, windows

SIZE = 80 << 20


def scan(disk: bytes | bytearray) -> tuple[Signature, ...]:
    size = len(disk)
    return find_signatures(size, {at: bytes(disk[at : at + n]) for at, n in windows(size)})


def disk_with(*pieces: tuple[int, bytes | bytearray], size: int = SIZE) -> bytearray:
    disk = bytearray(size)
    for at, data in pieces:
        at = at if at >= 0 else size + at
        disk[at : at + len(data)] = data
    return disk


_MBR = bytes(446) + b"\x80\0\0\0\x83\0\0\0" + bytes(56) + b"\x55\xaa"

_CASES = [
    ("MBR partition table", 510, _MBR, 0),
    ("boot sector", 510, b"\x55\xaa", 510),
    ("GPT partition table", 512, b"EFI PART", 512),
    ("GPT partition table", 4096, b"EFI PART", 4096),
    ("GPT partition table (backup)", SIZE - 512, b"EFI PART", -512),
    ("GPT partition table (backup)", SIZE - 4096, b"EFI PART", -4096),
    ("LVM physical volume", 512, b"LABELONE", 512),
    ("LVM physical volume", 1536, b"LABELONE", 1536),
    ("XFS", 0, b"XFSB", 0),
    ("btrfs", 0x10040, b"_BHRfS_M", 0x10040),
    ("btrfs (superblock copy)", 0x4000040, b"_BHRfS_M", 0x4000040),
    ("VMFS volume member", 0x100000, b"\x0d\xd0\x01\xc0", 0x100000),
    ("VMFS volume member", 0x110000, b"\x0d\xd0\x01\xc0", 0x110000),
    ("VMFS", 0x200000, b"\x5e\xf1\xab\x2f", 0x200000),
    ("NTFS", 3, b"NTFS    ", 3),
    ("ReFS", 3, b"ReFS\0\0\0\0", 3),
    ("exFAT", 3, b"EXFAT   ", 3),
    ("FAT", 0, b"FAT16   " + bytes(448) + b"\x55\xaa", 54),
    ("FAT", 0, b"FAT32   " + bytes(420) + b"\x55\xaa", 82),
    ("swap", 4086, b"SWAPSPACE2", 4086),
    ("swap", 65526, b"SWAPSPACE2", 65526),
    ("LUKS", 0, b"LUKS\xba\xbe\0\2", 0),
    ("LUKS (second header)", 0x4000, b"SKUL\xba\xbe\0\2", 0x4000),
    ("GFS2", 0x10000, bytes.fromhex("0116197000000001") + bytes(16) + b"\0\0\x07\x09", 0x10000),
    ("GFS", 0x10000, bytes.fromhex("0116197000000001") + bytes(16) + b"\0\0\x05\x1d", 0x10000),
    ("OCFS2", 2048, b"OCFSV2", 2048),
    ("bcache", 4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), 4120),
    ("Linux RAID (mdraid 1.1)", 0, b"\xfc\x4e\x2b\xa9\1\0\0\0", 0),
    ("Linux RAID (mdraid 1.2)", 4096, b"\xfc\x4e\x2b\xa9\1\0\0\0", 4096),
    ("Linux RAID (mdraid 1.0)", SIZE - 8192, b"\xfc\x4e\x2b\xa9\1\0\0\0", -8192),
    ("Linux RAID (mdraid 0.90)", SIZE - 65536, b"\xfc\x4e\x2b\xa9\0\0\0\0", -65536),
    ("ZFS (label 0)", 0x20000, b"\x0c\xb1\xba\0\0\0\0\0", 0x20000),
    ("ZFS (label 1)", 0x60400, b"\0\0\0\0\0\xba\xb1\x0c", 0x60400),
    ("ZFS (label 3)", SIZE - 0x20000, b"\x0c\xb1\xba\0\0\0\0\0", -0x20000),
]


@pytest.mark.parametrize(("name", "where", "data", "at"), _CASES)
def test_magic_is_named_with_its_place(name: str, where: int, data: bytes, at: int) -> None:
    assert scan(disk_with((at, data))) == (Signature(where, name),)


@pytest.mark.parametrize(
    ("name", "compat", "incompat", "ro_compat"),
    [("ext2", 0x38, 0x02, 0x03), ("ext3", 0x3C, 0x06, 0x03), ("ext4", 0x3C, 0x2C2, 0x46B)],
)
def test_ext(name: str, compat: int, incompat: int, ro_compat: int) -> None:
    features = b"".join(word.to_bytes(4, "little") for word in (compat, incompat, ro_compat))
    disk = disk_with((1024 + 56, b"\x53\xef"), (1024 + 92, features))
    assert scan(disk) == (Signature(1080, name),)


def test_ntfs_is_no_partition_table() -> None:
    assert scan(disk_with((0, _MBR), (3, b"NTFS    "))) == (Signature(3, "NTFS"),)


def test_nothing_is_found_where_nothing_is() -> None:
    assert scan(bytearray(SIZE)) == ()
    assert scan(bytearray(4096)) == ()
    assert scan(b"") == ()


def test_csvfs_by_label_and_damaged() -> None:
    geometry = fmt.Geometry.for_lun(SIZE, 2)
    superblock = fmt.Superblock(bytes(16), geometry, 0, "images")
    backup = geometry.backup_superblock
    main, copy = superblock.encode(0), superblock.encode(backup)
    whole = disk_with((0, main), (backup * 4096, copy))
    assert [str(s) for s in scan(whole)] == [
        'csvfs volume "images" at byte 0',
        f'csvfs volume "images" (backup superblock) at byte {backup * 4096}',
    ]
    main[99] ^= 1
    damaged = disk_with((0, main), (backup * 4096, copy))
    assert scan(damaged)[0] == Signature(0, "csvfs, damaged")


@pytest.mark.parametrize("size", [0, 512, 4096, SIZE, SIZE + 512, (1 << 40) + 512, 600 << 10])
def test_windows_are_disjoint_and_inside(size: int) -> None:
    end = 0
    for at, length in windows(size):
        assert at >= end
        assert length > 0
        assert at % 4096 == 0
        end = at + length
    assert end == size


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["mkfs.ext4", "-q", "-F", "{}"], "ext4"),
        (["mkfs.ext3", "-q", "-F", "{}"], "ext3"),
        (["mkfs.ext2", "-q", "-F", "{}"], "ext2"),
        (["mkfs.vfat", "{}"], "FAT"),
        (["mkswap", "{}"], "swap"),
    ],
)
def test_what_the_tools_write(command: list[str], found: str, tmp_path: Path) -> None:
    tool = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        pytest.skip(f"{command[0]} is not installed")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE * 2)
    image.chmod(0o600)
    subprocess.run(
        [tool, *(part.format(image) for part in command[1:])], check=True, capture_output=True
    )
    assert found in {signature.name for signature in scan(image.read_bytes())}


@pytest.mark.parametrize(("label", "found"), [("dos", "MBR"), ("gpt", "GPT")])
def test_partition_tables_of_sfdisk(label: str, found: str, tmp_path: Path) -> None:
    tool = shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        pytest.skip("sfdisk is not installed")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    script = f"label: {label}\n,,L\n".encode()
    subprocess.run([tool, "-q", image], input=script, check=True, capture_output=True)
    names = [signature.name for signature in scan(image.read_bytes())]
    assert f"{found} partition table" in names
    if label == "gpt":
        assert "GPT partition table (backup)" in names
