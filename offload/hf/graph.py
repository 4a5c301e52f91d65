"""Decoding steps without the host: a model's one-token forward over a tiered cache, captured as one CUDA graph.

Suffixes: B sequences, L tokens of the sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from attention_predictor.csrc import binding
from attention_predictor.offload.blocks.ring import RingTable
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.compiled import CompiledLayers
from attention_predictor.offload.hf.experts import capturable_experts
from attention_predictor.offload.hf.fixed_layer import FixedLayer, why_not_fixed
from attention_predictor.offload.hf.fused.modules import FusedModules
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import CACHE_NAMES, cache_argument, changed
from attention_predictor.offload.runtime import Runtime
from attention_predictor.offload.step.schedule import StreamSchedule

WORTH_IT, IN_VAIN = 8, 3  # steps that pay for capturing one; times that fewer are taken before it is given up
EAGER_STEPS = 2  # taken before one is captured: libraries set themselves up in them
INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES}
LEFT_PADDING = "_attention_predictor_left_padding"  # of a mask that is known to rule out what the prompt's did

Forward = Callable[..., Any]
Faster = CompiledLayers | FusedModules | None


class CapturedSteps:
    """Which forwards of a model are captured steps, and who takes them: one ``Graphed`` a cache, as long as it lives.

    Args:
        name: The model's, for what is noted.
        forward: The model's own.
        faster: Its layers compiled, or its modules fused, within steps alone; ``None`` leaves them as they are.
    """

    def __init__(self, name: str, forward: Forward, config: PreTrainedConfig, runtime: Runtime, faster: Faster) -> None:
        self.name, self.forward, self.config, self.runtime, self.faster = name, forward, config, runtime, faster
        self._failure: str | None = None  # of a capture; the next would fail alike
        self._graphed: weakref.WeakKeyDictionary[TieredCache, Graphed] = weakref.WeakKeyDictionary()

    def step(self, cache: TieredCache, given: dict[str, Any]) -> Any:
        """The model's output, where this forward is a step that can be captured; else ``None``, and the host has it."""
        graphed = self._graphed.get(cache)
        if is_one_token(given) and is_ready(cache):
            reason = self._failure or why_unsupported_call(given, self.config)
            if reason is None and (graphed is None or not graphed.entered):
                reason = why_not_captured(cache, graphed)
            if reason is None and not keeps_padding(cache, given.get("attention_mask")):
                reason = "the attention mask rules out more than the prompt's padding on the left, or less"
            if reason is None:
                if graphed is None:
                    graphed = self._graphed[cache] = Graphed(cache, self.forward, self.faster)
                try:
                    return graphed.run(cache, given)
                except CaptureError as error:
                    reason = self._failure = f"{self.name} can't be captured: {error}"
            self.runtime.note_fallback(f"the prefetch thread in place of captured steps: {reason}")
        if graphed is not None:
            graphed.leave()
        return None

    def leave(self) -> None:
        """Hand all caches back to the host."""
        for graphed in list(self._graphed.values()):
            graphed.leave()


def why_not_captured(cache: TieredCache, graphed: Graphed | None) -> str | None:
    """Why steps over this cache can't be captured; ``None`` if they can."""
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            if (reason := why_not_fixed(layer, number)) is not None:
                return reason
            continue
        if not binding.on_gpu(layer.runtime.device):
            return f"they need a CUDA device, the model is on {layer.runtime.device}"
        if not layer.kernel:
            return "they need the kernels"
        if not layer.blocks.store.pinned:
            return "they need pinned host memory"
        if (
            reason := layer.policy.why_never_captured(layer.runtime.config) or layer.policy.why_no_kernel()
        ) is not None:
            return reason
    if graphed is not None and graphed.in_vain >= IN_VAIN:
        return "something else changes the cache every few tokens, as beams do"
    return None


def is_one_token(given: dict[str, Any]) -> bool:
    """Whether a forward's arguments are those of a decoding step by token ids, none of which records gradients."""
    ids = given.get("input_ids")
    return ids is not None and ids.shape[1] == 1 and not torch.is_grad_enabled()


def why_unsupported_call(given: dict[str, Any], config: PreTrainedConfig) -> str | None:
    """What a step is asked for that a captured one does not give; ``None`` where it is nothing."""
    # What is absent, or False, asks for nothing.
    odd = sorted({name for name, value in given.items() if value is not None and value is not False} - INPUTS)
    odd += [name for name in ("return_dict", "use_cache") if given.get(name) is False]
    odd += [f"config.{name}" for name in ("output_hidden_states",) if given.get(name) is None and getattr(config, name)]
    keep, mask = given.get("logits_to_keep"), given.get("attention_mask")
    if keep is not None and not isinstance(keep, int):
        odd.append("logits_to_keep")
    if mask is not None and mask.dim() != 2:
        odd.append(f"attention_mask of {mask.dim()} dimensions")
    return f"the call gives {', '.join(odd)}" if odd else None


def keeps_padding(cache: TieredCache, mask_BL: Tensor | None) -> bool:
    """Whether the mask of a step rules out what the prompt's did and nothing else; reads it back from the device."""
    first = next(layer for layer in cache.layers if isinstance(layer, TieredLayer))
    if mask_BL is None:
        return not first.is_padded
    if hasattr(mask_BL, LEFT_PADDING):
        return True
    token_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return mask_BL.shape[1] == first.blocks.length + 1 and torch.equal(
        mask_BL.bool(), token_L >= first.padding_B[:, None]
    )


def is_ready(cache: TieredCache) -> bool:
    """Whether the cache has come so far that a step over it can be captured: later, if not now."""
    tiered = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    return bool(tiered) and all(
        layer.is_initialized
        and layer.policy.is_started
        and layer.blocks.pool.slots
        and layer.selection.decides(layer.blocks.length + 1)
        for layer in tiered
    )


class CaptureError(Exception):
    """The model asks the host within its forward."""


def _end_capture_of_random_numbers(device: torch.device) -> None:
    """A capture that has failed leaves torch's generator as if it were still captured: it would refuse to work."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


class Graphed:
    """The steps of one cache. ``run`` takes one; ``leave`` gives the cache back to the host, as if it had kept it.

    The first steps run kernel by kernel, then one is captured, then replayed for every token until the room is used up.
    """

    def __init__(self, cache: TieredCache, forward: Forward, faster: Faster) -> None:
        self.layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
        # Not the cache, which owns this and must not be kept alive by it.
        self._layers_of_cache = cache.layers
        self.fixed: list[FixedLayer] = []  # while steps are captured, in the places of transformers' own layers
        self.tables: dict[tuple[int, int], RingTable] = {}
        self.runtime = self.layers[0].runtime
        self.forward, self.faster = forward, faster
        self.cache_name = cache_argument(forward) or CACHE_NAMES[0]
        # Some policies read all keys at some steps, which are then not captured.
        self.may_read_all_keys = any(layer.may_read_all_keys for layer in self.layers)
        self.entered = False
        self.running = False
        self.taken = 0  # steps since the cache was entered
        self.in_vain = 0  # times that it was left before captured steps paid
        self.eager_steps = 0  # to be taken yet
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None

    # ---- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, cache: TieredCache, kwargs: dict[str, Any]) -> Any:
        """One forward; its result is the model's own kind of output, with logits that the next step leaves alone."""
        ids_B1, position = kwargs["input_ids"], kwargs.get("position_ids")
        if position is None:
            position = torch.full_like(ids_B1, self._length())
        elif position.dim() == 2:
            position = position.expand_as(ids_B1)
        # Room for this token, and for the next one, whose blocks are chosen.
        fits = self.entered and self._length() + 2 <= self.room
        if self.entered and not (fits and self.ids_B1.shape == ids_B1.shape and self.position.shape == position.shape):
            self.leave()
        if not self.entered:
            self._enter(ids_B1, position)
        self.ids_B1.copy_(ids_B1)
        self.position.copy_(position)
        if self.graph is None and not self.eager_steps and ids_B1.device.type == "cuda" and not self._reads_all_keys():
            self._capture(cache)
        stats = self.runtime.stats
        stats.steps += 1
        try:
            self.running = True
            output = self._take(cache)
            self.taken += 1
        except BaseException:
            for layer in self.layers:
                layer.armed = True  # how far the device has come is unknown: no further step on this cache
            raise
        finally:
            self.running = False
        # With logits of its own, which the next step leaves alone.
        return changed(output, cache=cache, logits=output.logits.clone())

    def join(self) -> None:
        """The model waits for all that prepares the next token."""
        self.schedule.join()

    @property
    def past(self) -> Tensor:
        """int64 without dimensions, on the device: tokens before the step in progress."""
        return self.length_B[0] - 1

    def leave(self) -> None:
        """Hand the cache back to the host; waits for the device."""
        if not self.entered or self.running:
            return
        self.entered = False
        self.in_vain = self.in_vain + 1 if self.taken < WORTH_IT else 0
        self.graph = self.output = None
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        for layer in self.layers:
            layer.leave()
        for fixed in self.fixed:
            self._layers_of_cache[fixed.number] = fixed.leave()
        self.fixed, self.tables = [], {}

    # ---- how -------------------------------------------------------------------------------------------------------

    @property
    def _all_layers(self) -> list[TieredLayer | FixedLayer]:
        return [*self.layers, *self.fixed]

    def _length(self) -> int:
        return self.layers[0].blocks.length

    @torch.inference_mode(False)
    def _enter(self, ids_B1: Tensor, position: Tensor) -> None:
        device, batch = ids_B1.device, self.layers[0].batch
        self.room = self.runtime.room.captured(self._length())
        self.length_B = torch.full((batch,), self._length(), device=device)
        self.schedule = StreamSchedule(device, self.runtime.counts.spent_1)
        self.ids_B1 = torch.zeros_like(ids_B1)
        self.position = torch.zeros_like(position)
        self.eager_steps, self.taken = EAGER_STEPS, 0
        for layer in self.layers:
            layer.enter(self, self.schedule, self.length_B, self.room)
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        padding_B = self.layers[0].padding_B if self.layers[0].is_padded else None
        for number, stock in enumerate(self._layers_of_cache):
            if isinstance(stock, DynamicLayer):  # not a tiered one, or one of models that share keys, which has none
                fixed = FixedLayer(stock, number, self.runtime, self, self.tables, padding_B, self.room)
                self._layers_of_cache[number] = fixed
                self.fixed.append(fixed)
        self.entered = True

    def _reads_all_keys(self) -> bool:
        return self.may_read_all_keys and any(layer.reads_all_keys for layer in self.layers)

    def _take(self, cache: TieredCache) -> Any:
        """One step, captured unless it reads all keys; and the host's counts."""
        at_once = None if self.may_read_all_keys else self.graph
        if at_once is not None:  # the host counts beside it
            at_once.replay()
        for one in self._all_layers:
            one.advance()
        if self._reads_all_keys():
            return self._step(cache)  # from host memory, between captured steps
        self.runtime.stats.captured_steps += 1
        if self.graph is None:
            self.eager_steps = max(self.eager_steps - 1, 0)
            return self._step(cache)
        if at_once is None:
            self.graph.replay()
        return self.output

    def _step(self, cache: TieredCache) -> Any:
        self.length_B.add_(1)
        for table in self.tables.values():
            table.update(self.length_B)
        given = {"input_ids": self.ids_B1, "position_ids": self.position, "use_cache": True, self.cache_name: cache}
        faster = self.faster if self.faster is not None else nullcontext()
        with faster, capturable_experts(self.runtime.text_config):
            # A mask of four dimensions is taken as it is, so that none is made for the host's lengths. None is read:
            # what each layer sees follows from lengths and padding on the device.
            output = self.forward(attention_mask=self.mask, **given)
        self.schedule.join()
        return output

    def _capture(self, cache: TieredCache) -> None:
        graph = torch.cuda.CUDAGraph()
        self.running = True
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._step(cache)
        except RuntimeError as error:
            # Nothing has run: capturing only notes what would.
            for one in self._all_layers:
                one.armed = False
            _end_capture_of_random_numbers(self.runtime.device)
            raise CaptureError(str(error).splitlines()[0]) from error
        finally:
            self.running = False
        # Without the cache, which must not be kept alive by what it owns.
        self.graph, self.output = graph, changed(output, cache=None)
