"""Updates the time filters' state with score rows, as torch operations.

Suffixes: B sequences, G KV heads, H query heads, S slots, R rows, N blocks, C state channels.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from attention_predictor.csrc.binding import address, check, check_on_gpu
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import doubles, integers, pointers

FILTERS, PEAKS = 8, 6  # averages of a block, and peaks with the last score: what the kernel is written for


class ObserveRow(ctypes.Structure):
    """As in observe.h."""

    _fields_ = [
        *pointers("given peak block slot_peak total rest fold length_B state row"),
        *integers("batch kv_heads heads slots columns capacity block_size length rows fresh"),
        *doubles("eps full_scale"),
    ]


TILE = 128  # blocks of a thread block
KERNEL = Kernel("observe.cu", "fold_row", ObserveRow, threads=224)


@torch.library.custom_op("attention_predictor::observe_row", mutates_args=("state_BGNC", "row_BGN"))
def observe_row(
    peak_BHN: Tensor | None,
    block_BGS: Tensor,
    slot_peak_BHS: Tensor,
    total_BH: Tensor,
    rest_BH: Tensor | None,
    state_BGNC: Tensor,
    fold_C: Tensor,
    eps: float,
    block_size: int,
    length: int,
    length_B: Tensor | None,
    row_BGN: Tensor | None,
) -> None:
    """Compute a step's score row from its logits, and update the state with it; on a GPU.

    A block's score is exp(logit − total), the maximum over the query heads of a KV head. It uses the exact logit if a
    slot holds the block, else the estimated one (``row_of_logits`` in ``predictor/history.py``).

    Args:
        peak_BHN: fp32 estimated largest logit of each block, ``-inf`` for a score of zero; ``None``: zero for all.
        block_BGS: int64 block in each slot, none twice in a row; -1 for a slot that takes no part.
        slot_peak_BHS: fp32 exact largest logit of each slot.
        total_BH: fp32 log-sum-exp of all logits.
        rest_BH: fp32 log-sum-exp of logits not included in ``total_BH``, or ``None``.
        state_BGNC: fp32 state of even capacity; blocks beyond the sequence are not changed.
        fold_C: fp32 weight of the new score in each average, then each peak's fall (``FilterPredictor.packed``).
        eps: Of the logarithmic scale.
        block_size, length: Tokens of a block and of the sequence, the new one included.
        length_B: int64 true lengths on the device, at most ``length``; ``None``: ``length``.
        row_BGN: fp32 output for the row, or ``None``.
    """
    B, G, S = block_BGS.shape
    H, n_blocks = total_BH.shape[1], -(-length // block_size)
    columns = n_blocks if peak_BHN is None else peak_BHN.shape[2]
    if row_BGN is not None and peak_BHN is None:
        columns = row_BGN.shape[2]
    _check_state(state_BGNC, fold_C, B, G, n_blocks)
    device = state_BGNC.device
    check("block_BGS", block_BGS, (B, G, S), torch.int64, device)
    check("slot_peak_BHS", slot_peak_BHS, (B, H, S), torch.float32, device)
    check("total_BH", total_BH, (B, H), torch.float32, device)
    if rest_BH is not None:
        check("rest_BH", rest_BH, (B, H), torch.float32, device)
    for name, tensor, rows in (("peak_BHN", peak_BHN, H), ("row_BGN", row_BGN, G)):
        if tensor is not None:
            check(name, tensor, (B, rows, columns), torch.float32, device)
    if length_B is not None:
        check("length_B", length_B, (B,), torch.int64, device)
    if H % G or columns < n_blocks:
        raise ValueError(
            f"expected heads a multiple of {G} and columns for the {n_blocks} blocks of {length} tokens; "
            f"found {H} heads, {columns} columns"
        )
    arguments = ObserveRow(
        *map(address, (None, peak_BHN, block_BGS, slot_peak_BHS, total_BH, rest_BH)),
        *map(address, (fold_C, length_B, state_BGNC, row_BGN)),
        *(B, G, H, S, columns, state_BGNC.shape[2], block_size, length, 1, 0, eps, math.log1p(1 / eps)),
    )
    KERNEL.launch(device, (-(-n_blocks // TILE), G, B), arguments)


@torch.library.custom_op("attention_predictor::fold_rows", mutates_args=("state_BGNC",))
def fold_rows(rows_BGRN: Tensor, state_BGNC: Tensor, fold_C: Tensor, eps: float, fresh: bool) -> None:
    """Update the state with fp32 score rows, oldest first; on a GPU.

    ``fresh``: there is no state yet, and the averages start at the first row. Other arguments as in ``observe_row``.
    """
    B, G, R, N = rows_BGRN.shape
    _check_state(state_BGNC, fold_C, B, G, N)
    check("rows_BGRN", rows_BGRN, (B, G, R, N), torch.float32, state_BGNC.device)
    arguments = ObserveRow(
        *map(address, (rows_BGRN, None, None, None, None, None, fold_C, None, state_BGNC, None)),
        *(B, G, G, 0, N, state_BGNC.shape[2], 1, N, R, int(fresh), eps, math.log1p(1 / eps)),
    )
    KERNEL.launch(state_BGNC.device, (-(-N // TILE) if R else 0, G, B), arguments)


def _check_state(state_BGNC: Tensor, fold_C: Tensor, batch: int, kv_heads: int, n_blocks: int) -> None:
    device, room = state_BGNC.device, state_BGNC.shape[2]
    check_on_gpu("state_BGNC", device)
    check("state_BGNC", state_BGNC, (batch, kv_heads, room, FILTERS + PEAKS), torch.float32, device)
    check("fold_C", fold_C, (FILTERS + PEAKS,), torch.float32, device)
    if room % 2 or room < n_blocks:
        raise ValueError(f"state_BGNC has room for {room} blocks, expected an even number and at least {n_blocks}")
