"""Selection and residency on the GPU: chooses blocks, gives them slots, lists the moves.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, N blocks, C capacity in blocks.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import address, check
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers

STATIC_BYTES = 5 << 10  # most static shared memory of the kernel
SLOT_BYTES, LIST_BYTES = 60, 8 << 10  # dynamic shared memory per slot, and for keys to compare


class Table(ctypes.Structure):
    """As in select.h."""

    _fields_ = [*pointers("block active use slot move_block move_slot moves"), *integers("slots capacity")]


class Bounds(ctypes.Structure):
    """As in select.h."""

    _fields_ = [*pointers("length padding deficit"), *integers("kv_heads block_size limit sink_blocks recent")]


class Select(ctypes.Structure):
    """As in select.h."""

    _fields_ = [
        ("table", Table),
        ("bounds", Bounds),
        *pointers("score peak sum slot_peak slot_sum rest count key"),
        *integers("heads late ahead chooses"),
    ]


# By scores: half a multiprocessor's registers, as it runs beside the model. By estimates: all, to hold the estimates.
# If there are more rows than multiprocessors, two run at once where shared memory suffices. Half of the registers
# hold the estimates of 2,048 blocks, all of them those of 8,192.
BY_SCORES = Kernel("select.cu", "select_blocks<true, 0>", Select, threads=512, at_once=2)
BY_ESTIMATES = Kernel("select.cu", "select_blocks<false, 4>", Select, threads=512, at_once=1)
BY_ESTIMATES_OF_MANY = Kernel("select.cu", "select_blocks<false, 1>", Select, threads=512, at_once=2)
KERNELS = [BY_ESTIMATES, BY_SCORES, BY_ESTIMATES_OF_MANY]


class SlotTensors(NamedTuple):
    """Which block is in which slot, and the blocks to move.

    Attributes:
        block_RS, active_RS, use_RS: int64, for each slot: its block, -1 for none; its block if chosen, else -1; the
            step that last chose it.
        slot_RC: int32, the slot of each block, -1 if absent.
        move_block_RS, move_slot_RS, moves_R: int32, output: blocks to fetch, their slots, and their number.
    """

    block_RS: Tensor
    active_RS: Tensor
    use_RS: Tensor
    slot_RC: Tensor
    move_block_RS: Tensor
    move_slot_RS: Tensor
    moves_R: Tensor

    @property
    def moves(self) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks to fetch, their slots, and their number."""
        return self.move_block_RS, self.move_slot_RS, self.moves_R

    def checked(self) -> Table:
        """The kernel's struct; ValueError if the tensors don't fit each other."""
        device, (R, S), C = self.block_RS.device, self.block_RS.shape, self.slot_RC.shape[1]
        for name, tensor in self._asdict().items():
            shape = {"RS": (R, S), "RC": (R, C), "R": (R,)}[name.rpartition("_")[2]]
            wide = name in ("block_RS", "active_RS", "use_RS")
            check(name, tensor, shape, torch.int64 if wide else torch.int32, device)
        return Table(*map(address, self), S, C)


class ChoiceBounds(NamedTuple):
    """Bounds of a choice of blocks.

    Attributes:
        length_B: int64, tokens of each sequence, the newest included.
        padding_B: int64, left padding of each sequence in tokens; ``None``: no padding.
        deficit_BG: int64, tokens by which a row's limit is lower; ``None``: same limit for all.
        block_size: Tokens of a block, a power of two.
        limit: Most tokens to choose.
        sink_blocks, recent: Always chosen, in blocks and tokens.
    """

    length_B: Tensor
    padding_B: Tensor | None
    deficit_BG: Tensor | None
    block_size: int
    limit: int
    sink_blocks: int
    recent: int

    def checked(self, kv_heads: int, device: torch.device) -> Bounds:
        """The kernel's struct; ValueError for invalid bounds."""
        B = len(self.length_B)
        check("length_B", self.length_B, (B,), torch.int64, device)
        if self.padding_B is not None:
            check("padding_B", self.padding_B, (B,), torch.int64, device)
        if self.deficit_BG is not None:
            check("deficit_BG", self.deficit_BG, (B, kv_heads), torch.int64, device)
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size is {self.block_size}, expected a power of two")
        addresses = map(address, (self.length_B, self.padding_B, self.deficit_BG))
        return Bounds(*addresses, kv_heads, self.block_size, self.limit, self.sink_blocks, self.recent)


class Estimates(NamedTuple):
    """A query's estimated scores of every block, and exact scores of the slots.

    Attributes:
        peak_BHC, sum_BHC: fp32, estimated largest logit and log-sum-exp of each block's tokens.
        slot_peak_BHS, slot_sum_BHS: The exact ones of each slot; ``None`` if not needed.
    """

    peak_BHC: Tensor
    sum_BHC: Tensor
    slot_peak_BHS: Tensor | None = None
    slot_sum_BHS: Tensor | None = None


def max_slots(device: torch.device, capacity: int) -> int:
    """Most slots of a row that the kernel supports, for sequences of up to ``capacity`` blocks."""
    return (binding.max_shared_memory(device) - STATIC_BYTES - _shared_bytes(0, capacity)) // SLOT_BYTES


def choose_by_scores(
    table: SlotTensors, bounds: ChoiceBounds, score_BGC: Tensor | None, count_2: Tensor, *, ahead: bool, late: int
) -> None:
    """Choose blocks by their scores, and give them slots.

    Args:
        bounds: With the current lengths, even when choosing for the next token.
        score_BGC: fp32, ``-inf`` for never; ``None``: only blocks that are always chosen.
        count_2: int64, incremented by the blocks chosen and by those to fetch.
        ahead: Choose for the next token, not the newest.
        late: Most absent blocks to choose.

    Raises:
        ValueError: An argument's shape, dtype, device or layout; more slots than ``max_slots``.
    """
    B, (R, C) = len(bounds.length_B), table.slot_RC.shape
    if score_BGC is not None:
        check("score_BGC", score_BGC, (B, R // B, C), torch.float32, table.block_RS.device)
    scores = (score_BGC, *[None] * 5)
    _choose(table, bounds, scores, count_2, heads=R // B, late=late, ahead=ahead, chooses=True)


def choose_by_estimates(
    table: SlotTensors, bounds: ChoiceBounds, estimates: Estimates, count_2: Tensor, *, late: int | None
) -> Tensor:
    """Choose the newest token's blocks by estimated mass, and give them slots.

    Args:
        estimates: Resident blocks use the slots' exact scores; their exact peaks overwrite the estimates.
        late: Most absent blocks to choose; ``None``: keep the active blocks, and only compute the rest.

    Returns:
        fp32 rest_BH, the log-sum-exp of all blocks that are not active.

    Raises:
        ValueError: As of ``choose_by_scores``.
    """
    (B, H, C), device, S = estimates.peak_BHC.shape, table.block_RS.device, table.block_RS.shape[1]
    for name, tensor in estimates._asdict().items():
        if tensor is not None:
            check(name, tensor, (B, H, C if name.endswith("C") else S), torch.float32, device)
    if late is not None and estimates.slot_sum_BHS is None:
        raise ValueError("slot_sum_BHS is None, expected the exact scores of what is resident, to choose by")
    rest_BH = estimates.peak_BHC.new_empty(B, H)
    scores = (None, *estimates, rest_BH)
    _choose(table, bounds, scores, count_2, heads=H, late=late or 0, ahead=False, chooses=late is not None)
    return rest_BH


def _choose(
    table: SlotTensors,
    bounds: ChoiceBounds,
    scores: tuple[Tensor | None, ...],
    count_2: Tensor,
    *,
    heads: int,
    late: int,
    ahead: bool,
    chooses: bool,
) -> None:
    device, (R, S), C = table.block_RS.device, table.block_RS.shape, table.slot_RC.shape[1]
    kv_heads = R // len(bounds.length_B)
    check("count_2", count_2, (2,), torch.int64, device)
    if (limit := max_slots(device, C)) < S:
        raise ValueError(f"there are {S} slots for {C} blocks, expected at most {limit}")
    shared_bytes, room = _shared_bytes(S, C), binding.max_shared_memory(device) - STATIC_BYTES
    keys_bytes = 16 * ceil_div(C, 4)
    keys_here = shared_bytes + keys_bytes <= room
    key_RC = None if keys_here else table.slot_RC.new_empty(R, C)
    shared_bytes += keys_bytes * keys_here
    arguments = Select(
        table.checked(),
        bounds.checked(kv_heads, device),
        *map(address, (*scores, count_2, key_RC)),
        *(heads, late, ahead, chooses),
    )
    kernel = BY_SCORES if scores[2] is None else estimating(device, R, shared_bytes)
    kernel.launch(device, (R, 1, 1), arguments, shared_bytes=shared_bytes)


def estimating(device: torch.device, rows: int, shared_bytes: int) -> Kernel:
    """The kernel that chooses by estimates, for launches of so many rows."""
    two_fit = 2 * (STATIC_BYTES + shared_bytes) <= binding.max_shared_memory(device)
    return BY_ESTIMATES_OF_MANY if two_fit and rows > binding.multiprocessors(device) else BY_ESTIMATES


def _shared_bytes(slots: int, capacity: int) -> int:
    """Dynamic shared memory without the sort keys; includes two bit sets of blocks."""
    return SLOT_BYTES * slots + LIST_BYTES + 8 * ceil_div(capacity, 32)
