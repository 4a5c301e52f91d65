"""FixedLayer: the cache of a layer that is not tiered, with fixed shapes, while steps are captured.

transformers' own layers grow by concatenation, so their tensors move at every token; a CUDA graph needs fixed
addresses.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import AttachError
from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.attention.sparse import Reach, attend_slots, why_no_kernel
from attention_predictor.offload.blocks.ring import Ring, RingTable, slots_for
from attention_predictor.offload.hf.handed import Handed, hand_over
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import layer_config
from attention_predictor.offload.hf.watched import WATCHED, WatchedLayer

if TYPE_CHECKING:
    from attention_predictor.offload.hf.layer import StepGraph
    from attention_predictor.offload.runtime import Runtime

EMPTY = "DummyLayer"  # transformers' layer without a cache, of models that share keys between layers


def why_not_fixed(layer: object, number: int) -> str | None:
    """Why no ``FixedLayer`` can replace this layer of transformers; ``None`` if one can, or none is needed."""
    name = type(layer).__name__
    if name == EMPTY or isinstance(layer, FixedLayer):
        return None
    if not isinstance(layer, WatchedLayer) or type(layer) not in WATCHED.values():
        return f"layer {number} keeps a {name} of transformers, whose tensors move as it grows"
    if not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4:
        return f"layer {number} has no keys of its own"
    if getattr(layer, "record_past", False):
        return f"layer {number} records its past, as assisted decoding asks"
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window < 2:
        return f"layer {number} has a window of {layer.sliding_window} tokens"
    if layer.differs is None:
        return f"layer {number}: the model's attention does not get the keys of its cache"
    if layer.differs:
        return differing_mask(number)
    return None


def empty_like(layer: Any, batch: int) -> Any:
    """A layer of transformers like this one that a ``FixedLayer`` can replace: ``batch`` sequences of one token."""
    twin = copy.copy(layer)
    if isinstance(layer, DynamicLayer):
        held: tuple[Any, Any] = layer.keys, layer.values
        twin.keys, twin.values = (x.new_zeros(batch, x.shape[1], 1, x.shape[3]) for x in held)
    if isinstance(layer, DynamicSlidingWindowLayer):
        twin.cumulative_length = 0 * layer.cumulative_length + 1  # some versions of transformers keep a tensor
    return twin


def differing_mask(number: int) -> str:
    """Why steps can't be captured over a layer to which the model gives a mask of its own."""
    return f"layer {number} has a mask that captured steps don't compute"


def is_chunked(config: PreTrainedConfig, number: int) -> bool:
    """Whether a layer's window moves by whole chunks (Llama 4) instead of token by token."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return bool(types[number] == "chunked_attention")
    return getattr(layer_config(config, number), "sliding_window", None) is None


def reach_of(layer: DynamicLayer, number: int, config: PreTrainedConfig, padding_B: Tensor | None) -> Reach:
    """What a captured step lets a token of this layer of transformers see."""
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else 0
    chunked = bool(window) and is_chunked(config, number)
    return Reach(padding_B, 0 if chunked else window, window if chunked else 0)


def compare_masks(cache: Cache, config: PreTrainedConfig, tokens: int) -> None:
    """Compare what the forward just done let the newest of ``tokens`` tokens see with what captured steps would."""
    padding_B = next((layer.hidden_B for layer in cache.layers if isinstance(layer, TieredLayer)), None)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, WatchedLayer):
            layer.compare(reach_of(layer, number, config, padding_B), tokens)


class FixedLayer(CacheLayerMixin):
    """Replaces ``stock`` in a cache's list of layers until ``leave``, with the same tokens in a ring.

    Any other use of the cache than a captured step puts the stock layer back, as it would be after the same tokens.

    Args:
        cache_graph: The graph that captures the steps.
        tables: The cache's ring tables, by shape; this layer adds the one it needs.
        tokens: Length up to which a layer without a window must hold all tokens.

    Raises:
        AttachError: The model uses its cache in a way that captured steps don't support.
    """

    is_croppable = True

    def __init__(
        self,
        stock: DynamicLayer,
        number: int,
        runtime: Runtime,
        cache_graph: StepGraph,
        tables: dict[tuple[int, int], RingTable],
        padding_B: Tensor | None,
        tokens: int,
    ) -> None:
        # Not the base class's __init__: it would set ``keys`` and ``values``, which lead to the stock layer here.
        self.stock, self.number, self.runtime = stock, number, runtime
        self.is_initialized = True
        self.is_sliding = stock.is_sliding
        self.awaits_attention = False  # between `update` and `attend`
        self.handed: Handed | None = None
        self.arrived_BH: Tensor | None = None  # made at the first query, which shows the number of heads
        # Weak: the graph refers to this layer.
        self._cache_graph = weakref.ref(cache_graph)
        self.length = int(stock.get_seq_length())
        window = stock.sliding_window if isinstance(stock, DynamicSlidingWindowLayer) else 0
        self.reach = reach_of(stock, number, runtime.text_config, padding_B)
        self.kept = window - 1 if window else tokens  # tokens that the stock layer keeps
        size, key_BGTD, value_BGTD = runtime.config.block_size, stock.keys, stock.values
        assert key_BGTD is not None  # as ``why_not_fixed`` has found
        assert value_BGTD is not None
        slots = slots_for(window, size) if window else ceil_div(tokens, size)
        self.ring = Ring(key_BGTD, slots, size)
        self.ring.fill(self.length - key_BGTD.shape[2], key_BGTD, value_BGTD)
        stock.keys, stock.values = (
            x.new_empty(0) for x in (key_BGTD, value_BGTD)
        )  # frees the memory of a whole context
        self.kernel = runtime.config.uses_kernels and why_no_kernel(self.ring.key_BGSTD) is None
        shape = (key_BGTD.shape[1], slots)
        self.table = tables.setdefault(shape, RingTable(*shape, size, key_BGTD.device))

    def put(self, place: int, stock: DynamicLayer) -> None:
        """Give a place to the only sequence of ``stock``."""
        assert stock.keys is not None  # as ``why_not_fixed`` has found
        assert stock.values is not None
        self.ring.put(place, int(stock.get_seq_length()) - stock.keys.shape[2], stock.keys, stock.values)

    def leave(self) -> DynamicLayer:
        """The stock layer, as it would be after these tokens."""
        stock = self.stock
        stock.keys, stock.values = self.ring.read(max(self.length - self.kept, 0), self.length)
        if isinstance(stock, DynamicSlidingWindowLayer):
            # Out of place: some versions of transformers keep a tensor, perhaps one of inference mode.
            stock.cumulative_length = stock.cumulative_length + (self.length - int(stock.cumulative_length))
        return stock

    def advance(self) -> None:
        """Count the next step's token on the host."""
        self.length += 1

    # ---- captured steps ----------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new token. The returned key carries this layer to the attention function."""
        if not self._running:
            return self._given_back().update(key_states, value_states, *args, **kwargs)
        key_BGSTD = self.ring.key_BGSTD
        B, G, _, _, D = key_BGSTD.shape
        for what, found in (("keys", key_states), ("values", value_states)):
            if found.shape != (B, G, 1, D) or found.dtype != key_BGSTD.dtype:
                raise AttachError(
                    f"layer {self.number}: a captured step takes {what} {[B, G, 1, D]} of {key_BGSTD.dtype}, got "
                    f"{list(found.shape)} of {found.dtype}"
                )
        self.ring.write(self.table.place_B, key_states, value_states)
        self.awaits_attention = True
        key_states, self.handed = hand_over(self, key_states, value_states)
        return key_states, value_states

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Attention of the newest token over the ring, also for a layer that shares its keys; ``[B, H, 1, D]``."""
        ring, table, dtype = self.ring, self.table, query_BHQD.dtype
        query_BHD = query_BHQD[:, :, 0].to(ring.key_BGSTD.dtype).contiguous()
        if self.arrived_BH is None:
            self.arrived_BH = query_BHD.new_zeros(query_BHD.shape[:2], dtype=torch.int32)
        cache_graph = self._cache_graph()
        assert cache_graph is not None  # it runs this step
        attention = attend_slots(
            query_BHD,
            ring.key_BGSTD,
            ring.value_BGSTD,
            table.block_BGS,
            cache_graph.length_B,
            None,
            terms,
            kernel=self.kernel,
            arrived_BH=self.arrived_BH,
            reach=self.reach,
        )
        self.awaits_attention = False
        return attention.out_BHD[:, :, None].to(dtype)

    @property
    def _running(self) -> bool:
        cache_graph = self._cache_graph()
        return cache_graph is not None and cache_graph.running

    # ---- what transformers asks of a cache layer -------------------------------------------------------------------

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as of static layers
        """Tokens stored. Within a captured step a device tensor, so that the graph does not bake in a number."""
        cache_graph = self._cache_graph()
        return cache_graph.past if cache_graph is not None and cache_graph.running else self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Within a captured step a constant size: no mask is read there."""
        if self._running:
            return self.ring.places, 0
        return self._given_back().get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return int(self.stock.get_max_length())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: only layers that hold tokens are replaced."""

    def _given_back(self) -> DynamicLayer:
        """Put the stock layer back and return it."""
        if self._running:
            raise AttachError(
                f"layer {self.number}: the model reads or changes its cache itself in a captured step: not supported; "
                'attach with prefetch="thread"'
            )
        if (cache_graph := self._cache_graph()) is not None:
            cache_graph.leave()
        return self.stock

    def reset(self) -> None:
        self._given_back().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self._given_back().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._given_back().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._given_back().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._given_back().batch_select_indices(indices)

    def offload(self) -> None:
        self._given_back().offload()

    def prefetch(self) -> None:
        self._given_back().prefetch()

    def activate_past_recording(self) -> None:
        """Called on sliding layers by assisted decoding."""
        if hasattr(stock := self._given_back(), "activate_past_recording"):
            stock.activate_past_recording()

    @property
    def keys(self) -> Tensor | None:
        return self._given_back().keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._given_back().keys = value

    @property
    def values(self) -> Tensor | None:
        return self._given_back().values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._given_back().values = value

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        return copy.deepcopy(self._given_back(), memo)
