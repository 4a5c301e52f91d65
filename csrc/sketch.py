"""The scores of a key sketch as a torch operation.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size, N blocks, K groups of tokens,
J bytes of a group, R channels with codes, C those of one width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.csrc.binding import ELEMENTS, address, call, check, threads


class SketchScores(ctypes.Structure):
    """As in sketch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "ranked", "zero", "scale", "wide", "narrow", "tail", "real")),
        *((name, ctypes.c_void_p) for name in ("peak", "sum")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "heads", "head_dim", "capacity", "group")),
        *((name, ctypes.c_int64) for name in ("length", "block_size", "coded", "wide_channels", "wide_bits", "bits")),
        *((name, ctypes.c_int64) for name in ("element", "workers")),
        ("softcap", ctypes.c_double),
    ]


@torch.library.custom_op("attention_predictor::sketch_scores", mutates_args=())
def sketch_scores(
    query_BHD: Tensor,
    ranked_BHD: Tensor,
    zero_BGKD: Tensor,
    scale_BGKR: Tensor,
    wide_BGKJC: Tensor | None,
    narrow_BGKJC: Tensor,
    tail_BGTD: Tensor,
    length: int,
    real_BL: Tensor | None,
    block_size: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """What one query makes of every block, by the few-bit keys of a sketch (`KeySketch` has the layout); on a CPU.

    Args:
        query_BHD: fp32, times the scaling.
        ranked_BHD: The same, the channels in the sketch's order.
        zero_BGKD, scale_BGKR: fp16 of each group of tokens, for all channels and for those with codes.
        wide_BGKJC, narrow_BGKJC: uint8 codes of the first channels, where these have more bits, and of the others.
        tail_BGTD: Exact keys of the last, partial group.
        length: Tokens of the sequence.
        real_BL: bool, False at padding, or ``None``.
        softcap: Bound of the logits, 0 for none.

    Returns:
        fp32 peak_BHN and sum_BHN: largest logit and log-sum-exp of each block, ``-inf`` where it is all padding.
    """
    host, (B, G, K, D) = torch.device("cpu"), zero_BGKD.shape
    H, R, group = query_BHD.shape[1], scale_BGKR.shape[3], tail_BGTD.shape[2]
    wide = 0 if wide_BGKJC is None else wide_BGKJC.shape[4]
    check("query_BHD", query_BHD, (B, H, D), torch.float32, host)
    check("ranked_BHD", ranked_BHD, (B, H, D), torch.float32, host)
    check("zero_BGKD", zero_BGKD, (B, G, K, D), torch.float16, host)
    check("scale_BGKR", scale_BGKR, (B, G, K, R), torch.float16, host)
    check("narrow_BGKJC", narrow_BGKJC, (B, G, K, narrow_BGKJC.shape[3], R - wide), torch.uint8, host)
    if wide_BGKJC is not None:
        check("wide_BGKJC", wide_BGKJC, (B, G, K, wide_BGKJC.shape[3], wide), torch.uint8, host)
    check("tail_BGTD", tail_BGTD, (B, G, group, D), tail_BGTD.dtype, host)
    if real_BL is not None:
        check("real_BL", real_BL, (B, length), torch.bool, host)
    if H % G or length // group > K or tail_BGTD.dtype not in ELEMENTS:
        raise ValueError(
            f"expected heads a multiple of {G}, at most {K} groups of {group} tokens and a tail of fp32, fp16 or bf16; "
            f"found {H} heads, {length} tokens, {tail_BGTD.dtype}"
        )
    wide_bits, bits = (0 if codes is None else codes.shape[3] * 8 // group for codes in (wide_BGKJC, narrow_BGKJC))
    peak_BHN = query_BHD.new_empty(B, H, -(-length // block_size))
    sum_BHN = torch.empty_like(peak_BHN)
    arguments = SketchScores(
        *map(address, (query_BHD, ranked_BHD, zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC, tail_BGTD, real_BL)),
        *map(address, (peak_BHN, sum_BHN)),
        *(B, G, H, D, K, group, length, block_size, R, wide, wide_bits, bits, ELEMENTS[tail_BGTD.dtype]),
        *(threads(B * G * length * D), softcap),
    )
    call("sketch_scores", arguments, host)
    return peak_BHN, sum_BHN


@sketch_scores.register_fake
def _(query_BHD, ranked_BHD, zero, scale, wide, narrow, tail, length, real_BL, block_size, softcap):
    peak_BHN = query_BHD.new_empty(*query_BHD.shape[:2], -(-length // block_size))
    return peak_BHN, torch.empty_like(peak_BHN)
