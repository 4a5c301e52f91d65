"""CUDA programs to machine code: by NVRTC, which comes with torch, or by nvcc; in parallel, and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from attention_predictor.csrc.build import SOURCES, cache_directory, find_compiler, keep, key, locked, run
from attention_predictor.predictor.errors import BuildError

if TYPE_CHECKING:
    from attention_predictor.csrc.kernel import Kernel

OPTIONS = ("-std=c++20", f"-I{SOURCES}")
DIGEST_BYTES = 32  # before the machine code in a file
logger = logging.getLogger(__name__)
_compiling = threading.Lock()


class Compiler(Protocol):
    """A compiler of kernels; ``version`` tells it from others."""

    version: str

    def compile(self, kernel: Kernel, capability: tuple[int, int]) -> bytes:
        """Machine code for that compute capability, or PTX; BuildError where it refuses, with what it said."""


class Nvrtc:
    """NVIDIA's compiler as a library.

    Raises:
        BuildError: It, its Python bindings or the headers are not there; what to install.
    """

    def __init__(self) -> None:
        major = (torch.version.cuda or "13").split(".")[0]
        try:
            from cuda.bindings import nvrtc
            from cuda.pathfinder import load_nvidia_dynamic_lib
        except ImportError as error:
            raise BuildError(f'cuda-bindings is not installed: pip install "cuda-bindings=={major}.*"') from error
        try:
            library = Path(load_nvidia_dynamic_lib("nvrtc").abs_path or "")
            self.version = "NVRTC {1}.{2}".format(*nvrtc.nvrtcVersion())
        except RuntimeError as error:
            package = f"nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}"
            raise BuildError(f"NVRTC of CUDA {major} was not found: pip install {package}") from error
        # In a wheel of CUDA 13 or a toolkit; in wheels of CUDA 12.
        places = (library.parent.parent / "include", library.parent.parent.parent / "cuda_runtime" / "include")
        found = next((place for place in places if (place / "cuda_fp16.h").exists()), None)
        if found is None:
            raise BuildError(f"cuda_fp16.h was not found in {' or '.join(map(str, places))}")
        self.headers, self.nvrtc = found, nvrtc

    def compile(self, kernel: Kernel, capability: tuple[int, int]) -> bytes:
        nvrtc, target = self.nvrtc, 10 * capability[0] + capability[1]
        known = self._call(nvrtc.nvrtcGetSupportedArchs())
        exact = target in known
        if not exact:  # it is older than the device: the driver compiles the rest
            target = max(x for x in known if x < target)
        options = [*OPTIONS, f"-I{self.headers}", f"-arch={'sm' if exact else 'compute'}_{target}"]
        handle = self._call(nvrtc.nvrtcCreateProgram(kernel.text.encode(), kernel.name.encode(), 0, [], []))
        try:
            (code,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
            if code:
                log = bytearray(self._call(nvrtc.nvrtcGetProgramLogSize(handle)))
                self._call(nvrtc.nvrtcGetProgramLog(handle, log))
                raise BuildError(f"{self.version} refused {kernel.name}\n{bytes(log).decode(errors='replace')}")
            size, get = (
                (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
            )
            binary = bytearray(self._call(size(handle)))
            self._call(get(handle, binary))
            return bytes(binary)
        finally:
            nvrtc.nvrtcDestroyProgram(handle)

    def _call(self, result):
        code, *values = result
        if code:
            raise BuildError(f"{self.version}: {code.name}")
        return values[0] if values else None


class Nvcc:
    """NVIDIA's compiler as a program; BuildError where there is none."""

    def __init__(self) -> None:
        there = os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
        self.path = find_compiler("nvcc", "CUDACXX", [there, "nvcc"])
        self.version = run([self.path, "--version"])

    def compile(self, kernel: Kernel, capability: tuple[int, int]) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            source, binary = Path(scratch) / f"{kernel.name}.cu", Path(scratch) / "cubin"
            source.write_text(kernel.text, "utf-8")
            architecture = "-arch=sm_{}{}".format(*capability)
            run([self.path, "-cubin", *OPTIONS, architecture, str(source), "-o", str(binary)])
            return binary.read_bytes()


@functools.cache
def chosen() -> Compiler:
    """NVRTC, or nvcc where that is not there.

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


def compiled(kernels: Sequence[Kernel], capability: tuple[int, int], compiler: Compiler | None = None) -> list[bytes]:
    """Machine code of kernels: from the disk where the same was compiled before, all others compiled in parallel.

    Raises:
        BuildError: There is no compiler, or it refuses one; with what it said.
    """
    if not kernels:
        return []
    compiler = compiler or chosen()
    parts = (*OPTIONS, compiler.version, str(capability))
    paths = [cache_directory() / f"{key(kernel.source, kernel.text, *parts)}.cubin" for kernel in kernels]
    found = [_read(path) for path in paths]
    if None in found:
        with _compiling, locked("cuda"):
            found = [_read(path) if binary is None else binary for path, binary in zip(paths, found, strict=True)]
            missing = [number for number, binary in enumerate(found) if binary is None]
            for number, binary in zip(missing, _compile([kernels[i] for i in missing], capability, compiler), strict=True):
                keep(paths[number], hashlib.sha256(binary).digest() + binary)
                found[number] = binary
    return [binary for binary in found if binary is not None]


def _compile(kernels: Sequence[Kernel], capability: tuple[int, int], compiler: Compiler) -> list[bytes]:
    if not kernels:
        return []

    def compile_one(kernel: Kernel) -> bytes:
        begun = time.perf_counter()
        binary = compiler.compile(kernel, capability)
        logger.debug("%5.2f s %s", time.perf_counter() - begun, kernel.name)
        return binary

    level = logging.WARNING if len(kernels) > 1 else logging.INFO  # one takes a second
    logger.log(level, "compiling %d GPU kernels, once: some seconds …", len(kernels))
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(compile_one, kernels))
    logger.log(level, "… done in %.1f s", time.perf_counter() - started)
    return binaries


def _read(path: Path) -> bytes | None:
    """What was kept there, if it is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, binary = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return binary if digest == hashlib.sha256(binary).digest() else None
