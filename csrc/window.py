"""An incremental step of the published network, as torch operations.

Suffixes: B sequences, G KV heads, R window rows (oldest first), N blocks, C feature maps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import candidates
from attention_predictor.csrc.binding import address, check, check_on_gpu
from attention_predictor.csrc.candidates import Candidates
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers
from attention_predictor.csrc.predict import fragments

ROWS, MAPS, FEATURES = 64, 16, 32  # of the network that the kernels are written for
WEIGHTS, REST = 9 * MAPS * FEATURES, MAPS * 10 + FEATURES * 2 + 1


class WindowStep(ctypes.Structure):
    """As in window.h."""

    _fields_ = [
        *pointers("row", "float"),
        *pointers("window", "void"),
        *pointers("sum", "double"),
        *pointers("weight", "void"),
        *pointers("rest scores", "float"),
        ("candidates", Candidates),
        *integers("batch kv_heads columns capacity"),
    ]


TILE, SLID = 126, 32  # columns of a thread block: to compute features, and to move the window
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
SCORE = Kernel("window.cu", "score_columns", WindowStep, threads=128, at_once=4, constants=CONSTANTS)


def pack_network(conv1: nn.Conv2d, conv2: nn.Conv2d, conv3: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """The network as the kernels read it: ``fragments`` of the second convolution's weights; all others in fp32."""
    weight_OI33, bias2_O = conv2.parameters()
    rest = [*conv1.parameters(), bias2_O, *conv3.parameters()]
    weight = fragments(weight_OI33.permute(2, 3, 1, 0).reshape(-1, MAPS, FEATURES))
    return weight, torch.cat([parameter.flatten() for parameter in rest]).float()


@torch.library.custom_op("attention_predictor::push_window", mutates_args=("window_BGNR", "sum_BGCN"))
def push_window(row_BGN: Tensor, window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Push a row into the window, and update the sums of features between its ends; on a GPU.

    Args:
        row_BGN: fp32 scores of the step, zero where there is no block yet.
        window_BGNR: fp16 window, with as many columns; zero where there are none.
        sum_BGCN: fp64 sums of the features of rows 2 to R - 3, of all columns.
        weight, rest: By ``pack_network``.
    """
    (B, G, N, _), device = window_BGNR.shape, window_BGNR.device
    _check(window_BGNR, sum_BGCN, weight, rest)
    check("row_BGN", row_BGN, (B, G, N), torch.float32, device)
    tensors = (row_BGN, window_BGNR, sum_BGCN, weight, rest, None)
    arguments = WindowStep(*map(address, tensors), Candidates(), *(B, G, N, N))
    SLIDE_SUMS.launch(device, (ceil_div(N, TILE), G, B), arguments)
    SLIDE_WINDOW.launch(device, (ceil_div(N, SLID), G, B), arguments)


@torch.library.custom_op("attention_predictor::score_window", mutates_args=())
def score_window(
    window_BGNR: Tensor,
    sum_BGCN: Tensor,
    weight: Tensor,
    rest: Tensor,
    columns: int,
    first: int,
    recent: int,
    block_size: int,
    length_B: Tensor,
    padding_B: Tensor | None = None,
) -> Tensor:
    """The candidates' scores for the next step: ``WindowPredictor.forward`` on their windows; on a GPU.

    Args:
        window_BGNR, sum_BGCN, weight, rest: As of ``push_window``.
        columns: Blocks of the result, at most those of the window.
        first, recent, block_size, length_B, padding_B: As of ``candidates.checked``.

    Returns:
        fp32 scores_BGN, ``-inf`` where there is no candidate.
    """
    (B, G, room, _), device = window_BGNR.shape, window_BGNR.device
    _check(window_BGNR, sum_BGCN, weight, rest)
    bounds = candidates.checked(first, recent, block_size, length_B, padding_B, window_BGNR)
    if columns > room:
        raise ValueError(f"window_BGNR has room for {room} blocks, expected at least {columns}")
    scores_BGN = window_BGNR.new_empty((B, G, columns), dtype=torch.float32)
    tensors = (None, window_BGNR, sum_BGCN, weight, rest, scores_BGN)
    arguments = WindowStep(*map(address, tensors), bounds, *(B, G, columns, room))
    SCORE.launch(device, (ceil_div(columns, TILE) + 2, G, B), arguments)
    return scores_BGN


@score_window.register_fake
def _(window_BGNR, sum_BGCN, weight, rest, columns, first, recent, block_size, length_B, padding_B=None):
    return window_BGNR.new_empty((*window_BGNR.shape[:2], columns), dtype=torch.float32)


def _check(window_BGNR: Tensor, sum_BGCN: Tensor, weight: Tensor, rest: Tensor) -> None:
    (B, G, N, _), device = window_BGNR.shape, window_BGNR.device
    check_on_gpu("window_BGNR", device)
    check("window_BGNR", window_BGNR, (B, G, N, ROWS), torch.float16, device)
    check("sum_BGCN", sum_BGCN, (B, G, FEATURES, N), torch.float64, device)
    check("weight", weight, (WEIGHTS,), torch.float16, device)
    check("rest", rest, (REST,), torch.float32, device)
