"""HostStore: all keys and values of one layer in CPU memory. It keeps every block that ever existed.

Suffixes: B sequences, G KV heads, R = B·G rows (row = b*G + g), T tokens in a call, D head size, S slabs of a chunk, n
list entries, z dimensions of a stored block; 2 is keys then values.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.block_codec import BlockCodec
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.transfer import HostCopier, PendingCopy, host_copier, upload_stream

UNSETTLED_TOKENS = 64  # last tokens whose copies `append` does not wait for


class _Arrival(NamedTuple):
    """Appended tokens whose copies are pending, and staged parts that must be scattered to slabs afterwards."""

    pending_copy: PendingCopy
    start: int
    staged: list[tuple[int, Tensor]]  # first token, and a run of tokens in the shape of `_target`


class HostStore:
    """Append-only keys and values of one layer, in slabs [B, G, slab_blocks, z]; a block is [2, block_size, D].

    A block's keys and values are contiguous, so one block is one copy. Slabs waste less than one slab of memory and
    never move written data, unlike one tensor that doubles.

    From a GPU to pinned slabs, `append` returns before its copies are done. Every method that reads or changes slabs
    first calls `settle`, which waits for them. Callers that use the slabs' `addresses` must do the same.

    Another thread may `gather` while this one appends, but not the block being written. Before `truncate` and `index`,
    wait for outstanding fetches, including those that a GPU does itself.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int = 16,
        slab_blocks: int = 64,
        memory: HostMemory | None = None,
        kernel: bool = True,
    ) -> None:
        """`memory` lends the slabs; `None`: pageable memory of this store's own.

        `kernel`: whether `gather` uses the compiled kernel, if it can be built.
        """
        self.batch, self.kv_heads, self.head_dim, self.dtype = batch, kv_heads, head_dim, dtype
        self.block_size, self.slab_blocks = block_size, slab_blocks
        self.codec = BlockCodec(block_size, head_dim, dtype)
        self.memory = HostMemory() if memory is None else memory
        self.pinned = bool(self.memory.pin_for)  # False once a slab is not pinned
        self.kernel = kernel
        self.length = 0
        self._slabs: list[Tensor] = []
        self._addresses_made: tuple[list[int], Tensor] | None = None  # the addresses, and the tensor made from them
        self._arrivals: deque[_Arrival] = deque()
        self._settling = threading.Lock()
        self._written_by_gpu = False  # since the last `settle`, by `advance`

    @property
    def n_blocks(self) -> int:
        """Blocks that hold at least one token."""
        return math.ceil(self.length / self.block_size)

    @property
    def room(self) -> int:
        """Tokens that the slabs can hold."""
        return len(self._slabs) * self.slab_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated, written or not."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def block_bytes(self) -> int:
        """Bytes of a stored block of one KV head."""
        return self.codec.block_bytes

    @torch.no_grad()
    def append(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Appends T ≥ 0 tokens from any device. The tensors must not be changed before `settle`.

        Raises ValueError (wrong shape or dtype) or HostMemoryError, leaving the store as it was.
        """
        tokens = key_BGTD.shape[2] if key_BGTD.dim() == 4 else -1
        self._check_input("key", key_BGTD, tokens)
        self._check_input("value", value_BGTD, tokens)
        length, slabs = self.length, len(self._slabs)
        copier = self._copier(key_BGTD.device)
        try:
            self._reserve(length + tokens)
            if copier is None:
                self._write(key_BGTD, value_BGTD)
            else:
                self._send(copier, key_BGTD, value_BGTD)
            self.length = length + tokens
        except BaseException:  # out of memory, or interrupted: remove partly written tokens
            self._undo(length, slabs, copier)
            raise

    @torch.no_grad()
    def settle(self, stop: int | None = None) -> None:
        """Waits until all appended tokens, or those before `stop`, are in the slabs."""
        with self._settling:
            if self._written_by_gpu:
                self._written_by_gpu = False
                if self.pinned:
                    self.memory.wait_for_gpus()
            while self._arrivals and (stop is None or self._arrivals[0].start < stop):
                arrival = self._arrivals[0]
                arrival.pending_copy.wait()
                for start, kv in arrival.staged:
                    self._put(start, kv)
                self._arrivals.popleft()  # last, so that it is repeated after an interrupt

    def gather(self, row_n: Tensor, block_n: Tensor, out: Tensor | None = None) -> Tensor:
        """Blocks as kv [n, 2, block_size, D]; tokens not yet written read as zeros.

        `row_n`, `block_n`: int64 on the CPU. `out`: a (pinned) staging buffer of at least n entries, of which
        the first n are filled and returned. Raises IndexError for a row or block that does not exist.
        """
        n = row_n.numel()
        kv_n2TD = self._empty(n) if out is None else out[:n]
        if kv_n2TD.shape != (expected := (n, 2, self.block_size, self.head_dim)):
            raise ValueError(f"size mismatch for out: expected {list(expected)}, got {list(kv_n2TD.shape)}")
        self._fill(kv_n2TD, row_n, block_n)
        return kv_n2TD

    def fetch(self, row_n: Tensor, block_n: Tensor, device: torch.device) -> Tensor:
        """As ``gather``, on a device; what crosses the bus is what is stored."""
        return self.gather(row_n, block_n).to(device, non_blocking=True)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, stop - start, D] of a token range, on the CPU. Raises IndexError beyond."""
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"token range [{start}, {stop}) is outside of the {self.length} tokens stored")
        self.settle(stop)
        first, last = start // self.block_size, math.ceil(stop / self.block_size)
        blocks = max(last - first, 0)
        kv = torch.empty((2, self.batch, self.kv_heads, blocks, self.block_size, self.head_dim), dtype=self.dtype)
        block = first
        while block < last:
            slab, begin = self._slabs[block // self.slab_blocks], block % self.slab_blocks
            count = min(self.slab_blocks - begin, last - block)
            kv_BGn2TD = self.codec.decode(slab[:, :, begin : begin + count])
            kv[:, :, :, block - first : block - first + count] = kv_BGn2TD.movedim(3, 0)
            block += count
        self._add_open_block(kv, first)
        skip = start - first * self.block_size
        key_BGTD, value_BGTD = kv.flatten(3, 4)[:, :, :, skip : skip + stop - start]
        return key_BGTD, value_BGTD

    def stream(self, stop: int, tokens: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields the tokens before `stop` in order, about `tokens` at a time: first token, keys, values [B, G, T, D].

        They are valid until the next request, on the stream that is current now. The next copies overlap with the use
        of these. Raises IndexError beyond the stored tokens.
        """
        if not 0 <= stop <= self.length:
            raise IndexError(f"token range [0, {stop}) is outside of the {self.length} tokens stored")
        self.settle(stop)
        slab_tokens = self.slab_blocks * self.block_size
        n_slabs = self._slabs_for(stop)
        S = min(max(tokens // slab_tokens, 1), n_slabs)  # whole slabs, which are contiguous
        chunks = range(0, n_slabs, max(S, 1))
        streams, side = torch.get_device_module(device), upload_stream(device)
        current = streams.current_stream(device)
        shape = (2, self.batch, self.kv_heads, S, self.slab_blocks, self.block_size, self.head_dim)
        like: dict[str, Any] = {"dtype": self.dtype, "device": device}
        with streams.stream(side):  # allocated on that stream, so that its use is ordered after the last call's
            kv_2BGSnTD = [torch.empty(shape, **like) for _ in chunks[:2]]
            # The GPU gets slabs unchanged and rearranges them; on a CPU one copy does both.
            raw = None
            if device.type != "cpu":
                raw = torch.empty((S, *self._slab_shape(self.batch)), dtype=self.codec.stored, device=device)

        def load(number: int) -> Any:
            slabs = self._slabs[chunks[number] : min(chunks[number] + S, n_slabs)]
            into = kv_2BGSnTD[number % 2][:, :, :, : len(slabs)]
            if number > 1:
                side.wait_stream(current)  # the previous contents have been used
            with streams.stream(side):
                for i, slab in enumerate(slabs):
                    if raw is None:
                        into[:, :, :, i].copy_(self.codec.decode(slab).movedim(3, 0))
                    else:
                        raw[i].copy_(slab, non_blocking=True)
                if raw is not None:
                    self._unpack(raw[: len(slabs)], into)
                self._add_open_block(into.flatten(3, 4), chunks[number] * self.slab_blocks)
                ready = streams.Event()
                ready.record(side)
            return ready

        try:
            loaded = [load(0)] if chunks else []
            for number, first in enumerate(chunks):
                if number + 1 < len(chunks):
                    loaded.append(load(number + 1))
                loaded[number].wait(current)
                start = first * slab_tokens
                key_BGTD, value_BGTD = kv_2BGSnTD[number % 2].flatten(3, 5)[:, :, :, : stop - start]
                yield start, key_BGTD, value_BGTD
        finally:
            # Even if the caller stops early: waiting for its stream then includes the slabs' reads, and the next call
            # may reuse the memory.
            current.wait_stream(side)
            side.wait_stream(current)

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on and frees the slabs that only held such tokens."""
        self._check_crop(length)
        self.settle()
        self.length = length
        del self._slabs[self._slabs_for(length) :]
        self._clear_tail()

    def index(self, batch_index: Tensor) -> None:
        """Reorders, repeats or selects sequences: sequence i becomes the former sequence `batch_index[i]` (beams)."""
        self.settle()
        batch_index = batch_index.cpu()
        batch = batch_index.numel()
        if batch == self.batch:
            if not torch.equal(batch_index, torch.arange(batch)):
                for slab in self._slabs:  # in place: beams reorder every step, and only one slab is copied at a time
                    slab.copy_(slab.index_select(0, batch_index))
            return
        slabs = []
        for slab in self._slabs:
            slabs.append(self._new_slab(batch))
            slabs[-1].copy_(slab.index_select(0, batch_index))
        self._slabs, self.batch = slabs, batch

    def put(self, place: int, other: HostStore) -> None:
        """Makes sequence `place` what the only sequence of `other` is. No GPU may be reading or writing either."""
        self.settle()
        other.settle()
        self._reserve(other.length)
        for mine, theirs in zip(self._slabs, other._slabs[: self._slabs_for(other.length)], strict=False):
            mine[place].copy_(theirs[0])
        self.length = max(self.length, other.length)

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless the slabs fit the length."""
        self.settle()
        if len(self._slabs) < (needed := self._slabs_for(self.length)):
            raise IntegrityError(f"{self.length} tokens need {needed} slabs, found {len(self._slabs)}")
        expected = (*self._slab_shape(self.batch), self.codec.stored, "cpu", True, self.pinned)
        for number, slab in enumerate(self._slabs):
            pinned = slab.is_pinned() if self.pinned else False
            found = (*slab.shape, slab.dtype, slab.device.type, slab.is_contiguous(), pinned)
            if found != expected:
                raise IntegrityError(f"slab {number}: expected {expected}, found {found}")
        if len({slab.data_ptr() for slab in self._slabs}) != len(self._slabs):
            raise IntegrityError("two slabs share their memory")
        block, offset = divmod(self.length, self.block_size)
        if offset:
            rest = self._partial(block)[:, :, :, offset:]
            if written := int(rest.count_nonzero()):
                raise IntegrityError(f"{written} numbers beyond token {self.length} are not zero")

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """A store with its own memory; pinned stays pinned, unlike in a copied tensor."""
        self.settle()
        twin = memo[id(self)] = copy.copy(self)
        twin._arrivals, twin._settling = deque(), threading.Lock()
        twin._slabs = [self._new_slab(self.batch).copy_(slab) for slab in self._slabs]
        return twin

    def reserve(self, tokens: int) -> None:
        """Allocates slabs for `tokens` tokens in all. Until then `append` allocates nothing; `addresses` is constant.

        Raises HostMemoryError; slabs allocated before the error are kept.
        """
        self._reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Counts tokens that a GPU has written to the slabs itself (`csrc/gather.cu`)."""
        if self._slabs_for(self.length + tokens) > len(self._slabs):
            raise ValueError(f"no room for {tokens} tokens beyond {self.length}")
        self.length += tokens
        self._written_by_gpu = True

    def count_to(self, tokens: int) -> None:
        """Sets the length to that of the longest sequence, whose last token a GPU writes itself."""
        self.length = tokens
        self._written_by_gpu = True

    def addresses(self, device: torch.device) -> Tensor:
        """The slabs' addresses, int64; cached until slabs or device change."""
        self.settle()
        found, made = [slab.data_ptr() for slab in self._slabs], self._addresses_made
        if made is None or made[0] != found or made[1].device != device:
            made = self._addresses_made = found, torch.tensor(found, device=device)
        return made[1]

    def _slabs_for(self, tokens: int) -> int:
        return math.ceil(tokens / (self.slab_blocks * self.block_size))

    def _slab_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.kv_heads, self.slab_blocks, *self.codec.shape)

    def _new_slab(self, batch: int) -> Tensor:
        return self._lend(self._slab_shape(batch), self.codec.stored)

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        lent, pinned = self.memory.lend(shape, dtype)
        self.pinned = self.pinned and pinned
        return lent

    def _reserve(self, tokens: int) -> None:
        missing = self._slabs_for(tokens) - len(self._slabs)
        self._slabs += [self._new_slab(self.batch) for _ in range(missing)]

    def _copier(self, device: torch.device) -> HostCopier | None:
        """The asynchronous copier for this device; None if `append` copies synchronously."""
        return host_copier(device) if self.pinned and device.type == "cuda" else None

    def _write(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle()  # pending copies may belong to the same block
        for start, parts in self._runs(key_BGTD, value_BGTD):
            # Stacked on the source device, so that one transfer carries keys and values.
            self._put(start, self._joined(parts))

    def _send(self, copier: HostCopier, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle(self.length - UNSETTLED_TOKENS)  # these copies are long done, but staged parts must be scattered
        # Tensors are kept alive until copied. A view would keep its whole storage alive, such as the queries.
        whole = [kv if kv.untyped_storage().nbytes() == kv.nbytes else kv.clone() for kv in (key_BGTD, value_BGTD)]
        pieces, staged = [], []
        for start, parts in self._runs(*whole):
            whole_blocks = parts[0].dim() == 5
            target = self._target(start, parts[0].shape[2], whole_blocks)
            if (
                not target.is_contiguous()
            ):  # scattered copies are slow: copy to a staging tensor, which `settle` scatters
                with torch.inference_mode(False):  # `settle` may be called outside of that mode
                    target = torch.empty(target.shape, dtype=target.dtype, pin_memory=self.pinned)
                staged.append((start, target))
            pieces.append((target, parts))
        if pieces:
            self._arrivals.append(_Arrival(copier.send(pieces, self._joined), self.length, staged))

    def _undo(self, length: int, slabs: int, copier: HostCopier | None) -> None:
        """Restores the store after a failed `append`."""
        if copier is not None:
            copier.drain()  # else it would write to slabs that are freed or reused
        with self._settling:
            while self._arrivals and self._arrivals[-1].start >= length:
                self._arrivals.pop()
        self.length = length
        del self._slabs[slabs:]
        self._clear_tail()

    def _clear_tail(self) -> None:
        """Zeros the last block beyond the last token."""
        block, offset = divmod(self.length, self.block_size)
        if offset:
            self._partial(block)[:, :, :, offset:].zero_()

    def _partial(self, block: int) -> Tensor:
        """The view [B, G, 2, block_size, D] of the block that isn't complete, or is being written."""
        return self._slabs[block // self.slab_blocks][:, :, block % self.slab_blocks]

    def _joined(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        """A run's keys and values as one tensor, as they are stored."""
        return self.codec.encode(*parts) if parts[0].dim() == 5 else torch.stack(parts, dim=-3)

    def _add_open_block(self, kv_2BGnTD: Tensor, first: int) -> None:
        """Fill in a block that slabs don't hold, if it is among the blocks from ``first`` on; here they hold all."""

    def _unpack(self, raw_SBGnz: Tensor, into_2BGSnTD: Tensor) -> None:
        """Rearrange slabs on a GPU."""
        into_2BGSnTD.copy_(raw_SBGnz.permute(4, 1, 2, 0, 3, 5, 6))

    def _fill(self, out_n2TD: Tensor, row_n: Tensor, block_n: Tensor) -> None:
        """Fill the buffer with blocks."""
        self._gather_stored(row_n, block_n, out_n2TD)

    def _gather_stored(self, row_n: Tensor, block_n: Tensor, out_nz: Tensor) -> Tensor:
        """Fills the buffer with blocks as they are stored, and returns it."""
        self._check_entries(row_n, block_n)
        self.settle()
        host = out_nz.device
        if len(row_n) and self.kernel and ops.why_no_kernels(host) is None:
            slab_s = self.addresses(host)
            ops.gather_to_host(slab_s, self.slab_blocks, row_n.contiguous(), block_n.contiguous(), out_nz)
        elif len(row_n):
            gather_reference(self._slabs, row_n, block_n, out_nz)
        return out_nz

    def _runs(self, key_BGTD: Tensor, value_BGTD: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Splits new tokens at slab boundaries and into whole and partial blocks: first token, keys, values.

        Whole blocks are [B, G, blocks, block_size, D], a partial block is [B, G, T, D].
        """
        return self._runs_from(self.length, key_BGTD, value_BGTD)

    def _runs_from(
        self, first: int, key_BGTD: Tensor, value_BGTD: Tensor
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """`_runs` of tokens that begin at ``first``."""
        done, tokens = 0, key_BGTD.shape[2]
        while done < tokens:
            block, offset = divmod(first + done, self.block_size)
            left = tokens - done
            token_dims: tuple[int, ...]
            if offset or left < self.block_size:
                token_dims = (min(self.block_size - offset, left),)
            else:
                room = self.slab_blocks - block % self.slab_blocks
                token_dims = (min(left // self.block_size, room), self.block_size)
            taken = math.prod(token_dims)
            key, value = (kv[:, :, done : done + taken].unflatten(2, token_dims) for kv in (key_BGTD, value_BGTD))
            yield first + done, (key, value)
            done += taken

    def _target(self, start: int, count: int, whole_blocks: bool) -> Tensor:
        """Where a run belongs: the slab's view [B, G, count, z] of whole blocks, or [B, G, 2, count, D] of tokens."""
        block, offset = divmod(start, self.block_size)
        if whole_blocks:
            first = block % self.slab_blocks
            return self._slabs[block // self.slab_blocks][:, :, first : first + count]
        return self._partial(block)[:, :, :, offset : offset + count]

    def _put(self, start: int, joined: Tensor) -> None:
        """Copies a run, as `_joined` returns it, to where it belongs."""
        whole_blocks = joined.dim() == 3 + len(self.codec.shape)  # tokens of a partial block have 5 dimensions
        target = self._target(start, joined.shape[2 if whole_blocks else 3], whole_blocks)
        if not whole_blocks and start % self.block_size == 0:
            # Memory is uninitialised (zeroing gigabytes would take seconds), so a new partial block is zeroed first;
            # full blocks are overwritten whole.
            self._partial(start // self.block_size).zero_()
        target.copy_(joined)

    def _empty(self, n: int) -> Tensor:
        return torch.empty((n, 2, self.block_size, self.head_dim), dtype=self.dtype)

    def _check_crop(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and {self.length}, got {length}")

    def _check_input(self, name: str, kv_BGTD: Tensor, tokens: int) -> None:
        expected = (self.batch, self.kv_heads, tokens, self.head_dim)
        if kv_BGTD.shape != expected or kv_BGTD.dtype != self.dtype:
            wanted = f"{self.dtype} {list(expected)}".replace("-1", "T")
            found = f"{kv_BGTD.dtype} {list(kv_BGTD.shape)}"
            raise ValueError(f"size mismatch for {name}: expected {wanted}, got {found}")

    def _check_entries(self, row_n: Tensor, block_n: Tensor) -> None:
        if row_n.shape != block_n.shape or row_n.dim() != 1:
            raise ValueError(f"size mismatch for block_n: expected {list(row_n.shape)}, got {list(block_n.shape)}")
        for name, entry_n, count in (
            ("row", row_n, self.batch * self.kv_heads),
            ("block", block_n, self.n_blocks),
        ):
            if not entry_n.numel():
                continue
            low, high = (int(end) for end in entry_n.aminmax())
            if low < 0 or high >= count:
                raise IndexError(f"{name} must be between 0 and {count - 1}, got {low} to {high}")


def gather_reference(slabs: list[Tensor], row_n: Tensor, block_n: Tensor, out_nz: Tensor) -> None:
    """The reference of `ops.gather_to_host`, in torch operations."""
    slab_blocks = slabs[0].shape[2]
    slab_n = block_n // slab_blocks
    entry_n = row_n * slab_blocks + block_n % slab_blocks
    # Grouped by slab: one vectorised read per slab, then one pass to restore the caller's order.
    order_n = torch.argsort(slab_n, stable=True)
    sorted_n, grouped_nz = entry_n[order_n], torch.empty_like(out_nz)
    start = 0
    for slab, count in zip(*(found.tolist() for found in torch.unique(slab_n, return_counts=True)), strict=True):
        part = slice(start, start + count)
        torch.index_select(slabs[slab].flatten(0, 2), 0, sorted_n[part], out=grouped_nz[part])
        start += count
    torch.index_select(grouped_nz, 0, torch.argsort(order_n), out=out_nz)
