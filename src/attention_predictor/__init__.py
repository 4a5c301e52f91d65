"""Long-context Hugging Face models with their KV cache in CPU memory and a learned predictor fetching ahead."""

from attention_predictor.offload.attach import attach
from attention_predictor.offload.cache import TieredCache
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.predictor.errors import (
    AttachError,
    AttentionPredictorError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DataError,
    FetchError,
    HostMemoryError,
    IntegrityError,
)
from attention_predictor.predictor.model import AttentionPredictor

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "AttentionPredictor",
    "AttentionPredictorError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "Engine",
    "FetchError",
    "HostMemoryError",
    "IntegrityError",
    "OffloadConfig",
    "TieredCache",
    "attach",
]
