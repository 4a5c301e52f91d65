"""All predictors under one roof: importing this module makes every architecture and rule loadable by name."""

from attention_predictor.predictor.base import ARCHITECTURES, AttentionPredictor, architecture
from attention_predictor.predictor.filters import FilterPredictor
from attention_predictor.predictor.rules import ExponentialAverage, LastRow, WindowMean
from attention_predictor.predictor.window import WindowPredictor

__all__ = [
    "ARCHITECTURES",
    "AttentionPredictor",
    "ExponentialAverage",
    "FilterPredictor",
    "LastRow",
    "WindowMean",
    "WindowPredictor",
    "architecture",
]
