"""TieredCache: a Hugging Face cache whose full-attention layers live in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from attention_predictor.offload.layer import TieredLayer
from attention_predictor.predictor.errors import AttachError

if TYPE_CHECKING:
    from attention_predictor.offload.engine import Engine


class TieredCache(DynamicCache):
    """Give it as ``past_key_values`` to the attached model; ``engine.new_cache()`` makes one.

    Sliding, chunked and linear-attention layers keep their stock caches, and so do ``skip_layers``.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(config=engine.text_config)
        adopt(self, engine)

    def check_integrity(self) -> None:
        """Check every tiered layer; raises ``IntegrityError``."""
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.check_integrity()


def adopt(cache: Cache, engine: Engine) -> None:
    """Turn an empty stock cache into a tiered one, in place: whoever made it keeps using the same object."""
    layers = cache.layers or DynamicCache(config=engine.text_config).layers
    if cache.get_seq_length() > 0:
        raise AttachError(
            f"the cache given holds {cache.get_seq_length()} tokens of another kind of cache; "
            "start from an empty one, or from engine.new_cache()"
        )
    cache.layers = [
        TieredLayer(engine, number) if number in engine.tiered_layers else layer for number, layer in enumerate(layers)
    ]
    cache.layer_class_to_replicate = None


def is_tiered(cache: Cache) -> bool:
    """Whether the cache has tiered layers."""
    return any(isinstance(layer, TieredLayer) for layer in cache.layers)


def full_attention_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of the layers that attend to the whole context and cache it."""
    return tuple(
        number for number, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer
    )
