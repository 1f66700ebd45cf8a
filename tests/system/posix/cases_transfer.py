"""Moving data otherwise than by plain read and write: vectors, splices, limits, programs."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess

from .case import Observation, call, case, does, each, make, opened


@case("vectors")
def _() -> Observation:
    parts = [bytes([number]) * (number * 37) for number in range(1, 60)]
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        answers: Observation = [os.writev(f, parts), os.pwritev(f, parts[:10], 65_000)]
        buffers = [bytearray(100), bytearray(0), bytearray(70_000)]
        answers += [os.preadv(f, buffers, 60), [sum(buffer) for buffer in buffers]]
        return [*answers, os.fstat(f).st_size]


@each("large", 1 << 20, (1 << 20) + 1, (3 << 20) + 17)
def _(length: int) -> Observation:
    """Requests above what one FUSE message carries, at an unaligned offset."""
    data = bytes(range(1, 252)) * (length // 251 + 1)
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        answers: Observation = [os.pwrite(f, data[:length], 4097), os.fstat(f).st_size]
        found = os.pread(f, length + 10_000, 0)
        return [*answers, found == bytes(4097) + data[:length]]


@case("sendfile")
def _() -> Observation:
    data = bytes(range(256)) * 1000
    with opened("f", os.O_CREAT | os.O_RDWR) as f, opened("g", os.O_CREAT | os.O_RDWR) as g:
        os.write(f, data)
        sent = 0
        while sent < len(data):
            sent += os.sendfile(g, f, sent, len(data) - sent)
        return [sent, os.pread(g, len(data) + 1, 0) == data]


@case("splice")
def _() -> Observation:
    data = bytes(range(256)) * 200
    reader, writer = os.pipe()
    with opened("f", os.O_CREAT | os.O_RDWR) as f, opened("g", os.O_CREAT | os.O_RDWR) as g:
        os.write(f, data)
        moved = 0
        while moved < len(data):
            count = os.splice(f, writer, 50_000, offset_src=moved)
            done = 0
            while done < count:
                done += os.splice(reader, g, count - done, offset_dst=moved + done)
            moved += count
        os.close(reader)
        os.close(writer)
        return [moved, os.pread(g, len(data) + 1, 0) == data]


@case("append-by-fcntl")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f, opened("f", os.O_RDWR) as g:
        os.write(g, b"0123456789")
        fcntl.fcntl(f, fcntl.F_SETFL, os.O_APPEND)
        answers: Observation = [os.write(f, b"end"), os.pread(f, 100, 0)]
        fcntl.fcntl(f, fcntl.F_SETFL, 0)
        return [*answers, os.pwrite(f, b"#", 0), os.pread(f, 100, 0)]


@case("write-flags")
def _() -> Observation:
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        return [
            os.pwritev(f, [b"synchronous"], 0, os.RWF_DSYNC),
            os.pwritev(f, [b"S"], 0, os.RWF_SYNC),
            os.pwritev(f, [b"appended"], 0, os.RWF_APPEND),
            os.pread(f, 100, 0),
        ]


@case("limit-of-file-size")
def _() -> Observation:
    """RLIMIT_FSIZE: a short write up to the limit, then EFBIG (SIGXFSZ is ignored by Python)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened("f", os.O_CREAT | os.O_RDWR) as f:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return [
                call(os.pwrite, f, b"x" * 200_000, 0),
                call(os.pwrite, f, b"x", 100_000),
                does(os.ftruncate, f, 100_001),
                does(os.truncate, "f", 100_000),
                os.fstat(f).st_size,
            ]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@case("program")
def _() -> Observation:
    """A binary is run from the filesystem; while it runs nobody may write it (ETXTBSY)."""
    program = shutil.which("sleep")
    assert program is not None
    shutil.copy(program, "sleep")
    with opened("sleep", os.O_WRONLY):
        try:
            subprocess.Popen(["./sleep", "60"]).kill()
            answers: Observation = ["runs while it is written"]
        except OSError as error:
            answers = [errno.errorcode[error.errno or 0]]
    with subprocess.Popen(["./sleep", "60"]) as running:
        answers += [
            does(os.open, "sleep", os.O_WRONLY),
            does(os.open, "sleep", os.O_RDONLY),
            does(os.truncate, "sleep", 0),
            does(os.unlink, "sleep"),
            running.poll(),
        ]
        running.kill()
    return [*answers, running.returncode == -signal.SIGKILL]


@case("sockets")
def _() -> Observation:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("s")
        answers: Observation = [does(listener.bind, "t")]
        listener.listen()
        client.connect("s")
        client.send(b"through")
        accepted, _ = listener.accept()
        answers.append(accepted.recv(100))
        accepted.close()
    with socket.socket(socket.AF_UNIX) as other:
        answers += [does(other.connect, "s"), does(other.connect, "absent"), does(other.bind, "s")]
        make("file", "plain")
        return [*answers, does(other.connect, "plain")]


@case("descriptors-of-directories")
def _() -> Observation:
    """The *at calls: relative to a descriptor, also of a directory that was renamed."""
    os.mkdir("d")
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as d:
        os.rename("d", "e")
        answers: Observation = [
            does(os.mkdir, "sub", dir_fd=d),
            does(os.open, "f", os.O_CREAT | os.O_WRONLY, dir_fd=d),
            does(os.rename, "f", "g", src_dir_fd=d, dst_dir_fd=d),
            does(os.link, "g", "h", src_dir_fd=d, dst_dir_fd=d),
            does(os.symlink, "t", "s", dir_fd=d),
            call(os.readlink, "s", dir_fd=d),
            sorted(os.listdir("e")),
            does(os.unlink, "h", dir_fd=d),
            does(os.rmdir, "sub", dir_fd=d),
            does(os.unlink, "sub", dir_fd=d),
        ]
        os.unlink("e/g")
        os.unlink("e/s")
        os.rmdir("e")
        return [*answers, does(os.mkdir, "sub", dir_fd=d), os.listdir(d), os.fstat(d).st_nlink]


@case("descriptor-of-a-path")
def _() -> Observation:
    """O_PATH: names an object, and gives no access."""
    make("file", "f")
    os.symlink("f", "s")
    with opened("s", os.O_PATH | os.O_NOFOLLOW) as s, opened("f", os.O_PATH) as f:
        return [
            os.fstat(f).st_ino == os.stat("f").st_ino,
            os.fstat(s).st_ino == os.lstat("s").st_ino,
            call(os.read, f, 1),
            call(os.write, f, b"x"),
            does(os.fchmod, f, 0o600),
            does(os.open, f"/proc/self/fd/{f}", os.O_RDWR),
        ]
