"""Key sketch kernels as torch operations: score all blocks, and quantise new keys.

Suffixes: B sequences, G KV heads, H query heads, T tokens, L tokens of the sequence (or room for them), D head size,
N blocks, K groups of tokens, J bytes of a group, R channels with codes, C those of one width. ``KeySketch`` says what
the tensors of a sketch hold.
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

MAX_BLOCKS = 2**31 - 1  # of a grid
GROUP = 64  # tokens of a group that the GPU kernels support
BLOCK_SIZES = (8, 16, 32, 64)  # block sizes that they support
MAX_HEAD_DIM = 256
WIDE_BITS = {1: 2, 2: 4, 4: 8, 8: 0}  # of the channels that weigh most, by those of the others; 0: there are none
WARPS, HEADS = 4, 8  # of a thread block: warps, and query heads of a KV head
PREPARATION = 4  # what a thread block does before its groups takes as long as so many groups
ROUNDS = 8  # of thread blocks on the GPU; with more, preparing would take a large part of the time


class Sketch(ctypes.Structure):
    """As in sketch.h."""

    _fields_ = [
        *pointers("zero scale", "uint16_t"),
        *pointers("wide narrow", "uint8_t"),
        *pointers("tail", "void"),
        *pointers("order", "int64_t"),
        *integers("batch kv_heads head_dim capacity group coded wide_channels wide_bits bits element"),
    ]


class SketchScores(ctypes.Structure):
    """As in sketch.h."""

    _fields_ = [
        ("sketch", Sketch),
        *pointers("query", "void"),
        *pointers("real", "uint8_t"),
        *pointers("length_B", "int64_t"),
        *pointers("peak sum", "float"),
        *integers("heads length block_size workers"),
        *doubles("scaling softcap"),
    ]


class SketchStore(ctypes.Structure):
    """As in sketch.h."""

    _fields_ = [
        ("sketch", Sketch),
        *pointers("key", "void"),
        *pointers("length_B", "int64_t"),
        *integers("of_batch of_head of_token first groups append length"),
    ]


ON_CPU = Function("sketch.cpp", "sketch_scores", SketchScores, ELEMENT_TYPES)


@functools.cache
def score_kernel(bits: int, head_dim: int) -> tuple[Kernel, int]:
    """The GPU kernel that scores blocks by codes of ``bits``, and its thread blocks per multiprocessor."""
    wide_bits = WIDE_BITS[bits]
    size = next(i for i in (1, 2, 4) if head_dim <= 64 * i)
    words = size * (2 if wide_bits else 4)  # of a lane
    wide_words = words // 2 if wide_bits else 0
    # Registers must suffice for a lane's part of a group.
    registers = (bits + 2) * words + (wide_bits + 2) * wide_words + 4 * size
    at_once = 5 if registers <= 40 else 3 if registers <= 80 else 2
    function = f"score_groups<{wide_bits}, {bits}, {words}>"
    constants = {"kGroup": GROUP, "kWarps": WARPS, "kMaxHeads": HEADS}
    return Kernel("sketch.cu", function, SketchScores, 32 * WARPS, at_once, constants), at_once


@functools.cache
def row_splits(rows: int, groups: int, at_once: int) -> int:
    """Thread blocks that share a row's groups, given how many of all run at once; one more takes its tail.

    Thread blocks run in rounds, and a round that is not full takes as long as a full one. Where one thread block for
    each of many rows would leave part of the GPU idle, more of them with fewer groups each take less time.
    """

    def duration(splits: int) -> int:
        return ceil_div(rows * (splits + 1), at_once) * (PREPARATION + ceil_div(groups, WARPS * splits))

    most = max(min(ceil_div(groups, WARPS), ROUNDS * at_once // rows), 1)
    return min(range(most, 0, -1), key=duration)


@functools.cache
def store_kernel(dtype: torch.dtype) -> Kernel:
    """The GPU kernel that quantises keys of this dtype."""
    function, constants = f"store_groups<{IN_CPP[dtype]}>", {"kGroup": GROUP, "kWarps": 8}
    return Kernel("sketch_store.cu", function, SketchStore, threads=256, at_once=3, constants=constants)


def why_unsupported(
    device: torch.device, dtype: torch.dtype, head_dim: int, group: int, block_size: int | None = None
) -> str | None:
    """Why no kernel for this kind of device scores blocks of `block_size` tokens by such a sketch, on one line.

    ``None`` if one does. Without `block_size`: why no kernel quantises its keys.
    """
    if dtype not in ELEMENTS:
        return f"no kernel for a sketch of {dtype} keys"
    if not binding.on_gpu(device):
        return "no CPU kernel quantises a sketch's keys" if block_size is None else None
    if group != GROUP:
        return f"no kernel for a sketch in groups of {group} tokens, only of {GROUP}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"no kernel for a sketch with a head size of {head_dim}, only for multiples of 8 up to {MAX_HEAD_DIM}"
    if block_size is not None and block_size not in BLOCK_SIZES:
        return f"no kernel for a sketch with blocks of {block_size} tokens, only of {', '.join(map(str, BLOCK_SIZES))}"
    return None


@torch.library.custom_op("attention_predictor::sketch_scores", mutates_args=())
def sketch_scores(
    query_BHD: Tensor,
    order_BGD: Tensor,
    tail_BGTD: Tensor,
    zero_BGKD: Tensor,
    scale_BGKR: Tensor,
    wide_BGKJC: Tensor | None,
    narrow_BGKJC: Tensor,
    length: int,
    length_B: Tensor | None,
    real_BL: Tensor | None,
    block_size: int,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Scores of every block for one query, by the few-bit keys of a sketch.

    Args:
        query_BHD: In the dtype of the keys, channels in the model's order; query heads of one KV head are adjacent.
        length: Tokens of the sequence; with `length_B`, the capacity.
        length_B: int64 on the device, tokens of each sequence; results of blocks beyond it are undefined.
        real_BL: bool, False at padding, or ``None``.
        scaling, softcap: Logits are softcap·tanh(scaling·q·k / softcap), or scaling·q·k for a softcap of 0.

    Returns:
        fp32 peak_BHN and sum_BHN: largest logit and log-sum-exp of each block, ``-inf`` where it is all padding.
    """
    device, (B, G, D), H = order_BGD.device, order_BGD.shape, query_BHD.shape[1]
    sketch = _sketch(order_BGD, tail_BGTD, zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC)
    check("query_BHD", query_BHD, (B, H, D), tail_BGTD.dtype, device)
    _check_length(length, length_B, B, zero_BGKD.shape[2], tail_BGTD.shape[2], device)
    if real_BL is not None:
        check("real_BL", real_BL, (B, length), torch.bool, device)
    if H % G:
        raise ValueError(f"query_BHD has {H} heads, expected a multiple of the sketch's {G} KV heads")
    _check_served(tail_BGTD, block_size)
    peak_BHN, sum_BHN = _scores(query_BHD, length, block_size)
    workers = threads(B * G * length * D)
    arguments = SketchScores(
        sketch,
        *map(address, (query_BHD, real_BL, length_B, peak_BHN, sum_BHN)),
        *(H, length, block_size, workers, scaling, softcap),
    )
    if not binding.on_gpu(device):
        ON_CPU.call(arguments)
        return peak_BHN, sum_BHN
    kernel, at_once = score_kernel(sketch.bits, D)
    pieces = ceil_div(H, G * HEADS)
    splits = row_splits(B * G * pieces, length // GROUP, at_once * binding.multiprocessors(device))
    kernel.launch(device, (1 + splits, G * pieces, B), arguments)
    return peak_BHN, sum_BHN


@sketch_scores.register_fake
def _(query_BHD, order, tail, zero, scale, wide, narrow, length, length_B, real, block_size, scaling, softcap):
    return _scores(query_BHD, length, block_size)


def _scores(query_BHD: Tensor, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    peak_BHN = query_BHD.new_empty((*query_BHD.shape[:2], ceil_div(length, block_size)), dtype=torch.float32)
    return peak_BHN, torch.empty_like(peak_BHN)


@torch.library.custom_op(
    "attention_predictor::sketch_append",
    mutates_args=("tail_BGTD", "zero_BGKD", "scale_BGKR", "wide_BGKJC", "narrow_BGKJC"),
)
def sketch_append(
    key_BGD: Tensor,
    order_BGD: Tensor,
    tail_BGTD: Tensor,
    zero_BGKD: Tensor,
    scale_BGKR: Tensor,
    wide_BGKJC: Tensor | None,
    narrow_BGKJC: Tensor,
    length: int,
    length_B: Tensor | None,
) -> None:
    """Add the newest token's key to the tail, and quantise the group that it completes. On a GPU.

    The order of the channels must be known: the caller leaves a sequence's first group to ``KeySketch.extend``.

    Args:
        length: Tokens of the sequence, this one included; with `length_B`, the capacity.
        length_B: int64 on the device, tokens of each sequence, this one included.
    """
    device, (B, G, D) = order_BGD.device, order_BGD.shape
    sketch = _sketch(order_BGD, tail_BGTD, zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC)
    check("key_BGD", key_BGD, (B, G, D), tail_BGTD.dtype, device)
    _check_length(length, length_B, B, zero_BGKD.shape[2], tail_BGTD.shape[2], device)
    if length < 1:
        raise ValueError(f"length is {length}, expected at least 1, the new token")
    _check_served(tail_BGTD, None)
    arguments = SketchStore(sketch, *map(address, (key_BGD, length_B)), G * D, D, 0, 0, 1, 1, length)
    store_kernel(key_BGD.dtype).launch(device, (B * G, 1, 1), arguments)


@torch.library.custom_op(
    "attention_predictor::sketch_store", mutates_args=("zero_BGKD", "scale_BGKR", "wide_BGKJC", "narrow_BGKJC")
)
def sketch_store(
    key_BGTD: Tensor,
    order_BGD: Tensor,
    tail_BGTD: Tensor,
    zero_BGKD: Tensor,
    scale_BGKR: Tensor,
    wide_BGKJC: Tensor | None,
    narrow_BGKJC: Tensor,
    first: int,
) -> None:
    """Quantise whole groups of keys, as ``quantise`` does, to groups from `first` on. On a GPU.

    Args:
        key_BGTD: In the dtype of the tail; its channels must be contiguous, tokens and heads may have any stride.
    """
    device, (B, G, D), T = order_BGD.device, order_BGD.shape, key_BGTD.shape[2]
    sketch = _sketch(order_BGD, tail_BGTD, zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC)
    group, K = tail_BGTD.shape[2], zero_BGKD.shape[2]
    found = (tuple(key_BGTD.shape), key_BGTD.dtype, key_BGTD.device, key_BGTD.stride(3))
    if found != ((B, G, T, D), tail_BGTD.dtype, device, 1) or T % group:
        raise ValueError(
            f"key_BGTD: expected {tail_BGTD.dtype} {[B, G, -1, D]} on {device} (-1: a multiple of {group}), a token's "
            f"channels side by side; found {key_BGTD.dtype} {list(key_BGTD.shape)} on {key_BGTD.device}, strides "
            f"{key_BGTD.stride()}"
        )
    if first < 0 or first + T // group > K:
        raise ValueError(f"groups {first} to {first + T // group} are to be stored, there is room for {K}")
    _check_served(tail_BGTD, None)
    arguments = SketchStore(sketch, address(key_BGTD), None, *key_BGTD.stride()[:3], first, T // group, 0, 0)
    store_kernel(key_BGTD.dtype).launch(device, (min(B * G * (T // group), MAX_BLOCKS), 1, 1), arguments)


def _sketch(
    order_BGD: Tensor,
    tail_BGTD: Tensor,
    zero_BGKD: Tensor,
    scale_BGKR: Tensor,
    wide_BGKJC: Tensor | None,
    narrow_BGKJC: Tensor,
) -> Sketch:
    """The tensors of a sketch, checked against each other."""
    device, (B, G, K, D) = zero_BGKD.device, zero_BGKD.shape
    group, R = tail_BGTD.shape[2], scale_BGKR.shape[3]
    wide = 0 if wide_BGKJC is None else wide_BGKJC.shape[4]
    check("order_BGD", order_BGD, (B, G, D), torch.int64, device)
    check("tail_BGTD", tail_BGTD, (B, G, group, D), tail_BGTD.dtype, device)
    check("zero_BGKD", zero_BGKD, (B, G, K, D), torch.float16, device)
    check("scale_BGKR", scale_BGKR, (B, G, K, R), torch.float16, device)
    check("narrow_BGKJC", narrow_BGKJC, (B, G, K, narrow_BGKJC.shape[3], R - wide), torch.uint8, device)
    if wide_BGKJC is not None:
        check("wide_BGKJC", wide_BGKJC, (B, G, K, wide_BGKJC.shape[3], wide), torch.uint8, device)
    wide_bits, bits = (0 if codes is None else codes.shape[3] * 8 // group for codes in (wide_BGKJC, narrow_BGKJC))
    tensors = (zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC, tail_BGTD, order_BGD)
    return Sketch(
        *map(address, tensors), B, G, D, K, group, R, wide, wide_bits, bits, ELEMENTS.get(tail_BGTD.dtype, -1)
    )


def _check_length(length: int, length_B: Tensor | None, B: int, room: int, group: int, device: torch.device) -> None:
    if length // group > room:
        raise ValueError(f"length is {length} tokens, expected at most {room} whole groups of {group}")
    if length_B is not None:
        check("length_B", length_B, (B,), torch.int64, device)


def _check_served(tail_BGTD: Tensor, block_size: int | None) -> None:
    _, _, group, D = tail_BGTD.shape
    if (reason := why_unsupported(tail_BGTD.device, tail_BGTD.dtype, D, group, block_size)) is not None:
        raise ValueError(reason)
