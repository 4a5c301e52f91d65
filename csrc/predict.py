"""The next step's scores by the time filters' network, as a torch operation.

Suffixes: B sequences, G KV heads, N blocks, C state channels; of a convolution: O channels out, I channels in, 3 taps.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_predictor.csrc import binding, candidates
from attention_predictor.csrc.binding import address, check, check_on_gpu
from attention_predictor.csrc.candidates import Candidates
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import integers, pointers

CHANNELS, HIDDEN, FURTHER = 14, 32, 3  # of the network that the kernel is written for
SLICE = 16  # channels that a matrix instruction takes at once
SLICES = 3 * (SLICE + FURTHER * HIDDEN) // SLICE
STRIDE = HIDDEN + 8  # elements of a row in shared memory
BIASES = (1 + FURTHER) * HIDDEN + HIDDEN + 1
WARPS = (4, 2)  # of a thread block: the most with which every multiprocessor has one


class PredictBlocks(ctypes.Structure):
    """As in predict.h."""

    _fields_ = [
        *pointers("state weight bias scores"),
        ("candidates", Candidates),
        *integers("batch kv_heads capacity columns"),
    ]


KERNEL = Kernel("predict.cu", "score_tiles", PredictBlocks, 32 * WARPS[0], at_once=4)


def fragments(weight_SIO: Tensor) -> Tensor:
    """Weights of S slices of 16 inputs × 32 outputs, in fp16, a lane's of each matrix together.

    A lane of a warp has, of 16 inputs × 8 outputs, output lane / 4 and the inputs 2·(lane % 4) + {0, 1, 8, 9} (PTX,
    mma.m16n8k16, B); of two such matrices that makes 16 bytes.
    """
    # Inputs: half, lane, pair. Outputs: two matrices, matrix, lane.
    weight = weight_SIO.reshape(-1, 2, 4, 2, HIDDEN // 16, 2, 8)
    return weight.permute(0, 4, 6, 2, 5, 1, 3).flatten().half()


def pack_convolutions(convolutions: list[nn.Conv1d], last: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """The network as ``predict_blocks`` reads it: ``fragments`` of the weights; biases and the last one in fp32."""
    slices: list[Tensor] = []
    rest: list[Tensor] = []
    for convolution in convolutions:
        weight_OI3, bias_O = convolution.parameters()
        padded_OI3 = F.pad(weight_OI3, (0, 0, 0, -weight_OI3.shape[1] % SLICE))
        slices.append(padded_OI3.permute(2, 1, 0).reshape(-1, SLICE, HIDDEN))
        rest.append(bias_O)
    rest += [parameter.flatten() for parameter in last.parameters()]
    return fragments(torch.cat(slices)), torch.cat(rest).float()


@torch.library.custom_op("attention_predictor::predict_blocks", mutates_args=())
def predict_blocks(
    state_BGNC: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int,
    first: int,
    recent: int,
    block_size: int,
    length_B: Tensor,
    padding_B: Tensor | None = None,
) -> Tensor:
    """The candidates' scores for the next step: ``FilterPredictor.forward`` on their states; on a GPU.

    Args:
        state_BGNC: fp32 state of even capacity.
        weight, bias: From ``pack_convolutions``.
        columns: Blocks of the result, at most the capacity.
        first, recent, block_size, length_B, padding_B: As in ``candidates.checked``.

    Returns:
        fp32 scores_BGN, ``-inf`` for blocks that are no candidates.
    """
    B, G, room, _ = state_BGNC.shape
    device = state_BGNC.device
    check_on_gpu("state_BGNC", device)
    check("state_BGNC", state_BGNC, (B, G, room, CHANNELS), torch.float32, device)
    check("weight", weight, (SLICES * SLICE * HIDDEN,), torch.float16, device)
    check("bias", bias, (BIASES,), torch.float32, device)
    bounds = candidates.checked(first, recent, block_size, length_B, padding_B, state_BGNC)
    if room % 2 or room < columns:
        raise ValueError(f"state_BGNC has room for {room} blocks, expected an even number and at least {columns}")
    scores_BGN = state_BGNC.new_empty((B, G, columns))
    multiprocessors = binding.multiprocessors(device)
    tiles = {warps: -(-columns // (32 * warps - 2 * FURTHER)) for warps in WARPS}  # by the warps of a thread block
    warps = next((warps for warps in WARPS if B * G * tiles[warps] >= multiprocessors), WARPS[-1])
    arguments = PredictBlocks(*map(address, (state_BGNC, weight, bias, scores_BGN)), bounds, *(B, G, room, columns))
    # Weights, then rows and one more at each end, then biases.
    shared_bytes = 2 * (SLICES * SLICE * HIDDEN + (32 * warps + 2) * STRIDE) + 4 * BIASES
    KERNEL.launch(device, (tiles[warps], G, B), arguments, threads=32 * warps, shared_bytes=shared_bytes)
    return scores_BGN


@predict_blocks.register_fake
def _(state_BGNC, weight, bias, columns, first, recent, block_size, length_B, padding_B=None):
    return state_BGNC.new_empty((*state_BGNC.shape[:2], columns))
