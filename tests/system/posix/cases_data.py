"""Opening, reading, writing, seeking, mapping, and what each flag of open(2) asks for."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from .case import KINDS, USER, Observation, call, case, does, each, make, opened, seen, user

ACCESS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}


@each("open", *[kind for kind in KINDS if kind not in ("fifo",)])
def _(kind: str) -> Observation:
    make(kind, "n")
    answers: Observation = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        for more in (0, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_CREAT | os.O_EXCL, os.O_TRUNC):
            if kind == "symlink" and more == 0:
                continue
            answers.append(does(os.open, "n", flags | more | os.O_NONBLOCK))
    return answers


@case("open-fifo")
def _() -> Observation:
    os.mkfifo("p")
    answers: Observation = [does(os.open, "p", os.O_WRONLY | os.O_NONBLOCK)]
    with opened("p", os.O_RDONLY | os.O_NONBLOCK) as reader:
        with opened("p", os.O_WRONLY | os.O_NONBLOCK) as writer:
            answers += [os.write(writer, b"through"), os.read(reader, 100)]
        answers.append(os.read(reader, 100))
    return answers


@case("open-errors")
def _() -> Observation:
    make("file", "f")
    os.symlink("loop", "loop")
    os.symlink("absent", "dangling")
    os.mkdir("d")
    names = ("absent", "absent/x", "f/x", "loop", "dangling", "x" * 256, "", "f/", "d/")
    answers: Observation = [does(os.open, name, os.O_RDONLY) for name in names]
    answers += [
        does(os.open, "d", os.O_CREAT | os.O_RDWR),
        does(os.open, "n/", os.O_CREAT | os.O_RDWR),
    ]
    answers += [does(os.open, "dangling", os.O_CREAT | os.O_EXCL | os.O_WRONLY)]
    answers += [does(os.open, "dangling", os.O_CREAT | os.O_WRONLY), os.path.exists("absent")]
    return answers


@case("open-permissions")
def _() -> Observation:
    answers: Observation = []
    for mode in range(0, 0o1000, 0o100):
        name = f"f{mode}"
        make("file", name, mode)
        os.chown(name, USER, USER)
        with user(USER):
            answers += [does(os.open, name, flags) for flags in ACCESS.values()]
            answers.append(does(os.open, name, os.O_RDONLY | os.O_TRUNC))
    return answers


@case("open-create-existing-keeps")
def _() -> Observation:
    make("file", "f", 0o600)
    with opened("f", os.O_WRONLY) as f:
        os.write(f, b"kept")
    os.close(os.open("f", os.O_CREAT | os.O_RDWR, 0o777))
    answers: Observation = [seen("f")]
    os.close(os.open("f", os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o777))
    return [*answers, seen("f")]


@case("open-create-without-write-permission")
def _() -> Observation:
    os.mkdir("d", 0o777)
    os.chmod("d", 0o777)
    with user(USER):
        f = os.open("d/f", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0)
        answers: Observation = [os.write(f, b"first"), does(os.open, "d/f", os.O_RDONLY), seen(f)]
        os.close(f)
    return answers


@each("descriptor-mode", *ACCESS)
def _(access: str) -> Observation:
    make("file", "f")
    with opened("f", ACCESS[access]) as f:
        return [
            call(os.write, f, b"abc"),
            call(os.pread, f, 3, 0),
            does(os.ftruncate, f, 1),
            does(os.fsync, f),
            does(os.fdatasync, f),
        ]


@case("read-write-offsets")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        answers: Observation = [
            os.write(f, b"hello"),
            os.lseek(f, 0, os.SEEK_CUR),
            os.pwrite(f, b"J", 0),
            os.lseek(f, 0, os.SEEK_SET),
            os.read(f, 100),
            os.read(f, 100),
            os.lseek(f, -2, os.SEEK_END),
            os.read(f, 100),
            call(os.lseek, f, -1, os.SEEK_SET),
            call(os.pread, f, 10, 1000),
            call(os.pread, f, 0, 0),
            os.lseek(f, 1000, os.SEEK_SET),
            os.write(f, b"far"),
            os.fstat(f).st_size,
            os.pread(f, 10, 998),
            os.pread(f, 2000, 0) == b"Jello" + bytes(995) + b"far",
            call(os.pread, f, 1, -1),
            call(os.pwrite, f, b"x", -1),
        ]
    return answers


@each("sparse", 4095, 4096, 65535, 65536, 65537, 1 << 20, (1 << 32) + 17, (1 << 40) - 1)
def _(offset: int) -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.pwrite(f, b"tail", offset)
        answers: Observation = [os.fstat(f).st_size, os.pread(f, 8, offset - 4)]
        answers += [os.pread(f, 8, 0), os.fstat(f).st_blocks * 512 < 1 << 20]
        os.pwrite(f, b"head", 0)
        answers += [os.pread(f, 5, 0), os.pread(f, 4, offset)]
        return answers


@case("size-limits")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        top = 2**63 - 1
        return [does(os.ftruncate, f, top) in ("ok", "EFBIG"), call(os.pwrite, f, b"x", top)]


@case("append")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR | os.O_APPEND) as f, opened("f", os.O_RDWR) as g:
        answers: Observation = [os.write(f, b"one"), os.write(g, b"two"), os.write(f, b"three")]
        answers += [os.pread(f, 100, 0), os.lseek(f, 0, os.SEEK_CUR), os.pwrite(f, b"four", 0)]
        os.ftruncate(g, 2)
        answers += [os.write(f, b"five"), os.pread(f, 100, 0)]
    return answers


@each("synchronous", "O_SYNC", "O_DSYNC")
def _(flag: str) -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR | getattr(os, flag)) as f:
        return [os.write(f, b"x" * 70_000), os.fstat(f).st_size, os.pread(f, 2, 69_999)]


@each("unaligned", 1, 511, 513, 4095, 5000, 65_535, 100_000)
def _(length: int) -> Observation:
    data = (bytes(range(1, 252)) * 1200)[: max(140_000, length * 10) if length > 1 else 5_000]
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        position = 0
        while position < len(data):
            position += os.pwrite(f, data[position : position + length], position)
        expected = bytearray(data)
        for offset in (3, 510, 4090, 65_530, 131_071):
            if offset < len(data):
                os.pwrite(f, b"#" * 9, offset)
                expected[offset : offset + 9] = b"#" * 9
        return [os.pread(f, len(data) + 1, 0) == bytes(expected), os.fstat(f).st_size]


@case("o-direct")
def _() -> Observation:
    page = mmap.mmap(-1, 8192)
    page.write(b"d" * 8192)
    with opened("f", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as f:
        answers: Observation = [call(os.pwrite, f, page, 0), call(os.preadv, f, [page], 4096)]
        one = memoryview(page)[:1]
        answers.append(call(os.preadv, f, [one], 0))
        one.release()
        return [*answers, os.fstat(f).st_size]


@case("mmap-private")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"mapped" * 2000)
        with mmap.mmap(f, 12_000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
            answers: Observation = [view[:6], view[11_994:]]
            view[:6] = b"change"
        return [*answers, os.pread(f, 6, 0)]


@case("mmap-shared")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"mapped" * 2000)
        try:
            with mmap.mmap(f, 12_000, mmap.MAP_SHARED, mmap.PROT_READ) as view:
                return [view[:6]]
        except OSError as error:
            return [errno.errorcode[error.errno or 0]]


@case("lseek-data-hole")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        os.write(f, b"x" * 65_536)
        os.ftruncate(f, 1 << 20)
        return [
            call(os.lseek, f, 0, os.SEEK_DATA),
            call(os.lseek, f, 0, os.SEEK_HOLE),
            call(os.lseek, f, 1 << 20, os.SEEK_DATA),
        ]


@case("fallocate")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        return [does(os.posix_fallocate, f, 0, 100_000), os.fstat(f).st_size]


@case("copy-file-range")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f, opened("g", os.O_CREAT | os.O_RDWR) as g:
        os.write(f, b"copied" * 20_000)
        os.copy_file_range(f, g, 120_000, 0, 0)
        return [os.pread(g, 6, 0), os.fstat(g).st_size, os.pread(g, 10, 119_994)]


@each("locks", "posix", "flock")
def _(kind: str) -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f, opened("f", os.O_RDWR) as g:
        if kind == "flock":
            answers: Observation = [does(fcntl.flock, f, fcntl.LOCK_EX | fcntl.LOCK_NB)]
            answers.append(does(fcntl.flock, g, fcntl.LOCK_SH | fcntl.LOCK_NB))
            answers.append(does(fcntl.flock, f, fcntl.LOCK_UN))
            return [*answers, does(fcntl.flock, g, fcntl.LOCK_SH | fcntl.LOCK_NB)]
        answers = [does(fcntl.lockf, f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)]
        child = os.fork()
        if child == 0:
            refused = does(fcntl.lockf, g, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 7)
            os._exit(0 if refused in ("EAGAIN", "EACCES") else 1)
        return [*answers, os.waitpid(child, 0)[1]]


@case("executable")
def _() -> Observation:
    with opened("script", os.O_CREAT | os.O_WRONLY, 0o755) as f:
        os.write(f, b"#!/bin/sh\nexit 7\n")
    child = os.fork()
    if child == 0:
        os.execv("./script", ["script"])
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


@case("fsync-of-directory")
def _() -> Observation:
    os.mkdir("d")
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as d:
        return [does(os.fsync, d), does(os.fdatasync, d), call(os.read, d, 10)]


@case("o-tmpfile")
def _() -> Observation:
    return [does(os.open, ".", os.O_TMPFILE | os.O_RDWR, 0o600)]
