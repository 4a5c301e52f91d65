"""TieredLayer: one layer's KV cache as transformers sees it, and the attention over it.

For each forward, ``update`` waits for the blocks fetched ahead. ``attend`` then runs a decoding step over the pool
(``step/step.py``), or, for prompts, later turns and drafts, stores the tokens and attends to everything.
``LayerBlocks`` stores and moves the blocks.

Suffixes: B sequences, G KV heads, H query heads, R the last queries that are scored, Q queries, T tokens, L tokens of
the sequence, D head size, N blocks.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attention_predictor.errors import AttachError
from attention_predictor.offload.attention.dense import Scorer, ScoreRows, Terms, attend, attend_prompt, why_not_fused
from attention_predictor.offload.attention.sparse import why_no_kernel
from attention_predictor.offload.blocks.layer_blocks import LayerBlocks
from attention_predictor.offload.blocks.room import KVShape
from attention_predictor.offload.blocks.selection import Budget, Selection
from attention_predictor.offload.chunk import Chunk
from attention_predictor.offload.hf.handed import Handed, hand_over
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.base import LayerSpec, Step
from attention_predictor.offload.step.recovery import measure
from attention_predictor.offload.step.schedule import EagerSchedule, Schedule
from attention_predictor.offload.step.step import attend_again, chunks, decode, fetch_ahead

if TYPE_CHECKING:
    from attention_predictor.offload.policies.allocation import PromptAllocation
    from attention_predictor.offload.runtime import Runtime


GRADIENTS_LOST = (
    "gradients are recorded, but the cached tokens are in host memory and have none: call the model within "
    "torch.no_grad(), or with use_cache=False"
)


class StepGraph(Protocol):
    """What a layer needs of the object that captures its steps (``CacheGraph``).

    Attributes:
        running: Whether a step is in progress.
        length_B: int64 on the device, tokens of each sequence, the current step's included.
    """

    running: bool
    length_B: Tensor

    @property
    def past(self) -> Tensor:
        """int64 scalar on the device: tokens before the current step."""
        ...

    def join_prefetch(self) -> None:
        """Make the model's stream wait for the prefetch stream."""
        ...

    def leave(self) -> None:
        """End captured steps, unless one is running."""
        ...


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a ``TieredCache``.

    Raises:
        AttachError: The model bypasses the registered attention function, the engine is detached, or a step was
            interrupted.
        FetchError: A fetch failed; the cache must not be used further.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, runtime: Runtime, number: int, allocation: PromptAllocation | None = None) -> None:
        # Before the base class's __init__, which sets ``keys`` and ``values`` by the setters below.
        self.runtime = runtime
        self.number = number
        self.stage = runtime.stage_of[number]
        super().__init__()
        self.prompt_allocation = allocation  # shared by the layers of the cache; None if budgets are fixed
        self.block_size = runtime.config.block_size
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.awaits_attention = False  # between `update` and `attend`
        self.handed: Handed | None = None
        self.stored_recorded = False  # whether gradients of tokens that are stored were recorded
        self.is_padded = False  # whether the last mask hid any token
        self.has_holes: Tensor | None = None  # bool on the device: whether the model's own hid more than left padding
        self.selection = Selection.of(self.runtime.config, self.runtime.first_budgets[self.number], self.runtime.ranks)
        self.schedule: Schedule = EagerSchedule(self.stage.prefetcher)
        self.arrived_BH: Tensor | None = None  # made at the first captured query, which shows the number of heads
        self.real_BL: Tensor | None = None  # during captured steps
        # Set during captured steps. Weak: the graph refers to this layer, and a cycle would keep the cache's memory
        # until Python collects garbage.
        self._cache_graph: weakref.ref[StepGraph] | None = None

    # ---- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        if key_states.device != self.stage.device:
            raise AttachError(
                f"layer {self.number}: the model was attached on {self.stage.device} and now computes on "
                f"{key_states.device}; move it first, then attach"
            )
        config = self.runtime.config
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.kv_heads, self.head_dim = B, G, D
        self.padding_B = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.blocks = LayerBlocks(
            self.runtime, self.stage, self.number, batch=B, kv_heads=G, head_dim=D, dtype=self.dtype
        )
        spec = LayerSpec(config, self.stage.predictor, B, G, D, self.dtype, self.device)
        self.policy = policy_class(config.policy)(spec)
        self.policy.selection = self.selection
        wanted = config.uses_kernels
        reason = why_no_kernel(self.blocks.pool.key_BGSTD) if wanted else None
        self.kernel = wanted and reason is None
        if reason is not None:
            self.runtime.note_fallback(f"plain torch operations in place of kernels: {reason}")
        self.runtime.room.set_shape(self.number, KVShape(G, D, self.dtype.itemsize))
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Accept the new tokens. The returned key carries this layer to the attention function, which stores them."""
        self.runtime.check_open()
        self.check_attended()
        key_states, value_states = as_under_autocast(key_states, value_states)
        self._check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_gradients(key_states.requires_grad or value_states.requires_grad)
        self.settle()
        self.awaits_attention = True
        key_states, self.handed = hand_over(self, key_states, value_states)
        return key_states, value_states

    def _check_gradients(self, recorded: bool) -> None:
        """``AttachError`` where gradients go through cached tokens, also those of what a hook adds to the model."""
        if not torch.is_grad_enabled():
            return
        if self.blocks.length and (recorded or self.stored_recorded):
            raise AttachError(GRADIENTS_LOST)
        self.stored_recorded |= recorded

    def _check_states(self, key_states: Tensor, value_states: Tensor) -> None:
        for what in ("shape", "dtype"):
            key, value = getattr(key_states, what), getattr(value_states, what)
            if key != value:
                raise AttachError(
                    f"layer {self.number}: keys have {what} {_plain(key)} and values {_plain(value)}: not supported"
                )
        if self.is_initialized and key_states.dtype != self.dtype:
            raise AttachError(
                f"layer {self.number}: the cache started with dtype {_plain(self.dtype)} but now got "
                f"{_plain(key_states.dtype)}; use one dtype for the whole sequence"
            )

    def check_attended(self) -> None:
        """Raise ``AttachError`` if the last step ended between ``update`` and the end of ``attend``."""
        if self.awaits_attention:
            raise AttachError(
                f"layer {self.number}: its last step did not reach the attention function; either the step was "
                "interrupted (use a new cache) or the model ignores the attention interface (unsupported)"
            )

    def settle(self) -> None:
        """Give the blocks to the host: end captured steps and wait for fetches."""
        if self._cache_graph is not None and (cache_graph := self._cache_graph()) is not None:
            cache_graph.leave()  # does nothing within its own step
        self.blocks.settle()

    def advance(self) -> None:
        """Count the next step's token on the host."""
        self.blocks.advance()
        if self._cache_graph is None:  # captured steps have reserved the capacity
            self.policy.reserve(self.blocks.capacity)
        self.policy.advance()

    @property
    def may_read_all_keys(self) -> bool:
        """Whether any step may read all keys from host memory."""
        return bool(self.runtime.config.measure_recovery) or self.policy.may_read_all_keys

    @property
    def reads_all_keys(self) -> bool:
        """Whether the step that ``advance`` counted reads all keys from host memory, so it can't be captured."""
        return self.policy.reads_all_keys or self._is_measured()

    def enter(self, cache_graph: StepGraph, schedule: Schedule, length_B: Tensor, tokens: int) -> None:
        """Switch to captured steps, run by ``cache_graph`` up to a length of ``tokens``."""
        self.blocks.enter(length_B, tokens, self.selection.max_slots_at(self.blocks.length + 1))
        self.policy.reserve(self.blocks.capacity)
        self.blocks.padding_B = self.hidden_B
        self.real_BL = self._real_tokens(None) if self.is_padded else None
        self._cache_graph, self.schedule = weakref.ref(cache_graph), schedule
        self.note_memory()

    def leave(self) -> None:
        """Switch back to steps run by the host."""
        self._cache_graph, self.schedule = None, EagerSchedule(self.stage.prefetcher)
        self.arrived_BH = self.real_BL = None
        self.blocks.leave()
        self.note_memory()

    def empty(self, batch: int) -> TieredLayer:
        """A layer like this one, for ``batch`` sequences, without a token."""
        layer = TieredLayer(self.runtime, self.number)
        nothing_BGTD = torch.empty((batch, self.kv_heads, 0, self.head_dim), dtype=self.dtype, device=self.device)
        layer.lazy_initialization(nothing_BGTD, nothing_BGTD)
        return layer

    def put(self, place: int, other: TieredLayer) -> None:
        """Give a place to the only sequence of ``other``; as ``LayerBlocks.put``."""
        self.blocks.put(place, other.blocks)
        self.policy.put(place, other.policy)

    @property
    def hidden_B(self) -> Tensor | None:
        """int64 on the device, left padding of each sequence in tokens; ``None`` if the last mask hid no token."""
        return self.padding_B if self.is_padded else None

    def hid_more_than(self, padding_B: Tensor) -> Tensor:
        """bool without dimensions, on the device: whether the last mask hid other tokens than this left padding."""
        moved = (self.padding_B != padding_B).any()
        return moved if self.has_holes is None else moved | self.has_holes

    @property
    def room(self) -> int:
        """Tokens that allocated host memory can hold."""
        return self.blocks.store.room if self.is_initialized else 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # as of static layers
        """Tokens stored. Within a captured step a device tensor, so that the graph does not bake in a number."""
        if self._cache_graph is not None and (cache_graph := self._cache_graph()) is not None and cache_graph.running:
            return cache_graph.past
        return self.blocks.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.blocks.length if self.is_initialized else 0) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_initialized:
            self.settle()
            del self.blocks, self.policy
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # some versions of transformers give a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.runtime.check_open()
        self.check_attended()  # else the policy may have missed tokens that are stored
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.settle()
        length = max(self.blocks.length + tokens_to_remove, 0)
        if length == 0:
            self.reset()
            return
        self.blocks.truncate(length)
        self.policy.crop(length, lambda start, stop: self.blocks.store.read(start, stop)[0])
        self._fetch_ahead()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        self.runtime.check_open()
        self.settle()
        index = beam_idx.cpu()
        if len(index) == self.batch and bool((index == torch.arange(self.batch)).all()):
            return
        self.blocks.index(index)
        self.policy.index(index.to(self.device))
        self.padding_B = self.padding_B[index.to(self.device)]
        self.batch = len(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch)[indices.cpu()])

    # The base class sets these; models that bypass `update` read them.
    @property
    def keys(self) -> Tensor | None:
        return self._not_there("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse("keys", value)

    @property
    def values(self) -> Tensor | None:
        return self._not_there("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse("values", value)

    def _not_there(self, name: str) -> Tensor | None:
        if self.is_initialized:
            self._refuse(name, name)
        return None

    def _refuse(self, name: str, value: object) -> None:
        if value is not None:
            raise AttachError(f"layer {self.number}: the model reads or sets the cached {name} itself: not supported")

    def offload(self) -> None:
        """Nothing to do: the cache is in host memory already."""

    def prefetch(self) -> None:
        """Nothing to do: the engine's own prefetcher fetches blocks."""

    @torch.inference_mode(False)  # copies made under it could not be written to outside of it
    def __deepcopy__(self, memo: dict) -> TieredLayer:
        if self.is_initialized:
            self.settle()
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    # ---- attention -------------------------------------------------------------------------------------------------

    def check_terms(self, terms: Terms, causal: bool) -> None:
        """Raise ``AttachError`` if the model asks for attention that steps over the pool can't compute."""
        mask = terms.mask
        if not causal and self.handed is not None and self.handed.tokens > 1 and (mask is None or mask.dim() == 2):
            raise AttachError(f"layer {self.number}: its attention is not causal: not supported")
        if mask is None or mask.dim() == 2 or (mask.dtype == torch.bool and mask.shape[1] == 1):
            return
        if mask.dtype != torch.bool:
            # Values other than 0 and the minimum are a bias on the logits, which a step over the pool can't apply.
            hidden = torch.finfo(mask.dtype).min / 2
            if not bool(((mask == 0) | (mask <= hidden)).all()):
                raise AttachError(f"layer {self.number}: the model's mask adds to the logits: not supported")
            mask = mask <= hidden
        if not bool((mask == mask[:, :1]).all()):
            raise AttachError(f"layer {self.number}: the model's mask differs between heads: not supported")

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Attention of the tokens just passed to ``update``; ``[B, H, Q, D]``."""
        if self._cache_graph is not None:
            out_BHQD = self._attend_captured(query_BHQD, key_BGTD, value_BGTD, terms)
        else:
            out_BHQD = self._attend_eager(query_BHQD, key_BGTD, value_BGTD, terms)
        self.awaits_attention = False  # only here: a step that failed half way must leave the layer unusable
        return out_BHQD

    def _attend_captured(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """A step that may be captured: it reads neither device values nor the mask."""
        if query_BHQD.shape[2] != 1 or key_BGTD.shape[2] != 1:
            raise AttachError(f"a captured step takes one token per sequence, got {key_BGTD.shape[2]}")
        if self.arrived_BH is None:
            self.arrived_BH = query_BHQD.new_zeros(query_BHQD.shape[:2], dtype=torch.int32)
        if not self.awaits_attention:
            assert self._cache_graph is not None
            if (cache_graph := self._cache_graph()) is not None:
                cache_graph.join_prefetch()
            return attend_again(self, query_BHQD, terms, self.real_BL)
        watch = self._measure_recovery if self._is_measured() else None
        return decode(self, query_BHQD, key_BGTD, value_BGTD, terms, self.real_BL, self.schedule, watch)

    def _attend_eager(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        padding_B = _left_padding(terms.mask, self.batch, self.device)
        # The pool holds blocks selected for one more token with the same padding; anything else attends to all keys.
        was_padded, self.is_padded = self.is_padded, terms.mask is not None
        as_before = not (was_padded or self.is_padded) or torch.equal(padding_B, self.padding_B)
        self.padding_B = padding_B
        self.blocks.padding_B = self.hidden_B
        new = self.awaits_attention  # False if layers share keys and another one attends to the same tokens
        holes = _has_holes(terms.mask, padding_B)
        if new or self.has_holes is None:
            self.has_holes = holes
        elif holes is not None:
            self.has_holes = self.has_holes | holes
        one = query_BHQD.shape[2] == 1 and self.blocks.pool.slots > 0 and as_before
        if one and not new:
            self.blocks.settle()
            return attend_again(self, query_BHQD, terms, self._real_tokens(terms.mask))
        stats = self.runtime.stats
        if one:
            self.advance()
            stats.steps += self.runtime.is_first(self.number)
            watch = self._measure_recovery if self._is_measured() else None
            parts = (query_BHQD, key_BGTD.detach(), value_BGTD.detach(), terms)
            out_BHQD = decode(self, *parts, self._real_tokens(terms.mask), self.schedule, watch)
            self.note_memory()
            return out_BHQD
        if new:
            self.store(key_BGTD.detach(), value_BGTD.detach(), query_BHQD.detach())
        allocation = self._allocation_for(query_BHQD.shape[2])
        out_BHQD = self._attend_all(query_BHQD, key_BGTD, value_BGTD, terms, allocation)
        if allocation is None:
            self._fetch_ahead()
            self.note_memory()
        return out_BHQD

    def store(self, key_BGTD: Tensor, value_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """Store the tokens of a forward that is not a decoding step, and show them to the policy."""
        self.blocks.append(key_BGTD, value_BGTD)
        self.policy.reserve(self.blocks.capacity)
        self.policy.extend(key_BGTD, query_BHQD)

    def _real_tokens(self, mask: Tensor | None) -> Tensor | None:
        """bool ``[B, L]`` over the whole capacity, False at padding: from the mask, else from the left padding.

        ``None`` if there is no padding.
        """
        tokens = self.blocks.capacity * self.block_size
        if mask is None and not self.is_padded:
            return None
        if mask is None:
            return (torch.arange(tokens, device=self.device) >= self.padding_B[:, None]).contiguous()
        real_BL = _real_keys(mask)
        assert real_BL is not None
        return F.pad(real_BL, (0, tokens - real_BL.shape[1]), value=True)

    def _is_measured(self) -> bool:
        """Whether recovery is measured in this step."""
        interval = self.runtime.config.measure_recovery
        return bool(interval) and self.runtime.stats.steps % interval == 0

    def _allocation_for(self, queries: int) -> PromptAllocation | None:
        """The allocation that sets budgets from this forward of ``queries`` tokens, or ``None``."""
        allocation = self.prompt_allocation
        if allocation is None or not self.awaits_attention or not allocation.applies_to(queries, self.blocks.length):
            return None
        return allocation

    def _attend_all(
        self,
        query_BHQD: Tensor,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        terms: Terms,
        allocation: PromptAllocation | None,
    ) -> Tensor:
        """Attend to all keys: prefill, later turns, verification of drafts, and every step of full attention."""
        length, queries = self.blocks.length, query_BHQD.shape[2]
        rows = min(max(self.policy.prompt_rows, allocation.rows if allocation is not None else 0), queries)
        last_BHRD, last_terms = query_BHQD[:, :, queries - rows :], terms.queries(queries - rows, queries)
        scorer = None
        if rows:
            form = (last_BHRD, length, last_terms)
            scorer = Scorer(*form, kv_heads=self.kv_heads, block_size=self.block_size, kernel=self.kernel)
        # The new tokens are on the device; earlier ones are read back from host memory, once.
        own = Chunk(length - key_BGTD.shape[2], key_BGTD, value_BGTD)
        if own.start == 0:
            out_BHQD = attend_prompt(query_BHQD, key_BGTD, value_BGTD, terms)
        else:
            past = chunks(self.blocks, query_BHQD, own.start)
            out_BHQD = attend(query_BHQD, own, terms, past if scorer is None else scorer.watch(past))
            if query_BHQD.is_cuda and (reason := why_not_fused(query_BHQD, key_BGTD, terms)) is not None:
                self.runtime.note_fallback(f"plain torch operations attend to cached tokens: {reason}")
        found: ScoreRows | None = None
        if scorer is not None:
            scorer.add(own)
            found = scorer.rows()
            if own_rows := self.policy.prompt_rows:
                self.policy.observe_rows(ScoreRows(*(rows_BGQN[:, :, -own_rows:] for rows_BGQN in found)))
        if allocation is not None:
            allocation.record(self, query_BHQD.detach(), found, _real_keys(terms.mask))
        if queries == 1 and self.runtime.is_first(self.number):
            self.runtime.stats.steps += 1
        return out_BHQD

    # ---- choosing blocks -------------------------------------------------------------------------------------------

    def set_budget(self, budget: Budget) -> None:
        """Attend to ``budget`` tokens from the next step on; budgets by head are those of all ranks' KV heads."""
        self.selection = self.policy.selection = Selection.of(self.runtime.config, budget, self.runtime.ranks)
        self._fetch_ahead()
        self.note_memory()

    def _fetch_ahead(self) -> None:
        """Choose and fetch the next token's blocks after a forward that was not a step."""
        self.blocks.settle()  # a layer that shares these keys may have started a fetch
        if self.policy.selects != "all":
            fetch_ahead(self, self.blocks.extent, self.schedule)

    # ---- figures and checks ----------------------------------------------------------------------------------------

    def _measure_recovery(self, step: Step) -> None:
        found, stats = measure(step, self.selection).recovery, self.runtime.stats
        stats.recovery_sum += float(found.share.sum())
        stats.relative_recovery_sum += float(found.relative.sum())
        stats.recovery_count += found.share.numel()

    def note_memory(self) -> None:
        """Record this layer's memory in the stats."""
        stats = self.runtime.stats
        if self.policy.selects != "all":
            stats.layer_budgets[self.number] = self.selection.heads or self.selection.budget
        parts = {name: part.nbytes for name, part in self.policy.parts.items()}
        parts = {"pool": self.blocks.pool.nbytes, "table": self.blocks.table.nbytes} | parts
        stats.device_bytes[self.number] = parts if self.policy.selects != "all" else {}
        stats.host_bytes[self.number] = self.blocks.store.nbytes
        stats.host_kv_bytes = self.runtime.memory.lent_bytes
        tokens = self.batch * self.kv_heads * self.blocks.length
        stats.full_bytes[self.number] = 2 * tokens * self.head_dim * self.dtype.itemsize

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if the blocks' or the policy's state is inconsistent."""
        if self.is_initialized:
            self.settle()
            self.blocks.check_integrity()
            self.policy.check_integrity()


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast to autocast's dtype within autocast, as stock attention would compute."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)


def _plain(value: object) -> str:
    return str(list(value) if isinstance(value, torch.Size) else value).replace("torch.", "")


def _real_keys(mask: Tensor | None) -> Tensor | None:
    """bool ``[B, L]``, True where the last query may attend, from any form of mask."""
    if mask is None or mask.dim() == 2:
        return mask
    last_BL = mask[:, 0, -1]
    return last_BL if last_BL.dtype == torch.bool else last_BL > torch.finfo(last_BL.dtype).min / 2


def _has_holes(mask: Tensor | None, padding_B: Tensor) -> Tensor | None:
    """bool without dimensions: whether the model's mask hides other tokens from the last query than left padding.

    ``None``: it gave none of its own. The caller's, of two dimensions, is checked at each step.
    """
    if mask is None or mask.dim() == 2:
        return None
    real_BL = _real_keys(mask)
    assert real_BL is not None
    token_L = torch.arange(real_BL.shape[1], device=real_BL.device)
    return (real_BL.bool() != (token_L >= padding_B[:, None])).any()


def _left_padding(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Tokens of left padding of each sequence."""
    real_BL = _real_keys(mask)
    if real_BL is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return real_BL.int().argmax(-1)
