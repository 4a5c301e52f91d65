"""Every block that ever existed, of one layer, in CPU memory: the tier that nothing is lost from.

Letters: B sequences, G KV heads, R rows = B·G (row = b*G + g), T tokens in a call, D head size, S slabs of a
chunk, n list entries; 2 is keys then values.
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
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.transfer import HostCopier, PendingCopy, host_copier, upload_stream

UNSETTLED_TOKENS = 64  # at the end, that may be late where nothing is read for a while


class _Arrival(NamedTuple):
    """Appended tokens that are on their way: the copies, the first token, and what has to be put in its place then."""

    pending_copy: PendingCopy
    start: int
    staged: list[tuple[int, Tensor]]  # first token, and a run of tokens as `_target` is shaped


class HostStore:
    """Append-only keys and values of one layer, in slabs [B, G, slab_blocks, 2, block_size, D].

    A block's keys and values are contiguous, so one block is one copy. Slabs, rather than one tensor that
    doubles, keep the memory over what is needed under one slab and never move what was written.

    From a GPU to pinned slabs, `append` returns before its copies are made. Whatever reads or changes slabs begins
    with `settle`, which waits for them; so must whoever is given the slabs' `addresses`.

    Another thread may `gather` while this one appends, as long as it leaves the block being written alone.
    Before `truncate` and `index`, wait for outstanding fetches, also for a GPU that reads the slabs itself.
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
        """`memory` lends the slabs; without one they are pageable, and of this store alone.

        `kernel`: `gather` uses the compiled one where it can be built.
        """
        self.batch, self.kv_heads, self.head_dim, self.dtype = batch, kv_heads, head_dim, dtype
        self.block_size, self.slab_blocks = block_size, slab_blocks
        self.memory = HostMemory() if memory is None else memory
        self.pinned = self.memory.pin_for is not None  # until a slab is not
        self.kernel = kernel
        self.length = 0
        self._slabs: list[Tensor] = []
        self._addresses_made: tuple[list[int], Tensor] | None = None  # from what, and the tensor
        self._arrivals: deque[_Arrival] = deque()
        self._settling = threading.Lock()
        self._written_by_gpu = False  # since the last `settle`, by `advance`

    @property
    def n_blocks(self) -> int:
        """Blocks that hold at least one token."""
        return math.ceil(self.length / self.block_size)

    @property
    def room(self) -> int:
        """Tokens that the slabs have room for."""
        return len(self._slabs) * self.slab_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated, written or not."""
        return sum(slab.nbytes for slab in self._slabs)

    @torch.no_grad()
    def append(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Adds T ≥ 0 tokens from any device. They must not be changed before `settle`.

        Raises ValueError (wrong shape or dtype) or HostMemoryError, leaving the store as it was.
        """
        tokens = key_BGTD.shape[2] if key_BGTD.dim() == 4 else -1
        self._check_input("key", key_BGTD, tokens)
        self._check_input("value", value_BGTD, tokens)
        length, slabs = self.length, len(self._slabs)
        way = self._way(key_BGTD.device)
        try:
            self._reserve(length + tokens)
            if way is None:
                self._write(key_BGTD, value_BGTD)
            else:
                self._send(way, key_BGTD, value_BGTD)
            self.length = length + tokens
        except BaseException:  # out of memory, or interrupted: drop what is half written
            self._undo(length, slabs, way)
            raise

    @torch.no_grad()
    def settle(self, stop: int | None = None) -> None:
        """Returns when every token appended, or every one before `stop`, is in the slabs."""
        with self._settling:
            if self._written_by_gpu:
                self._written_by_gpu = False
                if self.pinned:
                    torch.cuda.synchronize()
            while self._arrivals and (stop is None or self._arrivals[0].start < stop):
                arrival = self._arrivals[0]
                arrival.pending_copy.wait()
                for start, kv in arrival.staged:
                    self._put(start, kv)
                self._arrivals.popleft()  # last: after an interrupt the same is done again

    def gather(self, row_n: Tensor, block_n: Tensor, out: Tensor | None = None) -> Tensor:
        """Blocks as kv [n, 2, block_size, D]; tokens not yet written read as zeros.

        `row_n`, `block_n`: int64 on the CPU. `out`: a (pinned) staging buffer of at least n entries, of which
        the first n are filled and returned. Raises IndexError for a row or block that does not exist.
        """
        n = row_n.numel()
        self._check_entries(row_n, block_n)
        self.settle()
        kv_n2TD = self._empty(n) if out is None else out[:n]
        if kv_n2TD.shape != (expected := (n, 2, self.block_size, self.head_dim)):
            raise ValueError(f"size mismatch for out: expected {list(expected)}, got {list(kv_n2TD.shape)}")
        host = kv_n2TD.device
        if n and self.kernel and ops.why_no_kernels(host) is None:
            slab_s = self.addresses(host)
            ops.gather_to_host(slab_s, self.slab_blocks, row_n.contiguous(), block_n.contiguous(), kv_n2TD)
        elif n:
            gather_reference(self._slabs, row_n, block_n, kv_n2TD)
        return kv_n2TD

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
            kv[:, :, :, block - first : block - first + count] = slab[:, :, begin : begin + count].movedim(3, 0)
            block += count
        skip = start - first * self.block_size
        key_BGTD, value_BGTD = kv.flatten(3, 4)[:, :, :, skip : skip + stop - start]
        return key_BGTD, value_BGTD

    def stream(self, stop: int, tokens: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The tokens before `stop`, in order, about `tokens` at a time: first token, keys and values [B, G, T, D].

        They are valid until the next are asked for, on the stream that is current now; the copies of the next run
        beside what is done with these. Raises IndexError beyond what is stored.
        """
        if not 0 <= stop <= self.length:
            raise IndexError(f"token range [0, {stop}) is outside of the {self.length} tokens stored")
        self.settle(stop)
        slab_tokens = self.slab_blocks * self.block_size
        n_slabs = self._slabs_for(stop)
        S = min(max(tokens // slab_tokens, 1), n_slabs)  # in whole slabs, which are contiguous
        chunks = range(0, n_slabs, max(S, 1))
        streams, side = torch.get_device_module(device), upload_stream(device)
        current = streams.current_stream(device)
        shape = (2, self.batch, self.kv_heads, S, self.slab_blocks, self.block_size, self.head_dim)
        like: dict[str, Any] = {"dtype": self.dtype, "device": device}
        with streams.stream(side):  # memory of that stream: what it does there is in order with the last call's
            kv_2BGSnTD = [torch.empty(shape, **like) for _ in chunks[:2]]
            # Slabs as they are, whose layout the GPU changes; on a CPU one copy does both.
            raw = None if device.type == "cpu" else torch.empty((S, *self._slab_shape(self.batch)), **like)

        def load(number: int) -> Any:
            slabs = self._slabs[chunks[number] : min(chunks[number] + S, n_slabs)]
            into = kv_2BGSnTD[number % 2][:, :, :, : len(slabs)]
            if number > 1:
                side.wait_stream(current)  # what was there has been used
            with streams.stream(side):
                for i, slab in enumerate(slabs):
                    if raw is None:
                        into[:, :, :, i].copy_(slab.movedim(3, 0))
                    else:
                        raw[i].copy_(slab, non_blocking=True)
                if raw is not None:
                    into.copy_(raw[: len(slabs)].permute(4, 1, 2, 0, 3, 5, 6))
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
            # Also when the caller has had enough: whoever waits for its stream has waited for the slabs to be read,
            # and the next call writes to the same memory.
            current.wait_stream(side)
            side.wait_stream(current)

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on and frees the slabs that only held such tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and {self.length}, got {length}")
        self.settle()
        self.length = length
        del self._slabs[self._slabs_for(length) :]
        self._clear_tail()

    def index(self, batch_index: Tensor) -> None:
        """Makes sequence i what sequence `batch_index[i]` was: reorders, repeats or selects (beams)."""
        self.settle()
        batch_index = batch_index.cpu()
        batch = batch_index.numel()
        if batch == self.batch:
            if not torch.equal(batch_index, torch.arange(batch)):
                for slab in self._slabs:  # in place: beams reorder every step, and only one slab is held twice
                    slab.copy_(slab.index_select(0, batch_index))
            return
        slabs = []
        for slab in self._slabs:
            slabs.append(self._new_slab(batch))
            slabs[-1].copy_(slab.index_select(0, batch_index))
        self._slabs, self.batch = slabs, batch

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless the slabs are what the length asks for."""
        self.settle()
        if len(self._slabs) < (needed := self._slabs_for(self.length)):
            raise IntegrityError(f"{self.length} tokens need {needed} slabs, found {len(self._slabs)}")
        expected = (*self._slab_shape(self.batch), self.dtype, "cpu", True, self.pinned)
        for number, slab in enumerate(self._slabs):
            pinned = slab.is_pinned() if self.pinned else False
            found = (*slab.shape, slab.dtype, slab.device.type, slab.is_contiguous(), pinned)
            if found != expected:
                raise IntegrityError(f"slab {number}: expected {expected}, found {found}")
        if len({slab.data_ptr() for slab in self._slabs}) != len(self._slabs):
            raise IntegrityError("two slabs share their memory")
        block, offset = divmod(self.length, self.block_size)
        if offset:
            rest = self._slabs[block // self.slab_blocks][:, :, block % self.slab_blocks, :, offset:]
            if written := int(rest.count_nonzero()):
                raise IntegrityError(f"{written} numbers beyond token {self.length} are not zero")

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """A store with its own memory: a pinned one stays pinned, which a copied tensor would not."""
        self.settle()
        twin = memo[id(self)] = copy.copy(self)
        twin._arrivals, twin._settling = deque(), threading.Lock()
        twin._slabs = [self._new_slab(self.batch).copy_(slab) for slab in self._slabs]
        return twin

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens in all: until then `append` allocates nothing, and `addresses` stays as it is.

        Raises HostMemoryError; what was allocated until then is kept.
        """
        self._reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens that a GPU has written into the room there is (`csrc/gather.cu`)."""
        if self._slabs_for(self.length + tokens) > len(self._slabs):
            raise ValueError(f"no room for {tokens} tokens beyond {self.length}")
        self.length += tokens
        self._written_by_gpu = True

    def addresses(self, device: torch.device) -> Tensor:
        """The slabs' addresses, int64; made anew when the slabs have changed, or for another device."""
        self.settle()
        found, made = [slab.data_ptr() for slab in self._slabs], self._addresses_made
        if made is None or made[0] != found or made[1].device != device:
            made = self._addresses_made = found, torch.tensor(found, device=device)
        return made[1]

    def _slabs_for(self, tokens: int) -> int:
        return math.ceil(tokens / (self.slab_blocks * self.block_size))

    def _slab_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.kv_heads, self.slab_blocks, 2, self.block_size, self.head_dim)

    def _new_slab(self, batch: int) -> Tensor:
        slab, pinned = self.memory.lend(self._slab_shape(batch), self.dtype)
        self.pinned = self.pinned and pinned
        return slab

    def _reserve(self, tokens: int) -> None:
        missing = self._slabs_for(tokens) - len(self._slabs)
        self._slabs += [self._new_slab(self.batch) for _ in range(missing)]

    def _way(self, device: torch.device) -> HostCopier | None:
        """What copies from there beside the computation; None where `append` copies itself."""
        return host_copier(device) if self.pinned and device.type == "cuda" else None

    def _write(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle()  # what is on its way may be of the same block
        for start, parts in self._runs(key_BGTD, value_BGTD):
            # Stacked where the tokens are: one transfer carries both keys and values.
            self._put(start, torch.stack(parts, dim=-3))

    def _send(self, way: HostCopier, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle(self.length - UNSETTLED_TOKENS)  # long there, but someone has to put them in their places
        # What is sent is kept until it has been read; a view would keep all it is a view of, such as the queries.
        whole = [kv if kv.untyped_storage().nbytes() == kv.nbytes else kv.clone() for kv in (key_BGTD, value_BGTD)]
        pieces, staged = [], []
        for start, parts in self._runs(*whole):
            target = self._target(start, parts[0])
            if not target.is_contiguous():  # scattered copies are slow: one copy now, and `settle` scatters it
                with torch.inference_mode(False):  # `settle` may be called outside of that mode
                    target = torch.empty(target.shape, dtype=self.dtype, pin_memory=self.pinned)
                staged.append((start, target))
            pieces.append((target, parts))
        if pieces:
            self._arrivals.append(_Arrival(way.send(pieces), self.length, staged))

    def _undo(self, length: int, slabs: int, way: HostCopier | None) -> None:
        """Makes the store what it was before an `append` that failed."""
        if way is not None:
            way.drain()  # else it would go on writing to slabs that are freed or written to otherwise
        with self._settling:
            while self._arrivals and self._arrivals[-1].start >= length:
                self._arrivals.pop()
        self.length = length
        del self._slabs[slabs:]
        self._clear_tail()

    def _clear_tail(self) -> None:
        """Zeros beyond the last token in its block."""
        block, offset = divmod(self.length, self.block_size)
        if offset:
            self._slabs[block // self.slab_blocks][:, :, block % self.slab_blocks, :, offset:].zero_()

    def _runs(self, key_BGTD: Tensor, value_BGTD: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """New tokens cut at slabs, and where a block is not whole: first token, keys and values.

        Whole blocks are [B, G, blocks, block_size, D], a part of one is [B, G, T, D].
        """
        done, tokens = 0, key_BGTD.shape[2]
        while done < tokens:
            block, offset = divmod(self.length + done, self.block_size)
            left = tokens - done
            token_dims: tuple[int, ...]
            if offset or left < self.block_size:
                token_dims = (min(self.block_size - offset, left),)
            else:
                room = self.slab_blocks - block % self.slab_blocks
                token_dims = (min(left // self.block_size, room), self.block_size)
            taken = math.prod(token_dims)
            key, value = (kv[:, :, done : done + taken].unflatten(2, token_dims) for kv in (key_BGTD, value_BGTD))
            yield self.length + done, (key, value)
            done += taken

    def _target(self, start: int, part: Tensor) -> Tensor:
        """Where keys and values of a run belong, of which `part` is the keys: a view [B, G, …, 2, T, D]."""
        block, offset = divmod(start, self.block_size)
        slab, first = self._slabs[block // self.slab_blocks], block % self.slab_blocks
        if part.dim() == 5:
            return slab[:, :, first : first + part.shape[2]]
        return slab[:, :, first, :, offset : offset + part.shape[2]]

    def _put(self, start: int, kv: Tensor) -> None:
        """Copies a run's keys and values, stacked in dimension −3, to their place."""
        target = self._target(start, kv.select(-3, 0))
        if kv.dim() == 5 and start % self.block_size == 0:
            # Slabs come uninitialised (zeroing gigabytes would cost seconds), so a partly filled block is zeroed
            # when it is opened; full blocks are overwritten whole.
            block = start // self.block_size
            self._slabs[block // self.slab_blocks][:, :, block % self.slab_blocks].zero_()
        target.copy_(kv)

    def _empty(self, n: int) -> Tensor:
        return torch.empty((n, 2, self.block_size, self.head_dim), dtype=self.dtype)

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


def gather_reference(slabs: list[Tensor], row_n: Tensor, block_n: Tensor, out_n2TD: Tensor) -> None:
    """What `ops.gather_to_host` does, in torch operations."""
    slab_blocks = slabs[0].shape[2]
    slab_n = block_n // slab_blocks
    entry_n = row_n * slab_blocks + block_n % slab_blocks
    # Grouped by slab: one vectorised read a slab, then one pass that restores the caller's order.
    order_n = torch.argsort(slab_n, stable=True)
    sorted_n, grouped_n2TD = entry_n[order_n], torch.empty_like(out_n2TD)
    start = 0
    for slab, count in zip(*(found.tolist() for found in torch.unique(slab_n, return_counts=True)), strict=True):
        part = slice(start, start + count)
        torch.index_select(slabs[slab].flatten(0, 2), 0, sorted_n[part], out=grouped_n2TD[part])
        start += count
    torch.index_select(grouped_n2TD, 0, torch.argsort(order_n), out=out_n2TD)
