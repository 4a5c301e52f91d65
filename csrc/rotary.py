"""The rotary embedding of queries and keys in one launch.

Suffixes: B sequences, H query heads, G KV heads, T tokens, D head size, E elements of a head that are rotated.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from attention_predictor.csrc.binding import ELEMENTS, IN_CPP, address, check_on_gpu
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers
from attention_predictor.csrc.norm import VECTOR_BYTES, is_wide

THREADS = 128
MAX_ROWS = 65535  # of a grid


class Rotary(ctypes.Structure):
    """As in rotary.h."""

    _fields_ = [
        *pointers("query key cosine sine query_out key_out"),
        *integers("batch heads kv_heads tokens head_dim rotated"),
        *integers("query_batch query_head query_token key_batch key_head key_token angle_batch wide"),
    ]


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel:
    """For elements of that type, one of ``ELEMENTS``."""
    return Kernel("rotary.cu", f"rotate<{IN_CPP[dtype]}>", Rotary, threads=THREADS)


def rotates(query_BHTD: Tensor, key_BGTD: Tensor, cosine_BTE: Tensor, sine_BTE: Tensor) -> bool:
    """Whether ``rotate`` takes tensors of these shapes, types and places."""
    if not query_BHTD.dim() == key_BGTD.dim() == 4 or not cosine_BTE.dim() == sine_BTE.dim() == 3:
        return False
    (B, _, T, D), E = query_BHTD.shape, cosine_BTE.shape[2]
    return (
        query_BHTD.dtype in ELEMENTS
        and len({(x.dtype, x.device) for x in (query_BHTD, key_BGTD, cosine_BTE, sine_BTE)}) == 1
        and (key_BGTD.shape[0], *key_BGTD.shape[2:]) == (B, T, D)
        and cosine_BTE.shape == sine_BTE.shape
        and cosine_BTE.shape[0] in (1, B)
        and cosine_BTE.shape[1] == T
        and 0 < E <= D
        and E % 2 == 0
    )


def rotate(query_BHTD: Tensor, key_BGTD: Tensor, cosine_BTE: Tensor, sine_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """The first E elements of each head rotated, element i with element i + E / 2, the others as they are; on a GPU.

    ``rotate_by_torch`` says what it is.

    Args:
        query_BHTD, key_BGTD: fp32, fp16 or bf16; any order of the first three dimensions in memory.
        cosine_BTE, sine_BTE: Of the same type; B may be 1 for all sequences.

    Returns:
        New contiguous tensors, query and key.

    Raises:
        ValueError: Arguments that don't go together, or a device without kernels.
    """
    device = query_BHTD.device
    check_on_gpu("query_BHTD", device)
    given = (query_BHTD, key_BGTD, cosine_BTE, sine_BTE)
    if not rotates(*given):
        found = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in given)
        raise ValueError(
            f"expected [B, H, T, D], [B, G, T, D] and twice [B or 1, T, E], E even and at most D, all of one type "
            f"({', '.join(map(str, ELEMENTS))}) and device; found {found}"
        )
    query_BHTD, key_BGTD = (x if x.stride(3) == 1 else x.contiguous() for x in (query_BHTD, key_BGTD))
    cosine_BTE, sine_BTE = cosine_BTE.contiguous(), sine_BTE.contiguous()
    (B, H, T, D), G, E = query_BHTD.shape, key_BGTD.shape[1], cosine_BTE.shape[2]
    query_out, key_out = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query_BHTD, key_BGTD))
    strides = (*query_BHTD.stride()[:3], *key_BGTD.stride()[:3], T * E if cosine_BTE.shape[0] > 1 else 0)
    tensors = (query_BHTD, key_BGTD, cosine_BTE, sine_BTE, query_out, key_out)
    wide = is_wide(tensors, D, E // 2, *strides)
    arguments = Rotary(*map(address, tensors), B, H, G, T, D, E, *strides, int(wide))
    size = VECTOR_BYTES // query_BHTD.itemsize if wide else 1
    lanes = (D - E // 2) // size
    kernel(query_BHTD.dtype).launch(device, (-(-(H + G) * lanes // THREADS), min(B * T, MAX_ROWS), 1), arguments)
    return query_out, key_out


def rotate_by_torch(
    query_BHTD: Tensor, key_BGTD: Tensor, cosine_BTE: Tensor, sine_BTE: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by torch's operations: the reference."""
    E = cosine_BTE.shape[2]
    rotated = []
    for x in (query_BHTD, key_BGTD):
        lower, upper = x[..., : E // 2], x[..., E // 2 : E]
        turned = torch.cat((-upper, lower), -1) * sine_BTE[:, None]
        rotated.append(torch.cat((x[..., :E] * cosine_BTE[:, None] + turned, x[..., E:]), -1))
    return rotated[0], rotated[1]
