"""A step of the published network, streamed, as torch operations.

Suffixes: B sequences, G KV heads, R window rows (oldest first), N blocks, C feature maps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import address, check
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers
from attention_predictor.csrc.predict import fragments

ROWS, MAPS, FEATURES = 64, 16, 32  # of the network that the kernels are written for
WEIGHTS, REST = 9 * MAPS * FEATURES, MAPS * 10 + FEATURES * 2 + 1


class WindowStep(ctypes.Structure):
    """As in window.h."""

    _fields_ = [
        *pointers("row window sum weight first last rest scores"),
        *integers("batch kv_heads columns capacity known"),
    ]


SLIDE_SUMS = Kernel("window.cu", "slide_sums", WindowStep, threads=128)
SLIDE_WINDOW = Kernel("window.cu", "slide_window", WindowStep, threads=256)
SCORE = Kernel("window.cu", "score_columns", WindowStep, threads=128)
TILE, SLID = 126, 32  # columns of a thread block: where features are computed, and where the window moves


def pack_network(conv1: nn.Conv2d, conv2: nn.Conv2d, conv3: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """The network as the kernels read it: ``fragments`` of the second convolution's weights; all others in fp32."""
    weight_OI33, bias2_O = conv2.parameters()
    rest = [*conv1.parameters(), bias2_O, *conv3.parameters()]
    weight = fragments(weight_OI33.permute(2, 3, 1, 0).reshape(-1, MAPS, FEATURES))
    return weight, torch.cat([parameter.flatten() for parameter in rest]).float()


@torch.library.custom_op("attention_predictor::push_window", mutates_args=("window_BGNR", "sum_BGCN"))
def push_window(
    row_BGN: Tensor, window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor, known: int
) -> None:
    """Move the window up by a row, and the sums of features between its ends with it; on a GPU.

    Args:
        row_BGN: fp32 scores of the step, of all blocks there are.
        window_BGNR: fp16 window, with room for blocks; zero where there are none.
        sum_BGCN: fp64 sums of the features of rows 2 to R - 3, with as much room.
        weight, rest: By ``pack_network``.
        known: The first blocks, whose sums are kept up; those of the others are left as they are.
    """
    B, G, N = row_BGN.shape
    room = _check(window_BGNR, sum_BGCN, weight, rest, B, G)
    check("row_BGN", row_BGN, (B, G, N), torch.float32, window_BGNR.device)
    if not known <= N <= room:
        raise ValueError(f"row_BGN has {N} columns, expected at least {known} and at most {room}")
    arguments = WindowStep(
        *map(address, (row_BGN, window_BGNR, sum_BGCN, weight, None, None, rest, None)), *(B, G, N, room, known)
    )
    SLIDE_SUMS.launch(window_BGNR.device, (-(-known // TILE), G, B), arguments)
    SLIDE_WINDOW.launch(window_BGNR.device, (-(-N // SLID), G, B), arguments)


@torch.library.custom_op("attention_predictor::score_window", mutates_args=())
def score_window(
    window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor, first_B: Tensor, last_B: Tensor
) -> Tensor:
    """Scores of blocks first to last - 1 of each sequence: ``WindowPredictor.forward`` on their windows; on a GPU.

    Args:
        first_B, last_B: int64. Where there are fewer than four blocks, their scores are left as they come.
        window_BGNR, sum_BGCN, weight, rest: As of ``push_window``.

    Returns:
        fp32 scores_BGN, ``-inf`` for all others.
    """
    (B, G, room, _), device = window_BGNR.shape, window_BGNR.device
    _check(window_BGNR, sum_BGCN, weight, rest, B, G)
    for name, tensor in (("first_B", first_B), ("last_B", last_B)):
        check(name, tensor, (B,), torch.int64, device)
    scores_BGN = window_BGNR.new_empty((B, G, room), dtype=torch.float32)
    tensors = (None, window_BGNR, sum_BGCN, weight, first_B, last_B, rest, scores_BGN)
    SCORE.launch(device, (-(-room // TILE) + 2, G, B), WindowStep(*map(address, tensors), B, G, room, room, 0))
    return scores_BGN


@score_window.register_fake
def _(window_BGNR, sum_BGCN, weight, rest, first_B, last_B):
    return window_BGNR.new_empty(window_BGNR.shape[:3], dtype=torch.float32)


def _check(window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor, batch: int, kv_heads: int) -> int:
    """The room for blocks."""
    device, room = window_BGNR.device, window_BGNR.shape[2]
    if not binding.on_gpu(device):
        raise ValueError(f"window_BGNR is on {device}, expected a GPU: this kernel is written for no other device")
    check("window_BGNR", window_BGNR, (batch, kv_heads, room, ROWS), torch.float16, device)
    check("sum_BGCN", sum_BGCN, (batch, kv_heads, FEATURES, room), torch.float64, device)
    check("weight", weight, (WEIGHTS,), torch.float16, device)
    check("rest", rest, (REST,), torch.float32, device)
    return room
