"""Sparse decode attention as a torch operation.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import ELEMENTS, address, call, check, threads

MOST_TOKENS, MOST_HEAD_DIM = 64, 256  # of a block and of a head that the GPU's kernel has room for
WARPS = 4  # of a thread block: slots taken at once


class SparseDecode(ctypes.Structure):
    """As in attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "block", "real", "sinks")),
        *((name, ctypes.c_void_p) for name in ("out", "peak", "sum", "lse", "partial")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "heads", "slots", "tokens", "head_dim")),
        *((name, ctypes.c_int64) for name in ("length", "splits", "element")),
        *((name, ctypes.c_double) for name in ("scaling", "softcap")),
    ]


def fits(key_BGSTD: Tensor) -> bool:
    """Whether `sparse_decode` can read such a pool."""
    T, D = key_BGSTD.shape[3:]
    return key_BGSTD.dtype in ELEMENTS and T <= MOST_TOKENS and D <= MOST_HEAD_DIM and D % 8 == 0


@torch.library.custom_op("attention_predictor::sparse_decode", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of one new token over the tokens of the blocks in the slots.

    Args:
        query_BHD: Queries, in the dtype of the pool: fp32, fp16 or bf16.
        key_BGSTD, value_BGSTD: The pool; without values scores are found alone.
        block_BGS: int64 block in each slot, -1 for one that takes no part.
        length: Tokens of the sequence, the new one included.
        real_BL: bool, False at padding, or ``None``.
        sinks_H: fp32 logit of one more softmax column without a value, or ``None``.
        scaling, softcap: Logits are softcap·tanh(scaling·q·k / softcap), or scaling·q·k for a softcap of 0.

    Returns:
        out_BHD in the dtype of the query; fp32 peak_BHS and sum_BHS, largest logit and log-sum-exp of each slot,
        ``-inf`` where none takes part; fp32 lse_BH of all logits, the sink included. Without values, the first and
        the last are not filled.
    """
    B, G, S, T, D = key_BGSTD.shape
    H = query_BHD.shape[1]
    check("query_BHD", query_BHD, (B, H, D), key_BGSTD.dtype, key_BGSTD.device)
    check("key_BGSTD", key_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, key_BGSTD.device)
    check("block_BGS", block_BGS, (B, G, S), torch.int64, key_BGSTD.device)
    if value_BGSTD is not None:
        check("value_BGSTD", value_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, key_BGSTD.device)
    if real_BL is not None:
        check("real_BL", real_BL, (B, length), torch.bool, key_BGSTD.device)
    if sinks_H is not None:
        check("sinks_H", sinks_H, (H,), torch.float32, key_BGSTD.device)
    if H % G:
        raise ValueError(f"query_BHD has {H} heads, expected a multiple of the pool's {G} KV heads")
    if not fits(key_BGSTD):
        raise ValueError(
            f"key_BGSTD is {key_BGSTD.dtype} with blocks of {T} tokens and a head size of {D}, expected fp32, fp16 or "
            f"bf16, at most {MOST_TOKENS} tokens, and a multiple of 8 up to {MOST_HEAD_DIM}"
        )
    out_BHD, peak_BHS, sum_BHS, lse_BH = _outputs(query_BHD, key_BGSTD)
    if binding.on_gpu(key_BGSTD.device):
        # Slots are split until there are two thread blocks for each multiprocessor.
        wanted = 2 * binding.multiprocessors(key_BGSTD.device) // max(1, B * G)
        splits = max(1, min(-(-S // WARPS), wanted))
        partial = torch.empty((B, H, splits, D + 2), dtype=torch.float32, device=key_BGSTD.device)
    else:
        splits, partial = threads(B * G * S * T * D), None
    arguments = SparseDecode(
        *map(address, (query_BHD, key_BGSTD, value_BGSTD, block_BGS, real_BL, sinks_H)),
        *map(address, (out_BHD, peak_BHS, sum_BHS, lse_BH, partial)),
        *(B, G, H, S, T, D, length, splits, ELEMENTS[key_BGSTD.dtype], scaling, softcap),
    )
    call("sparse_decode", arguments, key_BGSTD.device)
    return out_BHD, peak_BHS, sum_BHS, lse_BH


@sparse_decode.register_fake
def _(query_BHD, key_BGSTD, value_BGSTD, block_BGS, length, real_BL, sinks_H, scaling, softcap):
    return _outputs(query_BHD, key_BGSTD)


def _outputs(query_BHD: Tensor, key_BGSTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, _), S = query_BHD.shape, key_BGSTD.shape[2]
    score_BHS = query_BHD.new_empty((B, H, S), dtype=torch.float32)
    return torch.empty_like(query_BHD), score_BHS, torch.empty_like(score_BHS), score_BHS.new_empty((B, H))
