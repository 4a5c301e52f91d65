"""Sparse decode attention: one new token over the pool, as a torch operation.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import ELEMENT_TYPES, ELEMENTS, IN_CPP, address, check, threads
from attention_predictor.csrc.function import Function
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import doubles, integers, pointers

WIDTHS = (64, 128, 256)  # largest head sizes of the GPU kernel's instances
MAX_HEAD_DIM = WIDTHS[-1]
WARPS, HEADS = 4, 8  # of a thread block: warps, and query heads of a KV head
MAX_SPLITS = 64  # thread blocks that share a row's slots


class SparseDecode(ctypes.Structure):
    """As in attention.h."""

    _fields_ = [
        *pointers("query key value", "void"),
        *pointers("block", "int64_t"),
        *pointers("real", "uint8_t"),
        *pointers("sinks", "float"),
        *pointers("length_B padding", "int64_t"),
        *pointers("out", "void"),
        *pointers("peak sum lse partial", "float"),
        *pointers("arrived", "int32_t"),
        *integers("batch kv_heads group slots tokens head_dim length splits element window chunk"),
        *doubles("scaling softcap"),
    ]


ON_CPU = Function("attention.cpp", "sparse_decode", SparseDecode, ELEMENT_TYPES)
CONSTANTS = {"kWarps": WARPS, "kHeads": HEADS, "kMaxSplits": MAX_SPLITS}


@functools.cache
def kernel(dtype: torch.dtype, head_dim: int, values: bool) -> Kernel:
    """The GPU kernel for a pool of this dtype and head size; without ``values`` it computes only scores."""
    width = next(width for width in WIDTHS if head_dim <= width)
    function = f"attend_slots<{IN_CPP[dtype]}, {width}, {str(values).lower()}>"
    return Kernel("attention.cu", function, SparseDecode, 32 * WARPS, _at_once(head_dim), CONSTANTS)


def fits(key_BGSTD: Tensor) -> bool:
    """Whether `sparse_decode` supports this pool."""
    D = key_BGSTD.shape[4]
    return key_BGSTD.dtype in ELEMENTS and D <= MAX_HEAD_DIM and D % 8 == 0


def sparse_decode(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor | None,
    block_BGS: Tensor,
    length: int,
    real_BL: Tensor | None,
    sinks_H: Tensor | None,
    scaling: float,
    softcap: float,
    length_B: Tensor | None = None,
    arrived_BH: Tensor | None = None,
    padding_B: Tensor | None = None,
    window: int = 0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of one new token over the tokens of the blocks in the slots.

    Registered as ``torch.ops.attention_predictor.sparse_decode``, which is used only when compiling: torch's dispatcher
    takes as long as the rest of the launch.

    Args:
        query_BHD: Queries, in the dtype of the pool: fp32, fp16 or bf16.
        key_BGSTD, value_BGSTD: The pool; without values only scores are computed, bit-equal to those with values.
        block_BGS: int64 block in each slot, -1 for a slot that takes no part.
        length: Tokens of the sequence, the new one included; with ``length_B``, their maximum.
        real_BL: bool, False at padding, or ``None``.
        sinks_H: fp32 logit of an extra softmax column without a value, or ``None``.
        scaling, softcap: Logits are softcap·tanh(scaling·q·k / softcap), or scaling·q·k for a softcap of 0.
        length_B: int64 tokens of each sequence, on the device; ``None``: ``length``.
        arrived_BH: int32 counters, zero before and after each call, by which the last thread block of a GPU is found.
            Keep the tensor between calls, one call at a time; ``None``: allocated here, at the cost of one more kernel.
        padding_B: int64, left padding of each sequence in tokens, not visible; ``None``: none.
        window: Only this many last tokens are visible; 0: all.
        chunk: Only tokens of the newest token's chunk are visible; chunks of this size start after the padding. 0: all.

    Returns:
        out_BHD in the dtype of the query; fp32 peak_BHS and sum_BHS, largest logit and log-sum-exp of each slot,
        ``-inf`` for slots that take no part; fp32 lse_BH of all logits, the sink included. Without values, the first
        and the last are empty.

    Raises:
        ValueError: A wrong shape, dtype, device or layout; names the argument, what was expected and what was found.
    """
    if torch.compiler.is_compiling():
        inputs = (query_BHD, key_BGSTD, value_BGSTD, block_BGS, length, real_BL, sinks_H, scaling, softcap)
        return _operation(*inputs, length_B, arrived_BH, padding_B, window, chunk)
    B, G, S, T, D = key_BGSTD.shape
    H, dtype, device = query_BHD.shape[1], key_BGSTD.dtype, key_BGSTD.device
    check("query_BHD", query_BHD, (B, H, D), dtype, device)
    check("key_BGSTD", key_BGSTD, (B, G, S, T, D), dtype, device)
    check("block_BGS", block_BGS, (B, G, S), torch.int64, device)
    if value_BGSTD is not None:
        check("value_BGSTD", value_BGSTD, (B, G, S, T, D), dtype, device)
    if real_BL is not None:
        check("real_BL", real_BL, (B, length), torch.bool, device)
    if sinks_H is not None:
        check("sinks_H", sinks_H, (H,), torch.float32, device)
    if length_B is not None:
        check("length_B", length_B, (B,), torch.int64, device)
    if arrived_BH is not None:
        check("arrived_BH", arrived_BH, (B, H), torch.int32, device)
    if padding_B is not None:
        check("padding_B", padding_B, (B,), torch.int64, device)
    if window < 0 or chunk < 0:
        raise ValueError(f"window and chunk: expected tokens, or 0 for all, got {window} and {chunk}")
    if H % G:
        raise ValueError(f"query_BHD has {H} heads, expected a multiple of the pool's {G} KV heads")
    if not fits(key_BGSTD):
        raise ValueError(
            f"key_BGSTD is {dtype} with a head size of {D}, expected fp32, fp16 or bf16, and a multiple of 8 up to "
            f"{MAX_HEAD_DIM}"
        )
    if any(read is not None and read.data_ptr() % 16 for read in (query_BHD, key_BGSTD, value_BGSTD)):
        raise ValueError("query_BHD, key_BGSTD, value_BGSTD: expected addresses that are multiples of 16")
    outputs = out_BHD, peak_BHS, sum_BHS, lse_BH = _outputs(query_BHD, key_BGSTD, value_BGSTD)
    partial = None
    if binding.on_gpu(device):
        pieces = ceil_div(H, G * HEADS)
        splits = _splits(B * G * pieces, S, D, device)
        if value_BGSTD is not None:
            partial = torch.empty((B, H, splits, D + 4), dtype=torch.float32, device=device)
            if arrived_BH is None:
                arrived_BH = torch.zeros((B, H), dtype=torch.int32, device=device)
    else:
        splits = threads(key_BGSTD.numel())
    arguments = SparseDecode(
        *map(address, (query_BHD, key_BGSTD, value_BGSTD, block_BGS, real_BL, sinks_H, length_B)),
        *map(address, (padding_B, out_BHD, peak_BHS, sum_BHS, lse_BH, partial, arrived_BH)),
        *(B, G, H // G, S, T, D, length, splits, ELEMENTS[dtype]),
        *(window, chunk, scaling, softcap),
    )
    if binding.on_gpu(device):
        kernel(dtype, D, value_BGSTD is not None).launch(device, (splits * pieces, G, B), arguments)
    else:
        ON_CPU.call(arguments)
    return outputs


_operation = torch.library.custom_op("attention_predictor::sparse_decode", sparse_decode, mutates_args=())


@_operation.register_fake
def _(query_BHD, key_BGSTD, value_BGSTD, *rest):
    return _outputs(query_BHD, key_BGSTD, value_BGSTD)


def _outputs(query_BHD: Tensor, key_BGSTD: Tensor, value_BGSTD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, _), S = query_BHD.shape, key_BGSTD.shape[2]
    peak_BHS = query_BHD.new_empty((B, H, S), dtype=torch.float32)
    sum_BHS = torch.empty_like(peak_BHS)
    if value_BGSTD is None:
        return query_BHD.new_empty(0), peak_BHS, sum_BHS, peak_BHS.new_empty(0)
    return torch.empty_like(query_BHD), peak_BHS, sum_BHS, peak_BHS.new_empty((B, H))


def _at_once(head_dim: int) -> int:
    """Thread blocks per multiprocessor that registers suffice for."""
    return 2 if head_dim > 128 else 4


def _splits(rows: int, slots: int, head_dim: int, device: torch.device) -> int:
    """Thread blocks per row: as many as run at once, with at least one slot per warp; a power of two."""
    limit = min(_at_once(head_dim) * binding.multiprocessors(device) // rows, ceil_div(slots, WARPS), MAX_SPLITS)
    return 1 << max(limit.bit_length() - 1, 0)
