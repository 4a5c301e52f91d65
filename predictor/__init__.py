"""The learned model and what it reads; knows nothing of caches or of Hugging Face.

Importing the package imports no torch: its names load when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention_predictor.lazy import lazy_names

if TYPE_CHECKING:
    from attention_predictor.predictor.model import AttentionPredictor as AttentionPredictor
    from attention_predictor.predictor.model import FilterPredictor as FilterPredictor
    from attention_predictor.predictor.model import WindowPredictor as WindowPredictor

PROMPT_ROWS = 64  # rows of a prompt that start a history: H of the published method

_MODULES = dict.fromkeys(("AttentionPredictor", "FilterPredictor", "WindowPredictor"), f"{__name__}.model")

__all__ = ["PROMPT_ROWS", *_MODULES]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
