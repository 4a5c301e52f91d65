"""All kernels as functions, why a device has none, and which kernels a model needs."""

from __future__ import annotations

import torch

from attention_predictor.csrc import (
    attention,
    block_code,
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
from attention_predictor.csrc.block_code import append_coded_token, encode_blocks, move_coded_blocks
from attention_predictor.csrc.gate import Activation, gate_up
from attention_predictor.csrc.gather import Slabs, append_token, gather_to_host, move_blocks, note_time
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
    "Slabs",
    "SlotTensors",
    "append_coded_token",
    "append_token",
    "choose_by_estimates",
    "choose_by_scores",
    "encode_blocks",
    "every_kernel",
    "fits",
    "fold_rows",
    "gate_up",
    "gather_to_host",
    "kernels_of",
    "max_slots",
    "move_blocks",
    "move_coded_blocks",
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

    Without `block_size`: why no kernel quantises its keys.
    """
    return why_no_kernels(device) or sketch.why_unsupported(device, dtype, head_dim, group, block_size)


def reduces(device: torch.device, block_size: int) -> bool:
    """Whether a kernel reduces a prompt's logits to blocks of that size."""
    return reduce.serves(device, block_size) and why_no_kernels(device) is None


def kernels_of(
    dtype: torch.dtype,
    head_dim: int,
    *,
    sketch_bits: int | None,
    predictor: str | None,
    fused: bool = True,
    code_bits: int | None = None,
) -> list[Kernel]:
    """The kernels that prompts and decoding steps need on a GPU, for ``prepare``.

    Args:
        dtype, head_dim: Of the keys; kernels that don't support them are left out.
        sketch_bits: Of a sketch's codes; ``None``: no sketch.
        predictor: Its architecture, or ``None``.
        fused: Whether captured steps use the kernels for norms, gated MLPs and rotary embeddings.
        code_bits: Of the codes of blocks in host memory; ``None``: blocks are not coded.
    """
    # Those that take longest to compile come first.
    found = [*select.KERNELS, gather.NOTE_TIME]
    found += block_code.kernels(dtype, code_bits) if dtype in ELEMENTS and code_bits else [gather.MOVE, gather.APPEND]
    if dtype in ELEMENTS and head_dim <= attention.MAX_HEAD_DIM:
        if sketch_bits is not None:
            found += [sketch.score_kernel(sketch_bits, head_dim)[0], sketch.store_kernel(dtype)]
        found += [attention.kernel(dtype, head_dim, values) for values in (True, False)]
    if fused and dtype in ELEMENTS:
        found += fusing(dtype)
    return [*found, *OF_PREDICTOR.get(predictor or "", ()), reduce.KERNEL]


def fusing(dtype: torch.dtype) -> list[Kernel]:
    """The kernels of norms, gated MLPs and rotary embeddings, for one dtype of ``ELEMENTS``."""
    return [norm.kernel(dtype), gate.kernel(dtype), rotary.kernel(dtype)]


def every_kernel() -> list[Kernel]:
    """All kernels, for every dtype, head size, sketch and predictor."""
    found = [
        kernel
        for dtype in ELEMENTS
        for head_dim in attention.WIDTHS
        for bits in sketch.WIDE_BITS
        for predictor in OF_PREDICTOR
        for code_bits in (None, *block_code.BITS)
        for kernel in kernels_of(dtype, head_dim, sketch_bits=bits, predictor=predictor, code_bits=code_bits)
    ]
    return list({kernel.name: kernel for kernel in found}.values())
