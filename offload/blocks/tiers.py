"""Tiers: one layer's blocks, all of them in host memory, those that matter in a pool on the device.

Suffixes: B sequences, G KV heads, R rows = B·G, T tokens, D head size, S slots, N blocks, W wanted blocks; n: one
entry a moved block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.errors import FetchError, IntegrityError
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.host_store import HostStore
from attention_predictor.offload.blocks.residency import ResidencyTable
from attention_predictor.offload.chunk import Chunk, chunk_tokens

if TYPE_CHECKING:
    from attention_predictor.offload.blocks.prefetch import Ticket
    from attention_predictor.offload.runtime import Runtime


class Fetched(NamedTuple):
    """What a fetch did, in blocks that hold tokens: wanted ones, and those of them that had to be moved."""

    planned: int
    moved: int


class Tiers:
    """``HostStore``, ``BlockPool`` and ``ResidencyTable`` of one layer, and every way a block takes between them.

    After ``fetch_ahead`` the prefetch thread may be at work on pool and table: ``settle`` comes before anything else.

    Raises:
        FetchError: A fetch failed; the cache must not be used further.
    """

    def __init__(
        self,
        runtime: Runtime,
        number: int,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        config = runtime.config
        self.runtime, self.number = runtime, number
        self.kv_heads, self.device = kv_heads, device
        shape = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": config.block_size}
        self.kernels = config.kernels == "auto"
        self.store = HostStore(
            **shape, dtype=dtype, slab_blocks=config.slab_blocks, memory=runtime.memory, kernel=self.kernels
        )
        self.pool = BlockPool(**shape, dtype=dtype, slots=0, device=device)
        self.table = ResidencyTable(rows=batch * kv_heads, slots=0)
        self.block_bytes = 2 * config.block_size * head_dim * dtype.itemsize  # keys and values
        self.ticket: Ticket | None = None
        self.fetched: Fetched | None = None  # by the ticket's job; set on the prefetch thread

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.store.length

    @property
    def device_reads_host(self) -> bool:
        """Whether the GPU reads blocks out of pinned memory itself."""
        return self.store.pinned and self.kernels and ops.missing(self.device) is None

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Store new tokens; a single one is written to its resident block as well."""
        start = self.store.length
        self.store.append(key_BGTD, value_BGTD)
        tail, offset = divmod(start, self.store.block_size)
        if key_BGTD.shape[2] == 1 and self.pool.slots:
            slot_R = self.table.slot_of(torch.full((self.table.rows,), tail))
            if bool((slot_R < 0).any()):
                raise IntegrityError(f"layer {self.number}: block {tail} has no slot for token {start}")
            self.pool.write_token(slot_R, offset, key_BGTD, value_BGTD)
        else:
            self.table.drop_from(tail)  # the tail block has grown behind the pool's back

    def stream(self, query_BHQD: Tensor, stop: int | None = None) -> Iterator[Chunk]:
        """Keys and values of the tokens before ``stop`` (all), from host memory, in chunks that suit the query.

        A chunk is valid until the next is asked for.
        """
        stop = self.store.length if stop is None else stop
        for start, key_BGTD, value_BGTD in self.store.stream(stop, chunk_tokens(query_BHQD), self.device):
            self.runtime.stats.streamed_bytes += key_BGTD.nbytes + value_BGTD.nbytes
            yield Chunk(start, key_BGTD, value_BGTD)

    # ---- moving blocks ---------------------------------------------------------------------------------------------

    def grow(self, slots: int) -> None:
        """At least so many slots a row."""
        if slots > self.pool.slots:
            self.pool.grow(slots)
            self.table.grow(slots)

    def shrink(self, slots: int) -> None:
        """So many slots a row, all of them empty: what is wanted next is fetched anew."""
        B, G, _, T, D = self.pool.key_BGSTD.shape
        dtype = self.pool.key_BGSTD.dtype
        self.pool = BlockPool(
            batch=B, kv_heads=G, slots=slots, block_size=T, head_dim=D, dtype=dtype, device=self.device
        )
        self.table = ResidencyTable(rows=self.table.rows, slots=slots)

    def fetch_ahead(self, wanted_BGW: Tensor) -> None:
        """Submit the fetch of what the next token wants; ``settle`` waits for it."""
        self.ticket = self.runtime.prefetcher.submit(partial(self._run, wanted_BGW))

    def settle(self) -> None:
        """Wait until the blocks fetched ahead are in the pool."""
        if self.ticket is None:
            return
        ticket, self.ticket = self.ticket, None
        stats = self.runtime.stats
        stats.exposed_wait_ms += self.runtime.prefetcher.wait(ticket)
        assert self.fetched is not None  # `wait` has raised otherwise
        stats.planned_blocks += self.fetched.planned
        stats.ahead_blocks += self.fetched.moved
        stats.ahead_bytes += self.fetched.moved * self.block_bytes

    def fetch_late(self, wanted_BGW: Tensor) -> None:
        """Fetch what is missing within the step; the wanted blocks are what attention reads."""
        started = time.perf_counter()
        try:
            moved = self.fetch(wanted_BGW).moved
        except Exception as error:
            raise FetchError(f"layer {self.number}: a late fetch failed: {error!r}") from error
        stats = self.runtime.stats
        if moved:
            stats.exposed_wait_ms += 1000 * (time.perf_counter() - started)
        stats.late_blocks += moved
        stats.late_bytes += moved * self.block_bytes

    def fetch(self, wanted_BGW: Tensor) -> Fetched:
        """Bring the wanted blocks into the pool. Runs on the prefetch thread or, for late fetches, in the step."""
        plan = self.table.plan(wanted_BGW.flatten(0, 1).cpu())
        stored = plan.block_n < self.store.n_blocks  # the next token's own block may not have begun
        moved = int(stored.sum())
        if moved:
            row_n, block_n, slot_n = plan.row_n[stored], plan.block_n[stored], plan.slot_n[stored]
            if self.device_reads_host:
                self.store.gather_to_pool(row_n, block_n, slot_n, self.pool)
            else:
                self.pool.write_blocks(row_n, slot_n, self.store.gather(row_n, block_n))
        self.table.commit(plan)
        begun_RW = (plan.wanted_RW >= 0) & (plan.wanted_RW < self.store.n_blocks)
        return Fetched(int(begun_RW.sum()), moved)

    def _run(self, wanted_BGW: Tensor) -> None:
        self.fetched = self.fetch(wanted_BGW)

    # ---- sequences that shrink, and change places --------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        self._release()
        self.store.truncate(length)
        self.table.drop_from(self.store.n_blocks)

    def index(self, batch_index: Tensor) -> None:
        """Reorder, repeat or select sequences; the index is on the CPU."""
        self._release()
        self.store.index(batch_index)
        self.pool.index(batch_index.to(self.device))
        self.table.index(batch_index, self.kv_heads)

    def _release(self) -> None:
        """Wait until the GPU no longer reads host memory, which is about to change."""
        if self.device.type == "cuda":
            # ``settle`` has ordered the fetches before it, and so has ``HostStore.stream`` its copies.
            torch.cuda.current_stream(self.device).synchronize()

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if tiers contradict each other: every resident block must equal its host block."""
        self.settle()
        self.store.check_integrity()
        self.pool.check_integrity()
        self.table.check_integrity()
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
