"""Moving blocks from host memory, as torch operations.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size; s slabs; n: one entry a moved block; 2 is keys then values.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.csrc.binding import address, call, check, threads

GATHER_BLOCKS = 32  # thread blocks on a GPU: enough to fill the bus, few enough to leave the GPU to the model


class Gather(ctypes.Structure):
    """As in gather.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slab", "row", "block", "slot", "key", "value")),
        *((name, ctypes.c_int64) for name in ("n", "slab_blocks", "slots", "half_bytes", "workers")),
    ]


@torch.library.custom_op("attention_predictor::gather_to_pool", mutates_args=("key_BGSTD", "value_BGSTD"))
def gather_to_pool(
    slab_s: Tensor,
    slab_blocks: int,
    row_n: Tensor,
    block_n: Tensor,
    slot_n: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
) -> None:
    """Copy blocks from pinned slabs ``[B, G, slab_blocks, 2, T, D]`` into the slots of a pool on a GPU.

    The GPU reads host memory itself, in the current stream; the caller keeps slabs and lists until that is done, and
    vouches that rows, blocks and slots exist.

    Args:
        slab_s: int64 addresses of the slabs, on the pool's device.
        row_n, block_n, slot_n: int64 on the pool's device; which row's block goes to which slot of that row.
    """
    device = key_BGSTD.device
    shape = tuple(key_BGSTD.shape)
    S, T, D = shape[2:]
    check("key_BGSTD", key_BGSTD, shape, key_BGSTD.dtype, device)
    check("value_BGSTD", value_BGSTD, shape, key_BGSTD.dtype, device)
    check("slab_s", slab_s, (len(slab_s),), torch.int64, device)
    for name, entry_n in (("row_n", row_n), ("block_n", block_n), ("slot_n", slot_n)):
        check(name, entry_n, (len(row_n),), torch.int64, device)
    half_bytes = T * D * key_BGSTD.element_size()
    if half_bytes % 16:
        raise ValueError(f"the keys of a block have {half_bytes} bytes, expected a multiple of 16")
    arguments = Gather(
        *map(address, (slab_s, row_n, block_n, slot_n, key_BGSTD, value_BGSTD)),
        *(len(row_n), slab_blocks, S, half_bytes, GATHER_BLOCKS),
    )
    call("gather_blocks", arguments, device)


@gather_to_pool.register_fake
def _(slab_s, slab_blocks, row_n, block_n, slot_n, key_BGSTD, value_BGSTD):
    return None


@torch.library.custom_op("attention_predictor::gather_to_host", mutates_args=("out_n2TD",))
def gather_to_host(slab_s: Tensor, slab_blocks: int, row_n: Tensor, block_n: Tensor, out_n2TD: Tensor) -> None:
    """Copy blocks of slabs ``[B, G, slab_blocks, 2, T, D]`` into a buffer in host memory, on several threads.

    ``slab_s`` are the slabs' int64 addresses. The caller vouches for them, and that rows and blocks exist.
    """
    host, (n, _, T, D) = torch.device("cpu"), out_n2TD.shape
    check("slab_s", slab_s, (len(slab_s),), torch.int64, host)
    check("out_n2TD", out_n2TD, (n, 2, T, D), out_n2TD.dtype, host)
    for name, entry_n in (("row_n", row_n), ("block_n", block_n)):
        check(name, entry_n, (n,), torch.int64, host)
    half_bytes = T * D * out_n2TD.element_size()
    arguments = Gather(
        *map(address, (slab_s, row_n, block_n, None, out_n2TD, None)),
        *(n, slab_blocks, 0, half_bytes, threads(out_n2TD.numel())),
    )
    call("gather_blocks", arguments, host)


@gather_to_host.register_fake
def _(slab_s, slab_blocks, row_n, block_n, out_n2TD):
    return None
