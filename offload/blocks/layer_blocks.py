"""LayerBlocks: one layer's blocks, all in host memory and the selected ones in a pool on the device.

Suffixes: B sequences, G KV heads, R = B·G rows, T tokens, D head size, S slots, C block capacity; n: one entry per
moved block.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import binding, ops
from attention_predictor.csrc.ops import Estimates
from attention_predictor.errors import FetchError, IntegrityError
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.coded_store import CodedStore, new_store
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.slot_table import SlotTable

if TYPE_CHECKING:
    from attention_predictor.offload.blocks.host_memory import HostMemory
    from attention_predictor.offload.blocks.prefetch import Prefetcher, Ticket
    from attention_predictor.offload.blocks.selection import Limits, Selection
    from attention_predictor.offload.config import OffloadConfig
    from attention_predictor.offload.stats import DeviceCounts, Stats

CAPACITY_BLOCKS = 64  # the capacity grows by this many blocks: doubling would waste the memory this library saves
POOL_STEP = 16  # the pool grows by this many slots while the context is shorter than the budget


class BlockRuntime(Protocol):
    """What ``LayerBlocks`` needs of ``Runtime``."""

    config: OffloadConfig
    stats: Stats

    @property
    def memory(self) -> HostMemory: ...


class BlockStage(Protocol):
    """What ``LayerBlocks`` needs of ``Stage``."""

    device: torch.device
    counts: DeviceCounts
    prefetcher: Prefetcher


class LayerBlocks:
    """``HostStore``, ``BlockPool`` and ``SlotTable`` of one layer, and all moves of blocks between them.

    A GPU with kernels and pinned memory moves blocks itself. Otherwise the host reads the move lists and moves blocks.
    After ``fetch_ahead`` the prefetch thread may be changing pool and table: call ``settle`` before anything else.

    Attributes:
        capacity: Blocks that table and policy have places for.
        counts: int64 on the device, as ``DeviceCounts.of_layer``.

    Raises:
        FetchError: A fetch failed; the cache must not be used further.
    """

    def __init__(
        self,
        runtime: BlockRuntime,
        stage: BlockStage,
        number: int,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        config, device = runtime.config, stage.device
        self.runtime, self.stage, self.number = runtime, stage, number
        self.kv_heads, self.device, self.block_size = kv_heads, device, config.block_size
        shape = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": config.block_size}
        kernels = config.uses_kernels
        options = {"slab_blocks": config.slab_blocks, "memory": runtime.memory, "kernel": kernels}
        self.store = new_store(config.code_bits, **shape, dtype=dtype, **options)
        self.pool = BlockPool(**shape, dtype=dtype, slots=0, device=device)
        self.table = SlotTable(rows=batch * kv_heads, device=device)
        self.counts = stage.counts.of_layer(number, self.store.block_bytes)
        self.capacity = 0
        self.ticket: Ticket | None = None
        self._may_move = kernels and binding.on_gpu(device) and ops.why_no_kernels(device) is None
        if isinstance(self.store, CodedStore):
            self._may_move = self._may_move and dtype in ops.ELEMENTS
        self._slabs: ops.Slabs | None = None
        self.padding_B: Tensor | None = None  # int64, left padding of each sequence in tokens; None: no padding
        self._device_length_B: Tensor | None = None  # during captured steps, which count tokens on the device
        self._length_B = self._counted(0)

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.store.length

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Reserve host memory for ``tokens`` tokens if the GPU writes them itself, and table places for one more."""
        blocks = ceil_div(tokens + 1, self.block_size)
        if blocks > self.capacity:
            self.capacity = ceil_div(blocks, CAPACITY_BLOCKS) * CAPACITY_BLOCKS
            self.table.reserve(self.capacity)
        if self.device_moves and tokens > self.store.room:
            self.store.reserve(tokens)
            self._slabs = None

    @property
    def device_moves(self) -> bool:
        """Whether the GPU itself reads and writes host memory."""
        return self._device_length_B is not None or (self._may_move and self.store.pinned)

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Store the tokens of a forward that is not a decoding step."""
        start = self.store.length
        self.store.append(key_BGTD, value_BGTD)
        self._slabs = None
        self.reserve(self.store.length)
        self.table.drop_from(start // self.block_size)  # the pool's copy of the tail block is outdated
        self._length_B = self._counted(0)

    def advance(self) -> None:
        """Count the next step's token on the host."""
        if self._device_length_B is not None:
            self.store.advance(1)
            return
        self.reserve(self.store.length + 1)
        if self.device_moves:
            self.store.advance(1)
        self._length_B = self._counted(0 if self.device_moves else 1)

    def append_token(self, key_BGD: Tensor, value_BGD: Tensor, extent: Extent) -> None:
        """Write the step's token to its block in host memory and in the pool. ``extent`` already counts the token."""
        pool, length_B = self.pool, extent.length_B
        if self.device_moves:
            into = (pool.key_BGSTD, pool.value_BGSTD, self._find_slabs())
            given = (key_BGD, value_BGD, *into, self.table.tensors.slot_RC, length_B, self.counts[4:])
            if isinstance(self.store, CodedStore):
                ops.append_coded_token(*given, open_R2TD=self.store.open_R2TD, bits=self.store.codec.bits)
            else:
                ops.append_token(*given)
            return
        key_BG1D, value_BG1D = key_BGD[:, :, None], value_BGD[:, :, None]
        self.store.append(key_BG1D, value_BG1D)
        token_B = length_B - 1
        slot_R = self.table.slot_of(token_B // self.block_size)
        if bool((slot_R < 0).any()):
            raise IntegrityError(f"layer {self.number}: a token's block has no slot at {self.length} tokens")
        offset_R = (token_B % self.block_size).repeat_interleave(self.kv_heads)
        pool.write_token(slot_R, offset_R, key_BG1D, value_BG1D)
        if isinstance(self.store, CodedStore) and self.store.open_block is None:  # the token has completed a block
            row_R = torch.arange(len(slot_R))
            kv_R2TD = self.store.fetch(row_R, torch.full_like(row_R, self.store.n_blocks - 1), self.device)
            pool.write_blocks(row_R.to(self.device), slot_R, kv_R2TD)

    def stream(self, tokens: int, stop: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values before token ``stop`` (default: all), from host memory, about ``tokens`` tokens at a time.

        Yields the first token's number, keys and values, valid until the next request.
        """
        stop = self.store.length if stop is None else stop
        for start, key_BGTD, value_BGTD in self.store.stream(stop, tokens, self.device):
            blocks = key_BGTD.shape[:3].numel() / self.block_size
            self.runtime.stats.streamed_bytes += round(blocks * self.store.block_bytes)
            yield start, key_BGTD, value_BGTD

    # ---- choosing and moving blocks --------------------------------------------------------------------------------

    def choose(
        self, selection: Selection, extent: Extent, scores: Tensor | Estimates, late_blocks: int | None
    ) -> Tensor | None:
        """Choose the blocks of this step and fetch the absent ones within the step; see ``SlotTable.choose``."""
        limits = selection.limits(self.length)
        rest_BH = self.table.choose(limits, extent, scores, late_blocks, self.counts, self._kernel)
        if late_blocks is not None:
            started = time.perf_counter()
            try:
                moved = self._move(extent, self.stage.counts.stall_ns_1)
            except Exception as error:
                raise FetchError(f"layer {self.number}: a late fetch failed: {error!r}") from error
            if moved:
                self.runtime.stats.exposed_wait_ms += 1000 * (time.perf_counter() - started)
        return rest_BH

    def fetch_ahead(
        self,
        selection: Selection,
        extent: Extent,
        score_BGC: Tensor | None,
        unspent_BG: Tensor | None,
        more: int,
        run: Callable[[Callable[[], None]], Ticket | None],
    ) -> None:
        """Choose and fetch the blocks of the next token and ``more`` others; ``run`` starts the job.

        Args:
            unspent_BG: int64, tokens of the budget to leave; ``None``: none.
        """
        self._fit_pool(selection)
        limits = selection.limits(self.length + 1, more)
        self.ticket = run(partial(self._choose_ahead, limits, extent, score_BGC, unspent_BG))

    def _choose_ahead(
        self, limits: Limits, extent: Extent, score_BGC: Tensor | None, unspent_BG: Tensor | None
    ) -> None:
        self.table.choose_ahead(limits, extent, score_BGC, self.counts, self._kernel, unspent_BG)
        self._move(extent, None)

    def settle(self) -> None:
        """Wait until the blocks fetched ahead are in the pool; the time counts as exposed wait."""
        if self.ticket is not None:
            ticket, self.ticket = self.ticket, None
            self.runtime.stats.exposed_wait_ms += self.stage.prefetcher.wait(ticket)

    def count_attended(self) -> None:
        """Count the active blocks, for policies whose step does not choose."""
        self.counts[0] += (self.table.active_RS >= 0).sum()

    @property
    def active_BGS(self) -> Tensor:
        """int64, the block in each slot that attention reads, -1 for other slots."""
        return self.table.active_RS.unflatten(0, (-1, self.kv_heads))

    @property
    def block_BGS(self) -> Tensor:
        """int64, the block in each slot, -1 for an empty one."""
        return self.table.block_RS.unflatten(0, (-1, self.kv_heads))

    @property
    def _kernel(self) -> bool:
        """Whether a kernel chooses blocks."""
        return self.device_moves and self.pool.slots <= ops.max_slots(self.device, self.capacity)

    def _move(self, extent: Extent, stall_ns_1: Tensor | None) -> int:
        """Fetch the blocks that the table lists. Returns their number if the host moved them, else 0."""
        table, pool = self.table, self.pool
        if self.device_moves:
            moves = table.tensors.moves
            given = (self._find_slabs(), *moves, pool.key_BGSTD, pool.value_BGSTD, stall_ns_1)
            if isinstance(self.store, CodedStore):
                open_R2TD, bits = self.store.open_R2TD, self.store.codec.bits
                ops.move_coded_blocks(*given, open_R2TD=open_R2TD, length_B=extent.length_B, bits=bits)
            else:
                ops.move_blocks(*given)
            return 0
        row_n, block_n, slot_n = table.moves()
        if len(row_n):
            pool.write_blocks(row_n, slot_n, self.store.fetch(row_n, block_n, self.device))
        return len(row_n)

    def _find_slabs(self) -> ops.Slabs:
        """Where the store's slabs are, cached. Looking them up waits for copies to host memory."""
        if self._slabs is None:
            self._slabs = ops.Slabs(self.store.addresses(self.device), self.store.slab_blocks)
        return self._slabs

    def _fit_pool(self, selection: Selection) -> None:
        """Size the pool for the next token. It grows with a context shorter than the budget, and shrinks once a
        smaller budget takes effect; a pool that shrinks is emptied.
        """
        slots, most = selection.slots(self.length + 1), selection.max_slots_at(self.length + 1)
        if slots > self.pool.slots:
            self.grow(min(slots + POOL_STEP, most))
        elif most < self.pool.slots:
            B, G, _, T, D = self.pool.key_BGSTD.shape
            dtype = self.pool.key_BGSTD.dtype
            self.pool = BlockPool(
                batch=B, kv_heads=G, slots=most, block_size=T, head_dim=D, dtype=dtype, device=self.device
            )
            self.table = SlotTable(rows=B * G, device=self.device)
            self.table.grow(most)
            self.table.reserve(self.capacity)

    def grow(self, slots: int) -> None:
        """Grow to at least ``slots`` slots per row."""
        if slots > self.pool.slots:
            self.pool.grow(slots)
            self.table.grow(slots)

    # ---- captured steps --------------------------------------------------------------------------------------------

    def enter(self, length_B: Tensor, tokens: int, slots: int) -> None:
        """Switch to captured steps, which count tokens in ``length_B``. No tensor is reallocated up to ``tokens``."""
        self.settle()
        self._device_length_B = self._length_B = length_B
        self.grow(slots)
        self.reserve(tokens - 1)
        self._find_slabs()

    def leave(self) -> None:
        """Switch back: the host counts tokens."""
        self._device_length_B = None
        self._length_B = self._counted(0)

    @property
    def extent(self) -> Extent:
        """The sequences' lengths. A new object each step: a graph must not keep tensors that an earlier step cached."""
        return Extent(self._length_B, self.padding_B, self.capacity, self.block_size)

    def _counted(self, coming: int) -> Tensor:
        """The sequences' lengths: tokens stored plus ``coming``; during captured steps their own counter."""
        if self._device_length_B is not None:
            return self._device_length_B
        with torch.inference_mode(False):
            return torch.full((self.store.batch,), self.store.length + coming, device=self.device)

    # ---- cropping and reordering ------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        self._release()
        self.store.truncate(length)
        self._slabs = None
        self.table.drop_from(self.store.n_blocks)
        self._length_B = self._counted(0)

    def index(self, batch_index: Tensor) -> None:
        """Reorder, repeat or select sequences; the index is on the CPU."""
        self._release()
        on_device = batch_index.to(self.device)
        self.store.index(batch_index)
        self._slabs = None
        self.pool.index(on_device)
        self.table.index(on_device, self.kv_heads)
        if self.padding_B is not None:
            self.padding_B = self.padding_B[on_device]
        self._length_B = self._counted(0)

    def put(self, place: int, other: LayerBlocks) -> None:
        """Give a place to the only sequence of ``other``, which loses it; both at rest, the GPU idle."""
        self.store.put(place, other.store)
        self.pool.put(place, other.pool)
        self.table.put(place, other.table, self.kv_heads)

    def _release(self) -> None:
        """Wait until the GPU no longer reads host memory that is about to change."""
        if self.device.type == "cuda":
            # ``settle`` and ``HostStore.stream`` have ordered their copies before this stream's later work.
            torch.cuda.current_stream(self.device).synchronize()

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` on inconsistent state; every resident block must equal its host block."""
        self.settle()
        self.store.check_integrity()
        self.pool.check_integrity()
        self.table.check_integrity()
        block_RS = self.table.block_RS.cpu()
        row_n, slot_n = ((block_RS >= 0) & (block_RS < self.store.n_blocks)).nonzero(as_tuple=True)
        block_n = block_RS[row_n, slot_n]
        host_n2TD = self.store.gather(row_n, block_n)
        pool_n2TD = torch.stack(
            [side.flatten(0, 1).cpu()[row_n, slot_n] for side in (self.pool.key_BGSTD, self.pool.value_BGSTD)], 1
        )
        token_nT = block_n[:, None] * self.block_size + torch.arange(self.block_size)
        written = (token_nT < self.store.length)[:, None, :, None]
        if not torch.equal(host_n2TD.masked_fill(~written, 0), pool_n2TD.masked_fill(~written, 0)):
            raise IntegrityError(f"layer {self.number}: a resident block differs from its block in host memory")

    def __deepcopy__(self, memo: dict) -> LayerBlocks:
        """A copy with its own memory that shares the engine's counts."""
        self.settle()
        memo[id(self.counts)] = self.counts
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        twin._slabs = None
        return twin
