"""Predictors, their state, and the key sketch. Independent of caches and of Hugging Face models.

Importing the package imports no torch: its names load when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention_predictor.lazy import lazy_names
from attention_predictor.predictor.prompt_rows import PROMPT_ROWS

if TYPE_CHECKING:
    from attention_predictor.predictor.model import AttentionPredictor as AttentionPredictor
    from attention_predictor.predictor.model import FilterPredictor as FilterPredictor
    from attention_predictor.predictor.model import WindowPredictor as WindowPredictor

_MODULES = dict.fromkeys(("AttentionPredictor", "FilterPredictor", "WindowPredictor"), f"{__name__}.model")

__all__ = ["PROMPT_ROWS", *_MODULES]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
