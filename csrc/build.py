"""Builds the kernels when they are first used, once per source, compiler and arguments.

They include no torch headers: a build takes seconds, and the library is called through ctypes. It is kept in
``$ATTENTION_PREDICTOR_CACHE``, else ``attention_predictor`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
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
from pathlib import Path

from attention_predictor.predictor.errors import BuildError

SOURCES = Path(__file__).resolve().parent
# Sums may be reordered, so that they are vectorised; infinities keep their meaning, masks are made of them.
CPU_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
SHARED = ("-std=c++17", "-shared")
SECONDS = 600  # that a build may take
logger = logging.getLogger(__name__)


@functools.cache
def library(device: str, capability: tuple[int, int] | None = None) -> ctypes.CDLL:
    """The kernels for "cpu", or for "cuda" of that compute capability.

    Raises:
        BuildError: There is no compiler, or it refused; with what it said.
    """
    if os.name != "posix":
        raise BuildError(f"kernels are built on POSIX systems alone, this is {os.name}")
    if device == "cuda":
        assert capability is not None
        number = "".join(map(str, capability))
        target = f"arch=compute_{number},code=sm_{number}"
        compiler = _compiler("nvcc", "CUDACXX", [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", "nvcc"])
        flags: tuple[str, ...] = ("-O3", *SHARED, "-Xcompiler", "-fPIC", "-gencode", target)
        sources = sorted(SOURCES.glob("*.cu"))
    else:
        compiler = _compiler("a C++ compiler", "CXX", ["c++", "g++", "clang++"])
        flags = (*CPU_FLAGS, *SHARED, "-fPIC", "-pthread")
        sources = sorted(SOURCES.glob("*.cpp"))
    kernels = ctypes.CDLL(str(build(compiler, flags, sources)))
    kernels.error_text.restype = ctypes.c_char_p
    return kernels


def build(compiler: str, flags: tuple[str, ...], sources: list[Path]) -> Path:
    """The shared library of the sources; from the cache, where the same was built before."""
    path = cache_directory() / f"{_key(compiler, flags, sources)}.so"
    if path.exists():
        return path
    import fcntl

    # Of several processes that start at once, one builds and the others wait for it.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Seconds for a CPU; for a GPU long enough to ask oneself what is going on.
            level = logging.WARNING if "-gencode" in flags else logging.INFO
            logger.log(level, "building kernels with %s, once: %s", compiler, path)
            partial = path.with_suffix(".partial")
            _run([compiler, *flags, *map(str, sources), "-o", str(partial)])
            os.replace(partial, path)
    return path


def cache_directory() -> Path:
    """Where libraries are kept; made if it isn't there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention_predictor"
    directory = Path(os.environ.get("ATTENTION_PREDICTOR_CACHE") or base)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"kernels can't be kept in {directory}: {error.strerror or error}") from error
    return directory


def _key(compiler: str, flags: tuple[str, ...], sources: list[Path]) -> str:
    headers = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")])
    texts = [file.read_text("utf-8") for file in (*sources, *headers)]
    # A home directory may be shared by machines of which each has another processor.
    machine = _processor() if "-march=native" in flags else platform.machine()
    version = _run([compiler, "--version"])
    return hashlib.sha256("\0".join([*texts, *flags, machine, version]).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compiler(what: str, variable: str, candidates: list[str]) -> str:
    named = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [named] if named else candidates)), None)
    if found is None:
        raise BuildError(f"{what} was not found: {variable}={named}" if named else f"{what} was not found")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
