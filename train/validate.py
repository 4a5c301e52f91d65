"""Recovery of a predictor on recorded histories: the attention mass that its choice of blocks would hold.

Suffixes: X records (layers × KV heads), Q steps, S chosen steps, N blocks, C state channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.dataset import Recording

BUDGETS = (256, 512, 1024)  # tokens per KV head, sink and recent included
STEPS = 12  # steps judged in each document, evenly spread
RECORDS = 32  # heads judged in each document, evenly spread
WARM = 64  # rows that predictors have seen before they are judged


def candidates(tokens: int, meta: Mapping[str, Any]) -> tuple[int, int]:
    """Blocks first to last − 1 that a step over `tokens` tokens may choose from: all but sink and recent."""
    return meta["sink"] // meta["block_size"], max(tokens - meta["recent"], 0) // meta["block_size"]


@torch.no_grad()
def recovery(
    predictor: AttentionPredictor,
    recordings: Iterable[Recording],
    meta: Mapping[str, Any],
    device: torch.device,
) -> dict[str, float]:
    """Mass on sink, recent and chosen blocks relative to the best choice: the mean by budget.

    Judged ahead: state after row t, mass of row t + 1. Steps that fit a budget whole don't count for it; a budget
    without any step is left out.
    """
    shares: dict[int, list[Tensor]] = {budget: [] for budget in BUDGETS}
    for recording in recordings:
        steps = spread(min(WARM, recording.steps // 2) - 1, recording.steps - 1, STEPS)
        picked = spread(0, len(recording.layers), RECORDS)
        rows_1XQN = recording.scores_XQN[picked][None].to(device, torch.float32)
        mass_XQN = recording.mass_XQN[picked].to(device, torch.float32)
        state_XSNC = predictor.unroll(rows_1XQN, torch.tensor(steps, device=device))[0]
        for index, step in enumerate(steps):
            tokens = recording.first_tokens + step + 1
            first, last = candidates(tokens, meta)
            if first >= last:
                continue
            scores_XN = predictor(state_XSNC[None, :, index, first:last])[0]
            mass_XN = mass_XQN[:, step + 1]
            kept_X = mass_XN.sum(-1) - mass_XN[:, first:last].sum(-1)
            always = -(-tokens // meta["block_size"]) - (last - first)
            for budget in BUDGETS:
                choice = budget // meta["block_size"] - always
                if 0 < choice < last - first:
                    chosen_XK = scores_XN.topk(choice).indices
                    found_X = kept_X + mass_XN[:, first:last].gather(-1, chosen_XK).sum(-1)
                    best_X = kept_X + mass_XN[:, first:last].topk(choice).values.sum(-1)
                    shares[budget].append(found_X / best_X.clamp_min(1e-9))
    return {str(budget): float(torch.cat(found).mean()) for budget, found in shares.items() if found}


def spread(first: int, end: int, count: int) -> list[int]:
    """At most `count` whole numbers from first to end − 1, evenly spread, both ends included."""
    first = max(first, 0)
    return sorted({round(x) for x in torch.linspace(first, end - 1, min(count, end - first)).tolist()})
