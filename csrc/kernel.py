"""GPU kernels: declared in Python, compiled when they are first needed, launched by the CUDA driver.

A ``.cu`` file holds device functions. Each takes one struct, which its operation's Python module fills in.
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
    """A kernel on one GPU; ``shared_bytes``: the most shared memory that launches may have beyond what it declares."""

    function: Any
    context: Any
    shared_bytes: int = 0


class Kernel:
    """One instance of a device function; a program by itself.

    Args:
        source: Its file, beside this module.
        function: How it is called in C++; it takes the struct by reference.
        struct: The struct, as in the header that the file includes.
        threads: Of a thread block at most.
        at_once: Thread blocks that a multiprocessor must have registers for; ``None`` leaves it to the compiler.
        constants: Of the source, by name, with the values that Python counts on.
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
        """Its program."""
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
        """Run in torch's current stream of a GPU; not at all where the grid is empty.

        Args:
            threads: Of a thread block; as many as there may be, if ``None``.
            shared_bytes: Shared memory beyond what the function declares.

        Raises:
            BuildError: It can't be compiled.
            RuntimeError: CUDA refuses; with its reason.
        """
        if 0 in grid:
            return
        loaded = self._loaded.get(device.index) or load([self], device)[0]
        driver, stream = _driver(), torch.cuda.current_stream(device).cuda_stream
        argument = ctypes.c_void_p(ctypes.addressof(arguments))
        driver.cuCtxPushCurrent(loaded.context)  # a thread may have another device's, or none yet
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
    """A program of kernels of one source: the source, assertions about structs and constants, and their entries."""
    checks = dict.fromkeys(text for kernel in kernels for text in (assertions(kernel.struct), equal(kernel.constants)))
    parts = [f'#include "{kernels[0].source}"', *checks, *(kernel.entry for kernel in kernels)]
    return "\n".join([*parts, ""])


def load(kernels: Sequence[Kernel], device: torch.device) -> list[Loaded]:
    """Compile kernels, those that are not kept on disk in parallel, and load them to a GPU.

    Raises:
        BuildError: There is no compiler, it refuses, or the driver does.
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
