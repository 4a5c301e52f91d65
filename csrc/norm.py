"""Root-mean-square normalisation of rows.

Suffix: W elements of a row; ``_xW`` has any dimensions before.
"""

from __future__ import annotations

import ctypes
import enum
import functools

import torch
from torch import Tensor

from attention_predictor.csrc.binding import ELEMENTS, IN_CPP, address, check, check_on_gpu
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import doubles, integers, pointers

MAX_THREADS, WARP = 1024, 32
VECTOR_BYTES = 16  # one load of a thread


class Form(enum.IntEnum):
    """Where the normalised x̂ (fp32) is rounded, and what it is multiplied with; as in norm.h."""

    CAST_FIRST = 0  # weight · cast(x̂), as in Llama
    ONE_PLUS = 1  # cast((1 + weight) · x̂), as in Gemma
    CAST_LAST = 2  # cast(weight · x̂), as in OLMo 2


class RmsNorm(ctypes.Structure):
    """As in norm.h."""

    _fields_ = [*pointers("x weight out"), *integers("width form wide"), *doubles("eps")]


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel:
    """For elements of that type, one of ``ELEMENTS``."""
    return Kernel("norm.cu", f"rms_norm<{IN_CPP[dtype]}>", RmsNorm, threads=MAX_THREADS)


def rms_norm(x_xW: Tensor, weight_W: Tensor, eps: float, form: Form) -> Tensor:
    """Root-mean-square normalisation on a GPU; ``rms_norm_by_torch`` is the reference.

    Args:
        x_xW: fp32, fp16 or bf16; copied if not contiguous.
        weight_W: Of the same type.
        eps: Added to the mean square.

    Returns:
        A new contiguous tensor like ``x_xW``.

    Raises:
        ValueError: Arguments that don't go together, or a device without kernels.
    """
    device, dtype, width = x_xW.device, x_xW.dtype, x_xW.shape[-1]
    check_on_gpu("x_xW", device)
    if dtype not in ELEMENTS:
        raise ValueError(f"x_xW is {dtype}, expected one of {', '.join(map(str, ELEMENTS))}")
    check("weight_W", weight_W, (width,), dtype, device)
    x_xW = x_xW.contiguous()
    out = torch.empty_like(x_xW)
    given = (x_xW, weight_W, out)
    arguments = RmsNorm(*map(address, given), width, int(form), int(is_wide(given, width)), eps)
    vectors = -(-width * dtype.itemsize // VECTOR_BYTES)
    threads = min(-(-vectors // WARP) * WARP, MAX_THREADS)
    kernel(dtype).launch(device, (x_xW.numel() // max(width, 1), 1, 1), arguments, threads=threads)
    return out


def rms_norm_by_torch(x_xW: Tensor, weight_W: Tensor, eps: float, form: Form) -> Tensor:
    """The same by torch's operations: the reference."""
    y_xW = x_xW.float()
    y_xW = y_xW * torch.rsqrt(y_xW.pow(2).mean(-1, keepdim=True) + eps)
    if form == Form.CAST_FIRST:
        return weight_W * y_xW.to(x_xW.dtype)
    weight_W = weight_W.float() + 1.0 if form == Form.ONE_PLUS else weight_W.float()
    return (y_xW * weight_W).to(x_xW.dtype)


def is_wide(tensors: tuple[Tensor, ...], *elements: int) -> bool:
    """Whether all tensors begin at multiples of 16 bytes, and strides of so many elements are multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % VECTOR_BYTES == 0 and not any(n * tensor.itemsize % VECTOR_BYTES for n in elements)
        for tensor in tensors
    )
