"""All predictors: importing this module makes every architecture and rule loadable by name."""

import torch

from attention_predictor.predictor import incremental
from attention_predictor.predictor.base import ARCHITECTURES, AttentionPredictor, architecture
from attention_predictor.predictor.filters import FilterPredictor
from attention_predictor.predictor.history import ScoreHistory, why_no_kernel
from attention_predictor.predictor.rules import ExponentialAverage, LastRow, WindowMean
from attention_predictor.predictor.window import WindowPredictor


def new_history(
    predictor: AttentionPredictor, *, batch: int, kv_heads: int, device: torch.device | str, kernels: bool = False
) -> ScoreHistory:
    """The fastest history for this predictor in one layer, by kernels if allowed and available."""
    shape = {"batch": batch, "kv_heads": kv_heads}
    if isinstance(predictor, WindowPredictor):
        kernel = kernels and incremental.why_no_kernel(predictor, device) is None
        return incremental.IncrementalHistory(predictor, **shape, device=device, kernel=kernel)
    kernel = kernels and why_no_kernel(predictor, device) is None
    return ScoreHistory(predictor, **shape, device=device, kernel=kernel)


__all__ = [
    "ARCHITECTURES",
    "AttentionPredictor",
    "ExponentialAverage",
    "FilterPredictor",
    "LastRow",
    "WindowMean",
    "WindowPredictor",
    "architecture",
    "new_history",
]
