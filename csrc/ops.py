"""All kernels as functions: arguments checked, a reason where there are none, and which of them a model needs."""

from __future__ import annotations

import torch

from attention_predictor.csrc import (
    attention,
    gate,
    gather,
    norm,
    observe,
    predict,
    reduce,
    rotary,
    select,
    sketch,
    window,
)
from attention_predictor.csrc.attention import fits, sparse_decode
from attention_predictor.csrc.available import prepare, why_no_kernels
from attention_predictor.csrc.binding import ELEMENTS
from attention_predictor.csrc.gate import Activation, gate_up
from attention_predictor.csrc.gather import append_token, gather_to_host, move_blocks, note_time
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.norm import Form, rms_norm
from attention_predictor.csrc.observe import fold_rows, observe_row
from attention_predictor.csrc.predict import pack_convolutions, predict_blocks
from attention_predictor.csrc.reduce import reduce_logits
from attention_predictor.csrc.rotary import rotate, rotates
from attention_predictor.csrc.select import (
    ChoiceBounds,
    Estimates,
    SlotTensors,
    choose_by_estimates,
    choose_by_scores,
    max_slots,
)
from attention_predictor.csrc.sketch import sketch_append, sketch_scores, sketch_store
from attention_predictor.csrc.window import pack_network, push_window, score_window

__all__ = [
    "Activation",
    "ChoiceBounds",
    "Estimates",
    "Form",
    "SlotTensors",
    "append_token",
    "choose_by_estimates",
    "choose_by_scores",
    "every_kernel",
    "fits",
    "fold_rows",
    "gate_up",
    "gather_to_host",
    "kernels_of",
    "max_slots",
    "move_blocks",
    "note_time",
    "observe_row",
    "pack_convolutions",
    "pack_network",
    "predict_blocks",
    "prepare",
    "push_window",
    "reduce_logits",
    "reduces",
    "rms_norm",
    "rotate",
    "rotates",
    "score_window",
    "sketch_append",
    "sketch_scores",
    "sketch_store",
    "sparse_decode",
    "why_no_kernels",
    "why_no_sketch_kernel",
]

# By the architecture of the predictor (`AttentionPredictor.arch`).
OF_PREDICTOR = {
    "time-filters": (observe.KERNEL, predict.KERNEL),
    "paper": (window.SLIDE_SUMS, window.SLIDE_WINDOW, window.SCORE),
}


def why_no_sketch_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, group: int, block_size: int | None = None
) -> str | None:
    """Why no kernel scores blocks of `block_size` tokens by such a sketch, on one line; ``None`` if one does.

    Without a `block_size`: why none makes codes of its keys.
    """
    return why_no_kernels(device) or sketch.why_unsupported(device, dtype, head_dim, group, block_size)


def reduces(device: torch.device, block_size: int) -> bool:
    """Whether a kernel brings a prompt's logits down to blocks of that size."""
    return reduce.serves(device, block_size) and why_no_kernels(device) is None


def kernels_of(
    dtype: torch.dtype, head_dim: int, *, sketch_bits: int | None, predictor: str | None, fused: bool = True
) -> list[Kernel]:
    """All that a GPU needs for a prompt and decoding steps, to be given to ``prepare``.

    Args:
        dtype, head_dim: Of the keys; kernels that none are written for are left out.
        sketch_bits: Of a sketch's codes; ``None`` where there is no sketch.
        predictor: Its architecture, if there is one.
        fused: Captured steps use the kernels for norms, gated MLPs and rotary embeddings.
    """
    # What takes longest to compile comes first.
    found = [select.BY_ESTIMATES, select.BY_SCORES, gather.MOVE, gather.APPEND, gather.NOTE_TIME]
    if dtype in ELEMENTS and head_dim <= attention.MAX_HEAD_DIM:
        if sketch_bits is not None:
            found += [sketch.score_kernel(sketch_bits, head_dim)[0], sketch.store_kernel(dtype)]
        found += [attention.kernel(dtype, head_dim, values) for values in (True, False)]
    if fused and dtype in ELEMENTS:
        found += fusing(dtype)
    return [*found, *OF_PREDICTOR.get(predictor or "", ()), reduce.KERNEL]


def fusing(dtype: torch.dtype) -> list[Kernel]:
    """For norms, gated MLPs and rotary embeddings of that type, one of ``ELEMENTS``."""
    return [norm.kernel(dtype), gate.kernel(dtype), rotary.kernel(dtype)]


def every_kernel() -> list[Kernel]:
    """All that can ever be asked for."""
    found = [
        kernel
        for dtype in ELEMENTS
        for head_dim in attention.WIDTHS
        for bits in sketch.WIDE_BITS
        for predictor in OF_PREDICTOR
        for kernel in kernels_of(dtype, head_dim, sketch_bits=bits, predictor=predictor)
    ]
    return list({kernel.name: kernel for kernel in found}.values())
