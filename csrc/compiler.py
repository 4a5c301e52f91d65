"""Compiles CUDA programs by NVRTC, which comes with torch, or by nvcc; in parallel, cached on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from attention_predictor.csrc.build import SOURCES, cache_directory, find_compiler, keep, key, locked, run
from attention_predictor.errors import BuildError

OPTIONS = ("-std=c++20",)
DIGEST_BYTES = 32  # at the beginning of a cached file
logger = logging.getLogger(__name__)
_compiling = threading.Lock()


class Program(Protocol):
    """A program to compile: ``text``, which includes the file ``source`` and defines the entry point ``name``."""

    name: str
    source: str

    @property
    def text(self) -> str: ...


def bindings(module: str) -> Any:
    """A module of NVIDIA's Python bindings; BuildError if they are not installed."""
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError as error:
        raise BuildError(f'cuda-bindings is not installed: pip install "cuda-bindings=={_cuda_major()}.*"') from error


def result_of(library: str, returned: tuple[Any, ...]) -> Any:
    """The result of a bindings call, without its status; BuildError with the library's name if it failed."""
    code, *values = returned
    if code:
        raise BuildError(f"{library}: {code.name}")
    return values[0] if values else None


def _cuda_major() -> str:
    """The major version of CUDA that torch is built for."""
    return (torch.version.cuda or "13").split(".")[0]


def _wheel(name: str) -> str:
    return name if _cuda_major() == "13" else f"{name}-cu{_cuda_major()}"


class Nvrtc:
    """NVIDIA's compiler as a library.

    Raises:
        BuildError: It, its Python bindings or the headers are not there; what to install.
    """

    def __init__(self) -> None:
        self.nvrtc = bindings("nvrtc")
        try:
            from cuda.pathfinder import find_nvidia_header_directory
        except ImportError as error:
            raise BuildError("cuda-pathfinder is older than 1.3: pip install -U cuda-pathfinder") from error
        try:
            self.version = "NVRTC {1}.{2}".format(*self.nvrtc.nvrtcVersion())
        except RuntimeError as error:
            raise BuildError(f"NVRTC was not found: pip install {_wheel('nvidia-cuda-nvrtc')}") from error
        self.headers = find_nvidia_header_directory("cudart")
        if self.headers is None:
            raise BuildError(f"CUDA's headers were not found: pip install {_wheel('nvidia-cuda-runtime')}")

    def compile(self, program: Program, capability: tuple[int, int]) -> bytes:
        """Machine code for the compute capability, or PTX; BuildError with the compiler's output if it fails."""
        nvrtc, target = self.nvrtc, 10 * capability[0] + capability[1]
        known = result_of(self.version, nvrtc.nvrtcGetSupportedArchs())
        exact = target in known
        if not exact:  # NVRTC is older than the device: the driver compiles the PTX
            target = max(x for x in known if x < target)
        options = [*OPTIONS, f"-I{SOURCES}", f"-I{self.headers}", f"-arch={'sm' if exact else 'compute'}_{target}"]
        created = nvrtc.nvrtcCreateProgram(program.text.encode(), program.name.encode(), 0, [], [])
        handle = result_of(self.version, created)
        try:
            (code,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
            if code:
                log = bytearray(result_of(self.version, nvrtc.nvrtcGetProgramLogSize(handle)))
                result_of(self.version, nvrtc.nvrtcGetProgramLog(handle, log))
                raise BuildError(f"{self.version} refused {program.name}\n{bytes(log).decode(errors='replace')}")
            size, get = (
                (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
            )
            binary = bytearray(result_of(self.version, size(handle)))
            result_of(self.version, get(handle, binary))
            return bytes(binary)
        finally:
            nvrtc.nvrtcDestroyProgram(handle)


class Nvcc:
    """NVIDIA's compiler as a program; BuildError if it is not installed."""

    def __init__(self) -> None:
        there = os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
        self.path = find_compiler("nvcc", "CUDACXX", [there, "nvcc"])
        self.version = run([self.path, "--version"])

    def compile(self, program: Program, capability: tuple[int, int]) -> bytes:
        """As ``Nvrtc.compile``."""
        with tempfile.TemporaryDirectory() as scratch:
            source, binary = Path(scratch) / f"{program.name}.cu", Path(scratch) / "cubin"
            source.write_text(program.text, "utf-8")
            architecture = "-arch=sm_{}{}".format(*capability)
            run([self.path, "-cubin", *OPTIONS, f"-I{SOURCES}", architecture, str(source), "-o", str(binary)])
            return binary.read_bytes()


@functools.cache
def chosen() -> Nvrtc | Nvcc:
    """NVRTC, or nvcc if NVRTC is not available.

    Raises:
        BuildError: There is neither; what to install.
    """
    try:
        return Nvrtc()
    except BuildError as error:
        try:
            return Nvcc()
        except BuildError:
            raise error from None


def compiled(
    programs: Sequence[Program], capability: tuple[int, int], compiler: Nvrtc | Nvcc | None = None
) -> list[bytes]:
    """Machine code of programs: from the disk cache if available, else compiled in parallel.

    Raises:
        BuildError: There is no compiler, or a program does not compile; with the compiler's output.
    """
    if not programs:
        return []
    compiler = compiler or chosen()
    parts = (*OPTIONS, compiler.version, str(capability))
    paths = [cache_directory() / f"{key(program.source, program.text, *parts)}.cubin" for program in programs]
    found = [_read(path) for path in paths]
    if None in found:
        with _compiling, locked("cuda"):
            found = [_read(path) if binary is None else binary for path, binary in zip(paths, found, strict=True)]
            missing = [number for number, binary in enumerate(found) if binary is None]
            made = _compile([programs[number] for number in missing], capability, compiler)
            for number, binary in zip(missing, made, strict=True):
                keep(paths[number], hashlib.sha256(binary).digest() + binary)
                found[number] = binary
    return [binary for binary in found if binary is not None]


def _compile(programs: Sequence[Program], capability: tuple[int, int], compiler: Nvrtc | Nvcc) -> list[bytes]:
    if not programs:
        return []

    def compile_one(program: Program) -> bytes:
        begun = time.perf_counter()
        binary = compiler.compile(program, capability)
        logger.debug("%5.2f s %s", time.perf_counter() - begun, program.name)
        return binary

    level = logging.WARNING if len(programs) > 1 else logging.INFO  # one takes a second
    logger.log(level, "compiling %d GPU kernels, once; this takes some seconds …", len(programs))
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(compile_one, programs))
    logger.log(level, "… done in %.1f s", time.perf_counter() - started)
    return binaries


def _read(path: Path) -> bytes | None:
    """The cached machine code, if the file is complete."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, binary = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return binary if digest == hashlib.sha256(binary).digest() else None
