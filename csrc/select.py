"""Selection and residency on the GPU.

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

STATIC_BYTES = 5 << 10  # of shared memory, at most, whose size the kernel declares
SLOT_BYTES, LIST_BYTES = 60, 8 << 10  # of what it is given: for each slot, and for keys that are compared


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


# Half a multiprocessor's registers, for the choice that runs beside the model; all of them, to hold estimates.
BY_SCORES = Kernel("select.cu", "select_blocks<true>", Select, threads=512, at_once=2)
BY_ESTIMATES = Kernel("select.cu", "select_blocks<false>", Select, threads=512, at_once=1)


class SlotTensors(NamedTuple):
    """Which block is in which slot, and what must move for it.

    Attributes:
        block_RS, active_RS, use_RS: int64, of each slot: its block, -1 for none; its block if chosen, else -1; when it
            was chosen last.
        slot_RC: int32, the slot of each block, -1 for one that is absent.
        move_block_RS, move_slot_RS, moves_R: int32, written: what is to be fetched where; how many of them.
    """

    block_RS: Tensor
    active_RS: Tensor
    use_RS: Tensor
    slot_RC: Tensor
    move_block_RS: Tensor
    move_slot_RS: Tensor
    moves_R: Tensor

    def checked(self) -> Table:
        """As the kernel reads it; ValueError where the tensors don't fit each other."""
        device, (R, S), C = self.block_RS.device, self.block_RS.shape, self.slot_RC.shape[1]
        for name, tensor in self._asdict().items():
            shape = {"RS": (R, S), "RC": (R, C), "R": (R,)}[name.rpartition("_")[2]]
            wide = name in ("block_RS", "active_RS", "use_RS")
            check(name, tensor, shape, torch.int64 if wide else torch.int32, device)
        return Table(*map(address, self), S, C)


class ChoiceBounds(NamedTuple):
    """What bounds a choice of blocks.

    Attributes:
        length_B: int64, tokens of each sequence, the newest included.
        padding_B: int64, tokens of left padding of each; ``None`` where there is none.
        deficit_G: int64, tokens by which a KV head's limit is lower; ``None`` where all have the same.
        block_size: Tokens of a block, a power of two.
        limit: Tokens chosen at most.
        sink_blocks, recent: Always chosen, in blocks and tokens.
    """

    length_B: Tensor
    padding_B: Tensor | None
    deficit_G: Tensor | None
    block_size: int
    limit: int
    sink_blocks: int
    recent: int

    def checked(self, kv_heads: int, device: torch.device) -> Bounds:
        """As the kernel reads them; ValueError where they are not what they must be."""
        B = len(self.length_B)
        check("length_B", self.length_B, (B,), torch.int64, device)
        if self.padding_B is not None:
            check("padding_B", self.padding_B, (B,), torch.int64, device)
        if self.deficit_G is not None:
            check("deficit_G", self.deficit_G, (kv_heads,), torch.int64, device)
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size is {self.block_size}, expected a power of two")
        addresses = map(address, (self.length_B, self.padding_B, self.deficit_G))
        return Bounds(*addresses, kv_heads, self.block_size, self.limit, self.sink_blocks, self.recent)


class Estimates(NamedTuple):
    """What a query is thought to make of every block, and what it does make of the slots.

    Attributes:
        peak_BHC, sum_BHC: fp32, largest logit and log-sum-exp of each block's tokens.
        slot_peak_BHS, slot_sum_BHS: The same of each slot, exactly; ``None`` where nobody asks.
    """

    peak_BHC: Tensor
    sum_BHC: Tensor
    slot_peak_BHS: Tensor | None = None
    slot_sum_BHS: Tensor | None = None


def max_slots(device: torch.device, capacity: int) -> int:
    """Slots of a row that the kernel has room for, where a sequence has up to ``capacity`` blocks."""
    return (binding.max_shared_memory(device) - STATIC_BYTES - _shared_bytes(0, capacity)) // SLOT_BYTES


def choose_by_scores(
    table: SlotTensors, bounds: ChoiceBounds, score_BGC: Tensor | None, count_2: Tensor, *, ahead: bool, late: int
) -> None:
    """Choose blocks by their scores, and give them slots.

    Args:
        bounds: Their lengths are the tokens now, also where the next token's blocks are chosen.
        score_BGC: fp32, ``-inf`` for never; ``None``: what is always chosen, and no other.
        count_2: int64, adds up the blocks chosen, and those of them that are to be fetched.
        ahead: For the next token, not for the newest.
        late: Absent blocks chosen at most.

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
    """Choose the newest token's blocks by their shares of what its query attends to, and give them slots.

    Args:
        estimates: The exact scores of slots count for what is resident; their peaks are put in place of the others.
        late: Absent blocks chosen at most; ``None``: the active blocks stay as they are, and only the rest is found.

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
    if (most := max_slots(device, C)) < S:
        raise ValueError(f"there are {S} slots for {C} blocks, expected at most {most}")
    shared_bytes, room = _shared_bytes(S, C), binding.max_shared_memory(device) - STATIC_BYTES
    keys_bytes = 16 * ceil_div(C, 4)
    keys_here = shared_bytes + keys_bytes <= room
    key_RC = None if keys_here else table.slot_RC.new_empty(R, C)
    arguments = Select(
        table.checked(),
        bounds.checked(kv_heads, device),
        *map(address, (*scores, count_2, key_RC)),
        *(heads, late, ahead, chooses),
    )
    kernel = BY_SCORES if scores[2] is None else BY_ESTIMATES
    kernel.launch(device, (R, 1, 1), arguments, shared_bytes=shared_bytes + keys_bytes * keys_here)


def _shared_bytes(slots: int, capacity: int) -> int:
    """Without keys of all blocks; two sets of blocks have a bit for each."""
    return SLOT_BYTES * slots + LIST_BYTES + 8 * ceil_div(capacity, 32)
