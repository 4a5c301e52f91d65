"""TieredCache: a Hugging Face cache whose full-attention layers live in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from attention_predictor.errors import AttachError, IntegrityError
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.watched import watch
from attention_predictor.offload.policies.allocation import PromptAllocation

if TYPE_CHECKING:
    from attention_predictor.offload.runtime import Runtime


class TieredCache(DynamicCache):
    """The cache of an attached model; ``engine.new_cache()`` makes one.

    Sliding, chunked and linear-attention layers keep their stock caches, and so do ``skip_layers``.

    Attributes:
        length_read_by: Number of a layer that computes with the cache's length, which is one for all sequences.
    """

    length_read_by: int | None = None

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(config=runtime.text_config)
        adopt(self, runtime)

    @property
    def room(self) -> int:
        """Tokens that allocated host memory can hold in every tiered layer."""
        rooms = [layer.room for layer in self.layers if isinstance(layer, TieredLayer)]
        return min(rooms) if rooms else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = super().get_seq_length(layer_idx)
        # A model asks before its first layer, such as for the mask. A layer asks within a forward (Llama 4).
        if layer_idx and not isinstance(length, Tensor) and length < super().get_seq_length(0):
            self.length_read_by = layer_idx
        return length

    def crop(self, tokens_to_remove: int) -> None:
        """Crop all layers to one length, even if an interrupted forward left them with different lengths."""
        length = int(self.get_seq_length())
        lengths = layer_lengths(self)
        for number, layer in enumerate(self.layers):
            short = length - lengths.get(number, length)
            remove = min(tokens_to_remove + short, 0) if short else tokens_to_remove
            layer.crop(remove)  # type: ignore[union-attr]  # as transformers' own `crop`, of layers of any kind

    def check_integrity(self) -> None:
        """Check every tiered layer, equal lengths, and the prefetchers; raises ``IntegrityError``."""
        tiered = [layer for layer in self.layers if isinstance(layer, TieredLayer)]
        for layer in tiered:
            layer.check_integrity()
        if unevenness := describe_unevenness(self):
            raise IntegrityError(unevenness)
        for stage in {layer.stage for layer in tiered}:
            stage.prefetcher.check_integrity()


def adopt(cache: Cache, runtime: Runtime) -> None:
    """Turn an empty stock cache into a tiered one in place, since its owner keeps using the same object."""
    layers = cache.layers or DynamicCache(config=runtime.text_config).layers
    if cache.get_seq_length() > 0:
        raise AttachError(
            f"the given cache already holds {cache.get_seq_length()} tokens, stored by another kind of cache; "
            "start from an empty one, or from engine.new_cache()"
        )
    tiered = runtime.tiered_layers
    allocation = PromptAllocation.of(
        runtime.config, [number for number in range(len(layers)) if number in tiered], runtime.ranks
    )
    cache.layers = [
        TieredLayer(runtime, number, allocation) if number in tiered else watch(layer)
        for number, layer in enumerate(layers[: runtime.layers])  # some configurations count an encoder's
    ]
    cache.layer_class_to_replicate = None
    if type(cache) is DynamicCache:
        cache.__class__ = TieredCache  # for its `crop` and `check_integrity`


def is_tiered(cache: Cache) -> bool:
    """Whether the cache has tiered layers."""
    return any(isinstance(layer, TieredLayer) for layer in cache.layers)


def layer_lengths(cache: Cache) -> dict[int, int]:
    """Tokens in each layer that counts them."""
    return {
        number: int(layer.get_seq_length())  # some versions of transformers keep a tensor
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, (TieredLayer, DynamicLayer))
    }


def describe_unevenness(cache: Cache) -> str | None:
    """What is wrong and how to go on if layers differ in length after an interrupted forward; else ``None``."""
    lengths = layer_lengths(cache).values()
    if len(set(lengths)) < 2:
        return None
    shortest = min(lengths)
    return (
        f"the layers of the cache hold from {shortest} to {max(lengths)} tokens: a forward was interrupted; go on with "
        f"cache.crop({shortest - int(cache.get_seq_length())}), which leaves {shortest} in each, or with a new cache"
    )


def full_attention_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of the layers that attend to the whole context and cache it."""
    return tuple(
        number for number, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer
    )
