"""TieredLayer: one layer's KV cache, all of it in host memory, the blocks that matter in a pool on the device.

The way of a token: ``update`` waits for what was fetched ahead and stores its key and value; ``attend`` gives the
policy key and query, lets it correct the selection, attends to the pool, shows it what happened and submits the fetch
for the next token.

Suffixes: B sequences, G KV heads, H query heads, R rows = B·G, Q queries, T tokens, L tokens of the sequence, D head
size, S slots, N blocks, W wanted blocks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attention_predictor.offload.block_pool import BlockPool
from attention_predictor.offload.dense import (
    Chunk,
    Terms,
    attend,
    attend_prompt,
    chunk_tokens,
    score_rows,
    split,
)
from attention_predictor.offload.host_store import HostStore
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.base import LayerSpec, Step
from attention_predictor.offload.residency import Plan, ResidencyTable
from attention_predictor.offload.selection import Selection
from attention_predictor.offload.sparse import attend_slots
from attention_predictor.predictor.errors import AttachError, FetchError, IntegrityError

if TYPE_CHECKING:
    from attention_predictor.offload.engine import Engine
    from attention_predictor.offload.prefetch import Ticket

# The key that `update` returns carries its layer under this name to the attention function.
HANDLE = "_attention_predictor_layer"

# Slots by which the pool grows while the context is shorter than the budget.
POOL_STEP = 16


class TieredLayer(CacheLayerMixin):
    """One full-attention layer of a ``TieredCache``.

    Raises:
        AttachError: A model without the registered attention function, a detached engine, an interrupted step.
        FetchError: A fetch failed; the cache must not be used further.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, engine: Engine, number: int) -> None:
        super().__init__()
        self.engine = engine
        self.number = number
        self.selection = Selection.of(engine.config)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.armed = False  # between `update` and `attend`
        self.ticket: Ticket | None = None
        self.ahead_plan: Plan | None = None  # what the ticket's job did; set on the prefetch thread

    # ---- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        if value_states.shape != key_states.shape:
            raise AttachError(
                f"layer {self.number}: keys {list(key_states.shape)} and values {list(value_states.shape)} differ in "
                "shape, which this engine does not support"
            )
        if key_states.device != self.engine.device:
            raise AttachError(
                f"layer {self.number}: the model was attached on {self.engine.device} and now computes on "
                f"{key_states.device}; move it first, then attach"
            )
        config = self.engine.config
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.kv_heads, self.head_dim = B, G, D
        self.padding_B = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.store = HostStore(
            batch=B,
            kv_heads=G,
            head_dim=D,
            dtype=self.dtype,
            block_size=config.block_size,
            slab_blocks=config.slab_blocks,
            pin=self.device.type == "cuda",
        )
        self.pool = BlockPool(
            batch=B,
            kv_heads=G,
            slots=0,
            block_size=config.block_size,
            head_dim=D,
            dtype=self.dtype,
            device=self.device,
        )
        self.table = ResidencyTable(rows=B * G, slots=0)
        spec = LayerSpec(config, self.engine.predictor, B, G, D, self.dtype, self.device)
        self.policy = policy_class(config.policy)(spec)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens; the returned key leads the attention function to this layer."""
        self.engine.check_open()
        self._check_attended()
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle()
        self.armed = True
        start = self.store.length
        self.store.append(key_states, value_states)
        if key_states.shape[2] == 1 and self.pool.slots:
            tail, offset = divmod(start, self.store.block_size)
            slot_R = self.table.slot_of(torch.full((self.batch * self.kv_heads,), tail))
            if bool((slot_R < 0).any()):
                raise IntegrityError(f"layer {self.number}: block {tail} has no slot for token {start}")
            self.pool.write_token(slot_R, offset, key_states, value_states)
        else:
            self.table.drop_from(start // self.store.block_size)  # the tail block has grown behind the pool's back
        # A view of its own, so that no reference from the tensor to this layer outlives the call. The layer must
        # never hold the tensor in turn: that cycle would keep the whole prefill alive.
        key_states = key_states.view_as(key_states)
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    def _check_attended(self) -> None:
        if self.armed:
            raise AttachError(
                f"layer {self.number}: its last step did not reach the attention function; either the step was "
                "interrupted (use a new cache) or the model ignores the attention interface (unsupported)"
            )

    def get_seq_length(self) -> int:
        return self.store.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_initialized:
            self._settle()
            del self.store, self.pool, self.table, self.policy
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # some versions of transformers give a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self._check_attended()  # else the policy may lack tokens that are in the store
        self._settle()
        length = max(self.store.length + tokens_to_remove, 0)
        if length == 0:
            self.reset()
            return
        self.store.truncate(length)
        self.table.drop_from(self.store.n_blocks)
        self.policy.crop(length, lambda start, stop: self.store.read(start, stop)[0])
        self._fetch_ahead()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        self._settle()
        index = beam_idx.cpu()
        if len(index) == self.batch and bool((index == torch.arange(self.batch)).all()):
            return
        self.store.index(index)
        self.pool.index(index.to(self.device))
        self.table.index(index, self.kv_heads)
        self.policy.index(index.to(self.device))
        self.padding_B = self.padding_B[index.to(self.device)]
        self.batch = len(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch)[indices.cpu()])

    def offload(self) -> None:
        """Nothing to do: the cache is in host memory already."""

    def prefetch(self) -> None:
        """Nothing to do: blocks are fetched by the engine's own prefetcher."""

    def __deepcopy__(self, memo: dict) -> TieredLayer:
        self._settle()
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = value if name == "engine" else copy.deepcopy(value, memo)
        return clone

    # ---- attention -------------------------------------------------------------------------------------------------

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Attention of the tokens that ``update`` has just stored, ``key_BGTD`` and no others; ``[B, H, Q, D]``."""
        if self.armed:  # not where layers share keys, and attention comes back for the same ones
            self.policy.extend(key_BGTD, query_BHQD)
        # The slots hold blocks that were wanted for one more token; several tokens at once attend to everything.
        if query_BHQD.shape[2] == 1 and self.pool.slots:
            out_BHQD = self._attend_one(query_BHQD, terms)
        else:
            out_BHQD = self._attend_all(query_BHQD, key_BGTD, value_BGTD, terms)
        self._fetch_ahead()
        self._note_memory()
        self.armed = False  # not before: a step that fails on its way leaves the layer unusable, as it should
        return out_BHQD

    def _attend_all(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Prefill, later turns, verification, and every step of full attention."""
        length = self.store.length
        self.padding_B = _left_padding(terms.mask, self.batch, self.device)
        is_prompt = key_BGTD.shape[2] == length  # all there is has just been computed: no need to read it back
        if is_prompt:
            out_BHQD = attend_prompt(query_BHQD, key_BGTD, value_BGTD, terms)
        else:
            out_BHQD = attend(query_BHQD, self._stream(query_BHQD), length, terms)
        rows = min(self.policy.prompt_rows, query_BHQD.shape[2])
        if rows:
            last_BHRD = query_BHQD[:, :, -rows:]
            if is_prompt:
                chunks = split(key_BGTD, value_BGTD, chunk_tokens(last_BHRD, self.store.block_size))
            else:
                chunks = self._stream(last_BHRD)
            self.policy.observe_rows(
                score_rows(
                    last_BHRD,
                    chunks,
                    length,
                    terms.last_queries(rows),
                    kv_heads=self.kv_heads,
                    block_size=self.store.block_size,
                )
            )
        if query_BHQD.shape[2] == 1 and self.engine.is_first(self):
            self.engine.stats.steps += 1
        return out_BHQD

    def _attend_one(self, query_BHQD: Tensor, terms: Terms) -> Tensor:
        """One token over the pool."""
        step = Step(
            query_BHD=query_BHQD[:, :, 0],
            length=self.store.length,
            real_BL=_real_keys(terms.mask),
            terms=terms,
            kv_heads=self.kv_heads,
            block_size=self.store.block_size,
            stream=self._stream,
        )
        before_RS = self.table.block_of_slot_RS.clone() if self.policy.late_share else self.table.block_of_slot_RS
        if self.policy.late_share:
            self._fetch_late(step)
        active_RS = self.table.active_RS
        block_RS = self.table.block_of_slot_RS.masked_fill(~active_RS, -1)
        step.block_BGS = block_RS.view(self.batch, self.kv_heads, -1).to(self.device, non_blocking=True)
        step.attention = attend_slots(
            step.query_BHD,
            self.pool.key_BGSTD,
            self.pool.value_BGSTD,
            step.block_BGS,
            step.length,
            step.real_BL,
            terms,
        )
        stats = self.engine.stats
        stats.steps += self.engine.is_first(self)
        stats.wanted_blocks += int(active_RS.sum())
        stats.hit_blocks += int((active_RS & (before_RS == block_RS)).sum())
        interval = self.engine.config.measure_recovery
        if interval and stats.steps % interval == 0:
            self._measure_recovery(step)
        self.policy.observe(step)
        return step.attention.out_BHD[:, :, None]

    # ---- moving blocks ---------------------------------------------------------------------------------------------

    def _fetch_ahead(self) -> None:
        """Submit the fetch of what the next token wants."""
        if self.policy.selects == "all":
            return
        length = self.store.length + 1
        scores_BGN = self.policy.score_next(length)
        wanted_BGW = self.selection.wanted(scores_BGN, length, self.padding_B, self.kv_heads)
        slots = self.selection.slots(length)
        if slots > self.pool.slots:  # while the context is shorter than the budget, the pool grows with it
            slots = min(slots + POOL_STEP, self.selection.slots(self.engine.config.budget))
            self.pool.grow(slots)
            self.table.grow(slots)
        self.ticket = self.engine.prefetcher.submit(partial(self._run_ahead, wanted_BGW))

    def _run_ahead(self, wanted_BGW: Tensor) -> None:
        self.ahead_plan = self._fetch(wanted_BGW)

    def _fetch_late(self, step: Step) -> None:
        """Fetch, before attention, what the current query says is missing, within the policy's share."""
        scores_BGN = self.policy.score_now(step)
        resident_BGN = self.table.resident(step.n_blocks).view(self.batch, self.kv_heads, -1).to(self.device)
        late_blocks = self.selection.late_blocks(self.policy.late_share)
        if self.policy.selects != "now":
            scores_BGN = self.selection.within_reach(scores_BGN, resident_BGN, late_blocks)
        wanted_BGW = self.selection.wanted(scores_BGN, step.length, self.padding_B, self.kv_heads)
        started = time.perf_counter()
        try:
            plan = self._fetch(wanted_BGW)
        except Exception as error:
            raise FetchError(f"layer {self.number}: a late fetch failed: {error!r}") from error
        stats = self.engine.stats
        stats.exposed_wait_ms += 1000 * (time.perf_counter() - started)
        stats.late_blocks += len(plan.block_n)
        stats.late_bytes += len(plan.block_n) * self.block_bytes

    def _fetch(self, wanted_BGW: Tensor) -> Plan:
        """Bring the wanted blocks into the pool. Runs on the prefetch thread or, for late fetches, in the step."""
        plan = self.table.plan(wanted_BGW.flatten(0, 1).cpu())
        stored = plan.block_n < self.store.n_blocks  # the next token's own block may not have begun
        if bool(stored.any()):
            kv_n2TD = self.store.gather(plan.row_n[stored], plan.block_n[stored])
            self.pool.write_blocks(plan.row_n[stored], plan.slot_n[stored], kv_n2TD)
        self.table.commit(plan)
        return plan

    def _settle(self) -> None:
        """Wait until the blocks fetched ahead are in the pool."""
        if self.ticket is None:
            return
        ticket, self.ticket = self.ticket, None
        stats = self.engine.stats
        stats.exposed_wait_ms += self.engine.prefetcher.wait(ticket)
        plan = self.ahead_plan
        assert plan is not None  # `wait` has raised otherwise
        stats.planned_blocks += int((plan.wanted_RW >= 0).sum())
        stats.ahead_blocks += len(plan.block_n)
        stats.ahead_bytes += len(plan.block_n) * self.block_bytes

    def _stream(self, query_BHQD: Tensor) -> Iterator[Chunk]:
        """All keys and values from host memory, in chunks that suit the query."""
        size = chunk_tokens(query_BHQD, self.store.block_size)
        for start in range(0, self.store.length, size):
            key_BGTD, value_BGTD = self.store.read(start, min(start + size, self.store.length))
            self.engine.stats.streamed_bytes += key_BGTD.nbytes + value_BGTD.nbytes
            yield Chunk(start, key_BGTD.to(self.device), value_BGTD.to(self.device))

    # ---- figures and checks ----------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return 2 * self.store.block_size * self.head_dim * self.dtype.itemsize

    def _measure_recovery(self, step: Step) -> None:
        mass_BGN = step.exact.mass_BGQN[:, :, 0]
        total_BG = mass_BGN.sum(-1).clamp_min(1e-12)  # below 1 where an attention sink takes its share
        got_BG = mass_BGN.masked_fill(~step.attended_BGN, 0).sum(-1) / total_BG
        best_BGW = self.selection.wanted(mass_BGN, step.length, self.padding_B, self.kv_heads)
        best_BG = mass_BGN.gather(-1, best_BGW.clamp_min(0)).masked_fill(best_BGW < 0, 0).sum(-1) / total_BG
        stats = self.engine.stats
        stats.recovery_sum += float(got_BG.sum())
        stats.relative_recovery_sum += float((got_BG / best_BG.clamp_min(1e-12)).sum())
        stats.recovery_count += got_BG.numel()

    def _note_memory(self) -> None:
        stats = self.engine.stats
        parts = {name: part.nbytes for name, part in self.policy.parts.items()}
        stats.device_bytes[self.number] = {"pool": self.pool.nbytes} | parts
        stats.host_bytes[self.number] = self.store.nbytes
        tokens = self.batch * self.kv_heads * self.store.length
        stats.full_bytes[self.number] = 2 * tokens * self.head_dim * self.dtype.itemsize

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if tiers contradict each other: every resident block must equal its host block."""
        if not self.is_initialized:
            return
        self._settle()
        self.store.check_integrity()
        self.pool.check_integrity()
        self.table.check_integrity()
        self.policy.check_integrity()
        row_n, slot_n = (self.table.block_of_slot_RS >= 0).nonzero(as_tuple=True)
        block_n = self.table.block_of_slot_RS[row_n, slot_n]
        stored = block_n < self.store.n_blocks
        row_n, slot_n, block_n = row_n[stored], slot_n[stored], block_n[stored]
        host_n2TD = self.store.gather(row_n, block_n)
        pool_n2TD = torch.stack(
            [side.flatten(0, 1).cpu()[row_n, slot_n] for side in (self.pool.key_BGSTD, self.pool.value_BGSTD)], 1
        )
        token_nT = block_n[:, None] * self.store.block_size + torch.arange(self.store.block_size)
        written = (token_nT < self.store.length)[:, None, :, None]
        if not torch.equal(host_n2TD.masked_fill(~written, 0), pool_n2TD.masked_fill(~written, 0)):
            raise IntegrityError(f"layer {self.number}: a resident block differs from its block in host memory")


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
