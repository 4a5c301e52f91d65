"""Moves blocks from host memory to the pool, and new tokens to both.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, T tokens of a block, L tokens of the sequence,
D head size; s slabs of a sequence; n: one entry a moved block; 2 is keys then values.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc.binding import address, check, threads
from attention_predictor.csrc.function import Function
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers

THREADS = 128  # of a thread block
GATHER_BLOCKS = 32  # thread blocks on a GPU: enough to saturate the bus, few enough to leave the GPU to the model
LATE_BLOCKS = 128  # thread blocks for late fetches, while the model waits


class Gather(ctypes.Structure):
    """As in gather.h."""

    _fields_ = [
        *pointers("slab row block", "int64_t"),
        *pointers("out", "void"),
        *integers("n slabs slab_blocks block_bytes workers"),
    ]


class Move(ctypes.Structure):
    """As in gather.h."""

    _fields_ = [
        *pointers("slab", "int64_t"),
        *pointers("block slot moves", "int32_t"),
        *pointers("key value", "void"),
        *pointers("stall_ns", "int64_t"),
        *integers("rows slabs slab_blocks slots half_bytes"),
    ]


class Timestamp(ctypes.Structure):
    """As in gather.h."""

    _fields_ = [*pointers("stall_ns", "int64_t"), *integers("sign")]


class Append(ctypes.Structure):
    """As in gather.h."""

    _fields_ = [
        *pointers("new_key new_value key value", "void"),
        *pointers("slab", "int64_t"),
        *pointers("slot", "int32_t"),
        *pointers("length lost", "int64_t"),
        *integers("rows kv_heads slabs slab_blocks slots capacity tokens token_bytes"),
    ]


class Slabs(NamedTuple):
    """Where a store's blocks lie in host memory.

    Attributes:
        address_Rs: int64, where each row's part of each of its sequence's slabs begins, on the device that reads it.
        blocks: Blocks of a slab.
    """

    address_Rs: Tensor
    blocks: int

    def check(self, rows: int, device: torch.device) -> tuple[int, int]:
        """Slabs of a sequence, and blocks of a slab; raises ValueError if the addresses are not of these rows."""
        check("address_Rs", self.address_Rs, (rows, self.address_Rs.shape[-1]), torch.int64, device)
        return self.address_Rs.shape[-1], self.blocks


MOVE = Kernel("gather.cu", "move_blocks", Move, THREADS, constants={"kThreads": THREADS})
APPEND = Kernel("gather.cu", "append_token", Append, threads=64)
NOTE_TIME = Kernel("gather.cu", "note_time", Timestamp, threads=1)
ON_CPU = Function("gather.cpp", "gather_blocks", Gather)


def move_blocks(
    slabs: Slabs,
    block_RS: Tensor,
    slot_RS: Tensor,
    moves_R: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    stall_ns_1: Tensor | None,
) -> None:
    """Copy blocks from pinned slabs into the slots of a pool on a GPU.

    The GPU itself reads host memory, on the current stream. The caller must keep the slabs alive until that is done,
    and ensure that blocks and slots exist.

    Args:
        slabs: Blocks are ``[2, T, D]``; addresses on the pool's device.
        block_RS, slot_RS: int32, the blocks to move and their slots, in the first ``moves_R`` entries of a row.
        moves_R: int32.
        stall_ns_1: int64, incremented by the nanoseconds of calls that moved something, for late fetches; ``None`` for
            fetches ahead.
    """
    arguments = move_arguments(slabs, block_RS, slot_RS, moves_R, key_BGSTD, value_BGSTD, stall_ns_1)
    MOVE.launch(key_BGSTD.device, (GATHER_BLOCKS if stall_ns_1 is None else LATE_BLOCKS, 1, 1), arguments)


def move_arguments(
    slabs: Slabs,
    block_RS: Tensor,
    slot_RS: Tensor,
    moves_R: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    stall_ns_1: Tensor | None,
) -> Move:
    """Arguments of ``move_blocks``, checked."""
    device, (B, G, S, T, D) = key_BGSTD.device, key_BGSTD.shape
    check("value_BGSTD", value_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, device)
    sizes = slabs.check(B * G, device)
    check("block_RS", block_RS, (B * G, S), torch.int32, device)
    check("slot_RS", slot_RS, (B * G, S), torch.int32, device)
    check("moves_R", moves_R, (B * G,), torch.int32, device)
    if stall_ns_1 is not None:
        check("stall_ns_1", stall_ns_1, (1,), torch.int64, device)
    return Move(
        *map(address, (slabs.address_Rs, block_RS, slot_RS, moves_R, key_BGSTD, value_BGSTD, stall_ns_1)),
        *(B * G, *sizes, S, _half_bytes(key_BGSTD)),
    )


def note_time(stall_ns_1: Tensor, sign: int) -> None:
    """Add ``sign`` (1 or -1) times the GPU clock's nanoseconds to ``stall_ns_1`` (int64)."""
    check("stall_ns_1", stall_ns_1, (1,), torch.int64, stall_ns_1.device)
    NOTE_TIME.launch(stall_ns_1.device, (1, 1, 1), Timestamp(stall_ns_1.data_ptr(), sign))


def append_token(
    new_key_BGD: Tensor,
    new_value_BGD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    slabs: Slabs,
    slot_RC: Tensor,
    length_B: Tensor,
    lost_1: Tensor,
) -> None:
    """Write the newest token's key and value to the slot of its block and, from the GPU, to pinned host memory.

    Args:
        slot_RC: int32, the slot of each block, -1 if absent.
        length_B: int64, tokens of each sequence, this one included.
        lost_1: int64, counts tokens whose block had no slot; the caller raises the error.
    """
    into = (key_BGSTD, value_BGSTD, slabs, slot_RC, length_B, lost_1)
    arguments = append_arguments(new_key_BGD, new_value_BGD, *into)
    APPEND.launch(key_BGSTD.device, (arguments.rows, 1, 1), arguments)


def append_arguments(
    new_key_BGD: Tensor,
    new_value_BGD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    slabs: Slabs,
    slot_RC: Tensor,
    length_B: Tensor,
    lost_1: Tensor,
) -> Append:
    """Arguments of ``append_token``, checked."""
    device, (B, G, S, T, D) = key_BGSTD.device, key_BGSTD.shape
    check("new_key_BGD", new_key_BGD, (B, G, D), key_BGSTD.dtype, device)
    check("new_value_BGD", new_value_BGD, (B, G, D), key_BGSTD.dtype, device)
    check("value_BGSTD", value_BGSTD, (B, G, S, T, D), key_BGSTD.dtype, device)
    sizes = slabs.check(B * G, device)
    check("slot_RC", slot_RC, (B * G, slot_RC.shape[1]), torch.int32, device)
    check("length_B", length_B, (B,), torch.int64, device)
    check("lost_1", lost_1, (1,), torch.int64, device)
    _half_bytes(key_BGSTD)
    return Append(
        *map(
            address, (new_key_BGD, new_value_BGD, key_BGSTD, value_BGSTD, slabs.address_Rs, slot_RC, length_B, lost_1)
        ),
        *(B * G, G, *sizes, S, slot_RC.shape[1], T, D * key_BGSTD.element_size()),
    )


def gather_to_host(slabs: Slabs, row_n: Tensor, block_n: Tensor, out_nx: Tensor) -> None:
    """Copy blocks of slabs into a buffer in host memory, on several threads.

    A block has the shape x of the buffer's entries, whatever that is. The caller must ensure that slabs, rows and
    blocks exist.
    """
    host, n = torch.device("cpu"), len(out_nx)
    sizes = slabs.check(len(slabs.address_Rs), host)
    check("out_nx", out_nx, tuple(out_nx.shape), out_nx.dtype, host)
    for name, entry_n in (("row_n", row_n), ("block_n", block_n)):
        check(name, entry_n, (n,), torch.int64, host)
    block_bytes = out_nx.nbytes // max(n, 1)
    lists = map(address, (slabs.address_Rs, row_n, block_n, out_nx))
    arguments = Gather(*lists, n, *sizes, block_bytes, threads(out_nx.numel()))
    ON_CPU.call(arguments)


def _half_bytes(key_BGSTD: Tensor) -> int:
    """Bytes of a block's keys; a token's must be a multiple of 16."""
    T, D = key_BGSTD.shape[3:]
    token_bytes = D * key_BGSTD.element_size()
    if token_bytes % 16:
        raise ValueError(f"the key of a token has {token_bytes} bytes, expected a multiple of 16")
    return T * token_bytes
