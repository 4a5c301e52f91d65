"""Selection and residency on the GPU.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, N blocks, C capacity in blocks.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import address, check
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers

STATIC_BYTES = 5 << 10  # of shared memory, at most, whose size the kernel declares
SLOT_BYTES, LIST_BYTES = 60, 8 << 10  # of what it is given: for each slot, and for keys that are compared


class Table(ctypes.Structure):
    """As in select.h."""

    _fields_ = [*pointers("block active use slot move_block move_slot moves key"), *integers("slots capacity")]


class Select(ctypes.Structure):
    """As in select.h."""

    _fields_ = [
        ("table", Table),
        *pointers("score peak sum slot_peak slot_sum rest count length padding less"),
        *integers("kv_heads heads block_size limit late sink_blocks recent ahead chooses keys_here"),
    ]


KERNEL = Kernel("select.cu", "select_blocks", Select, threads=512, at_once=1)


class SlotTable(NamedTuple):
    """Which block is in which slot, and what must move for it.

    Attributes:
        block_RS, active_RS, use_RS: int64, of each slot: its block, -1 for none; its block if chosen, else -1; when it
            was chosen last.
        slot_RC: int32, the slot of each block, -1 for one that is absent.
        move_block_RS, move_slot_RS, moves_R: int32, written: what is to be fetched where; how many of them.
        key_RC: int32, room.
    """

    block_RS: Tensor
    active_RS: Tensor
    use_RS: Tensor
    slot_RC: Tensor
    move_block_RS: Tensor
    move_slot_RS: Tensor
    moves_R: Tensor
    key_RC: Tensor

    def checked(self) -> Table:
        """As the kernel reads it; ValueError where the tensors don't fit each other."""
        device, (R, S), C = self.block_RS.device, self.block_RS.shape, self.slot_RC.shape[1]
        for name, tensor in self._asdict().items():
            shape = {"RS": (R, S), "RC": (R, C), "R": (R,)}[name.rpartition("_")[2]]
            wide = name in ("block_RS", "active_RS", "use_RS")
            check(name, tensor, shape, torch.int64 if wide else torch.int32, device)
        return Table(*map(address, self), S, C)


class Limits(NamedTuple):
    """What bounds a choice of blocks.

    Attributes:
        length_1, padding_B: int64, tokens of the sequences, and those of left padding.
        less_G: int64, tokens by which a KV head's limit is lower; ``None`` where all have the same.
        block_size: Tokens of a block, a power of two.
        limit: Tokens chosen at most.
        sink_blocks, recent: Always chosen, in blocks and tokens.
    """

    length_1: Tensor
    padding_B: Tensor
    less_G: Tensor | None
    block_size: int
    limit: int
    sink_blocks: int
    recent: int


def most_slots(device: torch.device, capacity: int) -> int:
    """Slots of a row that the kernel has room for, where a sequence has up to ``capacity`` blocks."""
    return (binding.most_shared(device) - STATIC_BYTES - _shared_bytes(0, capacity)) // SLOT_BYTES


def choose_blocks(
    table: SlotTable,
    limits: Limits,
    peak_BHC: Tensor,
    sum_BHC: Tensor,
    slot_scores: tuple[Tensor, Tensor] | None,
    late: int,
    count_2: Tensor,
) -> Tensor:
    """Choose this token's blocks with its own query, and give them slots (``Selection``, ``ResidencyTable``).

    Args:
        peak_BHC, sum_BHC: fp32, largest logit and log-sum-exp of each block by the sketch.
        slot_scores: The exact ones, peak_BHS and sum_BHS of each slot, which count for what is resident, and whose
            peaks are put in place of the others. ``None``: the sketch's count, and the active blocks stay as they are.
        late: Absent blocks chosen at most.
        count_2: int64, adds up the blocks chosen, and those of them that are fetched.

    Returns:
        fp32 rest_BH, the log-sum-exp of all blocks that are not active.

    Raises:
        ValueError: An argument's shape, dtype, device or layout; more slots than ``most_slots``.
    """
    (B, H, C), device = peak_BHC.shape, peak_BHC.device
    R, S = table.block_RS.shape
    check("peak_BHC", peak_BHC, (B, H, C), torch.float32, device)
    check("sum_BHC", sum_BHC, (B, H, C), torch.float32, device)
    slot_peak_BHS, slot_sum_BHS = slot_scores or (None, None)
    for name, of_slots in (("slot_peak_BHS", slot_peak_BHS), ("slot_sum_BHS", slot_sum_BHS)):
        if of_slots is not None:
            check(name, of_slots, (B, H, S), torch.float32, device)
    rest_BH = peak_BHC.new_empty(B, H)
    scores = (None, peak_BHC, sum_BHC, slot_peak_BHS, slot_sum_BHS, rest_BH)
    _choose(table, limits, scores, count_2, (B, R // B, H, C), late=late, ahead=False, chooses=slot_scores is not None)
    return rest_BH


def choose_ahead(table: SlotTable, limits: Limits, score_BGC: Tensor, count_2: Tensor) -> None:
    """Choose the next token's blocks by predicted scores, and give them slots; arguments as of ``choose_blocks``.

    Args:
        limits: Its ``length_1`` are the tokens now, without the next one.
        score_BGC: fp32, ``-inf`` for never.
    """
    B, G, C = score_BGC.shape
    check("score_BGC", score_BGC, (B, G, C), torch.float32, table.block_RS.device)
    scores = (score_BGC, None, None, None, None, None)
    _choose(table, limits, scores, count_2, (B, G, G, C), late=0, ahead=True, chooses=True)


def _choose(
    table: SlotTable,
    limits: Limits,
    scores: tuple[Tensor | None, ...],
    count_2: Tensor,
    shape: tuple[int, int, int, int],
    *,
    late: int,
    ahead: bool,
    chooses: bool,
) -> None:
    (B, G, H, C), device, S = shape, table.block_RS.device, table.block_RS.shape[1]
    checked = table.checked()
    check("slot_RC", table.slot_RC, (B * G, C), torch.int32, device)
    check("count_2", count_2, (2,), torch.int64, device)
    check("length_1", limits.length_1, (1,), torch.int64, device)
    check("padding_B", limits.padding_B, (B,), torch.int64, device)
    if limits.less_G is not None:
        check("less_G", limits.less_G, (G,), torch.int64, device)
    if limits.block_size < 1 or limits.block_size & (limits.block_size - 1):
        raise ValueError(f"block_size is {limits.block_size}, expected a power of two")
    if (most := most_slots(device, C)) < S:
        raise ValueError(f"there are {S} slots for {C} blocks, expected at most {most}")
    shared_bytes, room = _shared_bytes(S, C), binding.most_shared(device) - STATIC_BYTES
    keys_here = shared_bytes + 4 * C <= room
    arguments = Select(
        checked,
        *map(address, (*scores, count_2, limits.length_1, limits.padding_B, limits.less_G)),
        *(G, H, limits.block_size, limits.limit, late, limits.sink_blocks, limits.recent, ahead, chooses, keys_here),
    )
    KERNEL.launch(device, (B * G, 1, 1), arguments, shared_bytes=shared_bytes + 4 * C * keys_here)


def _shared_bytes(slots: int, capacity: int) -> int:
    """Without keys of all blocks; two sets of blocks have a bit for each."""
    return SLOT_BYTES * slots + LIST_BYTES + 8 * -(-capacity // 32)
