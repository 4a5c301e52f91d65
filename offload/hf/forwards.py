"""Forwards: wraps each forward of an attached model.

A forward is offloaded, or runs as stock with a note in the stats, or is refused with one line. Before it, its cache
becomes a tiered one. After it, each tiered layer must have stored and attended to exactly its tokens.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor.errors import AttachError, ContextLengthError
from attention_predictor.offload.hf.attachment import Attachment
from attention_predictor.offload.hf.cache import TieredCache, adopt, describe_unevenness, is_tiered
from attention_predictor.offload.hf.fixed_layer import compare_masks
from attention_predictor.offload.hf.graph import CapturedSteps
from attention_predictor.offload.hf.layer import GRADIENTS_LOST, TieredLayer
from attention_predictor.offload.hf.versions import CACHE_NAMES, cache_argument, checkpointed
from attention_predictor.offload.runtime import Runtime

Forward = Callable[..., Any]


@dataclass
class _Call:
    """The forward in progress on this thread. ``tokens``: sequences and new tokens that the decoder received."""

    tokens: tuple[int, int] | None = None


class Forwards:
    """Wraps the forwards of a model, its base model and its decoder; the outermost call does the work."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        runtime: Runtime,
        attachment: Attachment,
        captured: CapturedSteps | None,
    ) -> None:
        self.model, self.decoder, self.runtime, self.attachment = model, decoder, runtime, attachment
        self.captured = captured
        self.text_config = runtime.text_config
        self._thread = threading.local()

    def install(self) -> None:
        """Replace the forwards of these module objects; the attachment restores them."""
        modules = {id(module): module for module in (self.model, self.model.base_model, self.decoder)}
        names = {key: cache_argument(module.forward) for key, module in modules.items()}
        known = next((name for name in names.values() if name is not None), None)
        for key, module in modules.items():
            forward = module.forward
            takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
            name = names[key] or (known if takes_any else None)
            if name is not None:
                self.attachment.attribute(module, "forward", self._around(module, forward, name))
            elif module is self.model:
                raise AttachError(
                    f"{type(module).__name__} of transformers {transformers.__version__} has no known cache argument "
                    f"({', '.join(CACHE_NAMES)}): this model or version is not supported"
                )

    def _around(self, module: nn.Module, own: Forward, cache_name: str) -> Forward:
        parameters = list(inspect.signature(own).parameters)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(parameters, args, strict=False)) | kwargs
            call: _Call | None = getattr(self._thread, "call", None)
            if call is not None:  # called within another wrapped forward
                if module is self.decoder:
                    call.tokens = _batch_and_length(given)
                return own(**given)
            self._thread.call = call = _Call()
            try:
                return self._run(module, own, cache_name, given, call)
            finally:
                self._thread.call = None

        return forward

    def _run(self, module: nn.Module, own: Forward, cache_name: str, given: dict[str, Any], call: _Call) -> Any:
        cache = _take_cache(given)
        if self._runs_as_stock(cache, given):
            if cache is not None:
                given[cache_name] = cache
            with self.attachment.turns.take(stock=True):
                return own(**given)
        given[cache_name] = cache if cache is not None else DynamicCache(config=self.text_config)
        with self.attachment.turns.take(stock=False):
            return self._offload(module, own, given[cache_name], given, call)

    def _offload(self, module: nn.Module, own: Forward, cache: Any, given: dict[str, Any], call: _Call) -> Any:
        batch, new = call.tokens = _batch_and_length(given)
        before = self._prepare(cache, batch, new, given)
        if self.captured is not None and module is self.model:
            result = self.captured.step(cache, given)
            if result is not None:
                return result
        output = own(**given)
        self._check_done(cache, before, *call.tokens)
        compare_masks(cache, self.text_config, before + call.tokens[1])
        return output

    # ---- before ----------------------------------------------------------------------------------------------------

    def _runs_as_stock(self, cache: Any, given: dict[str, Any]) -> bool:
        """Whether a forward runs without a tiered cache."""
        if checkpoints := checkpointed(self.model):
            self.attachment.recompute_as_stock(checkpoints)
            if cache is None or cache.get_seq_length() == 0:
                self.runtime.note_fallback(
                    "the stock model, since gradient checkpointing keeps caches from layers: torch.no_grad() or "
                    "torch.inference_mode() offloads"
                )
                return True
        if cache is not None:
            return False
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.text_config, "use_cache", False)
        if not use_cache:
            return True
        if self._records_gradients(given):
            self.runtime.note_fallback(
                "the stock model, since gradients are recorded: torch.no_grad() or torch.inference_mode() offloads"
            )
            return True
        return False

    def _records_gradients(self, given: dict[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = (value for value in given.values() if isinstance(value, Tensor))
        return any(tensor.requires_grad for tensor in (*tensors, *self.model.parameters()))

    def _prepare(self, cache: Cache, batch: int, new: int, given: dict[str, Any]) -> int:
        """Make the cache tiered and check the call. Returns the number of cached tokens."""
        self._check_cache(cache)
        if _wanted(given, self.text_config, "output_attentions"):
            raise AttachError(
                "output_attentions: sparse attention does not keep attention weights; detach the engine to get them"
            )
        if not is_tiered(cache):
            adopt(cache, self.runtime)
        cached = int(cache.get_seq_length())
        if cached and (self._records_gradients(given) or checkpointed(self.model)):
            raise AttachError(GRADIENTS_LOST)
        self._check_positions(cached, new)
        if not cached:
            self.runtime.ranks.share_random_state(self.runtime.device)
        if isinstance(cache, TieredCache):
            self.runtime.room.check(batch=batch, tokens=cached + new, room=cache.room)
            self.runtime.room.prepare(batch=batch, tokens=cached + new, room=cache.room)
        return cached

    def _check_positions(self, cached: int, new: int) -> None:
        """Refuse a prompt beyond the model's positions. Generation may pass them, as in the stock model."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is None or cached + new <= positions:
            return
        if not cached:
            check_positions(self.text_config, new)
        self.runtime.note_fallback(f"the context is longer than the model's {positions} positions; it goes on as stock")

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            kind = type(cache).__name__ + ("(offloading=True)" if isinstance(cache, DynamicCache) else "")
            raise AttachError(
                f"an attached model does not take a {kind}: allowed are an empty DynamicCache, a cache of "
                "engine.new_cache(), or none; set no cache_implementation"
            )
        for layer in cache.layers:
            if isinstance(layer, TieredLayer):
                if layer.runtime is not self.runtime:
                    raise AttachError("the cache belongs to another engine; make one with engine.new_cache()")
                layer.check_attended()  # first: uneven layers can be cropped, this can't
        if is_tiered(cache) and (unevenness := describe_unevenness(cache)):
            raise AttachError(unevenness)

    # ---- after -----------------------------------------------------------------------------------------------------

    def _check_done(self, cache: Cache, before: int, batch: int, new: int) -> None:
        """Raise ``AttachError`` unless each tiered layer has stored these tokens, and attended to them."""
        name, version = type(self.model).__name__, transformers.__version__
        layers = self.text_config.num_hidden_layers  # fewer, while drafts leave the model early
        for layer in cache.layers:
            if not isinstance(layer, TieredLayer) or layer.number >= layers:
                continue
            layer.check_attended()
            stored = layer.get_seq_length() - before
            if stored != new:
                raise AttachError(
                    f"{name} of transformers {version} bypasses the cache: layer {layer.number} has stored {stored} "
                    f"of the forward's {new} tokens; this model or version is not supported"
                )
            if layer.batch != batch:
                raise AttachError(f"{name}: layer {layer.number} has stored {layer.batch} of {batch} sequences")


def cached_length(prompt: int, new: int) -> int:
    """Tokens that a cache holds after a prompt and new tokens; the last one chosen is never read."""
    return prompt + max(new - 1, 0)


def check_positions(text_config: PreTrainedConfig, tokens: int) -> None:
    """Raise ``ContextLengthError`` if the model has positions for fewer tokens."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ContextLengthError(f"a context of {tokens} tokens: the model has positions for {positions}")


def _take_cache(given: dict[str, Any]) -> Any:
    """Remove the cache from a forward's arguments, under its old or new name, and return it."""
    names = [name for name, value in given.items() if name in CACHE_NAMES or isinstance(value, Cache)]
    caches = [value for value in map(given.pop, names) if value is not None]
    return caches[0] if caches else None


def _wanted(given: dict[str, Any], config: PreTrainedConfig, name: str) -> bool:
    value = given.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _batch_and_length(given: dict[str, Any]) -> tuple[int, int]:
    """Sequences and new tokens of a forward call."""
    for name in ("inputs_embeds", "input_ids"):
        if given.get(name) is not None:
            return given[name].shape[0], given[name].shape[1]
    raise AttachError("a forward of an attached model needs input_ids or inputs_embeds")
