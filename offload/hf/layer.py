"""TieredLayer: one layer's KV cache as transformers sees it, and the attention over it.

The way of a token: ``update`` waits for what was fetched ahead and stores its key and value; ``attend`` gives the
policy key and query, lets it correct the selection, attends to the pool, shows it what happened and submits the fetch
for the next token. What lies where, and how it moves, is ``Tiers``'.

Suffixes: B sequences, G KV heads, H query heads, R rows = B·G, Q queries, T tokens, L tokens of the sequence, D head
size, S slots, N blocks, W wanted blocks.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attention_predictor.arithmetic import scatter_or_drop
from attention_predictor.errors import AttachError
from attention_predictor.offload.attention.dense import Scorer, ScoreRows, Terms, attend, attend_prompt, no_fused
from attention_predictor.offload.attention.sparse import attend_slots, no_kernel
from attention_predictor.offload.blocks.room import KVShape
from attention_predictor.offload.blocks.tiers import Tiers
from attention_predictor.offload.chunk import Chunk
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.base import LayerSpec, Step
from attention_predictor.offload.policies.selection import Budget, Selection
from attention_predictor.predictor.scores import recovery

if TYPE_CHECKING:
    from attention_predictor.offload.policies.allocation import Sharing
    from attention_predictor.offload.runtime import Runtime
    from attention_predictor.offload.step.device_step import DeviceStep
    from attention_predictor.offload.step.graph import Graphed

# The key that `update` returns carries its layer under this name to the attention function.
HANDLE = "_attention_predictor_layer"

# Slots by which the pool grows while the context is shorter than the budget.
POOL_STEP = 16


class Handed(NamedTuple):
    """What ``update`` has handed to the model, to be recognised in the attention function; none of the tensors."""

    tokens: int
    key: tuple[Any, ...]
    value: tuple[Any, ...]


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a ``TieredCache``.

    Raises:
        AttachError: A model without the registered attention function, a detached engine, an interrupted step.
        FetchError: A fetch failed; the cache must not be used further.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, runtime: Runtime, number: int, sharing: Sharing | None = None) -> None:
        # Before the base class, which empties what transformers' own layers hold.
        self.runtime = runtime
        self.number = number
        super().__init__()
        self.sharing = sharing  # of the budget, with the other layers of the cache; None if it is fixed
        self.block_size = runtime.config.block_size
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.armed = False  # between `update` and `attend`
        self.handed: Handed | None = None
        self.is_padded = False  # whether the last mask ruled out any token
        self.selection = Selection.of(self.runtime.config, self.runtime.first_budgets[self.number])
        # While steps run without the host (`graph.py`): who runs them, and this layer's part. Who runs them holds this
        # layer: a reference back would keep the cache's memory until garbage is collected.
        self._graphed: weakref.ref[Graphed] | None = None
        self.device_step: DeviceStep | None = None

    # ---- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        if key_states.device != self.runtime.device:
            raise AttachError(
                f"layer {self.number}: the model was attached on {self.runtime.device} and now computes on "
                f"{key_states.device}; move it first, then attach"
            )
        config = self.runtime.config
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.kv_heads, self.head_dim = B, G, D
        self.padding_B = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.tiers = Tiers(
            self.runtime, self.number, batch=B, kv_heads=G, head_dim=D, dtype=self.dtype, device=self.device
        )
        spec = LayerSpec(config, self.runtime.predictor, B, G, D, self.dtype, self.device)
        self.policy = policy_class(config.policy)(spec)
        self.policy.selection = self.selection
        wanted = config.kernels == "auto"
        reason = no_kernel(self.tiers.pool.key_BGSTD) if wanted else None
        self.kernel = wanted and reason is None
        if reason is not None:
            self.runtime.note_fallback(f"plain torch operations in place of kernels: {reason}")
        self.runtime.room.learn(self.number, KVShape(G, D, self.dtype.itemsize))
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens; the returned key leads the attention function to this layer."""
        self.runtime.check_open()
        self.check_attended()
        key_states, value_states = as_under_autocast(key_states, value_states)
        self._check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle()
        self.armed = True
        if self.device_step is None:
            self.tiers.append(key_states.detach(), value_states.detach())
        # A view of its own, so that no reference from the tensor to this layer outlives the call. The layer must
        # never hold the tensor in turn: that cycle would keep the whole prefill alive.
        key_states = key_states.view_as(key_states)
        setattr(key_states, HANDLE, self)
        self.handed = Handed(key_states.shape[2], _identity(key_states), _identity(value_states))
        return key_states, value_states

    def _check_states(self, key_states: Tensor, value_states: Tensor) -> None:
        for what in ("shape", "dtype"):
            key, value = getattr(key_states, what), getattr(value_states, what)
            if key != value:
                raise AttachError(
                    f"layer {self.number}: keys have {what} {_plain(key)} and values {_plain(value)}: not supported"
                )
        if self.is_initialized and key_states.dtype != self.dtype:
            raise AttachError(
                f"layer {self.number}: the cache began with dtype {_plain(self.dtype)} and is given "
                f"{_plain(key_states.dtype)}; use one precision for all of a sequence"
            )

    def check_attended(self) -> None:
        """Raise ``AttachError`` if the last step ended between ``update`` and the end of ``attend``."""
        if self.armed:
            raise AttachError(
                f"layer {self.number}: its last step did not reach the attention function; either the step was "
                "interrupted (use a new cache) or the model ignores the attention interface (unsupported)"
            )

    def _settle(self) -> None:
        """Let the host have the tiers: after fetches under way, and steps that it took no part in."""
        if self._graphed is not None and (graphed := self._graphed()) is not None:
            graphed.leave()  # but for a step that it is running itself
        self.tiers.settle()

    def hand_over(self, graphed: Graphed, step: DeviceStep) -> None:
        """From now on ``graphed`` runs the steps, and ``step`` is this layer's part in them."""
        self._graphed, self.device_step = weakref.ref(graphed), step

    def take_back(self) -> None:
        """The host runs the steps again."""
        self._graphed = self.device_step = None

    @property
    def room(self) -> int:
        """Tokens for which there is host memory."""
        return self.tiers.store.room if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.tiers.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_initialized:
            self._settle()
            del self.tiers, self.policy
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # some versions of transformers give a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.check_attended()  # else the policy may lack tokens that are in the store
        self._settle()
        length = max(self.tiers.length + tokens_to_remove, 0)
        if length == 0:
            self.reset()
            return
        self.tiers.truncate(length)
        self.policy.crop(length, lambda start, stop: self.tiers.store.read(start, stop)[0])
        self._fetch_ahead()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        self._settle()
        index = beam_idx.cpu()
        if len(index) == self.batch and bool((index == torch.arange(self.batch)).all()):
            return
        self.tiers.index(index)
        self.policy.index(index.to(self.device))
        self.padding_B = self.padding_B[index.to(self.device)]
        self.batch = len(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch)[indices.cpu()])

    # Set by the base class, and read by models that look into their cache instead of calling `update`.
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
        """Nothing to do: blocks are fetched by the engine's own prefetcher."""

    def __deepcopy__(self, memo: dict) -> TieredLayer:
        if self.is_initialized:
            self._settle()
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    # ---- attention -------------------------------------------------------------------------------------------------

    def check_arrived(self, key: Tensor, value: Tensor, query_BHQD: Tensor) -> None:
        """Raise ``AttachError`` unless attention is asked for with what ``update`` returned, for those tokens."""
        if self.handed is None or not self.armed:  # of layers that share keys, another one has attended to them
            return
        for what, found, handed in (("keys", key, self.handed.key), ("values", value, self.handed.value)):
            if _identity(found) != handed:
                raise AttachError(
                    f"layer {self.number}: the model changes {what} between its cache and attention: not supported"
                )
        if query_BHQD.shape[2] != self.handed.tokens:
            raise AttachError(
                f"layer {self.number}: {query_BHQD.shape[2]} queries for {self.handed.tokens} new tokens: not supported"
            )

    def check_terms(self, terms: Terms, causal: bool, dropout: float) -> None:
        """Raise ``AttachError`` where attention is asked for that steps over the pool could not do."""
        mask = terms.mask
        if not causal and self.handed is not None and self.handed.tokens > 1 and (mask is None or mask.dim() == 2):
            raise AttachError(f"layer {self.number}: its attention is not causal: not supported")
        if dropout:
            self.runtime.note_fallback(f"attention dropout of {dropout:g} is left out of a model in training mode")
        if mask is None or mask.dim() == 2 or (mask.dtype == torch.bool and mask.shape[1] == 1):
            return
        if mask.dtype != torch.bool:
            # A mask says yes or no. Numbers between are a bias, which a step over the pool would not know.
            hidden = torch.finfo(mask.dtype).min / 2
            if not bool(((mask == 0) | (mask <= hidden)).all()):
                raise AttachError(f"layer {self.number}: the model's mask adds to the logits: not supported")
            mask = mask <= hidden
        if not bool((mask == mask[:, :1]).all()):
            raise AttachError(f"layer {self.number}: the model's mask differs between heads: not supported")

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Attention of the tokens that ``update`` has just stored, ``key_BGTD`` and no others; ``[B, H, Q, D]``."""
        if self.device_step is not None:
            out_BHQD = self.device_step.attend(query_BHQD, key_BGTD, value_BGTD, terms)
            self.armed = False
            return out_BHQD
        padding_B = _left_padding(terms.mask, self.batch, self.device)
        if self.armed:  # not where layers share keys, and attention comes back for the same ones
            self.policy.extend(key_BGTD.detach(), query_BHQD.detach())
        # The slots hold blocks that were wanted for one more token, padded as before; all else attends to everything.
        was_padded, self.is_padded = self.is_padded, terms.mask is not None
        as_before = not (was_padded or self.is_padded) or torch.equal(padding_B, self.padding_B)
        self.padding_B = padding_B
        if query_BHQD.shape[2] == 1 and self.tiers.pool.slots and as_before:
            sharing, out_BHQD = None, self._attend_one(query_BHQD, terms)
        else:
            sharing = self._sharing_now(query_BHQD.shape[2])
            out_BHQD = self._attend_all(query_BHQD, key_BGTD, value_BGTD, terms, sharing)
        if sharing is None:
            self._fetch_ahead()
            self.note_memory()
        self.armed = False  # not before: a step that fails on its way leaves the layer unusable, as it should
        return out_BHQD

    def _sharing_now(self, queries: int) -> Sharing | None:
        """Who decides about this layer's budget once so many queries have gone through all layers, if anyone does."""
        if self.sharing is None or not self.armed or not self.sharing.heeds(queries, self.tiers.length):
            return None
        return self.sharing

    def _attend_all(
        self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms, sharing: Sharing | None
    ) -> Tensor:
        """Prefill, later turns, verification, and every step of full attention."""
        length, queries = self.tiers.length, query_BHQD.shape[2]
        rows = min(max(self.policy.prompt_rows, sharing.rows if sharing is not None else 0), queries)
        last_BHRD, last_terms = query_BHQD[:, :, queries - rows :], terms.queries(queries - rows, queries)
        scorer = None
        if rows:
            form = (last_BHRD, length, last_terms)
            scorer = Scorer(*form, kv_heads=self.kv_heads, block_size=self.block_size, kernel=self.kernel)
        # What has just been computed is on the device; only what came before is read back, and once.
        own = Chunk(length - key_BGTD.shape[2], key_BGTD, value_BGTD)
        if own.start == 0:
            out_BHQD = attend_prompt(query_BHQD, key_BGTD, value_BGTD, terms)
        else:
            past = self.tiers.stream(query_BHQD, own.start)
            out_BHQD = attend(query_BHQD, own, terms, past if scorer is None else scorer.watch(past))
            if query_BHQD.is_cuda and (reason := no_fused(query_BHQD, key_BGTD, terms)) is not None:
                self.runtime.note_fallback(f"plain torch operations attend to what is cached: {reason}")
        found: ScoreRows | None = None
        if scorer is not None:
            scorer.add(own)
            found = scorer.rows()
            if own_rows := self.policy.prompt_rows:
                self.policy.observe_rows(ScoreRows(*(rows_BGQN[:, :, -own_rows:] for rows_BGQN in found)))
        if sharing is not None:
            sharing.tell(self, query_BHQD.detach(), found, _real_keys(terms.mask))
        if queries == 1 and self.runtime.is_first(self.number):
            self.runtime.stats.steps += 1
        return out_BHQD

    def _attend_one(self, query_BHQD: Tensor, terms: Terms) -> Tensor:
        """One token over the pool."""
        pool, table = self.tiers.pool, self.tiers.table
        before_RS = table.block_of_slot_RS.clone() if self.policy.chooses else table.block_of_slot_RS
        step = Step(
            query_BHD=query_BHQD[:, :, 0],
            length=self.tiers.length,
            real_BL=_real_keys(terms.mask),
            terms=terms,
            kv_heads=self.kv_heads,
            block_size=self.block_size,
            stream=self.tiers.stream,
            pool_key_BGSTD=pool.key_BGSTD,
            resident_RS=before_RS,
            kernel=self.kernel,
        )
        if self.policy.chooses:
            self._choose(step)
        active_RS = table.active_RS
        block_RS = table.block_of_slot_RS.masked_fill(~active_RS, -1)
        step.block_BGS = block_RS.view(self.batch, self.kv_heads, -1).to(self.device, non_blocking=True)
        step.attention = attend_slots(
            step.query_BHD,
            pool.key_BGSTD,
            pool.value_BGSTD,
            step.block_BGS,
            step.length,
            step.real_BL,
            terms,
            kernel=self.kernel,
        )
        stats = self.runtime.stats
        stats.steps += self.runtime.is_first(self.number)
        stats.wanted_blocks += int(active_RS.sum())
        stats.hit_blocks += int((active_RS & (before_RS == block_RS)).sum())
        interval = self.runtime.config.measure_recovery
        if interval and stats.steps % interval == 0:
            self._measure_recovery(step)
        self.policy.observe(step)
        return step.attention.out_BHD[:, :, None]

    # ---- choosing blocks -------------------------------------------------------------------------------------------

    def set_budget(self, budget: Budget) -> None:
        """Attend to so many tokens from the next step on, once all layers have told what they need."""
        self.tiers.settle()  # where layers share keys, one may have begun to fetch
        self.selection = self.policy.selection = Selection.of(self.runtime.config, budget)
        self._fetch_ahead()
        self.note_memory()

    def _fetch_ahead(self) -> None:
        """Submit the fetch of what the next token wants."""
        if self.policy.selects == "all":
            return
        length = self.tiers.length + 1
        self.policy.padding_B = self.padding_B if self.is_padded else None
        scores_BGN = self.policy.score_next(length)
        # More than a step may attend to, where the next one chooses among them.
        more = self.selection.ahead_blocks if self.policy.chooses else 0
        wanted_BGW = self.selection.wanted(scores_BGN, length, self.padding_B, self.kv_heads, more)
        slots, most = self.selection.slots(length), self.selection.most_slots_at(length)
        if slots > self.tiers.pool.slots:  # while the context is shorter than the budget, the pool grows with it
            self.tiers.grow(min(slots + POOL_STEP, most))
        elif most < self.tiers.pool.slots:  # the budget has become smaller, or has come into effect
            self.tiers.shrink(most)
        self.tiers.fetch_ahead(wanted_BGW)

    def _choose(self, step: Step) -> None:
        """Choose with the current query, among what is resident and, within the policy's share, what is fetched now."""
        scores_BGN = self.policy.score_now(step)
        if self.policy.selects != "now":
            resident_RN = self.tiers.table.resident(step.n_blocks)
            resident_BGN = resident_RN.view(self.batch, self.kv_heads, -1).to(self.device)
            late_blocks = self.selection.share(self.policy.late_share)
            scores_BGN = self.selection.within_reach(scores_BGN, resident_BGN, late_blocks)
        self.tiers.fetch_late(self.selection.wanted(scores_BGN, step.length, self.padding_B, self.kv_heads))

    # ---- figures and checks ----------------------------------------------------------------------------------------

    def _measure_recovery(self, step: Step) -> None:
        mass_BGN = step.exact.mass_BGQN[:, :, 0]
        best_BGW = self.selection.wanted(mass_BGN, step.length, self.padding_B, self.kv_heads)
        best_BGN = scatter_or_drop(torch.zeros_like(mass_BGN, dtype=torch.bool), best_BGW, True)
        found, stats = recovery(mass_BGN, step.attended_BGN, best_BGN), self.runtime.stats
        stats.recovery_sum += float(found.share.sum())
        stats.relative_recovery_sum += float(found.relative.sum())
        stats.recovery_count += found.share.numel()

    def note_memory(self) -> None:
        """Tell the stats what this layer holds."""
        stats = self.runtime.stats
        if self.policy.selects != "all":
            stats.layer_budgets[self.number] = self.selection.heads or self.selection.budget
        parts = {name: part.nbytes for name, part in self.policy.parts.items()}
        if self.device_step is not None:
            parts["table"] = self.device_step.table.nbytes
        stats.device_bytes[self.number] = {"pool": self.tiers.pool.nbytes} | parts
        stats.host_bytes[self.number] = self.tiers.store.nbytes
        tokens = self.batch * self.kv_heads * self.tiers.length
        stats.full_bytes[self.number] = 2 * tokens * self.head_dim * self.dtype.itemsize

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if the tiers or what the policy holds contradict themselves."""
        if self.is_initialized:
            self._settle()
            self.tiers.check_integrity()
            self.policy.check_integrity()


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as attention takes them: within autocast in its dtype, in which stock attention would compute too."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) if tensor.dtype == torch.float32 else tensor for tensor in tensors)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from others, and from itself once it has been written to."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version


def _plain(value: object) -> str:
    return str(list(value) if isinstance(value, torch.Size) else value).replace("torch.", "")


def _real_keys(mask: Tensor | None) -> Tensor | None:
    """bool ``[B, L]``, True where the last query may attend, from any form of mask."""
    if mask is None or mask.dim() == 2:
        return mask
    last_BL = mask[:, 0, -1]
    return last_BL if last_BL.dtype == torch.bool else last_BL > torch.finfo(last_BL.dtype).min / 2


def _left_padding(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Tokens of left padding of each sequence."""
    real_BL = _real_keys(mask)
    if real_BL is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return real_BL.int().argmax(-1)
