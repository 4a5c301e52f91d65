"""GPU kernels: declared in Python, compiled at first use, launched by the CUDA driver.

A ``.cu`` file has device functions. Each takes one struct, which its operation's Python module fills in.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from attention_predictor.csrc.compiler import bindings, compiled, result_of
from attention_predictor.csrc.layout import assertions, equal
from attention_predictor.errors import BuildError

_call = functools.partial(result_of, "CUDA's driver")


@dataclass(slots=True)
class Loaded:
    """A kernel loaded on one GPU; ``shared_bytes``: the dynamic shared memory that launches may use."""

    function: Any
    context: Any
    shared_bytes: int = 0


class Kernel:
    """One instance of a device function; compiled as its own program.

    Args:
        source: The file, in this folder.
        function: Its C++ name with template arguments; it takes the struct by reference.
        struct: The struct, as in the header that the file includes.
        threads: Most threads of a thread block.
        at_once: Thread blocks per multiprocessor that registers must suffice for; ``None``: the compiler decides.
        constants: Constants of the source and the values that Python relies on.
    """

    def __init__(
        self,
        source: str,
        function: str,
        struct: type[ctypes.Structure],
        threads: int,
        at_once: int | None = None,
        constants: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.source, self.struct, self.threads, self.constants = source, struct, threads, constants
        self.name = re.sub(r"[\W_]+", "_", f"{function} kernel")
        bounds = f"({threads})" if at_once is None else f"({threads}, {at_once})"
        self.entry = f"ENTRY({self.name}, {bounds}, {struct.__name__}, {function})"
        self._loaded: dict[int, Loaded] = {}

    @property
    def text(self) -> str:
        """The program's source."""
        return program_text([self])

    def launch(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        arguments: ctypes.Structure,
        *,
        threads: int | None = None,
        shared_bytes: int = 0,
    ) -> None:
        """Launch on torch's current stream of the GPU. Does nothing if the grid is empty.

        Args:
            threads: Threads of a thread block; ``None``: the most allowed.
            shared_bytes: Dynamic shared memory.

        Raises:
            BuildError: It can't be compiled.
            RuntimeError: CUDA refuses the launch; with its reason.
        """
        if 0 in grid:
            return
        loaded = self._loaded.get(device.index) or load([self], device)[0]
        driver, stream = _driver(), torch.cuda.current_stream(device).cuda_stream
        argument = ctypes.c_void_p(ctypes.addressof(arguments))
        driver.cuCtxPushCurrent(loaded.context)  # the thread may have another device's context, or none
        try:
            if shared_bytes > loaded.shared_bytes:
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(driver.cuFuncSetAttribute(loaded.function, most, shared_bytes))
                loaded.shared_bytes = shared_bytes
            block = (threads or self.threads, 1, 1)
            shape = (*grid, *block, shared_bytes, stream)
            _call(driver.cuLaunchKernel(loaded.function, *shape, ctypes.addressof(argument), 0))
        except BuildError as error:
            raise RuntimeError(f"{self.name} on {device}, {grid} thread blocks: {error}") from error
        finally:
            driver.cuCtxPopCurrent()


def program_text(kernels: Sequence[Kernel]) -> str:
    """The program of kernels of one source: the source, assertions about structs and constants, and entry points."""
    checks = dict.fromkeys(text for kernel in kernels for text in (assertions(kernel.struct), equal(kernel.constants)))
    parts = [f'#include "{kernels[0].source}"', *checks, *(kernel.entry for kernel in kernels)]
    return "\n".join([*parts, ""])


def load(kernels: Sequence[Kernel], device: torch.device) -> list[Loaded]:
    """Compile kernels (in parallel, unless cached on disk) and load them to a GPU.

    Raises:
        BuildError: There is no compiler, or compiler or driver report an error.
    """
    driver, missing = _driver(), [kernel for kernel in kernels if device.index not in kernel._loaded]
    binaries = compiled(missing, torch.cuda.get_device_capability(device))
    context = _context(device.index)
    _call(driver.cuCtxPushCurrent(context))
    try:
        for kernel, binary in zip(missing, binaries, strict=True):
            module = _call(driver.cuModuleLoadData(binary))
            function = _call(driver.cuModuleGetFunction(module, kernel.name.encode()))
            kernel._loaded[device.index] = Loaded(function, context)
    finally:
        driver.cuCtxPopCurrent()
    return [kernel._loaded[device.index] for kernel in kernels]


@functools.cache
def _driver() -> Any:
    return bindings("driver")


@functools.cache
def _context(number: int) -> Any:
    """The GPU's primary context, which torch uses."""
    driver = _driver()
    return _call(driver.cuDevicePrimaryCtxRetain(_call(driver.cuDeviceGet(number))))
