"""Builds the native extension; everything else about the package stands in pyproject.toml.

CSVFS_SANITIZE=address|thread|undefined builds it with that sanitizer of the compiler.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("redirector/native")
SOURCES = ["session.c", "login.c", "issue.c", "silence.c", "answer.c", "pulse.c"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]

# What is tried, in this order, and the Debian package that brings it.
NEEDED = [
    ("a C compiler", "gcc", ""),
    ("the C library's headers", "libc6-dev", "#include <stdio.h>\n"),
    ("the headers of Python", "python3-dev", "#include <Python.h>\n"),
    (
        "the headers of libiscsi",
        "libiscsi-dev",
        "#include <iscsi/iscsi.h>\n#include <iscsi/scsi-lowlevel.h>\n",
    ),
    ("the headers of OpenSSL", "libssl-dev", "#include <openssl/hmac.h>\n"),
]


class BuildExtension(build_ext):
    """Says in one message what is missing, before the compiler drowns it in errors."""

    def build_extensions(self) -> None:
        missing = [(what, package) for what, package, text in NEEDED if not self._compiles(text)]
        if missing:
            what = missing[0][0] if missing[0][1] == "gcc" else ", ".join(w for w, _ in missing)
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            python = f"\n(python3-dev: of Python {version}, which builds here.)"
            packages = " ".join(package for _, package in missing)
            raise SystemExit(
                f"\ncsvfs cannot build its native part; missing: {what}.\n"
                f"On Debian and Ubuntu:\n\n    apt-get install {packages}\n"
                f"{python if 'python3-dev' in packages else ''}\n"
            )
        super().build_extensions()

    def _compiles(self, text: str) -> bool:
        with tempfile.TemporaryDirectory(prefix="csvfs-build-") as directory:
            source = Path(directory, "probe.c")
            source.write_text(text + "int main(void) { return 0; }\n")
            arguments = [*self.compiler.compiler, "-c", str(source)]
            arguments += [f"-I{include}" for include in self.compiler.include_dirs]
            arguments += [f"-I{include}" for include in self.include_dirs]
            arguments += ["-o", str(Path(directory, "probe.o"))]
            return _quiet(arguments)


def _quiet(arguments: list[str]) -> bool:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
        child = os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=actions)
    except FileNotFoundError:
        return False
    finally:
        os.close(null)
    return os.waitpid(child, 0)[1] == 0


def _extension() -> Extension:
    sanitizer = os.environ.get("CSVFS_SANITIZE")
    flags = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g"] if sanitizer else []
    return Extension(
        "redirector.native._native",
        sources=[str(NATIVE / name) for name in ("_native.pyx", *SOURCES)],
        depends=[str(NATIVE / name) for name in ("session.h", "internal.h", "queue.h", "pulse.h")],
        include_dirs=[str(NATIVE)],
        libraries=["iscsi", "crypto"],
        extra_compile_args=["-std=gnu11", "-O2", "-pthread", *WARNINGS, *flags],
        extra_link_args=["-pthread", *flags],
    )


setup(
    ext_modules=cythonize([_extension()], language_level=3, build_dir="build/cython"),
    cmdclass={"build_ext": BuildExtension},
)
