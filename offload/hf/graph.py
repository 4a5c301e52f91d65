"""Captured steps: a model's one-token forward over a tiered cache, as one CUDA graph that needs no CPU work.

Suffixes: B sequences, L tokens of the sequence.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from attention_predictor.csrc import binding
from attention_predictor.errors import AttentionPredictorError
from attention_predictor.offload.blocks.ring import RingTable
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.compiled import CompiledLayers
from attention_predictor.offload.hf.experts import capturable_experts
from attention_predictor.offload.hf.fixed_layer import FixedLayer, differing_mask, why_not_fixed
from attention_predictor.offload.hf.fused.modules import FusedModules
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import CACHE_NAMES, cache_argument, changed
from attention_predictor.offload.runtime import Runtime
from attention_predictor.offload.step.schedule import StreamSchedule

MIN_STEPS_PER_CAPTURE = 8  # a capture that serves fewer steps has cost more than it saved: it was wasted
MAX_WASTED_CAPTURES = 3  # in a row; after them the cache is no longer captured
TOKENS_TO_PREPARE = 256  # steps left in the reserved room when the memory of the next is prepared, in the background
EAGER_STEPS = 2  # run before the capture: libraries initialise themselves in them
INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES}
LEFT_PADDING = "_attention_predictor_left_padding"  # attribute of a mask known to hide exactly the prompt's padding

Forward = Callable[..., Any]
StepModules = CompiledLayers | FusedModules | None
Graph = TypeVar("Graph", bound="CacheGraph")


class CapturedSteps:
    """Decides which forwards of a model run as captured steps, and keeps one ``CacheGraph`` per living cache.

    Args:
        name: The model's name, for messages.
        forward: The model's own forward.
        step_modules: Replacements used during captured steps only: compiled layers or fused modules; ``None``: the
            model's own.
    """

    def __init__(
        self, name: str, forward: Forward, config: PreTrainedConfig, runtime: Runtime, step_modules: StepModules
    ) -> None:
        self.name, self.forward, self.config, self.runtime = name, forward, config, runtime
        self.step_modules = step_modules
        self._failure: str | None = None  # why a capture failed; the next one would fail too
        self._cache_graphs: weakref.WeakKeyDictionary[TieredCache, CacheGraph] = weakref.WeakKeyDictionary()
        # What one of several ranks has refused, until the cache is used in another way: not asked at each step.
        self._refused: weakref.WeakKeyDictionary[TieredCache, str] = weakref.WeakKeyDictionary()

    def step(self, cache: TieredCache, given: dict[str, Any]) -> Any:
        """Run this forward as a captured step and return its output; ``None`` if the host has to run it."""
        cache_graph = self._cache_graphs.get(cache)
        entered = cache_graph is not None and cache_graph.entered
        one_token = is_one_token(given)
        if not one_token:
            self._refused.pop(cache, None)
        elif entered or is_ready(cache):
            reason = (None if entered else self._failure) or why_unsupported_call(given, self.config)
            if reason is None and not entered:
                reason = self._agreed(
                    cache, lambda: why_not_captured(cache, cache_graph) or why_not_masked_alike(cache)
                )
            if reason is None and not keeps_padding(cache, given.get("attention_mask")):
                reason = "the attention mask does not hide exactly the prompt's left padding"
            if reason is None and not (cache_graph is not None and cache_graph.has_room):
                reason = self._agreed(cache, lambda: why_no_room(cache))
            if reason is None:
                if cache_graph is None:
                    cache_graph = self._cache_graphs[cache] = CacheGraph(cache, self.forward, self.step_modules)
                try:
                    return cache_graph.run(cache, given)
                except CaptureError as error:
                    reason = f"{self.name} can't be captured: {error}"
                    if "out of memory" not in str(error):  # that may change: another cache's end frees memory
                        self._failure = reason
            self.runtime.note_fallback(f"the prefetch thread in place of captured steps: {reason}")
        if cache_graph is not None:
            cache_graph.leave()
        return None

    def adopt(self, cache: TieredCache, cache_graph: Graph) -> Graph:
        """Run the steps over this cache by a graph of another kind."""
        self._cache_graphs[cache] = cache_graph
        return cache_graph

    def _agreed(self, cache: TieredCache, why_not: Callable[[], str | None]) -> str | None:
        """The reason of the ranks together: they may differ in kernels, in host memory and in the masks of their heads.

        All else follows from the call and the cache, the same on each.
        """
        ranks = self.runtime.ranks
        if (reason := self._refused.get(cache)) is not None:
            return reason
        reason = ranks.first(why_not())
        if reason is not None and ranks.count > 1:
            self._refused[cache] = reason
        return reason

    def leave(self) -> None:
        """End captured steps on all caches; the host runs their next steps."""
        for cache_graph in list(self._cache_graphs.values()):
            cache_graph.leave()


def why_not_captured(cache: TieredCache, cache_graph: CacheGraph | None) -> str | None:
    """Why steps over this cache can't be captured, or ``None``."""
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            if (reason := why_not_fixed(layer, number)) is not None:
                return reason
            continue
        if not binding.on_gpu(layer.stage.device):
            return f"they need a CUDA device, the model is on {layer.stage.device}"
        if not layer.kernel:
            return "they need the kernels"
        if not layer.blocks.store.pinned:
            return "they need pinned host memory"
        if (
            reason := layer.policy.why_never_captured(layer.runtime.config) or layer.policy.why_no_kernel()
        ) is not None:
            return reason
    if cache_graph is not None and cache_graph.wasted_captures >= MAX_WASTED_CAPTURES:
        return "the cache changes every few tokens for another reason, such as beam search"
    return None


def why_not_masked_alike(cache: TieredCache, padding_B: Tensor | None = None) -> str | None:
    """Which tiered layer's last mask hid anything but this left padding; ``None`` if none did.

    The model may give a layer a mask of its own, and captured steps read none. Waits for the device if there was one.

    Args:
        padding_B: int64 on the device; by default the first tiered layer's.
    """
    tiered = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    if not any(layer.is_padded or layer.has_holes is not None for layer in tiered):
        return None
    expected_B = tiered[0].padding_B if padding_B is None else padding_B
    odd = torch.stack([layer.hid_more_than(expected_B) for layer in tiered]).tolist()
    return next((differing_mask(layer.number) for layer, one in zip(tiered, odd, strict=True) if one), None)


def why_no_room(cache: TieredCache) -> str | None:
    """Why captured steps can't reserve the memory that they need; ``None`` if they can."""
    first = next(layer for layer in cache.layers if isinstance(layer, TieredLayer))
    room = first.runtime.room
    return room.why_not_ahead(
        batch=first.batch, tokens=first.blocks.length, room=cache.room, promised=room.promised_beside(cache)
    )


def is_one_token(given: dict[str, Any]) -> bool:
    """Whether a forward is a decoding step of one token id a sequence, without gradients."""
    ids = given.get("input_ids")
    return ids is not None and ids.shape[1] == 1 and not torch.is_grad_enabled()


def why_unsupported_call(given: dict[str, Any], config: PreTrainedConfig) -> str | None:
    """Which arguments of the call captured steps don't support, as one line; ``None`` if they support all."""
    # An argument that is absent, None or False requests nothing.
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
    """Whether a step's mask hides exactly the prompt's left padding. Reads the mask back from the device."""
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
    """Whether the cache holds enough tokens for a captured step. If not now, it will later."""
    tiered = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    return bool(tiered) and all(
        layer.is_initialized
        and layer.policy.is_started
        and layer.blocks.pool.slots
        and layer.selection.is_sparse_at(layer.blocks.length + 1)
        for layer in tiered
    )


class CaptureError(AttentionPredictorError):
    """The model's forward can't be captured: it reads a value back to the host."""


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The device's only stream for captures: torch's own is on the device that was current at its first use."""
    return torch.cuda.Stream(device)


def _end_capture_of_random_numbers(device: torch.device) -> None:
    """Reset torch's random generator, which a failed capture leaves in its capturing state, unusable."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


class CacheGraph:
    """The CUDA graph of one cache's steps. ``run`` takes a step; ``leave`` returns the cache to the host.

    The first steps run kernel by kernel. Then one is captured, and replayed for every token until the cache's reserved
    capacity is used up.
    """

    def __init__(self, cache: TieredCache, forward: Forward, step_modules: StepModules) -> None:
        self.layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
        # Its list, not the cache: the cache owns this object, and a reference back would keep it alive.
        self._layers_of_cache = cache.layers
        self.fixed: list[FixedLayer] = []  # in place of transformers' own layers while steps are captured
        self.tables: dict[tuple[int, int], RingTable] = {}
        self.runtime, self.device = self.layers[0].runtime, self.layers[0].stage.device
        self.forward, self.step_modules = forward, step_modules
        self.cache_name = cache_argument(forward) or CACHE_NAMES[0]
        # Some policies read all keys in some steps; those steps are not captured.
        self.may_read_all_keys = any(layer.may_read_all_keys for layer in self.layers)
        self.entered = False
        self.running = False
        self.prepared = False  # whether memory is being allocated for when the room is used up
        self.steps_taken = 0  # since `_enter`
        self.wasted_captures = 0  # in a row
        self.eager_steps_left = 0  # before the capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None

    # ---- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, cache: TieredCache, kwargs: dict[str, Any]) -> Any:
        """One forward. Returns the model's own output type; the next step does not overwrite its logits."""
        ids_B1, position = kwargs["input_ids"], kwargs.get("position_ids")
        if position is None:
            position = torch.full_like(ids_B1, self._length())
        elif position.dim() == 2:
            position = position.expand_as(ids_B1)
        fits = self.has_room
        if self.entered and not (fits and self.ids_B1.shape == ids_B1.shape and self.position.shape == position.shape):
            self.leave()
        if not self.entered:
            with self.runtime.ranks.together():  # it takes host memory
                self._enter(ids_B1, position)
        self.ids_B1.copy_(ids_B1)
        self.position.copy_(position)
        may_capture = self.graph is None and not self.eager_steps_left and ids_B1.device.type == "cuda"
        if may_capture and not self._reads_all_keys():
            self._capture(cache)
        stats = self.runtime.stats
        stats.steps += 1
        try:
            self.running = True
            output = self._take(cache)
            self.steps_taken += 1
        except BaseException:
            for layer in self.layers:
                layer.awaits_attention = True  # the device's state is unknown: refuse further steps on this cache
            raise
        finally:
            self.running = False
        self._prepare_growth(cache)
        # A copy: the next replay overwrites the graph's logits.
        return changed(output, cache=cache, logits=output.logits.clone())

    @property
    def has_room(self) -> bool:
        """Whether steps have begun, and the next one has room: for its token, and the next, whose blocks it chooses."""
        return self.entered and self._length() + 2 <= self.room

    def join_prefetch(self) -> None:
        """Make the model's stream wait for the prefetch stream."""
        self.schedule.join_prefetch()

    @property
    def past(self) -> Tensor:
        """int64 without dimensions, on the device: tokens before the step in progress."""
        return self.length_B[0] - 1

    def leave(self) -> None:
        """End captured steps; the host runs the next ones. Waits for the device."""
        if not self.entered or self.running:
            return
        self.entered = False
        self.wasted_captures = self.wasted_captures + 1 if self.steps_taken < MIN_STEPS_PER_CAPTURE else 0
        self.graph = self.output = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for layer in self.layers:
            layer.leave()
        for fixed in self.fixed:
            self._layers_of_cache[fixed.number] = fixed.leave()
        self.fixed, self.tables = [], {}

    # ---- internals -------------------------------------------------------------------------------------------------

    @property
    def _all_layers(self) -> list[TieredLayer | FixedLayer]:
        return [*self.layers, *self.fixed]

    def _length(self) -> int:
        return self.layers[0].blocks.length

    @torch.inference_mode(False)
    def _enter(self, ids_B1: Tensor, position: Tensor, room: int | None = None) -> None:
        """Begin steps; ``room``: tokens to reserve, by default so many that the steps are worth a capture."""
        device, batch = ids_B1.device, self.layers[0].batch
        self.room = self.runtime.room.captured_tokens(self._length()) if room is None else room
        self.length_B = torch.full((batch,), self._length(), device=device)
        self.growth_B = torch.ones_like(self.length_B)
        self.schedule = StreamSchedule(device, self.layers[0].stage.counts.stall_ns_1)
        self.ids_B1 = torch.zeros_like(ids_B1)
        self.position = torch.zeros_like(position)
        self.eager_steps_left, self.steps_taken, self.prepared = EAGER_STEPS, 0, False
        for layer in self.layers:
            layer.enter(self, self.schedule, self.length_B, self.room)
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        padding_B = self.layers[0].hidden_B
        for number, stock in enumerate(self._layers_of_cache):
            if isinstance(stock, DynamicLayer):  # neither tiered nor an empty layer of a model that shares keys
                fixed = FixedLayer(stock, number, self.runtime, self, self.tables, padding_B, self.room)
                self._layers_of_cache[number] = fixed
                self.fixed.append(fixed)
        self.entered = True

    def _prepare_growth(self, cache: TieredCache) -> None:
        """Have memory allocated for the steps after these, once, when their room is nearly used up."""
        if not self.prepared and self.room - self._length() <= TOKENS_TO_PREPARE:
            self.prepared, host_room = True, self.runtime.room
            promised = host_room.promised_beside(cache)
            host_room.prepare_growth(batch=self.layers[0].batch, room=self.room, promised=promised)

    def _reads_all_keys(self) -> bool:
        return self.may_read_all_keys and any(layer.reads_all_keys for layer in self.layers)

    def _take(self, cache: TieredCache) -> Any:
        """Run one step, by the graph unless it reads all keys, and advance the host's counts."""
        early_graph = None if self.may_read_all_keys else self.graph
        if early_graph is not None:  # replayed first, so that the device works while the host counts
            early_graph.replay()
        self._count()
        if self._reads_all_keys():
            return self._step(cache)  # reads keys from host memory: not captured
        self.runtime.stats.captured_steps += 1
        if self.graph is None:
            self.eager_steps_left = max(self.eager_steps_left - 1, 0)
            return self._step(cache)
        if early_graph is None:
            self.graph.replay()
        return self.output

    def _count(self) -> None:
        """Count the step's token on the host."""
        for one in self._all_layers:
            one.advance()

    def _step(self, cache: TieredCache) -> Any:
        self.length_B.add_(self.growth_B)
        for table in self.tables.values():
            table.update(self.length_B)
        given = {"input_ids": self.ids_B1, "position_ids": self.position, "use_cache": True, self.cache_name: cache}
        step_modules = self.step_modules if self.step_modules is not None else nullcontext()
        with step_modules, capturable_experts(self.runtime.text_config):
            # transformers passes a 4-D mask through and builds none from the host's lengths. No layer reads it: what a
            # layer sees follows from lengths and padding on the device.
            output = self.forward(attention_mask=self.mask, **given)
        self.schedule.join_prefetch()
        return output

    def _capture(self, cache: TieredCache) -> None:
        self.running = True
        try:
            with self.runtime.ranks.together():  # the graph holds their all-reduces: it is replayed by all or by none
                graph, output = self._record(cache)
        finally:
            self.running = False
        # Without the cache: it owns this object, and a reference back would keep it alive.
        self.graph, self.output = graph, changed(output, cache=None)

    def _record(self, cache: TieredCache) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A step's graph and its output; ``CaptureError`` if the model can't be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            # By thread: NCCL's own thread queries events meanwhile, which would end another mode's capture.
            with torch.cuda.graph(graph, stream=_capture_stream(self.device), capture_error_mode="thread_local"):
                return graph, self._step(cache)
        except RuntimeError as error:
            # A capture records kernels and runs none, so the layers' state is as before.
            for one in self._all_layers:
                one.awaits_attention = False
            _end_capture_of_random_numbers(self.device)
            raise CaptureError(str(error).splitlines()[0]) from error
