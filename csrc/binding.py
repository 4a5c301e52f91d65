"""The way into the kernels: the library of a device, arguments checked, a call made; and why there is none.

The operations themselves are in the modules beside this one, a module for each kernel; ``ops`` has them all.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from attention_predictor.csrc.build import library
from attention_predictor.predictor.errors import BuildError

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
logger = logging.getLogger(__name__)


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why there are no kernels for this device, on one line; what a compiler said goes to the log, once."""
    if device.type not in ("cpu", "cuda"):
        return f"none are written for {device.type}"
    try:
        _library(device)
    except BuildError as error:
        reason, *output = str(error).splitlines()
        if output:
            logger.warning("kernels for %s: %s", device.type, error)
        return reason
    return None


def _library(device: torch.device) -> ctypes.CDLL:
    return library(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def call(name: str, arguments: ctypes.Structure, device: torch.device) -> None:
    kernels = _library(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            code = getattr(kernels, name)(ctypes.byref(arguments), stream)
    else:
        code = getattr(kernels, name)(ctypes.byref(arguments), None)
    if code:
        raise RuntimeError(f"{name} on {device}: {kernels.error_text(code).decode()}")


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threads(elements: int) -> int:
    """As many as torch uses, where the work is worth starting them."""
    return max(1, min(torch.get_num_threads(), elements >> 18))


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    as_expected = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not (as_expected and tensor.is_contiguous()):
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, contiguous; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"
        )


def on_gpu(device: torch.device) -> bool:
    """Whether the kernels of this device are the GPU's."""
    return device.type == "cuda"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
