"""HostStore: all keys and values of one layer in CPU memory. It keeps every block that ever existed.

Suffixes: B sequences, G KV heads, R = B·G rows (row = b*G + g), T tokens in a call, D head size, S slabs of a chunk, s
slabs of a sequence, n list entries, z dimensions of a stored block; 2 is keys then values.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.block_codec import BlockCodec
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.sequence_slabs import SequenceSlabs
from attention_predictor.offload.blocks.transfer import HostCopier, PendingCopy, host_copier, upload_stream

UNSETTLED_TOKENS = 64  # last tokens whose copies `append` does not wait for


class _Arrival(NamedTuple):
    """Appended tokens whose copies are pending, and staged parts that must be scattered to slabs afterwards."""

    pending_copy: PendingCopy
    start: int
    staged: list[tuple[int, int, Tensor]]  # sequence, first token, and a run of its tokens as `_joined` returns it


class HostStore:
    """Append-only keys and values of one layer: each sequence has slabs [G, slab_blocks, z] of blocks.

    A block is [2, block_size, D]: keys and values are contiguous, so one block is one copy. Slabs waste less than one
    slab of memory and never move written data, unlike one tensor that doubles. Copies of a sequence (``copy.deepcopy``,
    beams) share its complete slabs.

    Its sequences have one length, or after ``open_places`` lengths of their own.

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
        self._slabs = [SequenceSlabs() for _ in range(batch)]
        self._addresses: dict[torch.device, tuple[Tensor, Tensor]] = {}  # as made on the host, and on the device
        self._spare: Tensor | None = None  # a slab that a place reads and writes where it has none of its own
        self._arrivals: deque[_Arrival] = deque()
        self._settling = threading.Lock()
        self._written_by_gpu = False  # since the last `settle`, by `advance`

    @property
    def n_blocks(self) -> int:
        """Blocks that hold at least one token."""
        return math.ceil(self.length / self.block_size)

    @property
    def room(self) -> int:
        """Tokens that the slabs of each sequence can hold; with places, tokens that a place may have slabs for."""
        slabs = min(map(len, self._slabs)) if self._spare is None else self._places_slabs
        return slabs * self.slab_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated, written or not; what sequences share counts once."""
        spare = [] if self._spare is None else [self._spare]
        return sum({slab.data_ptr(): slab.nbytes for slab in chain(*self._slabs, spare)}.values())

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
        length, slabs = self.length, list(map(len, self._slabs))
        copier = self._copier(key_BGTD.device)
        try:
            self.reserve(length + tokens)
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
                for b, start, joined in arrival.staged:
                    self._put(b, start, joined)
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
            number, begin = divmod(block, self.slab_blocks)
            count = min(self.slab_blocks - begin, last - block)
            for b, slabs in enumerate(self._slabs):
                kv_Gn2TD = self.codec.decode(slabs[number][:, begin : begin + count])
                kv[:, b, :, block - first : block - first + count] = kv_Gn2TD.movedim(2, 0)
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
                raw = torch.empty((S, self.batch, *self._slab_shape), dtype=self.codec.stored, device=device)

        def load(number: int) -> Any:
            numbers = range(chunks[number], min(chunks[number] + S, n_slabs))
            into = kv_2BGSnTD[number % 2][:, :, :, : len(numbers)]
            if number > 1:
                side.wait_stream(current)  # the previous contents have been used
            with streams.stream(side):
                for b, slabs in enumerate(self._slabs):
                    for i, slab in enumerate(slabs[numbers.start : numbers.stop]):
                        if raw is None:
                            into[:, b, :, i].copy_(self.codec.decode(slab).movedim(2, 0))
                        else:
                            raw[i, b].copy_(slab, non_blocking=True)
                if raw is not None:
                    self._unpack(raw[: len(numbers)], into)
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
        """Forgets every token from `length` on and frees the slabs that only held such tokens.

        Raises HostMemoryError if the last slab is shared and there is no memory for a copy; nothing has changed then.
        """
        self._check_crop(length)
        self.settle()
        complete, used = self._complete_slabs(length), self._slabs_for(length)
        for slabs in self._slabs:
            slabs.own(complete, used, self._new_slab)
        for slabs in self._slabs:
            slabs.cut(used, complete)
        self.length = length
        self._clear_tail()

    def index(self, batch_index: Tensor) -> None:
        """Reorders, repeats or selects sequences: sequence i becomes the former sequence `batch_index[i]` (beams).

        Repeated sequences share their complete slabs.
        """
        self.settle()
        order, complete, used = batch_index.tolist(), self._complete_slabs(self.length), self._slabs_for(self.length)
        kept = {source: place for place, source in reversed(list(enumerate(order)))}  # the first place of each
        self._slabs = [
            self._slabs[source] if kept[source] == place else self._slabs[source].twin(complete, used, self._new_slab)
            for place, source in enumerate(order)
        ]
        self.batch = len(order)

    def open_places(self, tokens: int) -> None:
        """Let each sequence have a length of its own, of up to `tokens` tokens, and slabs for these alone.

        `put` gives a sequence its slabs and `release` takes them back, while the tensor of `addresses` stays the same
        one. A place without slabs reads and writes a spare one, for any block.
        """
        if self.length:
            raise ValueError(f"a store of {self.length} tokens has no free places")
        self._spare, self._places_slabs = self._new_slab().zero_(), self._slabs_for(tokens)

    def put(self, place: int, other: HostStore) -> None:
        """Makes sequence `place` the only sequence of `other`, with its slabs; `other` is then empty."""
        other.settle()
        self._slabs[place].take(other._slabs[0])
        self.length, other.length = max(self.length, other.length), 0
        self._renew_addresses()

    def release(self, place: int) -> None:
        """Takes the slabs of sequence `place` back. The GPU's work queued so far may still use them."""
        self._slabs[place] = SequenceSlabs()
        self._renew_addresses()

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless the slabs fit the length."""
        self.settle()
        needed = 0 if self._spare is not None else self._slabs_for(self.length)
        if (fewest := min(map(len, self._slabs))) < needed:
            raise IntegrityError(f"{self.length} tokens need {needed} slabs, found {fewest}")
        expected = (*self._slab_shape, self.codec.stored, "cpu", True, self.pinned)
        written: list[int] = []
        for b, slabs in enumerate(self._slabs):
            for number, slab in enumerate(slabs):
                pinned = slab.is_pinned() if self.pinned else False
                found = (*slab.shape, slab.dtype, slab.device.type, slab.is_contiguous(), pinned)
                if found != expected:
                    raise IntegrityError(f"slab {number} of sequence {b}: expected {expected}, found {found}")
            if slabs.shared > self._complete_slabs(self.length):
                raise IntegrityError(f"sequence {b} of {self.length} tokens shares {slabs.shared} slabs")
            written += [slab.data_ptr() for slab in slabs[slabs.shared :]]
        if len(set(written)) != len(written):
            raise IntegrityError("two slabs that may be written share their memory")
        if self._spare is not None:
            return
        block, offset = divmod(self.length, self.block_size)
        if offset:
            rests = [self._partial(b, block)[:, :, offset:] for b in range(self.batch)]
            if nonzero := sum(int(rest.count_nonzero()) for rest in rests):
                raise IntegrityError(f"{nonzero} numbers beyond token {self.length} are not zero")

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """A store of its own that shares the complete slabs; pinned stays pinned, unlike in a copied tensor."""
        if self._spare is not None:
            raise TypeError("a store with places can't be copied")
        self.settle()
        twin = memo[id(self)] = copy.copy(self)
        twin._arrivals, twin._settling, twin._addresses = deque(), threading.Lock(), {}
        complete, used = self._complete_slabs(self.length), self._slabs_for(self.length)
        twin._slabs = [slabs.twin(complete, used, twin._new_slab) for slabs in self._slabs]
        return twin

    def reserve(self, tokens: int) -> None:
        """Allocates slabs for `tokens` tokens of each sequence. Until then `append` allocates nothing; `addresses` is
        constant.

        Raises HostMemoryError; slabs allocated before the error are kept.
        """
        for slabs in self._slabs:
            slabs.grow(self._slabs_for(tokens), self._new_slab)

    def fit(self, tokens: int) -> None:
        """As `reserve`, and frees what was reserved beyond `tokens` tokens and is not in use."""
        self.reserve(tokens)
        for slabs in self._slabs:
            del slabs[self._slabs_for(max(tokens, self.length)) :]

    def advance(self, tokens: int) -> None:
        """Counts tokens that a GPU has written to the slabs itself (`csrc/gather.cu`)."""
        if self.length + tokens > self.room:
            raise ValueError(f"no room for {tokens} tokens beyond {self.length}")
        self.length += tokens
        self._written_by_gpu = True

    def count_to(self, tokens: int) -> None:
        """Sets the length to that of the longest sequence, whose last token a GPU writes itself."""
        self.length = tokens
        self._written_by_gpu = True

    def addresses(self, device: torch.device) -> Tensor:
        """Where each row's part of each slab begins, int64 [R, s]; cached until slabs or device change."""
        self.settle()
        found = self._find_addresses()
        made = self._addresses.get(device)
        if made is None or not torch.equal(made[0], found):
            made = self._addresses[device] = found, found.to(device)
        return made[1]

    def _find_addresses(self) -> Tensor:
        """``addresses`` on the host."""
        width = max(map(len, self._slabs)) if self._spare is None else self._places_slabs
        spare = 0 if self._spare is None else self._spare.data_ptr()
        address_Bs = torch.tensor(
            [[slab.data_ptr() for slab in slabs[:width]] + [spare] * (width - len(slabs)) for slabs in self._slabs],
            dtype=torch.int64,
        )
        row_bytes = self.slab_blocks * self.block_bytes
        offset_G = torch.arange(self.kv_heads) * row_bytes
        return (address_Bs.view(self.batch, 1, width) + offset_G[:, None]).flatten(0, 1)

    def _renew_addresses(self) -> None:
        """Update the tensors that ``addresses`` gave, in place: captured steps read them."""
        found = self._find_addresses()
        for device, (_, made) in self._addresses.items():
            self._addresses[device] = found, made.copy_(found)

    def _slabs_for(self, tokens: int) -> int:
        return math.ceil(tokens / (self.slab_blocks * self.block_size))

    def _complete_slabs(self, tokens: int) -> int:
        """Slabs that so many tokens fill, which are not written any more."""
        return tokens // (self.slab_blocks * self.block_size)

    @property
    def _slab_shape(self) -> tuple[int, ...]:
        return (self.kv_heads, self.slab_blocks, *self.codec.shape)

    def _new_slab(self) -> Tensor:
        return self._lend(self._slab_shape, self.codec.stored)

    def _lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        lent, pinned = self.memory.lend(shape, dtype)
        self.pinned = self.pinned and pinned
        return lent

    def _copier(self, device: torch.device) -> HostCopier | None:
        """The asynchronous copier for this device; None if `append` copies synchronously."""
        return host_copier(device) if self.pinned and device.type == "cuda" else None

    def _write(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle()  # pending copies may belong to the same block
        for start, parts in self._runs(key_BGTD, value_BGTD):
            # Stacked on the source device, so that one transfer carries keys and values.
            for b, joined in enumerate(self._joined(parts).split(1)):
                self._put(b, start, joined)

    def _send(self, copier: HostCopier, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.settle(self.length - UNSETTLED_TOKENS)  # these copies are long done, but staged parts must be scattered
        # Tensors are kept alive until copied. A view would keep its whole storage alive, such as the queries.
        whole = [kv if kv.untyped_storage().nbytes() == kv.nbytes else kv.clone() for kv in (key_BGTD, value_BGTD)]
        pieces, staged = [], []
        for start, parts in self._runs(*whole):
            whole_blocks = parts[0].dim() == 5
            for b in range(self.batch):
                target = self._target(b, start, parts[0].shape[2], whole_blocks)[None]
                if not target.is_contiguous():
                    # Scattered copies are slow: copy to a staging tensor, which `settle` scatters.
                    with torch.inference_mode(False):  # `settle` may be called outside of that mode
                        target = torch.empty(target.shape, dtype=target.dtype, pin_memory=self.pinned)
                    staged.append((b, start, target))
                key, value = (part[b : b + 1] for part in parts)
                pieces.append((target, (key, value)))
        if pieces:
            self._arrivals.append(_Arrival(copier.send(pieces, self._joined), self.length, staged))

    def _undo(self, length: int, slabs: list[int], copier: HostCopier | None) -> None:
        """Restores the store after a failed `append`."""
        if copier is not None:
            copier.drain()  # else it would write to slabs that are freed or reused
        with self._settling:
            while self._arrivals and self._arrivals[-1].start >= length:
                self._arrivals.pop()
        self.length = length
        for one, count in zip(self._slabs, slabs, strict=True):
            del one[count:]
        self._clear_tail()

    def _clear_tail(self) -> None:
        """Zeros the last block beyond the last token."""
        block, offset = divmod(self.length, self.block_size)
        if offset:
            for b in range(self.batch):
                self._partial(b, block)[:, :, offset:].zero_()

    def _partial(self, b: int, block: int) -> Tensor:
        """The view [G, 2, block_size, D] of a sequence's block that isn't complete, or is being written."""
        return self._slabs[b][block // self.slab_blocks][:, block % self.slab_blocks]

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
        self.gather_stored(row_n, block_n, out_n2TD)

    def gather_stored(self, row_n: Tensor, block_n: Tensor, out_nz: Tensor) -> Tensor:
        """Fills the buffer with blocks as they are stored, and returns it."""
        self._check_entries(row_n, block_n)
        self.settle()
        host = out_nz.device
        if len(row_n) and self.kernel and ops.why_no_kernels(host) is None:
            slabs = ops.Slabs(self.addresses(host), self.slab_blocks)
            ops.gather_to_host(slabs, row_n.contiguous(), block_n.contiguous(), out_nz)
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

    def _target(self, b: int, start: int, count: int, whole_blocks: bool) -> Tensor:
        """Where a run of a sequence belongs: the view [G, count, z] of whole blocks, or [G, 2, count, D] of tokens."""
        block, offset = divmod(start, self.block_size)
        if whole_blocks:
            first = block % self.slab_blocks
            return self._slabs[b][block // self.slab_blocks][:, first : first + count]
        return self._partial(b, block)[:, :, offset : offset + count]

    def _put(self, b: int, start: int, joined: Tensor) -> None:
        """Copies a run of one sequence, as `_joined` returns it, to where it belongs."""
        whole_blocks = joined.dim() == 3 + len(self.codec.shape)  # tokens of a partial block have 5 dimensions
        target = self._target(b, start, joined.shape[2 if whole_blocks else 3], whole_blocks)
        if not whole_blocks and start % self.block_size == 0:
            # Memory is uninitialised (zeroing gigabytes would take seconds), so a new partial block is zeroed first;
            # full blocks are overwritten whole.
            self._partial(b, start // self.block_size).zero_()
        target.copy_(joined[0])

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


def gather_reference(slabs: Sequence[Sequence[Tensor]], row_n: Tensor, block_n: Tensor, out_nz: Tensor) -> None:
    """The reference of `ops.gather_to_host`, in torch operations; `slabs`: of each sequence."""
    flat = list(chain(*slabs))
    kv_heads, slab_blocks = flat[0].shape[:2]
    count_B = torch.tensor(list(map(len, slabs)))  # they may differ: some have been reserved
    slab_n = (count_B.cumsum(0) - count_B)[row_n // kv_heads] + block_n // slab_blocks
    entry_n = row_n % kv_heads * slab_blocks + block_n % slab_blocks
    # Grouped by slab: one vectorised read per slab, then one pass to restore the caller's order.
    order_n = torch.argsort(slab_n, stable=True)
    sorted_n, grouped_nz = entry_n[order_n], torch.empty_like(out_nz)
    start = 0
    for slab, count in zip(*(found.tolist() for found in torch.unique(slab_n, return_counts=True)), strict=True):
        part = slice(start, start + count)
        torch.index_select(flat[slab].flatten(0, 1), 0, sorted_n[part], out=grouped_nz[part])
        start += count
    torch.index_select(grouped_nz, 0, torch.argsort(order_n), out=out_nz)
