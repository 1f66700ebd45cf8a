"""A disk image that boots by itself: Debian's cloud kernel, busybox and `init.sh`.

Layout of the image: an MBR with syslinux' boot code; partition 1, FAT, with kernel and initramfs;
partition 2, the data area that the guest writes. Built once into a cache directory, from Debian
packages alone, without a mount and without a loop device.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

SECTOR_BYTES = 512
BOOT_START_SECTOR = 2048
BOOT_SECTORS = 48 * 2048
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
)
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
DATA_START_SECTOR = BOOT_START_SECTOR + BOOT_SECTORS

# no_timer_check: an emulated timer that a busy machine holds up is not a broken one; else the
# kernel panics ("IO-APIC + timer doesn't work!").
SYSLINUX_CFG = """\
SERIAL 0 115200
DEFAULT guest
PROMPT 0
TIMEOUT 0
LABEL guest
  KERNEL vmlinuz
  APPEND initrd=initrd.gz console=ttyS0,115200 quiet panic=-1 no_timer_check rdinit=/init
"""


def default_cache() -> Path:
    """Where built images are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", "/var/cache")) / "csvfs-guest"


def bootable_image(size_bytes: int, *, cache: Path | None = None) -> Path:
    """Return the path of a raw image of ``size_bytes``; build it when it is not in ``cache``.

    Raises `subprocess.CalledProcessError` when a package cannot be had or a tool fails.
    """
    directory = cache or default_cache()
    directory.mkdir(parents=True, exist_ok=True)
    init = Path(__file__).with_name("init.sh").read_bytes()
    image = directory / f"guest-{size_bytes >> 20}-{_fingerprint(init)}.raw"
    if not image.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            built = _build(Path(scratch), _kernel_tree(directory), init, size_bytes)
            built.replace(image)
    return image


def _fingerprint(init: bytes) -> str:
    return f"{zlib.crc32(init + Path(__file__).read_bytes()):08x}"


def _run(*argv: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    done = subprocess.run(
        [str(word) for word in argv], cwd=cwd, input=stdin, capture_output=True, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, done.args, done.stdout, done.stderr.decode(errors="replace")
        )
    return done.stdout


def _kernel_tree(directory: Path) -> Path:
    """Debian's cloud kernel, unpacked; downloaded once."""
    tree = directory / "kernel"
    if tree.exists():
        return tree
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        listing = _run("apt-cache", "depends", "linux-image-cloud-amd64").decode()
        match = re.search(r"Depends: (linux-image-\S+)", listing)
        if match is None:
            raise FileNotFoundError("linux-image-cloud-amd64 is not in apt's lists: apt-get update")
        _run("apt-get", "-o", "APT::Sandbox::User=root", "download", match[1], cwd=Path(scratch))
        (package,) = Path(scratch).glob("*.deb")
        unpacked = Path(scratch) / "tree"
        _run("dpkg", "-x", package, unpacked)
        unpacked.replace(tree)
    return tree


def _initramfs(scratch: Path, kernel_tree: Path, init: bytes) -> bytes:
    root = scratch / "root"
    for name in ("bin", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    (root / "init").write_bytes(init)
    (root / "init").chmod(0o755)
    (modules,) = (kernel_tree / "lib" / "modules").iterdir()
    for module in MODULES:
        shutil.copy(modules / "kernel" / module, root / "modules")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = _run("cpio", "-o", "-H", "newc", "--quiet", cwd=root, stdin="\n".join(names).encode())
    return _run("gzip", "-1", "-n", stdin=archive)


def _build(scratch: Path, kernel_tree: Path, init: bytes, size_bytes: int) -> Path:
    (kernel,) = (kernel_tree / "boot").glob("vmlinuz-*")
    (scratch / "initrd.gz").write_bytes(_initramfs(scratch, kernel_tree, init))
    (scratch / "syslinux.cfg").write_text(SYSLINUX_CFG)
    boot = scratch / "boot.fat"
    boot.touch()
    os.truncate(boot, BOOT_SECTORS * SECTOR_BYTES)
    _run("mkfs.fat", "-F", "16", "-h", str(BOOT_START_SECTOR), boot)
    _run("mcopy", "-i", boot, kernel, "::vmlinuz")
    _run("mcopy", "-i", boot, scratch / "initrd.gz", "::initrd.gz")
    _run("mcopy", "-i", boot, scratch / "syslinux.cfg", "::syslinux.cfg")
    _run("syslinux", "--install", boot)
    image = scratch / "guest.raw"
    with image.open("wb") as out:
        out.truncate(size_bytes)
        out.write(_master_boot_record(size_bytes))
        out.seek(BOOT_START_SECTOR * SECTOR_BYTES)
        out.write(boot.read_bytes())
    return image


def _master_boot_record(size_bytes: int) -> bytes:
    data_sectors = size_bytes // SECTOR_BYTES - DATA_START_SECTOR
    if data_sectors < 2048:
        raise ValueError(f"a guest image needs at least 64 MiB, not {size_bytes} bytes")
    entries = b"".join(
        struct.pack("<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start, sectors)
        for active, kind, start, sectors in (
            (0x80, 0x0E, BOOT_START_SECTOR, BOOT_SECTORS),
            (0x00, 0x83, DATA_START_SECTOR, data_sectors),
        )
    )
    code = MBR_CODE.read_bytes()[:440].ljust(446, b"\0")
    return code + entries.ljust(64, b"\0") + b"\x55\xaa"
