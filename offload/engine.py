"""Engine: what attaching to a model gives; owns the prefetcher, the predictor and the figures."""

from __future__ import annotations

import inspect
import logging
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from attention_predictor.offload.cache import (
    TieredCache,
    adopt,
    describe_unevenness,
    full_attention_layers,
    is_tiered,
)
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.host_store import HostStore
from attention_predictor.offload.layer import TieredLayer
from attention_predictor.offload.prefetch import make_prefetcher
from attention_predictor.offload.stats import Stats
from attention_predictor.predictor.errors import AttachError, ContextLengthError, HostMemoryError
from attention_predictor.predictor.model import AttentionPredictor

logger = logging.getLogger(__name__)


class Engine:
    """An attached model. Use as a context manager, or call ``detach``.

    Attributes:
        config: The settings.
        stats: What happened so far.
        predictor: The loaded predictor, ``None`` for policies without one.
        tiered_layers: Numbers of the layers whose cache is in host memory.
    """

    def __init__(self, model: PreTrainedModel, config: OffloadConfig, predictor: AttentionPredictor | None) -> None:
        self.model = model
        self.config = config
        self.predictor = predictor
        self.text_config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        skipped = set(config.skip_layers)
        self.tiered_layers = frozenset(full_attention_layers(self.text_config)) - skipped
        self.stats = Stats()
        self.prefetcher = make_prefetcher(config.prefetch, self.device)
        self.attached = False

    # ---- use ---------------------------------------------------------------------------------------------------------

    def new_cache(self) -> TieredCache:
        """An empty cache for direct ``model(ids, past_key_values=cache)`` calls."""
        self.check_open()
        return TieredCache(self)

    def check_fits(self, *, batch: int, tokens: int, cached: int = 0) -> None:
        """Refuse, before any work is done, what the model or the host memory can't hold.

        Args:
            batch: Sequences.
            tokens: Length that each will have, cached tokens included.
            cached: Tokens of them that are in the cache already.

        Raises:
            ContextLengthError: More tokens than the model has positions.
            HostMemoryError: The blocks would not fit in ``config.host_memory``, or in what the system has available.
        """
        check_positions(self.text_config, tokens)
        needed = self._host_bytes(batch, tokens)
        if self.config.host_memory is not None:
            limit, source = self.config.host_memory, "host_memory allows"
        elif cached and tokens - cached <= self.config.slab_blocks * self.config.block_size:
            return  # at most one slab a layer more; asking the system at every token would cost more than it tells
        else:
            limit = psutil.virtual_memory().available + (self._host_bytes(batch, cached) if cached else 0)
            source = "the system has available"
        if needed > limit:
            raise HostMemoryError(
                f"the KV cache of {batch} × {tokens} tokens needs {needed / 2**30:.2f} GiB of host memory: "
                f"{source} {limit / 2**30:.2f} GiB"
            )

    def _host_bytes(self, batch: int, tokens: int) -> int:
        config = self.text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layer_bytes = HostStore.bytes_needed(
            tokens,
            batch=batch,
            kv_heads=heads,
            head_dim=head_dim,
            dtype=self.model.dtype,
            block_size=self.config.block_size,
            slab_blocks=self.config.slab_blocks,
        )
        return len(self.tiered_layers) * layer_bytes

    def detach(self) -> None:
        """Give the model back as it was. Caches made by this engine can't be used any more. Idempotent."""
        if not self.attached:
            return
        self.attached = False
        self._hook.remove()
        for config, implementation in self._implementations:
            config._attn_implementation_internal = implementation
        del self.model._attention_predictor_engine
        self.prefetcher.close()

    def __enter__(self) -> Engine:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict) -> Engine:
        return self  # a deep-copied cache belongs to the same engine

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return (
            f"Engine({type(self.model).__name__}, {state}, policy={self.config.policy!r}, budget={self.config.budget})"
        )

    # ---- what attach, caches and layers ask --------------------------------------------------------------------------

    def check_open(self) -> None:
        if not self.attached:
            raise AttachError("this engine is detached from its model; attach again")

    def is_first(self, layer: TieredLayer) -> bool:
        """Whether this is the layer by which steps are counted."""
        return layer.number == min(self.tiered_layers)

    def note_fallback(self, message: str) -> None:
        """Something runs otherwise than asked for: logged once, counted in ``stats.fallbacks``."""
        if message not in self.stats.fallbacks:
            logger.warning(message)
        self.stats.fallbacks[message] += 1

    def hook(self) -> None:
        """Install the one hook on the model; ``attach`` has set the attention function."""
        self._parameters = list(inspect.signature(self.model.forward).parameters)
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model._attention_predictor_engine = self  # type: ignore[assignment]  # not a module of the model
        self.attached = True

    def remember(self, implementations: list[tuple[Any, str | None]]) -> None:
        """The attention implementation of every config of the model, for ``detach``."""
        self._implementations = implementations

    def _before_forward(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Make the forward's cache a tiered one, and refuse what can't work before anything is computed."""
        kwargs = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.text_config, "use_cache", False)
        training = model.training and torch.is_grad_enabled()
        if cache is None and use_cache and not training:
            cache = kwargs["past_key_values"] = self.new_cache()
        if cache is not None:
            self._check_cache(cache)
            if self.tiered_layers and not is_tiered(cache):
                adopt(cache, self)
            batch, new = _batch_and_length(kwargs)
            cached = cache.get_seq_length()
            self.check_fits(batch=batch, tokens=cached + new, cached=cached)
        return (), kwargs

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            kind = type(cache).__name__ + ("(offloading=True)" if isinstance(cache, DynamicCache) else "")
            raise AttachError(
                f"an attached model does not take a {kind}: allowed are an empty DynamicCache, a cache of "
                "engine.new_cache(), or none; set no cache_implementation"
            )
        for layer in cache.layers:
            if isinstance(layer, TieredLayer):
                if layer.engine is not self:
                    raise AttachError("the cache belongs to another engine; make one with engine.new_cache()")
                layer.check_attended()  # before unevenness, which cropping could mend
        if is_tiered(cache) and (unevenness := describe_unevenness(cache)):
            raise AttachError(unevenness)


def check_positions(text_config: PreTrainedConfig, tokens: int) -> None:
    """Raise ``ContextLengthError`` if the model has positions for fewer tokens."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ContextLengthError(f"a context of {tokens} tokens: the model has positions for {positions}")


def _batch_and_length(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sequences and new tokens of a forward call."""
    for name in ("inputs_embeds", "input_ids"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[0], kwargs[name].shape[1]
    raise ValueError("a forward call needs input_ids or inputs_embeds")
