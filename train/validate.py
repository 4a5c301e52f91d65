"""Evaluates a predictor on recorded histories: the attention mass on the blocks it would choose.

Suffixes: X records (sequences × layers × KV heads), Q steps, S chosen steps, N blocks, M candidates, C state channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.predictor.scores import recovery
from attention_predictor.train.dataset import Recording

BUDGETS = (256, 512, 1024)  # tokens per KV head, sink and recent included
STEPS = 12  # steps evaluated in each document, evenly spaced
RECORDS = 32  # heads evaluated in each document, evenly spaced
WARM = 64  # rows that predictors observe before they are evaluated

METRICS = ("mse", "recovery", "relative_recovery", "relative_recovery_ahead", "overlap")
Metrics = dict[str, dict[str, float]]


def candidates(tokens: int, meta: Mapping[str, Any]) -> tuple[int, int]:
    """Range (first, end) of the candidates of a step over `tokens` tokens: all but sink and recent."""
    return meta["sink"] // meta["block_size"], max(tokens - meta["recent"], 0) // meta["block_size"]


def room(tokens: int, meta: Mapping[str, Any], budget: int) -> int:
    """Number of candidates within a budget, beside sink and recent."""
    first, last = candidates(tokens, meta)
    return budget // meta["block_size"] - (ceil_div(tokens, meta["block_size"]) - (last - first))


def attended(scores_XM: Tensor, choice: int, first: int, n_blocks: int) -> Tensor:
    """The blocks of a step, bool [X, N]: sink, recent, and the candidates with the highest scores.

    Args:
        scores_XM: Scores of the candidates.
        choice: Number of candidates to choose.
        first: Number of the first candidate.
        n_blocks: N.
    """
    chosen_XM = torch.zeros_like(scores_XM, dtype=torch.bool).scatter_(-1, scores_XM.topk(choice).indices, True)
    last = first + scores_XM.shape[-1]
    return torch.nn.functional.pad(chosen_XM, (first, n_blocks - last), value=True)


@torch.no_grad()
def validate(
    predictor: AttentionPredictor,
    recordings: Iterable[Recording],
    meta: Mapping[str, Any],
    device: torch.device,
    horizon: int = 1,
) -> Metrics:
    """Metrics averaged over records and steps: `{metric: {budget: value}}`, and `{"mse": {"share": value}}`.

    Evaluated ahead: state after row t, mass of row t + 1.

    - recovery: share of the mass on sink, recent and chosen blocks. relative_recovery: its ratio to the best choice of
      that size.
    - relative_recovery_ahead: the same ratio where each block counts with the largest mass of its next `horizon` steps.
    - overlap: share of the best choice's blocks that were chosen.
    - mse: squared error of the predicted share of the candidates' mass, a block. Scores that are no logits are
      normalised as they are.

    Steps that fit a budget whole are not counted for it; a budget without any step is left out.
    """
    found: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
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
            scores_XM = predictor(state_XSNC[None, :, index, first:last])[0]
            mass_XN = mass_XQN[:, step + 1]
            ahead_XN = mass_XQN[:, step + 1 : step + 1 + horizon].amax(1)
            share_XM = scores_XM.softmax(-1) if predictor.gives_logits else _normalised(scores_XM.clamp_min(0))
            found["mse", "share"].append((share_XM - _normalised(mass_XN[:, first:last])).square().mean(-1))
            for budget in BUDGETS:
                choice = room(tokens, meta, budget)
                if 0 < choice < last - first:
                    chosen_XN, best_XN, best_ahead_XN = (
                        attended(x_XM, choice, first, mass_XN.shape[-1])
                        for x_XM in (scores_XM, mass_XN[:, first:last], ahead_XN[:, first:last])
                    )
                    now = recovery(mass_XN, chosen_XN, best_XN)
                    found["recovery", str(budget)].append(now.share)
                    found["relative_recovery", str(budget)].append(now.relative)
                    ahead = recovery(ahead_XN, chosen_XN, best_ahead_XN)
                    found["relative_recovery_ahead", str(budget)].append(ahead.relative)
                    both_XM = (chosen_XN & best_XN)[:, first:last]
                    found["overlap", str(budget)].append(both_XM.sum(-1) / choice)
    metrics: Metrics = {name: {} for name in METRICS}
    for (metric, column), values in found.items():
        metrics[metric][column] = float(torch.cat(values).mean())
    return metrics


def why_not_judged(recordings: Iterable[Recording], meta: Mapping[str, Any]) -> str:
    """What documents lack for which ``validate`` has found no recovery."""
    longest = max(recording.first_tokens + recording.steps - 1 for recording in recordings)
    always = meta["sink"] + meta["recent"]
    least = next((budget for budget in BUDGETS if budget >= always + 2 * meta["block_size"]), None)
    if least is None:
        return f"sink and recent are {always} tokens; judging a predictor needs fewer than {BUDGETS[-1]}"
    return f"its held-out documents have at most {longest} tokens; judging a predictor needs more than {least}"


def _normalised(x_XM: Tensor) -> Tensor:
    return x_XM / x_XM.sum(-1, keepdim=True).clamp_min(1e-9)


def mean_ahead(metrics: Metrics) -> float:
    """Relative recovery ahead, averaged over budgets: the criterion for the best checkpoint.

    Recovery of the next step alone would be highest early in training, since the target reaches further.
    """
    by_budget = metrics["relative_recovery_ahead"]
    return sum(by_budget.values()) / len(by_budget)


def spread(first: int, end: int, count: int) -> list[int]:
    """At most `count` integers from first to end − 1, evenly spaced, both ends included."""
    first = max(first, 0)
    return sorted({round(x) for x in torch.linspace(first, end - 1, min(count, end - first)).tolist()})
