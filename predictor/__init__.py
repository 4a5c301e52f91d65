"""The learned model and what it reads; knows nothing of caches or of Hugging Face."""

from attention_predictor.predictor.model import AttentionPredictor, FilterPredictor, WindowPredictor

__all__ = ["AttentionPredictor", "FilterPredictor", "WindowPredictor"]
