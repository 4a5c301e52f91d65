"""Selection and residency on the GPU, as one torch operation.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, N blocks, C capacity in blocks.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.csrc.binding import address, call, check


class Select(ctypes.Structure):
    """As in select.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("score", "peak", "sum", "slot_peak", "slot_sum", "rest", "key")),
        *((name, ctypes.c_void_p) for name in ("block", "active", "use", "slot", "move_block", "move_slot", "moves")),
        *((name, ctypes.c_void_p) for name in ("count", "length", "padding", "less")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "heads", "slots", "capacity", "block_size")),
        *((name, ctypes.c_int64) for name in ("limit", "late", "sink_blocks", "recent", "ahead", "chooses")),
    ]


TABLE = ("block_RS", "active_RS", "use_RS", "slot_RC", "move_block_RS", "move_slot_RS", "moves_R", "key_RC")


@torch.library.custom_op("attention_predictor::choose_blocks", mutates_args=("peak_BHC", "count_2", *TABLE))
def choose_blocks(
    peak_BHC: Tensor,
    sum_BHC: Tensor,
    slot_peak_BHS: Tensor | None,
    slot_sum_BHS: Tensor | None,
    block_RS: Tensor,
    active_RS: Tensor,
    use_RS: Tensor,
    slot_RC: Tensor,
    move_block_RS: Tensor,
    move_slot_RS: Tensor,
    moves_R: Tensor,
    key_RC: Tensor,
    count_2: Tensor,
    length_1: Tensor,
    padding_B: Tensor,
    less_G: Tensor | None,
    kv_heads: int,
    block_size: int,
    limit: int,
    late: int,
    sink_blocks: int,
    recent: int,
    chooses: bool,
) -> Tensor:
    """Choose this token's blocks with its own query, and give them slots (``Selection``, ``ResidencyTable``).

    Args:
        peak_BHC, sum_BHC: fp32, largest logit and log-sum-exp of each block by the sketch.
        slot_peak_BHS, slot_sum_BHS: The exact ones, of each slot, which count for what is resident, and whose peaks are
            put in place of the others; ``None`` leaves the sketch's.
        block_RS, active_RS, use_RS: int64 tables of the slots: block, block if chosen, when chosen last.
        slot_RC: int32, the slot of each block.
        move_block_RS, move_slot_RS, moves_R: int32, written: what is to be fetched where.
        key_RC: 32-bit room.
        count_2: int64, adds up the blocks chosen, and those of them that are fetched.
        length_1, padding_B: int64, tokens of the sequences, and those of left padding.
        less_G: int64, tokens by which a KV head's limit is lower; ``None`` where all have the same.
        limit: Tokens chosen at most.
        late: Absent blocks chosen at most.
        sink_blocks, recent: Always chosen, in blocks and tokens.
        chooses: False leaves the active blocks as they are.

    Returns:
        fp32 rest_BH, the log-sum-exp of all blocks that are not active.
    """
    B, H, C = peak_BHC.shape
    R, S, device = B * kv_heads, block_RS.shape[1], peak_BHC.device
    check("peak_BHC", peak_BHC, (B, H, C), torch.float32, device)
    check("sum_BHC", sum_BHC, (B, H, C), torch.float32, device)
    for name, scores in (("slot_peak_BHS", slot_peak_BHS), ("slot_sum_BHS", slot_sum_BHS)):
        if scores is not None:
            check(name, scores, (B, H, S), torch.float32, device)
    table = (block_RS, active_RS, use_RS, slot_RC, move_block_RS, move_slot_RS, moves_R, key_RC)
    _check_table(*table, count_2, length_1, padding_B, less_G, R, S, C, kv_heads)
    rest_BH = peak_BHC.new_empty(B, H)
    arguments = Select(
        *map(address, (None, peak_BHC, sum_BHC, slot_peak_BHS, slot_sum_BHS, rest_BH, key_RC)),
        *map(address, (*table[:-1], count_2, length_1, padding_B, less_G)),
        *(B, kv_heads, H, S, C, block_size, limit, late, sink_blocks, recent, 0, int(chooses)),
    )
    call("select_blocks", arguments, device)
    return rest_BH


@choose_blocks.register_fake
def _(peak_BHC, *args):
    return peak_BHC.new_empty(peak_BHC.shape[:2])


@torch.library.custom_op("attention_predictor::choose_ahead", mutates_args=("count_2", *TABLE))
def choose_ahead(
    score_BGC: Tensor,
    block_RS: Tensor,
    active_RS: Tensor,
    use_RS: Tensor,
    slot_RC: Tensor,
    move_block_RS: Tensor,
    move_slot_RS: Tensor,
    moves_R: Tensor,
    key_RC: Tensor,
    count_2: Tensor,
    length_1: Tensor,
    padding_B: Tensor,
    less_G: Tensor | None,
    block_size: int,
    limit: int,
    sink_blocks: int,
    recent: int,
) -> None:
    """Choose the next token's blocks by predicted scores, and give them slots; arguments as of ``choose_blocks``.

    Args:
        score_BGC: fp32, ``-inf`` for never.
        length_1: int64, tokens of the sequences now, without the next one.
    """
    B, G, C = score_BGC.shape
    R, S, device = B * G, block_RS.shape[1], score_BGC.device
    check("score_BGC", score_BGC, (B, G, C), torch.float32, device)
    table = (block_RS, active_RS, use_RS, slot_RC, move_block_RS, move_slot_RS, moves_R, key_RC)
    _check_table(*table, count_2, length_1, padding_B, less_G, R, S, C, G)
    arguments = Select(
        *map(address, (score_BGC, None, None, None, None, None, key_RC)),
        *map(address, (*table[:-1], count_2, length_1, padding_B, less_G)),
        *(B, G, G, S, C, block_size, limit, 0, sink_blocks, recent, 1, 1),
    )
    call("select_blocks", arguments, device)


@choose_ahead.register_fake
def _(score_BGC, *args):
    return None


def _check_table(
    block_RS: Tensor,
    active_RS: Tensor,
    use_RS: Tensor,
    slot_RC: Tensor,
    move_block_RS: Tensor,
    move_slot_RS: Tensor,
    moves_R: Tensor,
    key_RC: Tensor,
    count_2: Tensor,
    length_1: Tensor,
    padding_B: Tensor,
    less_G: Tensor | None,
    R: int,
    S: int,
    C: int,
    G: int,
) -> None:
    device = block_RS.device
    for name, slots_RS in (("block_RS", block_RS), ("active_RS", active_RS), ("use_RS", use_RS)):
        check(name, slots_RS, (R, S), torch.int64, device)
    for name, slots_RS in (("move_block_RS", move_block_RS), ("move_slot_RS", move_slot_RS)):
        check(name, slots_RS, (R, S), torch.int32, device)
    for name, blocks_RC in (("slot_RC", slot_RC), ("key_RC", key_RC)):
        check(name, blocks_RC, (R, C), torch.int32, device)
    check("moves_R", moves_R, (R,), torch.int32, device)
    check("count_2", count_2, (2,), torch.int64, device)
    check("length_1", length_1, (1,), torch.int64, device)
    check("padding_B", padding_B, (len(padding_B),), torch.int64, device)
    if less_G is not None:
        check("less_G", less_G, (G,), torch.int64, device)
