"""What a predictor is trained for: to rank, one step ahead, the blocks that will hold the attention mass.

Suffixes: X records (layers × KV heads), Q steps, S chosen steps, N blocks, C state channels.
"""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.shards import Recording
from attention_predictor.train.validate import WARM, candidates

LOSSES = ("ce", "mse")
SEGMENT = 64  # steps after the warm rows that one segment reaches over
# Steps of a segment learned from at once. Neighbouring steps teach the same; the window network shares no work.
TARGETS = {"paper": 2, "time-filters": 16}


def segment_loss(
    predictor: AttentionPredictor,
    recording: Recording,
    count: int,
    meta: dict[str, Any],
    loss: str,
    horizon: int,
    noise: float,
    rng: random.Random,
    device: torch.device,
) -> Tensor | None:
    """Loss of `count` random records over one random segment of steps; None if it has no candidates.

    The target is the mean over the next `horizon` steps. Only the next one is predicted for, yet more of them teach
    what task accuracy needs and the mass of a single step hardly rewards: to hold on to a block that a head has
    just found, because it comes back to it a few tokens later (docs/LOG.md has the figures).

    `noise` is the standard deviation of a normal error added to the logarithm of the scores that the predictor
    is shown: recorded rows are exact, but those of sparse decoding are estimates from the key sketch.
    """
    warm = min(WARM, recording.steps // 2)
    start = rng.randint(0, max(0, recording.steps - 1 - warm - SEGMENT // 2))
    last_step = min(recording.steps - 1, start + warm + SEGMENT) - 1
    possible = range(start + warm - 1, last_step + 1)
    steps = sorted(rng.sample(possible, min(TARGETS[predictor.arch], len(possible))))
    picked = rng.sample(range(len(recording.layers)), min(count, len(recording.layers)))
    rows_1XQN = recording.scores_XQN[picked, start : last_step + 1][None].to(device, torch.float32)
    if noise > 0:
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        error_1XQN = noise * torch.randn(rows_1XQN.shape, generator=generator, device=device)
        rows_1XQN = (rows_1XQN * error_1XQN.exp()).clamp_max(1.0)
    state_XSNC = predictor.unroll(rows_1XQN, torch.tensor(steps, device=device) - start)[0]
    # The published network was fitted to the next row's scores; what is wanted is where the mass will be.
    target = recording.mass_XQN if loss == "ce" else recording.scores_XQN
    target_XQN = target[picked].to(device, torch.float32)
    # Towards the end of the recording there are fewer steps left to average.
    target_XSN = torch.stack([target_XQN[:, step + 1 : step + 1 + horizon].mean(1) for step in steps], 1)
    # Sink and recent are cut off before the prediction, and recent moves: steps of one cut go together, so
    # that the edges that the convolution sees are those of decoding.
    cuts = [candidates(recording.first_tokens + step + 1, meta) for step in steps]
    sizes = [len(list(same)) for _, same in groupby(cuts)]
    losses, weights = [], []
    parts = zip(dict.fromkeys(cuts), state_XSNC.split(sizes, 1), target_XSN.split(sizes, 1), strict=True)
    for (first, last), cut_state_XSNC, cut_target_XSN in parts:
        if last - first < 2:
            continue
        scores_XSN = predictor(cut_state_XSNC[:, :, first:last])
        losses.append(prediction_loss(scores_XSN, cut_target_XSN[:, :, first:last], loss))
        weights.append(cut_target_XSN.shape[1])
    if not losses:
        return None
    return torch.stack(losses) @ torch.tensor(weights, dtype=torch.float32, device=device) / sum(weights)


def prediction_loss(scores_XSN: Tensor, target_XSN: Tensor, loss: str) -> Tensor:
    """Mean over records and steps of one prediction's loss over its candidate blocks.

    "ce": cross-entropy between softmax(scores) and the normalised true mass. "mse": squared error of raw
    scores, as published (AttentionPredictor, arXiv 2502.04077, section 4), which rewards the few largest scores
    alone.
    """
    if loss == "mse":
        return F.mse_loss(scores_XSN, target_XSN)
    share_XSN = target_XSN / target_XSN.sum(-1, keepdim=True).clamp_min(1e-6)
    return -(share_XSN * scores_XSN.log_softmax(-1)).sum(-1).mean()
