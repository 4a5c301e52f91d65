"""Long-context Hugging Face models with their KV cache in CPU memory and a learned predictor fetching ahead.

``import attention_predictor`` imports neither torch nor transformers: names load when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention_predictor.lazy import lazy_names

if TYPE_CHECKING:
    from attention_predictor.errors import AttachError as AttachError
    from attention_predictor.errors import AttentionPredictorError as AttentionPredictorError
    from attention_predictor.errors import CheckpointError as CheckpointError
    from attention_predictor.errors import ConfigError as ConfigError
    from attention_predictor.errors import ContextLengthError as ContextLengthError
    from attention_predictor.errors import DataError as DataError
    from attention_predictor.errors import FetchError as FetchError
    from attention_predictor.errors import HostMemoryError as HostMemoryError
    from attention_predictor.errors import IntegrityError as IntegrityError
    from attention_predictor.errors import LogitsError as LogitsError
    from attention_predictor.errors import WriteError as WriteError
    from attention_predictor.offload.config import OffloadConfig as OffloadConfig
    from attention_predictor.offload.engine import Engine as Engine
    from attention_predictor.offload.generation import Sampling as Sampling
    from attention_predictor.offload.hf.attach import attach as attach
    from attention_predictor.offload.hf.cache import TieredCache as TieredCache
    from attention_predictor.offload.requests.prefix import Prefix as Prefix
    from attention_predictor.offload.requests.request import Request as Request
    from attention_predictor.predictor.model import AttentionPredictor as AttentionPredictor

__version__ = "0.1.0"

_MODULES = {
    "attach": "offload.hf.attach",
    "TieredCache": "offload.hf.cache",
    "OffloadConfig": "offload.config",
    "Engine": "offload.engine",
    "Prefix": "offload.requests.prefix",
    "Request": "offload.requests.request",
    "Sampling": "offload.generation",
    "AttentionPredictor": "predictor.model",
    **dict.fromkeys(
        (
            "AttachError",
            "AttentionPredictorError",
            "CheckpointError",
            "ConfigError",
            "ContextLengthError",
            "DataError",
            "FetchError",
            "HostMemoryError",
            "IntegrityError",
            "LogitsError",
            "WriteError",
        ),
        "errors",
    ),
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy_names(__name__, {name: f"{__name__}.{module}" for name, module in _MODULES.items()})
