"""The kernels as torch operations: arguments checked, shapes known to torch.compile, a reason where there are none.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size; s slabs; n: one entry a moved block; 2 is keys then values.
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
MOST_TOKENS, MOST_HEAD_DIM = 64, 256  # of a block and of a head that the GPU's kernel has room for
WARPS = 4  # of a thread block of sparse_decode: slots taken at once
GATHER_BLOCKS = (
    32  # thread blocks of the GPU's gather: enough to fill the bus, few enough to leave the GPU to the model
)
logger = logging.getLogger(__name__)


class SparseDecode(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "block", "real", "sinks")),
        *((name, ctypes.c_void_p) for name in ("out", "peak", "sum", "lse", "partial")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "heads", "slots", "tokens", "head_dim")),
        *((name, ctypes.c_int64) for name in ("length", "splits", "element")),
        *((name, ctypes.c_double) for name in ("scaling", "softcap")),
    ]


class SketchScores(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "ranked", "zero", "scale", "wide", "narrow", "tail", "real")),
        *((name, ctypes.c_void_p) for name in ("peak", "sum")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "heads", "head_dim", "capacity", "group")),
        *((name, ctypes.c_int64) for name in ("length", "block_size", "coded", "wide_channels", "wide_bits", "bits")),
        *((name, ctypes.c_int64) for name in ("element", "workers")),
        ("softcap", ctypes.c_double),
    ]


class Gather(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slab", "row", "block", "slot", "key", "value")),
        *((name, ctypes.c_int64) for name in ("n", "slab_blocks", "slots", "half_bytes", "workers")),
    ]


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
    _check("query_BHD", query_BHD, (B, H, D), key_BGSTD.dtype, key_BGSTD.device)
    _check("key_BGSTD", key_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, key_BGSTD.device)
    _check("block_BGS", block_BGS, (B, G, S), torch.int64, key_BGSTD.device)
    if value_BGSTD is not None:
        _check("value_BGSTD", value_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, key_BGSTD.device)
    if real_BL is not None:
        _check("real_BL", real_BL, (B, length), torch.bool, key_BGSTD.device)
    if sinks_H is not None:
        _check("sinks_H", sinks_H, (H,), torch.float32, key_BGSTD.device)
    if H % G:
        raise ValueError(f"query_BHD has {H} heads, expected a multiple of the pool's {G} KV heads")
    if not fits(key_BGSTD):
        raise ValueError(
            f"key_BGSTD is {key_BGSTD.dtype} with blocks of {T} tokens and a head size of {D}, expected fp32, fp16 or "
            f"bf16, at most {MOST_TOKENS} tokens, and a multiple of 8 up to {MOST_HEAD_DIM}"
        )
    out_BHD, peak_BHS, sum_BHS, lse_BH = _outputs(query_BHD, key_BGSTD)
    if key_BGSTD.device.type == "cuda":
        # Slots are split until there are two thread blocks for each multiprocessor.
        wanted = 2 * torch.cuda.get_device_properties(key_BGSTD.device).multi_processor_count // max(1, B * G)
        splits = max(1, min(-(-S // WARPS), wanted))
        partial = torch.empty((B, H, splits, D + 2), dtype=torch.float32, device=key_BGSTD.device)
    else:
        splits, partial = _threads(B * G * S * T * D), None
    arguments = SparseDecode(
        *map(_address, (query_BHD, key_BGSTD, value_BGSTD, block_BGS, real_BL, sinks_H)),
        *map(_address, (out_BHD, peak_BHS, sum_BHS, lse_BH, partial)),
        *(B, G, H, S, T, D, length, splits, ELEMENTS[key_BGSTD.dtype], scaling, softcap),
    )
    _call("sparse_decode", arguments, key_BGSTD.device)
    return out_BHD, peak_BHS, sum_BHS, lse_BH


@sparse_decode.register_fake
def _(query_BHD, key_BGSTD, value_BGSTD, block_BGS, length, real_BL, sinks_H, scaling, softcap):
    return _outputs(query_BHD, key_BGSTD)


def _outputs(query_BHD: Tensor, key_BGSTD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, _), S = query_BHD.shape, key_BGSTD.shape[2]
    score_BHS = query_BHD.new_empty((B, H, S), dtype=torch.float32)
    return torch.empty_like(query_BHD), score_BHS, torch.empty_like(score_BHS), score_BHS.new_empty((B, H))


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
    _check("query_BHD", query_BHD, (B, H, D), torch.float32, host)
    _check("ranked_BHD", ranked_BHD, (B, H, D), torch.float32, host)
    _check("zero_BGKD", zero_BGKD, (B, G, K, D), torch.float16, host)
    _check("scale_BGKR", scale_BGKR, (B, G, K, R), torch.float16, host)
    _check("narrow_BGKJC", narrow_BGKJC, (B, G, K, narrow_BGKJC.shape[3], R - wide), torch.uint8, host)
    if wide_BGKJC is not None:
        _check("wide_BGKJC", wide_BGKJC, (B, G, K, wide_BGKJC.shape[3], wide), torch.uint8, host)
    _check("tail_BGTD", tail_BGTD, (B, G, group, D), tail_BGTD.dtype, host)
    if real_BL is not None:
        _check("real_BL", real_BL, (B, length), torch.bool, host)
    if H % G or length // group > K or tail_BGTD.dtype not in ELEMENTS:
        raise ValueError(
            f"expected heads a multiple of {G}, at most {K} groups of {group} tokens and a tail of fp32, fp16 or bf16; "
            f"found {H} heads, {length} tokens, {tail_BGTD.dtype}"
        )
    wide_bits, bits = (0 if codes is None else codes.shape[3] * 8 // group for codes in (wide_BGKJC, narrow_BGKJC))
    peak_BHN = query_BHD.new_empty(B, H, -(-length // block_size))
    sum_BHN = torch.empty_like(peak_BHN)
    arguments = SketchScores(
        *map(_address, (query_BHD, ranked_BHD, zero_BGKD, scale_BGKR, wide_BGKJC, narrow_BGKJC, tail_BGTD, real_BL)),
        *map(_address, (peak_BHN, sum_BHN)),
        *(B, G, H, D, K, group, length, block_size, R, wide, wide_bits, bits, ELEMENTS[tail_BGTD.dtype]),
        *(_threads(B * G * length * D), softcap),
    )
    _call("sketch_scores", arguments, host)
    return peak_BHN, sum_BHN


@sketch_scores.register_fake
def _(query_BHD, ranked_BHD, zero, scale, wide, narrow, tail, length, real_BL, block_size, softcap):
    peak_BHN = query_BHD.new_empty(*query_BHD.shape[:2], -(-length // block_size))
    return peak_BHN, torch.empty_like(peak_BHN)


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
    _check("key_BGSTD", key_BGSTD, shape, key_BGSTD.dtype, device)
    _check("value_BGSTD", value_BGSTD, shape, key_BGSTD.dtype, device)
    _check("slab_s", slab_s, (len(slab_s),), torch.int64, device)
    for name, entry_n in (("row_n", row_n), ("block_n", block_n), ("slot_n", slot_n)):
        _check(name, entry_n, (len(row_n),), torch.int64, device)
    half_bytes = T * D * key_BGSTD.element_size()
    if half_bytes % 16:
        raise ValueError(f"the keys of a block have {half_bytes} bytes, expected a multiple of 16")
    arguments = Gather(
        *map(_address, (slab_s, row_n, block_n, slot_n, key_BGSTD, value_BGSTD)),
        *(len(row_n), slab_blocks, S, half_bytes, GATHER_BLOCKS),
    )
    _call("gather_blocks", arguments, device)


@gather_to_pool.register_fake
def _(slab_s, slab_blocks, row_n, block_n, slot_n, key_BGSTD, value_BGSTD):
    return None


@torch.library.custom_op("attention_predictor::gather_to_host", mutates_args=("out_n2TD",))
def gather_to_host(slab_s: Tensor, slab_blocks: int, row_n: Tensor, block_n: Tensor, out_n2TD: Tensor) -> None:
    """Copy blocks of slabs ``[B, G, slab_blocks, 2, T, D]`` into a buffer in host memory, on several threads.

    ``slab_s`` are the slabs' int64 addresses. The caller vouches for them, and that rows and blocks exist.
    """
    host, (n, _, T, D) = torch.device("cpu"), out_n2TD.shape
    _check("slab_s", slab_s, (len(slab_s),), torch.int64, host)
    _check("out_n2TD", out_n2TD, (n, 2, T, D), out_n2TD.dtype, host)
    for name, entry_n in (("row_n", row_n), ("block_n", block_n)):
        _check(name, entry_n, (n,), torch.int64, host)
    half_bytes = T * D * out_n2TD.element_size()
    arguments = Gather(
        *map(_address, (slab_s, row_n, block_n, None, out_n2TD, None)),
        *(n, slab_blocks, 0, half_bytes, _threads(out_n2TD.numel())),
    )
    _call("gather_blocks", arguments, host)


@gather_to_host.register_fake
def _(slab_s, slab_blocks, row_n, block_n, out_n2TD):
    return None


def _library(device: torch.device) -> ctypes.CDLL:
    return library(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def _call(name: str, arguments: ctypes.Structure, device: torch.device) -> None:
    kernels = _library(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
            code = getattr(kernels, name)(ctypes.byref(arguments), stream)
    else:
        code = getattr(kernels, name)(ctypes.byref(arguments), None)
    if code:
        raise RuntimeError(f"{name} on {device}: {kernels.error_text(code).decode()}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(elements: int) -> int:
    """As many as torch uses, where the work is worth starting them."""
    return max(1, min(torch.get_num_threads(), elements >> 18))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    found = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if found != (shape, dtype, device) or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, contiguous; "
            f"found {tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"
        )
