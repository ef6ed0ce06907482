"""Compiling the CPU kernel with this machine's own C++ compiler, once, as torch.compile does with its own.

The library is kept in the cache under a name that its source, compiler, flags and processor determine. It runs on the
OpenMP threads that torch has already started: a second pool would fight the first for the cores.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from factorctl.errors import FactorctlError, in_one_line
from factorctl.files.publishing import make_directory, write_file
from factorctl.processor import instruction_sets

SOURCE = Path(__file__).with_name("cpu.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions", "-fno-rtti",
    "-fPIC", "-shared",
)  # fmt: skip
SECONDS = 120
DIGEST_BYTES = 32


class NoKernelError(Exception):
    """Why there is no compiled kernel here, in a few words; factorctl then computes with torch alone."""


def compiled_library(cache: Path) -> Path:
    """The kernel as a shared library in `cache`: made if it is not there, made again if it was damaged.

    Raises:
        NoKernelError: there is no compiler, it fails, or its result cannot be kept.
    """
    compiler = _compiler()
    library = cache / f"cpu-{_identity(compiler)}.so"
    if not _is_whole(library):
        content = _compile(compiler)
        try:
            make_directory(cache)
            write_file(library, content + hashlib.sha256(content).digest())
        except FactorctlError as error:
            raise NoKernelError(f"it cannot be kept: {in_one_line(error)}") from error
    return library


def _compiler() -> str:
    named = os.environ.get("CXX")
    for command in (named,) if named else COMPILERS:
        if path := shutil.which(command):
            return path
    raise NoKernelError(f"no C++ compiler ({f'CXX={named}' if named else ', '.join(COMPILERS)}) is installed")


def _identity(compiler: str) -> str:
    parts = (compiler, *FLAGS, *_torch_threads(), instruction_sets(), *(path.read_text() for path in SOURCES))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _torch_threads() -> tuple[str, ...]:
    """The OpenMP library that came with torch; where there is none, torch uses the system's."""
    libraries = Path(torch.__file__).parent / "lib"
    return tuple(sorted(str(path) for path in libraries.glob("libgomp*.so*"))) or ("-lgomp",)


def _is_whole(library: Path) -> bool:
    """Whether it ends in its own digest, which loaders ignore: a damaged one would take the process down."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="factorctl-kernel-") as made:
        library = Path(made, "cpu.so")
        command = [compiler, *FLAGS, "-o", str(library), str(SOURCE), *_torch_threads()]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            _try_out(library)
            return library.read_bytes()
        except subprocess.CalledProcessError as error:
            errors = [line for line in error.stderr.splitlines() if "error" in line]
            reason = errors[0][:200] if errors else f"exit status {error.returncode}"
            raise NoKernelError(f"{compiler} fails: {reason}") from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise NoKernelError(f"{compiler} fails: {in_one_line(error)}") from error


def _try_out(library: Path) -> None:
    """Let another process compute with it first: a crash there costs the kernel, and here all of the user's work.

    Raises:
        NoKernelError: that process was lost. Whether results are right is checked whenever it is loaded.
    """
    program = f"from factorctl.ffn.kernel import cpu; cpu.try_out({str(library)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=SECONDS)
    if done.returncode < 0:
        raise NoKernelError(f"it ends the process that runs it ({signal.Signals(-done.returncode).name})")
