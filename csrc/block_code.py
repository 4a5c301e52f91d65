"""Blocks of keys and values as codes of 8 or 4 bits: the layout of a block's bytes, and the operations on it.

Keys are coded per channel of a block, values per token: a *group* is the numbers that share a scale and an offset. A
group's number is ``scale · (code + unit · offset)`` with a bf16 scale, an int8 offset, codes of 0 to 2^bits − 1, and
``unit`` = 2^bits / 16. The second factor is a whole number of at most 12 bits, so the product is exact in fp32, and
decoding rounds once, to the keys' type, whose largest finite number is the largest that decoding gives. A group with a
number that isn't finite, or a range beyond fp32's, decodes as NaN.

A block's bytes, in this order (T tokens, D head size):

    key scales [D], value scales [T]    bf16
    key offsets [D], value offsets [T]  int8
    zeros up to a multiple of 16 bytes
    key codes [T · D], zeros up to a multiple of 16 bytes
    value codes [T · D], zeros up to a multiple of 16 bytes

Codes lie in the order of the pool's numbers; two of 4 bits share a byte, the first in the lower half. So consecutive
threads load consecutive 16 bytes of codes, and each stores its 16 or 32 decoded numbers as whole 16-byte words. Scales
and offsets cross the bus once a block, and are read from shared memory.

Suffixes: B sequences, G KV heads, R rows = B·G, N blocks, S slots, T tokens of a block, L tokens, D head size, C block
capacity; b bytes of a block; s slabs; ``x`` any dimensions before; 2 is keys then values.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc.binding import ELEMENTS, IN_CPP, address, check, check_on_gpu
from attention_predictor.csrc.gather import (
    LATE_BLOCKS,
    THREADS,
    Append,
    Move,
    Slabs,
    append_arguments,
    move_arguments,
)
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers

BITS = (4, 8)
OFFSET_LIMIT = 127  # largest offset, either sign
VECTOR_BYTES = 16  # one load of a thread
NAN_WORD = 0x7FC00000  # the one NaN that kernels and torch operations write
# Thread blocks that decode blocks fetched ahead, by bits of a code: more where each has fewer bytes in flight.
MOVE_BLOCKS = {8: 64, 4: 128}


class Encode(ctypes.Structure):
    """As in block_code.h."""

    _fields_ = [
        *pointers("key value", "void"),
        *pointers("code", "uint8_t"),
        *integers("kv_heads blocks tokens head_dim key_sequence key_head key_token"),
        *integers("value_sequence value_head value_token"),
    ]


class MoveCoded(ctypes.Structure):
    """As in block_code.h."""

    _fields_ = [
        ("move", Move),
        *pointers("open", "void"),
        *pointers("length", "int64_t"),
        *integers("kv_heads tokens head_dim"),
    ]


class AppendCoded(ctypes.Structure):
    """As in block_code.h."""

    _fields_ = [("append", Append), *pointers("open", "void"), *integers("head_dim")]


CONSTANTS = {"kThreads": THREADS, "kOffsetLimit": OFFSET_LIMIT}


@functools.cache
def encode_kernel(dtype: torch.dtype, bits: int) -> Kernel:
    """For keys of a type of ``ELEMENTS``."""
    return Kernel("block_code.cu", f"encode_blocks<{IN_CPP[dtype]}, {bits}>", Encode, THREADS, constants=CONSTANTS)


@functools.cache
def move_kernel(dtype: torch.dtype, bits: int) -> Kernel:
    """For a pool of a type of ``ELEMENTS``."""
    return Kernel(
        "block_code.cu", f"move_coded_blocks<{IN_CPP[dtype]}, {bits}>", MoveCoded, THREADS, constants=CONSTANTS
    )


@functools.cache
def append_kernel(dtype: torch.dtype, bits: int) -> Kernel:
    """For a pool of a type of ``ELEMENTS``."""
    return Kernel(
        "block_code.cu", f"append_coded_token<{IN_CPP[dtype]}, {bits}>", AppendCoded, THREADS, constants=CONSTANTS
    )


def kernels(dtype: torch.dtype, bits: int) -> list[Kernel]:
    """All that a cache of coded blocks needs, for one dtype of ``ELEMENTS``."""
    return [move_kernel(dtype, bits), append_kernel(dtype, bits), encode_kernel(dtype, bits)]


def head_bytes(tokens: int, head_dim: int) -> int:
    """Bytes of a block's scales and offsets, before its codes."""
    return _aligned(3 * (tokens + head_dim))


def side_bytes(tokens: int, head_dim: int, bits: int) -> int:
    """Bytes of the codes of a block's keys, or of its values."""
    return _aligned(ceil_div(tokens * head_dim * bits, 8))


def block_bytes(tokens: int, head_dim: int, bits: int) -> int:
    """Bytes of a block, a multiple of 16."""
    return head_bytes(tokens, head_dim) + 2 * side_bytes(tokens, head_dim, bits)


def encode_blocks(key_BGLD: Tensor, value_BGLD: Tensor, tokens: int, bits: int) -> Tensor:
    """Whole blocks of keys and values as uint8 code_BGNb, on a GPU; ``encode_reference`` is the reference.

    Args:
        key_BGLD, value_BGLD: fp32, fp16 or bf16, L a multiple of ``tokens``.
        tokens: In a block.

    Raises:
        ValueError: Arguments that don't go together, or a device without kernels.
    """
    device, dtype, (B, G, L, D) = key_BGLD.device, key_BGLD.dtype, key_BGLD.shape
    check_on_gpu("key_BGLD", device)
    if dtype not in ELEMENTS:
        raise ValueError(f"key_BGLD is {dtype}, expected one of {', '.join(map(str, ELEMENTS))}")
    if L % tokens:
        raise ValueError(f"key_BGLD has {L} tokens, expected a multiple of {tokens}")
    key_BGLD, value_BGLD = (kv if kv.stride(-1) == 1 else kv.contiguous() for kv in (key_BGLD, value_BGLD))
    if value_BGLD.shape != key_BGLD.shape or value_BGLD.dtype != dtype or value_BGLD.device != device:
        raise ValueError(
            f"value_BGLD: expected {dtype} {[B, G, L, D]} on {device}; found {value_BGLD.dtype} "
            f"{list(value_BGLD.shape)} on {value_BGLD.device}"
        )
    blocks = L // tokens
    code_BGNb = torch.empty((B, G, blocks, block_bytes(tokens, D, bits)), dtype=torch.uint8, device=device)
    strides = (*key_BGLD.stride()[:3], *value_BGLD.stride()[:3])
    arguments = Encode(*map(address, (key_BGLD, value_BGLD, code_BGNb)), G, blocks, tokens, D, *strides)
    shared = head_bytes(tokens, D)
    encode_kernel(dtype, bits).launch(device, (blocks, B * G, 1), arguments, shared_bytes=shared)
    return code_BGNb


def move_coded_blocks(
    slabs: Slabs,
    block_RS: Tensor,
    slot_RS: Tensor,
    moves_R: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    stall_ns_1: Tensor | None,
    *,
    open_R2TD: Tensor,
    length_B: Tensor,
    bits: int,
) -> None:
    """Decode blocks from pinned slabs into the slots of a pool on a GPU.

    Arguments are as of ``gather.move_blocks``, and:

    Args:
        open_R2TD: In pinned memory, the block of each row that isn't complete, as it is.
        length_B: int64, tokens of each sequence; decides which block that is.
    """
    arguments = move_arguments(slabs, block_RS, slot_RS, moves_R, key_BGSTD, value_BGSTD, stall_ns_1)
    device, (B, G, _, T, D) = key_BGSTD.device, key_BGSTD.shape
    check("length_B", length_B, (B,), torch.int64, device)
    check("open_R2TD", open_R2TD, (B * G, 2, T, D), key_BGSTD.dtype, open_R2TD.device)
    coded = MoveCoded(arguments, *map(address, (open_R2TD, length_B)), G, T, D)
    grid = (MOVE_BLOCKS[bits] if stall_ns_1 is None else LATE_BLOCKS, 1, 1)
    move_kernel(key_BGSTD.dtype, bits).launch(device, grid, coded, shared_bytes=head_bytes(T, D))


def append_coded_token(
    new_key_BGD: Tensor,
    new_value_BGD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    slabs: Slabs,
    slot_RC: Tensor,
    length_B: Tensor,
    lost_1: Tensor,
    *,
    open_R2TD: Tensor,
    bits: int,
) -> None:
    """Write the newest token's key and value to its block in the pool and in ``open_R2TD``, in pinned memory.

    A token that completes its block codes it to the slab, and the pool's copy is replaced by what the codes decode to.
    Arguments are as of ``gather.append_token``.
    """
    into = (key_BGSTD, value_BGSTD, slabs, slot_RC, length_B, lost_1)
    arguments = append_arguments(new_key_BGD, new_value_BGD, *into)
    (B, G, _, T, D), dtype = key_BGSTD.shape, key_BGSTD.dtype
    check("open_R2TD", open_R2TD, (B * G, 2, T, D), dtype, open_R2TD.device)
    coded = AppendCoded(arguments, open_R2TD.data_ptr(), D)
    shared = head_bytes(T, D)
    append_kernel(dtype, bits).launch(key_BGSTD.device, (B * G, 1, 1), coded, shared_bytes=shared)


def encode_reference(key_xTD: Tensor, value_xTD: Tensor, bits: int) -> Tensor:
    """Blocks of keys and values as uint8 code_xb, by torch operations; the same bits on every device."""
    (*outer, T, D) = key_xTD.shape
    size = side_bytes(T, D, bits)
    key_code, key_scale, key_offset = _encode_groups(key_xTD, -2, bits)
    value_code, value_scale, value_offset = _encode_groups(value_xTD, -1, bits)
    head = [part.contiguous().view(torch.uint8) for part in (key_scale, value_scale, key_offset, value_offset)]
    parts = [*head, key_xTD.new_zeros((*outer, head_bytes(T, D) - 3 * (T + D)), dtype=torch.uint8)]
    for code_xTD in (key_code, value_code):
        code_xn = code_xTD.flatten(-2)
        if bits == 4:
            code_xn = torch.nn.functional.pad(code_xn, (0, code_xn.shape[-1] % 2))
            code_xn = code_xn[..., ::2] | code_xn[..., 1::2] << 4
        parts.append(torch.nn.functional.pad(code_xn, (0, size - code_xn.shape[-1])))
    return torch.cat(parts, -1)


def decode_reference(code_xb: Tensor, tokens: int, head_dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Keys and values kv_x2TD of coded blocks, by torch operations."""
    T, D = tokens, head_dim
    head_xn, key_xn, value_xn = code_xb.split(
        (head_bytes(T, D), side_bytes(T, D, bits), side_bytes(T, D, bits)), dim=-1
    )
    scales, offsets = head_xn[..., : 2 * (T + D)], head_xn[..., 2 * (T + D) : 3 * (T + D)]
    scale_xn = _as(scales, torch.bfloat16).float()
    base_xn = _as(offsets, torch.int8).float() * _unit(bits)
    sides = []
    for code_xn, begin, end, group in ((key_xn, 0, D, -2), (value_xn, D, D + T, -1)):
        if bits == 4:
            code_xn = torch.stack([code_xn & 15, code_xn >> 4], -1).flatten(-2)
        number_xTD = code_xn[..., : T * D].unflatten(-1, (T, D)).float()
        number_xTD += base_xn[..., begin:end].unsqueeze(group)
        number_xTD *= scale_xn[..., begin:end].unsqueeze(group)
        largest = torch.finfo(dtype).max
        sides.append(number_xTD.clamp(-largest, largest).to(dtype))  # NaN stays
    return torch.stack(sides, -3)


def _encode_groups(kv_xTD: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes_xTD; scales (bf16 as int16) and int8 offsets of the groups along dimension ``group``."""
    number_xTD, unit, top = kv_xTD.float(), _unit(bits), 2**bits - 1
    low_xn, high_xn = number_xTD.aminmax(dim=group)
    # A low end is rounded to a multiple of `unit` steps, at most half a step above it. So a range of 2^bits − unit
    # steps fits, and the offset may not be larger than int8.
    step_xn = _divided(high_xn - low_xn, 2**bits - unit)
    step_xn = torch.maximum(step_xn, _divided(low_xn.abs(), OFFSET_LIMIT * unit))
    # Rounded up to bf16: rounding to nearest might leave the range too short.
    word_xn = (step_xn.view(torch.int32) + 0xFFFF) & ~0xFFFF
    word_xn = torch.where(step_xn.isfinite(), word_xn, NAN_WORD)
    step_xn = word_xn.view(torch.float32)
    divisor_xn = torch.where(step_xn > 0, step_xn, 1.0)
    offset_xn = (low_xn / divisor_xn / unit + 0.5 / unit).floor().clamp(-OFFSET_LIMIT - 1, OFFSET_LIMIT)
    offset_xn = torch.where(step_xn > 0, offset_xn, 0.0)
    code_xTD = number_xTD / divisor_xn.unsqueeze(group) - (offset_xn * unit).unsqueeze(group)
    code_xTD = torch.where(step_xn.unsqueeze(group) > 0, code_xTD, 0.0).round().clamp(0, top)
    return code_xTD.to(torch.uint8), (word_xn >> 16).to(torch.int16), offset_xn.to(torch.int8)


def _divided(x_xn: Tensor, number: int) -> Tensor:
    """A quotient rounded as by IEEE 754. On a GPU torch multiplies by the reciprocal of a Python number."""
    return x_xn / torch.full((), number, dtype=x_xn.dtype, device=x_xn.device)


def _unit(bits: int) -> int:
    """Steps by which an offset counts."""
    return 2**bits // 16


def _as(bytes_xn: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_xn.contiguous().view(dtype)


def _aligned(nbytes: int) -> int:
    return ceil_div(nbytes, VECTOR_BYTES) * VECTOR_BYTES
