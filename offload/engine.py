"""Engine: what attaching to a model gives; owns the prefetcher, the predictor and the figures."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from attention_predictor.offload.allocation import first_budgets
from attention_predictor.offload.cache import (
    TieredCache,
    adopt,
    describe_unevenness,
    full_attention_layers,
    is_tiered,
)
from attention_predictor.offload.compiled import CompiledLayers
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.generation import Sampling, generate
from attention_predictor.offload.graph import CaptureError, Graphed, is_ready, is_step, why_not
from attention_predictor.offload.host_store import HostStore
from attention_predictor.offload.layer import TieredLayer
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.prefetch import make_prefetcher
from attention_predictor.offload.stats import DeviceCounts, Stats
from attention_predictor.predictor.errors import AttachError, ContextLengthError, HostMemoryError
from attention_predictor.predictor.model import AttentionPredictor

logger = logging.getLogger(__name__)


class Engine:
    """An attached model. Use as a context manager, or call ``detach``.

    Attributes:
        config: The settings.
        predictor: The loaded predictor, ``None`` for policies without one.
        tiered_layers: Numbers of the layers whose cache is in host memory.
        first_budgets: Tokens a step may attend to in each of them, until a prompt decides otherwise.
    """

    def __init__(self, model: PreTrainedModel, config: OffloadConfig, predictor: AttentionPredictor | None) -> None:
        self.model = model
        self.config = config
        self.predictor = predictor
        self.text_config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        skipped = set(config.skip_layers)
        self.tiered_layers = frozenset(full_attention_layers(self.text_config)) - skipped
        kv_heads = getattr(self.text_config, "num_key_value_heads", None)
        budgets = first_budgets(config, len(self.tiered_layers), kv_heads)
        self.first_budgets = dict(zip(sorted(self.tiered_layers), budgets, strict=True))
        # But for what captured steps have counted since: to look there waits for the device.
        self.stats_kept = Stats(evicts=policy_class(config.policy).evicts)
        self.counts = DeviceCounts(self.device, self.text_config.num_hidden_layers)
        self.prefetcher = make_prefetcher(config.prefetch, self.device)
        self.attached = False
        self._graphed: weakref.WeakKeyDictionary[TieredCache, Graphed] = weakref.WeakKeyDictionary()

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """What happened so far."""
        self.counts.move_into(self.stats_kept)
        return self.stats_kept

    def new_cache(self) -> TieredCache:
        """An empty cache for direct ``model(ids, past_key_values=cache)`` calls."""
        self.check_open()
        return TieredCache(self)

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prefill_chunk_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue prompts by the shortest loop there is: tokens are chosen on the device, for the next step there.

        ``model.generate`` can do more, and waits for the device at every token.

        Args:
            input_ids: int64 ``[B, T]``; shorter prompts are padded on the left, with zeros in ``attention_mask``.
            max_new_tokens: New tokens at most.
            temperature, top_k, top_p: ``Sampling``; a temperature of 0 is greedy.
            eos_token_id: Ends a sequence; as the model's generation config says, if ``None``.
            pad_token_id: Fills up sequences that have ended before others.
            prefill_chunk_size: Tokens of the prompt that go through the model at once; all, if ``None``.
            seed: Of the random numbers; torch's own state, if ``None``.

        Returns:
            int64 ``[B, T + new]``, prompts included.

        Raises:
            ConfigError: An argument that is not allowed.
            ContextLengthError, HostMemoryError: What ``check_fits`` refuses.
        """
        self.check_open()
        settings = self.model.generation_config
        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            eos_token_id=settings.eos_token_id if eos_token_id is None else eos_token_id,
            pad_token_id=settings.pad_token_id if pad_token_id is None else pad_token_id,
            prefill_chunk_size=prefill_chunk_size,
            seed=seed,
        )

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
        if self._own_forward is not None:
            self.model.__dict__.update(self._own_forward)
            if not self._own_forward:
                del self.model.forward
        for graphed in list(self._graphed.values()):
            graphed.leave()
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
        if message not in self.stats_kept.fallbacks:
            logger.warning(message)
        self.stats_kept.fallbacks[message] += 1

    def hook(self) -> None:
        """Install the one hook on the model; ``attach`` has set the attention function."""
        self._parameters = list(inspect.signature(self.model.forward).parameters)
        self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._own_forward: dict[str, Any] | None = None
        self._captures = True  # until a capture has failed
        if self.config.prefetch == "graph" or (self.config.prefetch == "auto" and self.device.type == "cuda"):
            # Of this model alone. A forward hook could change a result, but not keep the forward from being computed.
            self._own_forward = {k: v for k, v in self.model.__dict__.items() if k == "forward"}
            plain = self._forward = self.model.forward
            self._compiled = CompiledLayers(self.model) if self.config.compile else None

            @functools.wraps(plain)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._graph_or_forward(*args, **kwargs)

            self.model.forward = forward
        self.model._attention_predictor_engine = self  # type: ignore[assignment]  # not a module of the model
        self.attached = True

    def _graph_or_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: captured where it is a step that can be."""
        cache = kwargs.get("past_key_values")
        if args or not isinstance(cache, TieredCache):
            return self._forward(*args, **kwargs)
        graphed = self._graphed.get(cache)
        if self._captures and is_step(kwargs) and is_ready(cache):
            reason = None
            if graphed is None or not graphed.entered:
                reason = why_not(cache, kwargs.get("attention_mask"), graphed)
            if reason is None:
                if graphed is None:
                    graphed = self._graphed[cache] = Graphed(cache, self._forward, self._compiled)
                try:
                    return graphed.run(cache, kwargs)
                except CaptureError as error:
                    self._captures = False
                    reason = f"{type(self.model).__name__} can't be captured: {error}"
            self.note_fallback(f"the prefetch thread in place of captured steps: {reason}")
        if graphed is not None:
            graphed.leave()
        return self._forward(**kwargs)

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
