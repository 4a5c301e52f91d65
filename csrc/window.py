"""A step of the published network, streamed, as torch operations.

Suffixes: B sequences, G KV heads, R window rows (oldest first), N blocks, C feature maps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import binding
from attention_predictor.csrc.binding import address, check
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers
from attention_predictor.csrc.predict import fragments

ROWS, MAPS, FEATURES = 64, 16, 32  # of the network that the kernels are written for
WEIGHTS, REST = 9 * MAPS * FEATURES, MAPS * 10 + FEATURES * 2 + 1
FEWEST = 4  # columns that can be scored: two at each end


class WindowStep(ctypes.Structure):
    """As in window.h."""

    _fields_ = [
        *pointers("row", "float"),
        *pointers("window", "void"),
        *pointers("sum", "double"),
        *pointers("weight", "void"),
        *pointers("rest scores", "float"),
        *integers("batch kv_heads columns capacity known first last"),
    ]


TILE, SLID = 126, 32  # columns of a thread block: where features are computed, and where the window moves
CONSTANTS = {
    "kRows": ROWS,
    "kMaps": MAPS,
    "kFeatures": FEATURES,
    "kTaps * kMaps * kFeatures": WEIGHTS,
    "kRest": REST,
    "kPositions": 128,
    "kOutputs": TILE,
}
SLIDE_SUMS = Kernel("window.cu", "slide_sums", WindowStep, threads=128, constants=CONSTANTS)
SLIDE_WINDOW = Kernel("window.cu", "slide_window", WindowStep, threads=8 * SLID, constants=CONSTANTS)
SCORE = Kernel("window.cu", "score_columns", WindowStep, threads=128, constants=CONSTANTS)


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
        *map(address, (row_BGN, window_BGNR, sum_BGCN, weight, rest, None)), *(B, G, N, room, known, 0, 0)
    )
    SLIDE_SUMS.launch(window_BGNR.device, (ceil_div(known, TILE), G, B), arguments)
    SLIDE_WINDOW.launch(window_BGNR.device, (ceil_div(N, SLID), G, B), arguments)


@torch.library.custom_op("attention_predictor::score_window", mutates_args=())
def score_window(
    window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor, n_blocks: int, first: int, last: int
) -> Tensor:
    """Scores of blocks first to last - 1, four at least: ``WindowPredictor.forward`` on their windows alone; on a GPU.

    Arguments as for ``push_window``. Returns fp32 scores_BGN of ``n_blocks`` columns, ``-inf`` for all others.
    """
    B, G = window_BGNR.shape[:2]
    room = _check(window_BGNR, sum_BGCN, weight, rest, B, G)
    if not 0 <= first <= last - FEWEST or not last <= n_blocks <= room:
        raise ValueError(
            f"blocks {first}..{last} of {n_blocks}: expected {FEWEST} at least, and room for no more than {room}"
        )
    scores_BGN = window_BGNR.new_empty((B, G, n_blocks), dtype=torch.float32)
    arguments = WindowStep(
        *map(address, (None, window_BGNR, sum_BGCN, weight, rest, scores_BGN)), *(B, G, n_blocks, room, 0, first, last)
    )
    SCORE.launch(window_BGNR.device, (ceil_div(n_blocks, TILE) + 2, G, B), arguments)
    return scores_BGN


@score_window.register_fake
def _(window_BGNR, sum_BGCN, weight, rest, n_blocks, first, last):
    return window_BGNR.new_empty((*window_BGNR.shape[:2], n_blocks), dtype=torch.float32)


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
