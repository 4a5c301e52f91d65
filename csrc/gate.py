"""The middle of a gated MLP: act(gate) · up.

Suffix: W elements of a row; ``_xW`` has any dimensions before.
"""

from __future__ import annotations

import ctypes
import enum
import functools

import torch
from torch import Tensor
from torch.nn import functional

from attention_predictor.csrc.binding import ELEMENTS, IN_CPP, address, check_on_gpu
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers
from attention_predictor.csrc.norm import VECTOR_BYTES, is_wide

THREADS = 64
MAX_ROWS = 65535  # of a grid


class Activation(enum.IntEnum):
    """As in gate.h."""

    SILU = 0
    GELU_TANH = 1
    GELU = 2


class Gate(ctypes.Structure):
    """As in gate.h."""

    _fields_ = [*pointers("gate up out"), *integers("rows width gate_stride up_stride activation wide")]


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel:
    """For elements of that type, one of ``ELEMENTS``."""
    return Kernel("gate.cu", f"gate_up<{IN_CPP[dtype]}>", Gate, threads=THREADS)


def gate_up(gate_xW: Tensor, up_xW: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up; on a GPU. ``gate_up_by_torch`` says what it is.

    Args:
        gate_xW, up_xW: fp32, fp16 or bf16, of the same shape and type. Parts of one tensor, as ``chunk`` gives them
            along the last dimension, are read where they are.

    Returns:
        A new contiguous tensor.

    Raises:
        ValueError: Arguments that don't go together, or a device without kernels.
    """
    device, dtype = gate_xW.device, gate_xW.dtype
    check_on_gpu("gate_xW", device)
    if dtype not in ELEMENTS:
        raise ValueError(f"gate_xW is {dtype}, expected one of {', '.join(map(str, ELEMENTS))}")
    if (up_xW.shape, up_xW.dtype, up_xW.device) != (gate_xW.shape, dtype, device):
        raise ValueError(
            f"up_xW: expected {dtype} {list(gate_xW.shape)} on {device}; "
            f"found {up_xW.dtype} {list(up_xW.shape)} on {up_xW.device}"
        )
    gate_RW, up_RW = _rows(gate_xW), _rows(up_xW)
    out = torch.empty(gate_xW.shape, dtype=dtype, device=device)
    (rows, width), strides = gate_RW.shape, (gate_RW.stride(0), up_RW.stride(0))
    given = (gate_RW, up_RW, out)
    wide = is_wide(given, width, *strides)
    arguments = Gate(*map(address, given), rows, width, *strides, int(activation), int(wide))
    columns = -(-width * dtype.itemsize // (VECTOR_BYTES * THREADS))
    kernel(dtype).launch(device, (columns, min(rows, MAX_ROWS), 1), arguments)
    return out


def gate_up_by_torch(gate_xW: Tensor, up_xW: Tensor, activation: Activation) -> Tensor:
    """The same by torch's operations: the reference."""
    if activation == Activation.SILU:
        return functional.silu(gate_xW) * up_xW
    return functional.gelu(gate_xW, approximate="tanh" if activation == Activation.GELU_TANH else "none") * up_xW


def _rows(tensor_xW: Tensor) -> Tensor:
    """As ``[rows, W]``, each row's elements one after the other; without a copy where that can be."""
    rows = tensor_xW.reshape(-1, tensor_xW.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
