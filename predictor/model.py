"""All predictors under one roof: importing this module makes every architecture and rule loadable by name."""

import torch

from attention_predictor.predictor import streaming
from attention_predictor.predictor.base import ARCHITECTURES, AttentionPredictor, architecture
from attention_predictor.predictor.filters import FilterPredictor
from attention_predictor.predictor.history import ScoreHistory, why_no_kernel
from attention_predictor.predictor.rules import ExponentialAverage, LastRow, WindowMean
from attention_predictor.predictor.window import WindowPredictor


def new_history(
    predictor: AttentionPredictor, *, batch: int, kv_heads: int, device: torch.device | str, kernels: bool = False
) -> ScoreHistory:
    """What the predictor must remember of one layer, of the kind that evaluates it fastest; by kernels if allowed."""
    shape = {"batch": batch, "kv_heads": kv_heads}
    if isinstance(predictor, WindowPredictor):
        kernel = kernels and streaming.why_no_kernel(predictor, device) is None
        return streaming.StreamedHistory(predictor, **shape, device=device, kernel=kernel)
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
