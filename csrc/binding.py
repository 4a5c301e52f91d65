"""Helpers of all operations: checking and passing arguments, and device properties.

Each kernel's operation has its own module; ``ops`` exports them all.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attention_predictor.csrc.compiler import bindings, result_of
from attention_predictor.errors import BuildError

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ELEMENT_TYPES = {"kFloat32": 0, "kFloat16": 1, "kBFloat16": 2}  # the same, as in kernels.h
_BUS_ID_BYTES = 32  # enough for any
IN_CPP = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threads(elements: int) -> int:
    """Threads for this many elements: at most torch's number, fewer for little work."""
    return max(1, min(torch.get_num_threads(), elements >> 18))


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    as_expected = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not (as_expected and tensor.is_contiguous()):
        order = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, contiguous; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}{order}"
        )


def check_on_gpu(name: str, device: torch.device) -> None:
    """Raise ``ValueError`` unless argument ``name`` is on a GPU."""
    if not on_gpu(device):
        raise ValueError(f"{name} is on {device}, expected a GPU: this kernel has no CPU version")


def on_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU with CUDA kernels."""
    return device.type == "cuda"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def max_shared_memory(device: torch.device) -> int:
    """Most bytes of shared memory for a thread block of this GPU."""
    driver = bindings("driver")
    most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return result_of("CUDA's driver", driver.cuDeviceGetAttribute(most, device.index))


@functools.cache
def pci_bus_id(device: torch.device) -> str | None:
    """A GPU's PCI bus id as Linux writes it, such as ``0000:1b:00.0``; ``None`` if CUDA's driver does not tell it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        driver = bindings("driver")
        found = result_of("CUDA's driver", driver.cuDeviceGetPCIBusId(_BUS_ID_BYTES, index))
    except BuildError:
        return None
    return str(bytes(found).split(b"\0")[0].decode("ascii").lower())
