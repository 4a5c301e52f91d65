"""Logits reduced to blocks, as a torch operation.

Suffixes: B sequences, H query heads, Q queries, T keys, N blocks, L tokens of the sequence.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import address, check, check_on_gpu
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import doubles, integers, pointers

MIN_BLOCK = 4  # tokens: those that a thread reads together
THREADS = 256  # of a thread block
MAX_LANES = 32  # threads that share a block
MAX_ROWS = 65535  # of a grid


class ReduceLogits(ctypes.Structure):
    """As in reduce.h."""

    _fields_ = [
        *pointers("product", "float"),
        *pointers("real", "uint8_t"),
        *pointers("peak sum", "float"),
        *integers("batch heads queries tokens blocks length first_key first_query block_size"),
        *doubles("scaling softcap"),
    ]


CONSTANTS = {"kThreads": THREADS, "kFour": MIN_BLOCK, "kMaxLanes": MAX_LANES}
KERNEL = Kernel("reduce.cu", "reduce_logits", ReduceLogits, THREADS, constants=CONSTANTS)


def serves(device: torch.device, block_size: int) -> bool:
    """Whether there is a kernel of this kind of device for blocks of that size: a power of two, at least 4."""
    return block_size >= MIN_BLOCK and block_size & (block_size - 1) == 0 and binding.on_gpu(device)


@torch.library.custom_op("attention_predictor::reduce_logits", mutates_args=("peak_BHQN", "sum_BHQN"))
def reduce_logits(
    product_BHQT: Tensor,
    peak_BHQN: Tensor,
    sum_BHQN: Tensor,
    real_BL: Tensor | None,
    first_key: int,
    first_query: int,
    block_size: int,
    scaling: float,
    softcap: float,
) -> None:
    """Take keys' logits into each block's largest one and its log-sum-exp; on a GPU.

    A query sees the keys up to its own. A block may be shown in parts, each key once.

    Args:
        product_BHQT: fp32 products of queries and keys, not scaled yet.
        peak_BHQN, sum_BHQN: fp32, of what was shown before; ``-inf`` at the beginning.
        real_BL: bool, False at padding; ``None`` where there is none.
        first_key, first_query: Their numbers in the sequence.
        block_size: Tokens of a block: a power of two, at least 4.
        scaling, softcap: As in ``Terms``; a softcap of 0 is none.
    """
    device, (B, H, Q, T) = product_BHQT.device, product_BHQT.shape
    N, length = peak_BHQN.shape[-1], 0 if real_BL is None else real_BL.shape[1]
    check_on_gpu("product_BHQT", device)
    check("product_BHQT", product_BHQT, (B, H, Q, T), torch.float32, device)
    check("peak_BHQN", peak_BHQN, (B, H, Q, N), torch.float32, device)
    check("sum_BHQN", sum_BHQN, (B, H, Q, N), torch.float32, device)
    if real_BL is not None:
        check("real_BL", real_BL, (B, length), torch.bool, device)
    if block_size < MIN_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}, expected a power of two, at least {MIN_BLOCK}")
    if first_key + T > N * block_size or (real_BL is not None and first_key + T > length):
        raise ValueError(
            f"keys {first_key} to {first_key + T}: expected them within {N} blocks of {block_size} tokens"
            + (f" and {length} tokens of real_BL" if real_BL is not None else "")
        )
    arguments = ReduceLogits(
        *map(address, (product_BHQT, real_BL, peak_BHQN, sum_BHQN)),
        *(B, H, Q, T, N, length, first_key, first_query, block_size, scaling, softcap),
    )
    lanes = min(block_size // MIN_BLOCK, MAX_LANES)
    touched = ceil_div(first_key + T, block_size) - first_key // block_size
    columns = ceil_div(touched * lanes, KERNEL.threads) if T else 0
    KERNEL.launch(device, (columns, min(B * H * Q, MAX_ROWS), 1), arguments)
