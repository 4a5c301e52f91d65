"""What the operations have in common: arguments checked, the CPU's library called, why a device has no kernels.

The operations themselves are in the modules beside this one, a module for each kernel; ``ops`` has them all.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from attention_predictor.csrc import layout
from attention_predictor.csrc.build import cpu_library
from attention_predictor.csrc.compiler import bindings, result_of
from attention_predictor.csrc.kernel import Kernel, load
from attention_predictor.errors import BuildError

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in kernels.h
IN_CPP = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
LEAST_CAPABILITY = (8, 0)
logger = logging.getLogger(__name__)
_reasons: dict[torch.device, str | None] = {}


def missing(device: torch.device) -> str | None:
    """Why there are no kernels for this device, on one line; what a compiler said goes to the log, once."""
    if device in _reasons:
        return _reasons[device]
    from attention_predictor.csrc.gather import NOTE_TIME  # which is made of this module

    return prepare(device, [NOTE_TIME])  # the smallest: it shows whether any can be compiled and loaded


def prepare(device: torch.device, kernels: Sequence[Kernel]) -> str | None:
    """Compile and load kernels before they are needed; those that are not kept on disk in parallel.

    Returns:
        ``None``, or on one line why that fails: ``missing`` says the same from then on, and nothing is tried again.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if (reason := _reasons.get(device)) is None:
        try:
            if device.type == "cpu":
                library()
            else:
                reason = _unfit(device)
                if reason is None:
                    load(kernels, device)
        except BuildError as error:
            reason, *output = str(error).splitlines()
            if output:
                logger.warning("kernels for %s: %s", device, error)
    _reasons[device] = reason
    return reason


def _unfit(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"none are written for {device.type}"
    if torch.version.cuda is None:
        return "none are written for ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        least, found = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, capability))
        return f"none are written for GPUs of a compute capability below {least}, this one has {found}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The CPU's kernels; BuildError where they can't be compiled."""
    from attention_predictor.csrc import attention, gather, sketch  # which are made of this module

    structs = (attention.SparseDecode, gather.Gather, sketch.SketchScores)
    kernels = cpu_library("cpu.cpp", "\n".join(['#include "cpu.cpp"', *map(layout.assertions, structs)]))
    kernels.error_text.restype = ctypes.c_char_p
    return kernels


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call a function of the CPU's library."""
    kernels = library()
    if code := getattr(kernels, name)(ctypes.byref(arguments), None):
        raise RuntimeError(f"{name} on a CPU: {kernels.error_text(code).decode()}")


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threads(elements: int) -> int:
    """As many as torch uses, where the work is worth starting them."""
    return max(1, min(torch.get_num_threads(), elements >> 18))


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    as_expected = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not (as_expected and tensor.is_contiguous()):
        order = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, contiguous; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}{order}"
        )


def on_gpu(device: torch.device) -> bool:
    """Whether the kernels of this device are the GPU's."""
    return device.type == "cuda"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a thread block of a GPU may have."""
    driver = bindings("driver")
    most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return result_of("CUDA's driver", driver.cuDeviceGetAttribute(most, device.index))
