"""The disk cache of compiled kernels, and the host's C++ compiler.

The directory is ``$ATTENTION_PREDICTOR_CACHE``, else ``attention_predictor`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attention_predictor.errors import BuildError

SOURCES = Path(__file__).resolve().parent
# Sums may be reordered, for vectorisation. Infinities must keep their meaning: masks use them.
CPU_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
TIMEOUT_S = 600  # of a compiler
logger = logging.getLogger(__name__)


def cpu_library(source: str, text: str, flags: tuple[str, ...] = CPU_FLAGS) -> ctypes.CDLL:
    """C++ code as a shared library, compiled once per text, source, headers, compiler and flags.

    Args:
        source: Name of a file beside this module that ``text`` includes.

    Raises:
        BuildError: There is no compiler, or it refused; with what it said.
    """
    if os.name != "posix":
        raise BuildError(f"C++ is compiled on POSIX systems alone, this is {os.name}")
    compiler = find_compiler("a C++ compiler", "CXX", ["c++", "g++", "clang++"])
    flags = ("-x", "c++", "-std=c++17", *flags, "-shared", "-fPIC", "-pthread", f"-I{SOURCES}")
    # Machines with different processors may share a home directory.
    machine = _processor() if "-march=native" in flags else platform.machine()
    path = cache_directory() / f"{key(source, text, *flags, machine, run([compiler, '--version']))}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    with locked(source), tempfile.TemporaryDirectory() as scratch:
        built = path
        if not path.exists():
            logger.info("compiling kernels with %s, once: %s", compiler, path)
            built = Path(scratch) / path.name
            run([compiler, *flags, "-", "-o", str(built)], text)
            if keep(path, built.read_bytes()):
                built = path
        return ctypes.CDLL(str(built))  # stays loaded even if the file is deleted


def cache_directory() -> Path:
    """The folder of the disk cache; it may not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention_predictor"
    return Path(os.environ.get("ATTENTION_PREDICTOR_CACHE") or base)


def key(source: str, *parts: str) -> str:
    """A cache key of ``SOURCES / source``, all headers, and these parts."""
    files = [SOURCES / source, *sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")])]
    return hashlib.sha256("\0".join([*parts, *(file.read_text("utf-8") for file in files)]).encode()).hexdigest()[:24]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Lock so that one of several starting processes compiles and others wait; a killed process releases its lock."""
    try:
        import fcntl

        cache_directory().mkdir(parents=True, exist_ok=True)
        lock = (cache_directory() / f"{name}.lock").open("w")
    except (ImportError, OSError):  # not supported by the system, or the folder is not writable
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            logger.debug("no locks in %s", cache_directory())  # as on some network file systems
        yield


def keep(path: Path, data: bytes) -> bool:
    """Write a file atomically. Returns whether that worked; the log says once why not."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        reason = error.strerror or error
        _warn_once(f"compiled kernels can't be kept in {path.parent} ({reason}): each process makes its own")
        return False
    return True


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def find_compiler(what: str, variable: str, candidates: list[str]) -> str:
    """The compiler in the environment variable, else the first candidate that is installed."""
    named = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [named] if named else candidates)), None)
    if found is None:
        raise BuildError(f"{what} was not found: {variable}={named}" if named else f"{what} was not found")
    return found


def run(command: list[str], text: str = "") -> str:
    """Run a compiler on a text and return its output; BuildError with the output if it fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
