"""Places: a batch of sequences of different lengths that are decoded together and replaced one by one.

Each sequence is prefilled in a cache of its own. ``put`` gives it a place: its slabs in host memory change hands, and
its pool, its policy's state and the tokens of layers that are not offloaded are copied into the batch's tensors, whose
addresses stay. So the captured step goes on, whoever has the places. A place that nobody has repeats its last step: its
length stands still, and it reads and writes spare slabs.

Suffixes: B places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from attention_predictor.errors import AttachError, HostMemoryError
from attention_predictor.offload.hf import graph
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.fixed_layer import differing_mask, empty_like
from attention_predictor.offload.hf.graph import CacheGraph, CapturedSteps, CaptureError, is_ready
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.watched import WatchedLayer

BATCHWIDE_ROPE = {"dynamic", "longrope"}  # take their frequencies from the longest sequence of a batch
COMING = 2  # tokens that a step needs room for: its own, and the next one, whose blocks it chooses
STEPS_BETWEEN_TRIES = 256  # after a capture that failed


def why_no_place(cache: TieredCache) -> str | None:
    """Why the sequence of this cache, prefilled, can't be decoded in one step with others; ``None`` if it can."""
    layers = _tiered(cache)
    runtime = layers[0].runtime
    if (reason := graph.why_not_captured(cache, None)) is not None:
        return f"their steps are not captured: {reason}"
    if any(layer.may_read_all_keys for layer in layers):
        return "with these settings some steps read all keys"
    if runtime.ranks.count > 1:
        return "the model is divided among ranks"
    if kinds := rope_types(runtime.text_config) & BATCHWIDE_ROPE:
        return f"RoPE of type {min(kinds)} turns all sequences of a step as the longest one needs"
    if cache.length_read_by is not None:
        return f"layer {cache.length_read_by} computes with the cache's length, and theirs differ"
    if any(layer.prompt_allocation is not None or not layer.selection.is_sparse_at(1) for layer in layers):
        return "budgets differ by prompt, layer or head"
    return why_masked(cache) if is_ready(cache) else "a prompt is shorter than a step's state needs"


def rope_types(config: PreTrainedConfig) -> set[str]:
    """The types of the model's rotary position embeddings, of which kinds of layers may have their own."""
    given = getattr(config, "rope_parameters", None) or {}
    found = [given, *(one for one in given.values() if isinstance(one, dict))]
    return {str(one["rope_type"]) for one in found if "rope_type" in one}


def why_masked(cache: TieredCache) -> str | None:
    """Which layer's mask is not what the shared step computes; ``None`` if none. Places have no padding."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, WatchedLayer) and layer.differs:
            return differing_mask(number)
    return graph.why_not_masked_alike(cache, torch.zeros_like(_tiered(cache)[0].padding_B))


class Places:
    """Decodes up to ``count`` sequences of different lengths in one captured step.

    Args:
        captured: Of the engine.
        like: A prefilled cache that could have a place (``why_no_place``): those of all have its shapes.
        room: Tokens that a place has room for on the device. Host memory comes with the sequences.

    Attributes:
        cache: The batch's cache, for forwards of the attached model with one token for each place.

    Raises:
        HostMemoryError: There is no host memory for a spare slab of each layer.
    """

    def __init__(self, captured: CapturedSteps, like: TieredCache, count: int, room: int) -> None:
        layers = _tiered(like)
        layers[0].settle()  # ends captured steps: layers that are not offloaded are transformers' own again
        self.cache, room_of = TieredCache(layers[0].runtime), layers[0].runtime.room
        beside = room_of.promised_beside(self.cache) + room_of.bytes_for(count, 0)
        room_of.check(batch=1, tokens=1, room=0, promised=beside)  # spare slabs are as many as those of one token
        self.cache.layers = [
            layer.empty(count) if isinstance(layer, TieredLayer) else empty_like(layer, count) for layer in like.layers
        ]
        for layer in _tiered(self.cache):
            layer.blocks.store.open_places(room)
        self.room = room
        self._graph = captured.adopt(self.cache, PlacesGraph(self.cache, captured, count, room))

    @property
    def length_B(self) -> Tensor:
        """int64 on the device, tokens of each sequence: the position of the next one."""
        return self._graph.length_B

    def put(self, place: int, cache: TieredCache, *, final_length: int | None = None) -> None:
        """Give a free place to the sequence of a prefilled cache, which is empty afterwards. Waits for the device.

        Args:
            final_length: Tokens that the sequence will have at most, ``None``: as many as a place has room for. It
                gets host memory for them now.

        Raises:
            HostMemoryError: The sequence is longer than a place, or there is no host memory for its length.
            AttachError: The model has given one of its layers a mask that the shared step does not compute.
        """
        layers = _tiered(cache)
        length = layers[0].blocks.length
        if length + COMING > self.room:
            raise HostMemoryError(f"a place has room for {self.room} tokens, the sequence has {length}")
        tokens = self.room if final_length is None else min(final_length, self.room)
        if (reason := why_masked(cache)) is not None:
            raise AttachError(reason)
        for layer in layers:
            layer.settle()
            layer.blocks.store.fit(tokens)  # of all, before any layer has moved
        if self.length_B.is_cuda:
            torch.cuda.synchronize(self.length_B.device)
        for mine, theirs in zip(_tiered(self.cache), layers, strict=True):
            mine.put(place, theirs)
        for fixed in self._graph.fixed:
            stock = cache.layers[fixed.number]
            assert isinstance(stock, DynamicLayer)  # as the layer of `like` that `fixed` replaces
            fixed.put(place, stock)
        cache.reset()
        self._graph.take(place, length)

    def release(self, place: int) -> None:
        """Take a place and its sequence's host memory back: its length stands still until another sequence gets it."""
        self._graph.release(place)
        for layer in _tiered(self.cache):
            layer.blocks.store.release(place)


class PlacesGraph(CacheGraph):
    """The graph of a batch whose sequences have lengths of their own. It never goes back to steps run by the host."""

    def __init__(self, cache: TieredCache, captured: CapturedSteps, count: int, room: int) -> None:
        super().__init__(cache, captured.forward, captured.step_modules)
        self.lengths, self.taken = [1] * count, [False] * count
        ids_B1 = torch.zeros((count, 1), dtype=torch.int64, device=self.device)
        self._enter(ids_B1, torch.zeros_like(ids_B1), room)
        self.growth_B.zero_()
        for layer in self.layers:  # a free place holds one token, in a block that must have a slot
            layer.blocks.table.hold_first()

    def take(self, place: int, tokens: int) -> None:
        """Begin a sequence of so many tokens, whose state is in the place."""
        self.length_B[place], self.growth_B[place] = tokens, 1
        self.lengths[place], self.taken[place] = tokens, True

    def release(self, place: int) -> None:
        """End the sequence of a place."""
        self.growth_B[place] = 0
        self.taken[place] = False

    def _capture(self, cache: TieredCache) -> None:
        try:
            super()._capture(cache)
        except CaptureError as error:  # the same steps, kernel by kernel: the host can't run them
            self.runtime.note_fallback(f"the requests' step kernel by kernel: {error}")
            self.eager_steps_left = STEPS_BETWEEN_TRIES

    def leave(self) -> None:
        was_entered = self.entered and not self.running
        super().leave()
        if was_entered:
            for layer in self.layers:
                layer.awaits_attention = True  # the host has one length for all: refuse its steps

    def _length(self) -> int:
        return max(self.lengths)

    def _prepare_growth(self, cache: TieredCache) -> None:
        """Nothing to do: the room of places stays as it is."""

    def _count(self) -> None:
        self.lengths = [length + taken for length, taken in zip(self.lengths, self.taken, strict=True)]
        for layer in self.layers:
            layer.blocks.store.count_to(self._length())
        for fixed in self.fixed:
            fixed.length = self._length()


def _tiered(cache: TieredCache) -> Sequence[TieredLayer]:
    return [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
