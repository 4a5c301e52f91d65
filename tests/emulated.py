"""The GPU's kernels on a CPU, by the emulation in tests/emulation: slow, for their logic alone."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from attention_predictor.csrc import binding, build

HEADERS = Path(__file__).parent / "emulation"


@functools.cache
def library() -> ctypes.CDLL:
    """All CUDA sources, compiled as C++ against the emulation's headers."""
    version = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(HEADERS.iterdir()))).hexdigest()[:16]
    compiler = build._compiler("a C++ compiler", "CXX", ["c++", "g++", "clang++"])
    flags = (
        "-x",
        "c++",
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-shared",
        "-fPIC",
        f"-I{HEADERS}",
        f"-DEMULATION={version!r}",
    )
    kernels = ctypes.CDLL(str(build.build(compiler, flags, sorted(build.SOURCES.glob("*.cu")))))
    kernels.error_text.restype = ctypes.c_char_p
    return kernels


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Within it, operations on CPU tensors are done by the GPU's kernels."""
    with (
        mock.patch.object(binding, "_library", return_value=library()),
        mock.patch.object(binding, "on_gpu", return_value=True),
        mock.patch.object(binding, "multiprocessors", return_value=4),
    ):
        yield
