"""The training objective: rank, one step ahead, the blocks that will hold the attention mass.

Suffixes: X records (sequences × layers × KV heads), Q steps, S chosen steps, N blocks, C state channels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.options import TARGETS
from attention_predictor.train.shards import Recording
from attention_predictor.train.validate import WARM, candidates

WEIGHT_FLOOR = 0.01  # smallest weight of a step in the loss, however flat its target


def document_loss(
    predictor: AttentionPredictor,
    network: Callable[[Tensor], Tensor],
    recording: Recording,
    count: int,
    meta: dict[str, Any],
    loss: str,
    horizon: int,
    rng: random.Random,
    device: torch.device,
) -> Tensor | None:
    """Loss of `count` random records at some random steps; None if they have no candidates.

    `network` is the predictor's `forward`, perhaps in another precision; states are always made in fp32.
    States start as decoding does, from the prompt's rows. The target is the largest of the next `horizon` steps, block
    by block. Only the next one is predicted for, yet more of them teach what answers need and the mass of a single step
    hardly rewards: to hold on to a block that a head has just found, because it comes back to it a few tokens later
    (docs/LOG.md has the figures).
    """
    warm = min(WARM, recording.steps // 2)
    possible = range(warm - 1, recording.steps - 1)
    steps = sorted(rng.sample(possible, min(TARGETS[predictor.arch], len(possible))))
    picked = rng.sample(range(len(recording.layers)), min(count, len(recording.layers)))
    rows_1XQN = recording.scores_XQN[picked, : steps[-1] + 1][None].to(device, torch.float32)
    state_XSNC = predictor.unroll(rows_1XQN, torch.tensor(steps, device=device))[0]
    # The published network was fitted to the next row's scores; the goal is to predict where the mass will be.
    target = recording.mass_XQN if loss == "ce" else recording.scores_XQN
    target_XQN = target[picked].to(device, torch.float32)
    # Near the end of the recording fewer future steps remain.
    target_XSN = torch.stack([target_XQN[:, step + 1 : step + 1 + horizon].amax(1) for step in steps], 1)
    # Sink and recent blocks are excluded before the prediction, and the recent window moves. Steps with the same
    # candidates are computed together, so that the convolution sees the same edges as in decoding.
    cuts = [candidates(recording.first_tokens + step + 1, meta) for step in steps]
    sizes = [len(list(same)) for _, same in groupby(cuts)]
    total, weight = torch.zeros((), device=device), torch.zeros((), device=device)
    parts = zip(dict.fromkeys(cuts), state_XSNC.split(sizes, 1), target_XSN.split(sizes, 1), strict=True)
    for (first, last), cut_state_XSNC, cut_target_XSN in parts:
        if last - first < 2:
            continue
        scores_XSN = network(cut_state_XSNC[:, :, first:last])
        loss_XS, weight_XS = prediction_loss(scores_XSN, cut_target_XSN[:, :, first:last], loss)
        total, weight = total + (loss_XS * weight_XS).sum(), weight + weight_XS.sum()
    return total / weight if weight > 0 else None


def prediction_loss(scores_XSN: Tensor, target_XSN: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Loss of each prediction over its candidate blocks, and its weight in the mean: both [X, S].

    "ce": cross-entropy between softmax(scores) and the normalised target, weighted by the target's peak: a head about
    to look hard at one block matters more than one that looks everywhere a little. "mse": squared error of raw scores,
    as published (AttentionPredictor, arXiv 2502.04077, section 4), which rewards the few largest scores alone.
    """
    if loss == "mse":
        loss_XS = (scores_XSN - target_XSN).square().mean(-1)
        return loss_XS, torch.ones_like(loss_XS)
    sum_XS1 = target_XSN.sum(-1, keepdim=True)
    share_XSN = target_XSN / sum_XS1.clamp_min(1e-6)
    return -(share_XSN * scores_XSN.log_softmax(-1)).sum(-1), target_XSN.amax(-1) + WEIGHT_FLOOR
