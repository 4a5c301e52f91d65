"""Decoding steps without the host: a model's one-token forward over a tiered cache, captured as one CUDA graph.

Suffixes: B sequences, L tokens of the sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attention_predictor.csrc import binding
from attention_predictor.offload.cache import TieredCache
from attention_predictor.offload.compiled import CompiledLayers
from attention_predictor.offload.device_step import DeviceStep, Shared
from attention_predictor.offload.layer import TieredLayer

GROWTH = 4096  # tokens by which a captured step has more room than it needs: then it is captured anew
WORTH_IT, IN_VAIN = 8, 3  # steps that pay for capturing one; times that fewer are taken before it is given up
EAGER_STEPS = 2  # taken before one is captured: libraries set themselves up in them
INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}

Forward = Callable[..., Any]


def why_not(cache: TieredCache, mask_BL: Tensor | None, graphed: Graphed | None) -> str | None:
    """Why steps over this cache can't be captured; ``None`` if they can. The mask is read back from the device."""
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            return f"layer {number} keeps a {type(layer).__name__} of transformers, whose tensors move as it grows"
        if not binding.on_gpu(layer.engine.device):
            return f"they need a CUDA device, the model is on {layer.engine.device}"
        if not layer.kernel:
            return "they need the kernels"
        if (reason := layer.policy.no_graph) is not None:
            return reason
    if graphed is not None and graphed.in_vain >= IN_VAIN:
        return "something else changes the cache every few tokens, as beams do"
    if mask_BL is not None:
        token_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        first = cache.layers[0]
        assert isinstance(first, TieredLayer)
        if not torch.equal(mask_BL.bool(), token_L >= first.padding_B[:, None]):
            return "the attention mask rules out more than padding on the left"
    return None


def is_step(kwargs: dict[str, Any]) -> bool:
    """Whether a forward's arguments are those of a plain decoding step."""
    ids, position, mask = (kwargs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    given = {name for name, value in kwargs.items() if value is not None}
    return (
        given <= INPUTS
        and ids is not None
        and ids.shape[1] == 1
        and kwargs.get("return_dict", True) is not False
        and kwargs.get("use_cache", True) is not False
        and (mask is None or mask.dim() == 2)
        and (position is None or position.dim() == 2)
        and not torch.is_grad_enabled()
    )


def is_ready(cache: TieredCache) -> bool:
    """Whether the cache has come so far that a step over it can be captured: later, if not now."""
    tiered = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    return bool(tiered) and all(
        layer.is_initialized
        and layer.policy.is_started
        and layer.tiers.pool.slots
        and layer.selection.decides(layer.tiers.length + 1)
        for layer in tiered
    )


class CaptureError(Exception):
    """The model asks the host within its forward."""


class Graphed:
    """The steps of one cache. ``run`` takes one; ``leave`` gives the cache back to the host, as if it had kept it.

    The first steps run kernel by kernel, then one is captured, then replayed for every token until the room is used up.
    """

    def __init__(self, cache: TieredCache, forward: Forward, compiled: CompiledLayers | None) -> None:
        self.layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
        self.engine = self.layers[0].engine
        self.forward = forward
        self.compiled = compiled
        self.entered = False
        self.running = False
        self.taken = 0  # steps since the cache was entered
        self.in_vain = 0  # times that it was left before captured steps paid
        self.eager_steps = 0  # to be taken yet
        self.steps: list[DeviceStep] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None

    # ---- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, cache: TieredCache, kwargs: dict[str, Any]) -> Any:
        """One forward; its result is the model's own kind of output, with logits that the next step leaves alone."""
        ids_B1 = kwargs["input_ids"]
        # Room for this token, and for the next one, whose blocks are chosen.
        if self.entered and (self._length() + 2 > self.shared.capacity or ids_B1.shape != self.ids_B1.shape):
            self.leave()
        if not self.entered:
            self._enter(ids_B1)
        self.ids_B1.copy_(ids_B1)
        position_B1 = kwargs.get("position_ids")
        if position_B1 is None:
            self.position_B1.fill_(self._length())
        else:
            self.position_B1.copy_(position_B1.expand_as(self.position_B1))
        if self.graph is None and not self.eager_steps and ids_B1.device.type == "cuda":
            self._capture(cache)
        try:
            self.running = True
            if self.graph is None:
                self.eager_steps = max(self.eager_steps - 1, 0)
                output = self._step(cache)
            else:
                self.graph.replay()
                output = self.output
            for step in self.steps:
                step.advance()
            self.taken += 1
        except BaseException:
            for layer in self.layers:
                layer.armed = True  # how far the device has come is unknown: no further step on this cache
            raise
        finally:
            self.running = False
        self.engine.stats_kept.steps += 1
        return _own(output, cache)

    def leave(self) -> None:
        """Hand the cache back to the host; waits for the device."""
        if not self.entered or self.running:
            return
        self.entered = False
        self.in_vain = self.in_vain + 1 if self.taken < WORTH_IT else 0
        self.graph = self.output = None
        for layer, step in zip(self.layers, self.steps, strict=True):
            step.leave()
            layer.graphed = layer.device_step = None
            layer.note_memory()
        self.steps = []

    # ---- how -------------------------------------------------------------------------------------------------------

    def _length(self) -> int:
        return self.layers[0].tiers.length

    @torch.inference_mode(False)
    def _enter(self, ids_B1: Tensor) -> None:
        length, config = self._length(), self.engine.config
        # A limit on host memory is kept to the slab.
        growth = GROWTH if config.host_memory is None else config.slab_blocks * config.block_size
        capacity = ((length + 2) // growth + 1) * growth
        for layer in self.layers:
            layer.tiers.settle()
            layer.tiers.grow(layer.selection.most_slots_at(length + 1))
            layer.tiers.store.settle()
            layer.tiers.store.reserve(capacity)
            layer.policy.reserve(capacity)
        self.shared = Shared(length, capacity, self.layers[0].padding_B, self.engine.counts.spent_1)
        self.ids_B1 = torch.zeros_like(ids_B1)
        self.position_B1 = torch.zeros_like(ids_B1)
        self.eager_steps, self.taken = EAGER_STEPS, 0
        self.steps = [DeviceStep(layer, self.shared) for layer in self.layers]
        for layer, step in zip(self.layers, self.steps, strict=True):
            layer.graphed, layer.device_step = self, step
            layer.note_memory()
        self.entered = True

    def _step(self, cache: TieredCache) -> Any:
        self.shared.length_1.add_(1)
        with self.compiled if self.compiled is not None else nullcontext():
            output = self.forward(
                input_ids=self.ids_B1, position_ids=self.position_B1, past_key_values=cache, use_cache=True
            )
        self.shared.join()
        return output

    def _capture(self, cache: TieredCache) -> None:
        graph = torch.cuda.CUDAGraph()
        self.running = True
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._step(cache)
        except RuntimeError as error:
            # Nothing has run: capturing only notes what would.
            for layer in self.layers:
                layer.armed = False
            raise CaptureError(str(error).splitlines()[0]) from error
        finally:
            self.running = False
        output.past_key_values = None  # the cache must not be kept alive by what it owns
        self.graph, self.output = graph, output


def _own(output: Any, cache: TieredCache) -> Any:
    """The output with logits of its own, which the next step leaves alone."""
    output = copy.copy(output)
    output.logits = output.logits.clone()
    output.past_key_values = cache
    return output
